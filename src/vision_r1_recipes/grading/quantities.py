"""Numbers, exactly, and their units."""

import functools
import re
import unicodedata
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction

from .spelling import without_brackets


# -------- numbers

_DEC = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE]([+-]?\d+)| ?(?:\\times|\\cdot|\*|x|X) ?10 ?\^ ?\{ ?([+-]?\d+) ?\})"
_NUMBER = re.compile(rf"([+-]?) ?({_DEC}){_POWER}?")
_REPEATING = re.compile(r"([+-]?) ?(\d*)\.(\d*)(?:\\overline ?\{(\d+)\}|\\dot ?\{?(\d)\}?|\((\d+)\))")
_FRACTION = re.compile(
    rf"([+-]?) ?(?:(\d+) ?(?=\\)|(\d+) )?(?:\\frac ?\{{ ?(-?{_DEC}) ?\}} ?\{{ ?(-?{_DEC}) ?\}}|({_DEC}) ?/ ?({_DEC}))"
)
_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: value for value, word in enumerate(_ONES.split())}
_WORDS |= {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
_WORDS |= {"half": Fraction(1, 2)}
_CHINESE = "零一二两三四五六七八九十百千"
_IN_CHINESE = re.compile(f"[{_CHINESE}]{{1,8}}(?:分之[{_CHINESE}]{{1,8}})?")
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10}
_MULTIPLES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_MULTIPLES |= {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_MULTIPLE = re.compile(rf"([+-]?) ?({_DEC}) ?({'|'.join(_MULTIPLES)})", re.I)


def _decimal(text: str) -> Fraction | Decimal:
    value = Decimal(text.replace(",", "").replace(" ", ""))
    return Fraction(value) if len(text) < 1000 and abs(value.adjusted()) < 1000 else value


def equal_numbers(a: Fraction | Decimal, b: Fraction | Decimal) -> bool:
    """`a == b` for all kinds."""
    if type(a) is type(b):
        return a == b
    whole, part = (a, b) if isinstance(a, Decimal) else (b, a)
    digits = len(whole.as_tuple().digits) + len(str(part.denominator))
    context = Context(prec=digits, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
    return context.multiply(whole, part.denominator) == part.numerator  # exact: as many digits as it can have


def _in_words(text: str) -> Fraction | None:
    """Value of `twenty-five`, `two hundred and six` or `two thirds`."""
    if m := re.fullmatch(r"(.*?)[ -](half|third|quarter|fourth|fifth|sixth|eighth|tenth)s?", text.lower()):
        count = Fraction(1) if m[1] == "a" else _in_words(m[1])
        return None if count is None else count / _PARTS[m[2]]
    total, group = Fraction(0), None
    words = re.findall(r"[a-z]+", text.lower())
    for word in words:
        if word in _MULTIPLES:
            if group is None:
                return None
            group *= _MULTIPLES[word]
            if word != "hundred":
                total, group = total + group, Fraction(0)
        elif word in _WORDS:
            if group is not None and group % 10 and _WORDS[word]:
                return None
            group = (group or 0) + _WORDS[word]
        elif word != "and" or group is None:
            return None
    return total + group if group is not None else None


def _in_chinese(text: str) -> Fraction | None:
    """Value of `十五` or `二分之一`, up to 9999."""
    if "分之" in text:
        bottom, top = map(_in_chinese, text.split("分之", 1))
        return top / bottom if top is not None and bottom else None
    total, digit = 0, 0
    for char in text:
        value = int(unicodedata.numeric(char, 2))  # only 两 has none
        if value >= 10:
            total, digit = total + (digit or 1) * value, 0
        else:
            digit = value
    return Fraction(total + digit)


@functools.lru_cache(maxsize=4096)
def number(text: str) -> Fraction | Decimal | None:
    """Exact value of a plain number; a `Decimal` where the digits are too many to calculate with."""
    if len(text) < 1000:
        text = without_brackets(text)
    if _IN_CHINESE.fullmatch(text):
        return _in_chinese(text)
    if len(text) < 60 and text[:1].isalpha():
        if m := re.match(r"(?:minus|negative) (?=[\da-z\\.])", text, re.I):
            value = number(text[m.end() :])
            return None if value is None or value < 0 else -value
        return _in_words(text) if re.fullmatch(r"[A-Za-z]+(?:[ -][A-Za-z]+)*", text) else None
    if m := _MULTIPLE.fullmatch(text):
        return _decimal(m[1] + m[2]) * _MULTIPLES[m[3].lower()]
    if m := re.fullmatch(r"10 ?\^ ?\{ ?([+-]?\d+) ?\}", text):
        text = f"1e{m[1]}"
    if m := _NUMBER.fullmatch(text):
        exponent = m[3] or m[4] or "0"
        return _decimal(f"{m[1]}{m[2]}e{exponent}") if len(exponent) < 8 else None
    if len(text) < 1000:
        if m := _FRACTION.fullmatch(text):
            top, bottom = _decimal(m[4] or m[6]), _decimal(m[5] or m[7])
            whole = _decimal(m[2] or m[3] or "0")
            if bottom and (not whole or top < bottom):
                return (whole + top / bottom) * (-1 if m[1] == "-" else 1)
        elif m := _REPEATING.fullmatch(text):
            again = m[4] or m[5] or m[6]
            tail = Fraction(int(again), 10 ** len(m[3]) * (10 ** len(again) - 1))
            return (_decimal(f"{m[2] or 0}.{m[3]}") + tail) * (-1 if m[1] == "-" else 1)
    return None


# -------- surds

_TIMES = r"(?:(?<=[\d}]) ?(?:\\cdot|\\times|\*)(?= ?\\(?:sqrt|pi)))? ?"
_PRODUCT = re.compile(
    rf"([+-]?) ?(?:({_DEC})|\\frac ?\{{ ?(\d+) ?\}} ?\{{ ?(\d+) ?\}})?{_TIMES}"
    rf"(?:\\sqrt ?\{{ ?(\d{{1,8}}) ?\}})?{_TIMES}(\\pi)? ?(?:/ ?(\d+))?"
)
_PI_FIRST = re.compile(r"^\\pi ?(?:(?:\\cdot|\\times|\*) ?|(?=\\sqrt))([\d\\].*)$")
_ARGUMENT = r" ?\{((?:[^{}]|\{[^{}]*\})*)\}"
_QUOTIENT = re.compile(rf"([+-]?) ?\\frac{_ARGUMENT}{_ARGUMENT}")


@functools.lru_cache(maxsize=4096)
def surd(text: str) -> tuple[Fraction, int, int] | None:
    """`(a, b, c)` of `a \\sqrt{b} \\pi^c`, `b` square-free, for such a product or a quotient of two: the usual answers
    in geometry, exactly and without sympy."""
    if len(text) > 60:
        return None
    text = _PI_FIRST.sub(r"\1 \\pi", text)
    if m := _PRODUCT.fullmatch(text):
        sign, decimal, top, bottom, radicand, pi, divisor = m.groups()
        numbers = [int(n or 1) for n in (bottom, radicand, divisor)]
        if not (decimal or top or radicand or pi) or 0 in numbers:
            return None
        root, inside = _square_free(numbers[1])
        value = (_decimal(decimal) if decimal else int(top or 1)) * Fraction(root, numbers[0] * numbers[2])
        return (-value if sign == "-" else value), inside, int(pi is not None)
    if m := _QUOTIENT.fullmatch(text):
        top, bottom = surd(m[2].strip()), surd(m[3].strip())
        if top and bottom and bottom[0]:
            root, inside = _square_free(top[1] * bottom[1])
            value = top[0] * root / bottom[0] / bottom[1]
            return (-value if m[1] == "-" else value), inside, top[2] - bottom[2]
    return None


@functools.lru_cache(maxsize=4096)
def _square_free(n: int) -> tuple[int, int]:
    """`(a, b)` with `n = a^2 b` and a square-free `b`."""
    root, inside, factor = 1, 1, 2
    while factor * factor <= n:
        power = 0
        while n % factor == 0:
            n, power = n // factor, power + 1
        root, inside, factor = root * factor ** (power // 2), inside * factor ** (power % 2), factor + 1
    return root, inside * n


# -------- units

# Dimensions, then names = factor to the base unit; a name with `+` takes the metric prefixes.
_TABLE = """
length: +m +meter +metre 米 = 1; in inch inche = 0.0254; ft foot feet = 0.3048; yd yard = 0.9144; mi mile = 1609.344
length: 厘米 公分 = 0.01; 毫米 = 0.001; 分米 = 0.1; 千米 公里 = 1000; Å angstrom = 1e-10; micron = 1e-6
length /time: mph = 0.44704; kmh kmph kph = 5/18; knot = 463/900; mps = 1; fps = 0.3048
length length: hectare ha 公顷 = 10000; acre = 4046.8564224; 平方米 = 1; 平方厘米 = 0.0001; 平方千米 平方公里 = 1000000
length length length: +L +l +liter +litre 升 = 0.001; cc 立方厘米 毫升 = 0.000001; 立方米 = 1
length length length: gal gallon = 0.003785411784; qt quart = 0.000946352946; pt pint = 0.000473176473
mass: +g +gram 克 = 1; tonne 吨 = 1000000; 千克 公斤 = 1000; lb pound = 453.59237; oz ounce = 28.349523125
mass: ton = 1000000
time: +s sec +second 秒 秒钟 = 1; min minute 分钟 = 60; h hr hour 小时 = 3600; day 天 = 86400; week 周 星期 = 604800
month: month 个月 = 1; year yr 年 = 12; decade = 120; century centurie = 1200 | radian: rad radian = 1
angle: ° degree deg 度 = 1 | percent: % percent percentage pct = 1; permille = 0.1 | kelvin: K kelvin = 1
amount: +mol mole = 1
celsius: °C celsius 摄氏度 = 1 | fahrenheit: °F fahrenheit = 1 | none: unit = 1 | data: bit = 1
data: byte B = 8; KB kilobyte = 8000; MB megabyte = 8000000; GB gigabyte = 8000000000; TB terabyte = 8000000000000
dollar: $ dollar usd US$ = 1; cent ¢ = 0.01 | euro: € euro EUR = 1 | yuan: ¥ yuan 元 RMB CNY = 1; 角 = 0.1
sterling: £ GBP = 1; pence = 0.01 | rupee: ₹ rupee = 1 | yen: yen JPY = 1 | revolution: rev revolution = 1
voltage: +V +volt 伏 伏特 = 1 | charge: +C +coulomb = 1
mass length /time /time: +N +newton 牛 牛顿 = 1000 | /time: +Hz +hertz 赫兹 = 1
mass length length /time /time: +J +joule 焦耳 = 1000; cal calorie = 4184; kcal = 4184000; +Wh = 3600000
mass length length /time /time: +eV = 1.602176634e-16 | mass length length /time /time /time: +W +watt 瓦 瓦特 = 1000
mass /length /time /time: +Pa +pascal 帕 = 1000; atm = 101325000; bar = 100000000; mmHg = 133322.387415
current: +A +amp +ampere 安 安培 = 1 | resistance: +Ω +ohm 欧 欧姆 = 1 | flux: +T tesla = 1
capacitance: +F +farad = 1 | amount /length /length /length: +M = 1000
"""
_PREFIXES = {"": "1", "k": "1000", "M": "1e6", "G": "1e9", "d": "0.1", "c": "0.01", "m": "0.001", "u": "1e-6"}
_PREFIXES |= {"n": "1e-9", "p": "1e-12", "kilo": "1000", "deci": "0.1", "centi": "0.01", "milli": "0.001"}
_PREFIXES |= {"mega": "1e6", "giga": "1e9", "micro": "1e-6", "nano": "1e-9", "pico": "1e-12"}
_UNITS = {}
for _dims, _groups in (entry.strip(" ").split(": ") for entry in re.split(r" \| |\n", _TABLE.strip())):
    for _names, _base in (group.split(" = ") for group in _groups.split("; ")):
        for _name in _names.split():
            _UNITS[_name.strip("+")] = (_dims.split(), Fraction(_base))
            if _name[0] == "+":
                for _prefix, _scale in _PREFIXES.items():
                    if (len(_prefix) > 1) == (len(_name) > 3) or not _prefix:
                        _UNITS[_prefix + _name[1:]] = (_dims.split(), Fraction(_base) * Fraction(_scale))
_UNIT_TOKEN = re.compile(
    r" ?(?:(square|sq|cubic|cu)\b\.? ?)?"
    r"(US\$|[^\W\d_]+|°[CF]?(?![A-Za-z])|%|[$€£¥¢₹])(?: (squared|cubed)\b)?\.?"
    r"(?: ?\^ ?\{?(-?[1-9])\}?)?| ?(/)| ?[.*]"
)
_ATTACHED = "mgsLhNJWVΩK"  # one letter without a space is a unit and not a factor
_NOUN = re.compile(r"[a-z]{3,}(?:[ -][a-z]{3,}){0,2}|[\u4e00-\u9fff]{1,4}")
# What a numeral in characters counts; without a measure word it begins a noun (三角形, 二次函数).
_COUNTED = re.compile(
    r"[个個只隻条條本张張块塊支枝件名位颗棵朵匹头瓶杯盒箱袋份種种辆][\u4e00-\u9fff]{0,3}|[人岁次页题对双天年月日边面项倍步层组排]"
)
_NOT_A_NOUN = re.compile(
    r"\b(?:or|and|not|no|never|to|than|about|over|under|less|more|fewer|least|most|up|down|but|except|if|is|are|was|"
    r"wrong|false|incorrect|maybe|probably|possibly|perhaps|likely|nope|nor|none|isn|cannot|minus|plus|times|half|each|per|squared|cubed|divided|by|"
    r"(?:hundred|thousand|million|billion|trillion|dozen|half|third|quarter|double|triple)(?:th)?s?|root|square|cube|"
    r"halves|halved|doubled|tripled|score|factorial|reciprocal|inverse|opposite|negative|positive|below|above|zero|"
    r"[a-z]+(?:teen|ty|[fxnh]th|eenth|ieth)s?|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|"
    r"pi|sqrt|percent)\b"
    r"|[或不和到至多少万千百十亿半分倍非没以折零一二两三四五六七八九]"
)
_AROUND = re.compile(
    r"^in (?:total|all)$| ?\b(?:in total|in all|altogether|total|long|wide|tall|high|deep|old|approx)$"
)
_UNIT_SPELLING = [
    (re.compile(r"\bper cent\b"), "percent"),
    (re.compile(r"(?:\bdegrees?|\bdeg\.?|°) ?(?:celsius|C)$", re.I), "°C"),
    (re.compile(r"(?:\bdegrees?|\bdeg\.?|°) ?(?:fahrenheit|F)$", re.I), "°F"),
    (re.compile(r"\bper\b|每"), "/"),
    (re.compile(r"\\cdot"), "*"),
]


@functools.lru_cache(maxsize=4096)
def _unit(text: str) -> tuple[tuple[str, ...], Fraction] | None:
    """Sorted dimensions (a leading `/` means divided by) and factor of a unit such as `km/h` or `square feet`."""
    for pattern, new in _UNIT_SPELLING:
        text = pattern.sub(new, text)
    if not re.search(r"[^\W\d_]|[°%$€£¥¢₹]", text) or text.endswith(("/", "*")):
        return None
    powers, factor, sign, end = {}, Fraction(1), 1, 0
    while end < len(text):
        m = _UNIT_TOKEN.match(text, end)
        if not m:
            return None
        end = m.end()
        if name := m[2]:
            found = next((_UNITS[n] for n in (name, name.lower(), name.lower().rstrip("s")) if n in _UNITS), None)
            if not found or (len(name) == 1 and name not in _UNITS):
                return None
            power = sign * int(m[4] or 1) * {"s": 2, "c": 3}.get((m[1] or m[3] or " ")[0], 1)
            factor *= found[1] ** power
            for dim in found[0] if found[0] != ["none"] else ():
                inverse = -1 if dim[0] == "/" else 1
                powers[dim.strip("/")] = powers.get(dim.strip("/"), 0) + power * inverse
        elif m[5]:
            sign = -1
    if powers.get("percent", 1) != 1:
        return None
    return tuple(f"{d}^{p}" for d, p in sorted(powers.items()) if p), factor


_BEFORE_UNIT = re.compile(
    rf"(?:(?<=[\d}})\].万亿{_CHINESE}])(?P<gap> ?| ?-(?=[a-z]))|(?<=[a-z]) )(?=[^\W\d_]|[°%$€£¥¢₹])"
)
_VARIABLE = re.compile(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])")
DEGREE, RADIAN = _unit("°"), _unit("rad")


@functools.lru_cache(maxsize=4096)
def quantity(text: str, attached: bool = False) -> tuple[str, tuple | frozenset | None]:
    """Value and unit of one answer; the unit is `None` (none given), known (see `_unit`), or a noun's set of words.

    `attached`: one letter right behind a number is a unit also where it might be a factor (`5A`).
    """
    if number(text) is not None:
        return text, None
    if m := re.match(r"(-?) ?(US\$|[$€£¥¢₹]|RMB) ?(?=[\d.])", text):
        return m[1] + re.sub(r" ?(?:dollars?|USD)$", "", text[m.end() :]), _unit(m[2])
    for m in _BEFORE_UNIT.finditer(text):
        value, rest = text[: m.start()], text[m.end() :]
        factor = m["gap"] == "" and re.fullmatch(f"(?![{_ATTACHED}])[A-Za-z]", rest) and not attached
        factor = factor or (value.endswith("\\pi") and re.fullmatch("[A-Za-ln-z]", rest))  # 2 pi h
        if number(value) is None and _VARIABLE.search(value):  # r^2 h
            factor = factor or re.fullmatch("[A-Za-z]", rest)
        of_angle = rest.startswith("°") and re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", value)
        if len(rest) > 60 or factor or of_angle or not (re.search(r"\d|\\pi", value) or number(value)):
            continue
        if value in ("百", "千"):  # of a unit or a word: 千克
            continue
        if unit := _unit(rest):
            return value, unit if unit[0] else None
        rest = _AROUND.sub("", rest)
        if not rest:
            return value, None
        if (unit := _unit(rest)) and number(value) is not None:
            return value, unit if unit[0] else None
        noun = _NOUN.fullmatch(rest) and not _NOT_A_NOUN.search(rest) and (m["gap"] != "" or not rest.isascii())
        if noun and value[-1] in _CHINESE and not _COUNTED.fullmatch(rest):
            continue
        if noun and number(value) is not None:
            return value, frozenset(word.rstrip("s") for word in re.split("[ -]", rest))
    return text, None


_PARTS_OF_ONE = re.compile(rf"({_DEC}) ?([A-Za-z]+\.?|[\u4e00-\u9fff]+?(?=\d|$))(?:,? and |, ?| |(?=\d)|$)")


def _compound(text: str) -> tuple[Fraction, tuple] | None:
    """Sum and unit of `1 hour 30 minutes`, `5 ft 6 in` or `22° 30'`."""
    if len(text) > 60:
        return None
    if m := re.fullmatch(r"(-?\d+) ?° ?(\d+)'(?: ?(\d+)'')?", text):
        part = Fraction(int(m[2]) * 60 + int(m[3] or 0), 3600)
        return Fraction(m[1]) + (-part if m[1][0] == "-" else part), DEGREE
    parts = _PARTS_OF_ONE.findall(text)
    if len(parts) < 2 or re.sub(r"[\s,]|\band\b", "", text) != re.sub(r"[\s,]", "", "".join(map("".join, parts))):
        return None
    units = [_unit(name) for _, name in parts]
    if None in units or len({unit[0] for unit in units}) > 1 or len({unit[1] for unit in units}) < len(units):
        return None
    total = sum(number(value) * unit[1] for (value, _), unit in zip(parts, units, strict=True))
    return total, (units[0][0], Fraction(1))


@functools.lru_cache(maxsize=4096)
def _measure(text: str, attached: bool = False) -> tuple[Fraction | Decimal | None, tuple | frozenset | None]:
    if found := _compound(text):
        return found
    value, unit = quantity(text, attached)
    return number(value), unit


def factor_of(gold: tuple | frozenset | None, answer: tuple | frozenset | None) -> Fraction | None:
    """What the answer's value is multiplied by before it is compared; `None` when the quantities differ."""
    if gold is None or answer is None:
        return Fraction(1)
    if isinstance(gold, frozenset) or isinstance(answer, frozenset):
        same = isinstance(gold, frozenset) and isinstance(answer, frozenset) and (gold <= answer or answer <= gold)
        return Fraction(1) if same else None
    return answer[1] / gold[1] if gold[0] == answer[0] else None


def same_number(gold: str, answer: str) -> bool | None:
    """Verdict for two plain numbers with or without units; `None` when one of them is something else."""
    (g, gold_unit), (a, answer_unit) = _measure(gold), _measure(answer)
    if a is None and gold_unit:
        a, answer_unit = _measure(answer, attached=True)
    if g is None and answer_unit:
        g, gold_unit = _measure(gold, attached=True)
    if g is None or a is None:
        return _same_surd(gold, answer)
    if (factor := factor_of(gold_unit, answer_unit)) is None:
        return False
    if isinstance(g, Decimal) or isinstance(a, Decimal):
        return factor == 1 and equal_numbers(g, a)
    return g == a * factor or (answer_unit is None and gold_unit == _unit("%") and g == 100 * a)


def _same_surd(gold: str, answer: str) -> bool | None:
    (gold, gold_unit), (answer, answer_unit) = quantity(gold), quantity(answer)
    g, a = surd(gold), surd(answer)
    if g is None or a is None or {gold_unit, answer_unit} == {DEGREE, RADIAN}:
        return None
    factor = factor_of(gold_unit, answer_unit)
    return factor is not None and g == (a[0] * factor, *a[1:])
