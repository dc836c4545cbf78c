# ruff: noqa: RUF001
"""Does an answer have the value of the gold answer? [`grade`] and [`check_gold`], free of torch and of any trainer.

A verdict goes through the cheapest step that can give it: equal text, option letter, Yes/No, exact number with unit,
and only then math-verify, which runs in a killable process of its own because sympy can't be interrupted.
"""

import atexit
import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import threading
import unicodedata
from decimal import Decimal
from fractions import Fraction


MAX_TEXT = 10_000  # characters; a longer answer is compared as text only
MAX_MATHS = 600  # characters; a longer expression does not go to sympy
CPU_SECONDS = 2  # of the worker for one answer; the kernel ends it there, inside C code too
START_SECONDS = 120  # for importing sympy, which a cold network disk makes slow
WALL_SECONDS = 20  # until the parent ends a worker that neither answers nor uses its CPU time


def strip_prefix(text: str) -> str:
    """`text` without the literal prefix `Final Answer:` of the released samples `[repo]`."""
    return re.sub(r"^\s*final\s+answer\s*[:\uff1a]", "", text[:200], flags=re.I).strip() + text[200:].rstrip()


# -------- one spelling

_SIGNS = zip(
    "×·⋅÷√±∞≤≥≠≈∠△∪∅αβγδθλμπρσφω",
    re.findall(
        r"\w+",
        "times cdot cdot div sqrt pm infty le ge ne approx angle triangle cup emptyset "
        "alpha beta gamma delta theta lambda mu pi rho sigma phi omega",
    ),
    strict=True,
)
_CHARS = {sign: f"\\{name} " for sign, name in _SIGNS}
_CHARS |= dict.fromkeys("\u2212\u2013\u2014\u2012\u2010", "-")
_CHARS |= dict(zip("\u00baµ\u2126、㎡", ("°", "u", "Ω", ",", "m^2"), strict=True))
_CHARS |= {c: f" {unicodedata.normalize('NFKC', c).replace(chr(0x2044), '/')}" for c in "¼½¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"}
_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUBST = [
    (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"^{{{m[0].translate(_SUPER)}}}"),
    (r"[₀-₉]+", lambda m: f"_{{{unicodedata.normalize('NFKC', m[0])}}}"),
]
_LATEX = [
    (r"\\(?:left|right|displaystyle|rm|bf|[bB]igg?[lr]?)(?![A-Za-z])", ""),
    (r"(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z])|~|\{\}", " "),
    (r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it)|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\{,\}", ","),
    (r"\\([%$#&])", r"\1"),
    (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\degree(?![A-Za-z])", "\u00b0"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:leqslant|leq)(?![A-Za-z])|<=", r"\\le "),
    (r"\\(?:geqslant|geq)(?![A-Za-z])|>=", r"\\ge "),
    (r"\\neq(?![A-Za-z])|!=", r"\\ne "),
    (r"(?<![A-Za-z\\])(sqrt|sin|cos|tan|log|ln|pi)(?![A-Za-z])", r"\\\1 "),
    (r"(?<![A-Za-z\\])(?:inf|infinity)(?![A-Za-z])", r"\\infty "),
    (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),
    (r"(\\sqrt|\^)\s*\(((?:[^()]|\([^()]*\))*)\)", r"\1{\2}"),
    (r"\\sqrt\s*(\d+(?:\.\d+)?|[A-Za-z](?![A-Za-z]))", r"\\sqrt{\1}"),
    (r"\\frac\s*(\d)\s*(?=[\d{])", r"\\frac{\1}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"\^\s*([+-]?\d+)", r"^{\1}"),
]
_LEAD_IN = re.compile(
    r"(?:(?:so|thus|therefore|hence)\b[,\s]*)?(?:(?:the|my|our)\s+)?(?:(?:final|correct|right)\s+)?"
    r"(?:answer|result)\s*(?:\b(?:is|are|should be)\b\s*:?|[:=])\s*"
    r"|(?:最终|正确)?答案\s*(?:是|为|:)\s*:?\s*|\\approx\s*|=\s*",
    re.I,
)


_PAIRS = [("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("`", "`"), ('"', '"')]


def _unwrap(text: str) -> str:
    text = text.strip().removesuffix("。").rstrip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for left, right in _PAIRS:
        inside = text[len(left) : len(text) - len(right)]
        if len(inside) and text.startswith(left) and text.endswith(right) and left not in inside:
            text = inside
    if text.startswith("**") and text.count("**") % 2 == 0:
        text = text.replace("**", "")
    if text.count(r"\boxed") == 1 and text.endswith("}"):
        before, _, box = text.partition(r"\boxed")
        box = box.strip()
        if not re.search(r"\d|\bor\b|\bnot\b|\\", before) and _closing(box) == len(box) - 1:
            text = box[1:-1]
    if lead := _LEAD_IN.match(text):
        text = text[lead.end() :] or text
    return text.strip()


def _closing(text: str) -> int:
    """Index of the bracket that closes the one at 0; -1 when there is none."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth <= 0:
            return i if i else -1
    return -1


@functools.lru_cache(maxsize=2048)
def _clean(text: str) -> str:
    """One spelling for the ways to write the same thing: unicode, LaTeX dressing, wrappers, lead-ins."""
    for pattern, new in _SUBST:
        text = re.sub(pattern, new, text)
    text = "".join(_CHARS.get(c, c) for c in text)
    text = unicodedata.normalize("NFKC", text)
    for _ in range(6):
        before, text = text, _unwrap(text)
        if text == before:
            break
    if text.count("$") > 1 and text.count("$") % 2 == 0:
        text = text.replace("$", " ")
    for pattern, new in _LATEX:
        text = re.sub(pattern, new, text)
    return re.sub(r"\s+", " ", _unwrap(text))


def _fold(text: str) -> str:
    if "\\" not in text and (not re.search(r"\d", text) or re.search(r"[^\W\d_]{4}", text)):
        text = text.casefold()
    return re.sub(r" (?=\W)|(?<=\W) ", "", text)


# -------- letters, Yes/No

_OPTION = re.compile(
    r"(?:(?:i (?:choose|pick|select)|the|it is) )?(?:(?:correct|right|best) )?"
    r"(?:(?:option|choice|answer|选项?)(?: is)?:? ?)?[(\[]?(?P<letter>[A-J])"
    r"(?P<sep>[)\]][.:]?|[.:]|,(?!\d)| ?$|(?= is (?:the )?(?:correct|right|best|answer)| because| since)"
    r"| - | (?=[\d$(]))(?P<rest>.*)",
    re.I | re.S,
)
_OTHER = re.compile(
    r"(?:\b(?:or|and|not|option|choice|answer|is)\b[ :]*|[,/;&(:] ?|^ ?)([A-J])(?![\w'])|\b([A-J])[.)](?= |$)"
)


def _letter(text: str) -> str | None:
    """The one option letter that `text` names; `None` for several, for a negated one and for none."""
    match = _OPTION.fullmatch(text)
    if not match:
        return None
    letter, rest = match["letter"].upper(), match["rest"]
    if match["letter"].islower() and (match["sep"] not in (")", ").", "]", ".", "") or (rest and not match["sep"])):
        return None
    if re.search(r"\b(?:wrong|incorrect)\b|\b(?:is|are) not\b|n't\b", rest) and not match["sep"]:
        return None
    others = {a or b for a, b in _OTHER.findall(rest)}
    if match["sep"] == ",":
        others.update(re.findall(r"\b[A-J]\b", rest))
    return letter if others <= {letter} else None


def _yes_no(text: str) -> str | None:
    match = re.match(
        r"(yes|no|true|false)(?:(?: ?[.,;:!-] ?| (?=it|they|the|this|that|because))(.*))?$", text, re.I | re.S
    )
    if not match or re.search(r"\b(yes|no|true|false|or)\b", match[2] or "", re.I):
        return None
    return match[1].lower()


# -------- numbers with units

_DEC = r"(?:(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE]([+-]?\d+)| ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?\{ ?([+-]?\d+) ?\})"
_NUMBER = re.compile(rf"([+-]?) ?({_DEC}){_POWER}?")
_FRACTION = re.compile(
    rf"([+-]?) ?(?:(\d+) ?(?=\\)|(\d+) )?(?:\\frac ?\{{ ?(-?{_DEC}) ?\}} ?\{{ ?(-?{_DEC}) ?\}}|({_DEC}) ?/ ?({_DEC}))"
)


def _decimal(text: str) -> Fraction | Decimal:
    value = Decimal(text.replace(",", "").replace(" ", ""))
    return Fraction(value) if len(text) < 1000 and abs(value.adjusted()) < 1000 else value


def _number(text: str) -> Fraction | Decimal | None:
    """Exact value of a plain number; a `Decimal` where the digits are too many to calculate with."""
    if text[:1] == "(" and "," not in text and _closing(text) == len(text) - 1:
        text = text[1:-1].strip()
    if m := re.fullmatch(r"10 ?\^ ?\{ ?([+-]?\d+) ?\}", text):
        text = f"1e{m[1]}"
    if m := _NUMBER.fullmatch(text):
        exponent = m[3] or m[4] or "0"
        return _decimal(f"{m[1]}{m[2]}e{exponent}") if len(exponent) < 8 else None
    if (m := _FRACTION.fullmatch(text)) and len(text) < 1000:
        top, bottom = _decimal(m[4] or m[6]), _decimal(m[5] or m[7])
        whole = _decimal(m[2] or m[3] or "0")
        if bottom:
            return (whole + top / bottom) * (-1 if m[1] == "-" else 1)
    return None


# Dimensions, then names = factor to the base unit; a name with `+` takes the metric prefixes.
_TABLE = """
length: +m +meter +metre 米 = 1; in inch inche = 0.0254; ft foot feet = 0.3048; yd yard = 0.9144; mi mile = 1609.344
length: 厘米 = 0.01; 毫米 = 0.001; 千米 公里 = 1000 | length /time: mph = 0.44704; kmh kmph = 5/18
length length: hectare ha = 10000; acre = 4046.8564224; 平方米 = 1; 平方厘米 = 0.0001
length length length: +L +l +liter +litre 升 = 0.001; cc 立方厘米 = 0.000001; 立方米 = 1
mass: +g +gram 克 = 1; tonne ton = 1000000; 千克 公斤 = 1000; lb pound = 453.59237; oz ounce = 28.349523125
time: +s sec +second 秒 = 1; min minute 分钟 = 60; h hr hour 小时 = 3600; day 天 = 86400; week = 604800
month: month = 1; year yr = 12 | angle: ° degree deg 度 = 1 | radian: rad radian = 1 | kelvin: K kelvin = 1
percent: % percent percentage pct = 1 | celsius: °C = 1 | fahrenheit: °F = 1 | amount: mol mole = 1 | none: unit = 1
dollar: $ dollar usd = 1; cent ¢ = 0.01 | euro: € euro = 1 | yuan: ¥ yuan 元 = 1 | sterling: £ = 1
force: +N newton = 1 | energy: +J joule = 1 | power: +W +watt = 1 | voltage: +V volt = 1 | pressure: +Pa pascal = 1
current: +A amp ampere = 1 | resistance: +Ω ohm = 1 | frequency: +Hz hertz = 1
"""
_PREFIXES = {"": "1", "k": "1000", "M": "1e6", "d": "0.1", "c": "0.01", "m": "0.001", "u": "1e-6", "n": "1e-9"}
_PREFIXES |= {"kilo": "1000", "deci": "0.1", "centi": "0.01", "milli": "0.001"}
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
    r" ?(?:(square|sq|cubic|cu)\b\.? ?)?([^\W\d_]+|°[CF]?(?![A-Za-z])|[%$€£¥¢])(?: ?\^\{?(-?[1-9])\}?)?| ?(/)| ?[.*]"
)
_NOT_A_NOUN = re.compile(
    r"\b(?:or|and|not|no|never|to|than|about|over|under|less|more|fewer|least|most|up|down|but|except|if|is|are|was|"
    r"wrong|false|incorrect|maybe|nope|nor|none|isn|cannot|minus|plus|times|half|each|per|squared|cubed|"
    r"hundred|thousand|million|billion|dozen)\b"
)


def _unit(text: str) -> tuple[tuple[str, ...], Fraction] | None:
    """Sorted dimensions (a leading `/` means divided by) and factor of a unit such as `km/h` or `square feet`."""
    text = re.sub(r"\bper\b|每", "/", text.replace(r"\cdot", "*"))
    powers, factor, sign, end = {}, Fraction(1), 1, 0
    while end < len(text):
        m = _UNIT_TOKEN.match(text, end)
        if not m:
            return None
        end = m.end()
        if m[2]:
            found = next((_UNITS[n] for n in (m[2], m[2].lower(), m[2].lower().rstrip("s")) if n in _UNITS), None)
            if not found or (len(m[2]) == 1 and m[2] not in _UNITS):
                return None
            power = sign * int(m[3] or 1) * {"s": 2, "c": 3}.get((m[1] or " ")[0], 1)
            factor *= found[1] ** power
            for dim in found[0] if found[0] != ["none"] else ():
                inverse = -1 if dim[0] == "/" else 1
                powers[dim.strip("/")] = powers.get(dim.strip("/"), 0) + power * inverse
        elif m[4]:
            sign = -1
    if powers.get("percent", 1) != 1:
        return None
    return tuple(f"{d}^{p}" for d, p in sorted(powers.items()) if p), factor


def _quantity(text: str) -> tuple[str, tuple | frozenset | None]:
    """Value and unit of one answer; the unit is `None` (none given), known (see `_unit`), or a noun's set of words."""
    if m := re.match(r"([$€£¥]) ?(?=[\d.])", text):
        return text[m.end() :], _unit(m[1])
    for m in re.finditer(r"(?:(?<=[\d})\].])(?P<gap> ?)|(?<=[a-z]) )(?=[^\W\d_]|[°%$€£¥¢])", text):
        value, rest = text[: m.start()], text[m.end() :]
        attached = len(rest) == 1 and m["gap"] == "" and rest.isascii() and rest.isalpha() and rest not in "mgsL"
        if len(rest) > 60 or attached or not re.search(r"\d|\\pi", value):
            continue
        if unit := _unit(rest):
            return value, unit if unit[0] else None
        rest = re.sub(r"^in (?:total|all)$| (?:in total|in all|altogether|long|wide|tall|high)$", "", rest)
        if (unit := _unit(rest)) and _number(value) is not None:
            return value, unit if unit[0] else None
        noun = re.fullmatch(r"[a-z]{3,}(?: [a-z]{3,}){0,2}", rest)
        if noun and _number(value) is not None and m["gap"] and not _NOT_A_NOUN.search(rest):
            return value, frozenset(word.rstrip("s") for word in rest.split())
    return text, None


def _factor(gold: tuple | frozenset | None, answer: tuple | frozenset | None) -> Fraction | None:
    """What the answer's value is multiplied by before it is compared; `None` when the quantities differ."""
    if gold is None or answer is None:
        return Fraction(1)
    if isinstance(gold, frozenset) or isinstance(answer, frozenset):
        same = isinstance(gold, frozenset) and isinstance(answer, frozenset) and (gold <= answer or answer <= gold)
        return Fraction(1) if same else None
    return answer[1] / gold[1] if gold[0] == answer[0] else None


def _same_number(gold: str, answer: str) -> bool | None:
    """Verdict for two plain numbers with or without units; `None` when one of them is something else."""
    (gold, gold_unit), (answer, answer_unit) = _quantity(gold), _quantity(answer)
    g, a = _number(gold), _number(answer)
    if g is None or a is None:
        return None
    factor = _factor(gold_unit, answer_unit)
    if factor is None:
        return False
    if isinstance(g, Decimal) or isinstance(a, Decimal):
        return factor == 1 and g == a
    return g == a * factor or (answer_unit is None and gold_unit == _unit("%") and g == 100 * a)


# -------- lists and relations

_RELATION = re.compile(r"\\(?:le|ge|lt|gt)(?![A-Za-z])|[=<>]")
_LABEL = re.compile(
    r"(?:\\angle ?\d++|\\(?!sqrt|frac|left|lim|sum|int|pm|mp)[A-Za-z]++|[A-Za-z]++"
    r"|_(?:\{[^{}]*+\}|\w)|\(\w\)|[\s{}'])++"
)
_COMMANDS = (
    "frac|sqrt|pi|infty|times|cdot|div|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln|exp|alpha|beta|gamma|"
    "delta|theta|lambda|mu|rho|sigma|phi|omega|cup|cap|le|ge|lt|gt|angle|triangle|overline|binom|begin|end|emptyset|"
    "mathbb|lfloor|rfloor|lceil|rceil"
)
# Whatever math-verify might drop or read in its own way (`7_2`, `7'`, `1 2`, a command it doesn't know) is text.
_TEXT_ONLY = re.compile(
    rf"(?<!\\)\\(?!(?:{_COMMANDS})(?![A-Za-z])|[\\{{}}])"
    r"|\d [\d.]|\d ?[_']|[^\w\s\\{}()\[\]+*/^.,|<>=!&'-]"
)


def _split(text: str, separator: str) -> list[str]:
    """Parts of `text` between the separators that stand outside all brackets."""
    parts, depth, last = [], 0, 0
    for m in re.finditer(rf"[(\[{{]|[)\]}}]|{separator}", text):
        if m[0] in ("(", "[", "{"):
            depth += 1
        elif m[0] in (")", "]", "}"):
            depth -= 1
        elif depth == 0:
            parts.append(text[last : m.start()].strip())
            last = m.end()
    return [*parts, text[last:].strip()]


def _items(text: str) -> tuple[str, list[str]]:
    """Brackets (`(]`, `{}`, empty for a bare list) and the items of a tuple, interval, set, list or single value."""
    body = text.replace(r"\{", "{").replace(r"\}", "}")
    if body[:1] in ("(", "[", "{") and _closing(body) == len(body) - 1:
        items = _split(body[1:-1], "[,;]")
        if len(items) > 1 or body[0] == "{":
            return body[0] + body[-1], items
    thousands = r",(?!(?<=\d,)\d{3}(?!\d))"
    items = [item for item in _split(text, rf"{thousands}|;| or | and ") if item]
    if len(items) == 1 and items[0].count(r"\pm") == 1:
        return "", [items[0].replace(r"\pm", sign) for sign in "+-"]
    return "", items


def _same(gold: str, answer: str) -> bool:
    """Verdict on cleaned texts that may need sympy; runs in the worker."""
    if _fold(gold) == _fold(answer):
        return True
    (g_marks, g_items), (a_marks, a_items) = _items(gold), _items(answer)
    if len(g_items) > 1 or len(a_items) > 1 or g_marks == a_marks == "{}":
        if len(g_items) == len(a_items) and len(g_items) <= 20:
            if g_marks != a_marks and {g_marks, a_marks} not in ({"", "{}"}, {"", "()"}):
                return False
            labels = sum("=" in item for item in g_items), sum("=" in item for item in a_items)
            if {g_marks, a_marks} - {"", "{}"} or (labels[0] == 0) != (labels[1] == 0):
                return all(map(_same, g_items, a_items))
            left = list(a_items)
            for item in g_items:
                found = next((i for i, other in enumerate(left) if _same(item, other)), None)
                if found is None:
                    return False
                del left[found]
            return True
        # An inequality may be written as an interval; anything else with more or fewer values is wrong.
        both = gold + answer
        return bool(re.search(r"[<>]|\\[lg]e", both) and re.search(r"[(\[]", both)) and _verify(gold, answer)
    g_ops, a_ops = _RELATION.findall(gold), _RELATION.findall(answer)
    if set(g_ops + a_ops) - {"="}:
        return len(g_ops) == len(a_ops) and "=" not in g_ops + a_ops and _verify(gold, answer)
    g_parts, a_parts = gold.split("="), answer.split("=")
    g_label = g_parts.pop(0) if len(g_parts) > 1 and _LABEL.fullmatch(g_parts[0]) else None
    a_label = a_parts.pop(0) if len(a_parts) > 1 and _LABEL.fullmatch(a_parts[0]) else None
    if g_ops and a_ops and (g_label is None or a_label is None or _fold(g_label.strip()) != _fold(a_label.strip())):
        return len(g_ops) == len(a_ops) == 1 and _same_equation(gold, answer)
    if g_ops and not g_label:
        return False
    return all(_same_value(g_parts[-1].strip(), part.strip()) for part in a_parts)


def _same_value(gold: str, answer: str) -> bool:
    if _fold(gold) == _fold(answer):
        return True
    verdict = _same_number(gold, answer)
    if verdict is not None:
        return verdict
    (gold, gold_unit), (answer, answer_unit) = _quantity(gold), _quantity(answer)
    factor = _factor(gold_unit, answer_unit)
    if factor is None:
        return False
    if factor != 1:
        answer = rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({answer})"
    return _verify(gold, answer)


# -------- math-verify, in the worker


@functools.lru_cache(maxsize=4096)
def _parse(text: str):
    """Sympy object of a LaTeX expression, or `None`. Decimals become fractions, so that nothing is rounded."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    words = re.sub(r"\\(?:begin|end) ?\{[a-z]+\}|\\[A-Za-z]+|_\{[^{}]*\}", " ", text)
    if _TEXT_ONLY.search(text) or re.search(r"[A-Za-z]{4}", words) or not text.isascii():
        return None
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(
        r"\d*\.\d+|\d+\.", lambda m: "{{\\frac{{{}}}{{{}}}}}".format(*Fraction(m[0]).as_integer_ratio()), text
    )
    text = text.replace("°", "")
    dressing = NormalizationConfig(boxed="none", nits=True)
    config = [LatexExtractionConfig(normalization_config=dressing)]
    found = parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    return found[0] if len(found) == 1 else None


def _verify(gold: str, answer: str) -> bool:
    from math_verify import verify

    gold, answer = _parse(gold), _parse(answer)
    if gold is None or answer is None:
        return False
    return verify(gold, answer, numeric_precision=50, allow_set_relation_comp=True, timeout_seconds=None)


def _same_equation(gold: str, answer: str) -> bool:
    """Two equations are the same when their differences of sides are constant multiples of each other, not 0."""
    from sympy import simplify

    sides = [_parse(side.strip()) for side in (*gold.split("="), *answer.split("="))]
    if any(side is None for side in sides):
        return False
    ratio = simplify((sides[0] - sides[1]) / (sides[2] - sides[3]))
    return bool(ratio.is_number and ratio.is_finite and ratio != 0)


def _unparseable(gold: str) -> str | None:
    """The part of a cleaned gold that looks like mathematics and that math-verify can't parse; runs in the worker."""
    for item in _items(gold)[1]:
        for part in re.split(_RELATION, item):
            value = _quantity(part.strip())[0]
            words = re.search(r"[^\W\d_]{4}", re.sub(r"\\[A-Za-z]+", "", value))
            plain = _TEXT_ONLY.search(value) or words or not value.isascii() or _LABEL.fullmatch(value)
            if not plain and _number(value) is None and _parse(value) is None:
                return value
    return None


def _serve(cpu_seconds: float) -> None:
    """Worker: one JSON request per line on stdin, one JSON answer per line on the original stdout."""
    import logging
    import resource
    import signal

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the LaTeX parser prints
    logging.disable()
    _verify(r"\frac{1}{2}", "x+1"), _same_equation("y=x", "x=y")  # sympy's first call is slow
    resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    reply = "ready"
    while True:
        print(json.dumps(reply), file=replies, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        name, arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # not caught: the kernel ends the process
        reply = None
        with contextlib.suppress(Exception):
            reply = {"same": _same, "unparseable": _unparseable}[name](*arguments)
        signal.setitimer(signal.ITIMER_PROF, 0)


# -------- worker (in the parent)


class _Worker:
    """One process that runs math-verify. It is started at the first call and replaced when it dies.

    A pipe to a fresh interpreter rather than `multiprocessing`: the user's `__main__` is not imported again,
    and neither threads nor a forked parent matter.
    """

    def __init__(self):
        self.lock, self.process, self.timeouts = threading.Lock(), None, 0

    def _read(self, seconds: float):
        alarm = threading.Timer(seconds, self.process.kill)
        alarm.daemon = True
        alarm.start()
        try:
            return json.loads(self.process.stdout.readline())
        except ValueError:  # ended in the middle of a line, or before it
            return _DEAD
        finally:
            alarm.cancel()

    def _start(self) -> None:
        self.stop()
        self.process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__), "worker", str(CPU_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is the parent's
            text=True,
        )

    def stop(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()
            self.process = None

    def ask(self, name: str, *arguments: str):
        """The worker's reply, `_DEAD` when this request ended it; `RuntimeError` when no worker can be started."""
        request = json.dumps([name, arguments]) + "\n"
        with self.lock:
            for _ in range(3):
                try:
                    if self.process is None or self.process.poll() is not None:
                        self._start()
                        if self._read(START_SECONDS) != "ready":
                            continue
                    self.process.stdin.write(request)
                    self.process.stdin.flush()
                except OSError:  # it had died before the request; not this item's fault
                    self.stop()
                    continue
                reply = _DEAD
                try:
                    reply = self._read(WALL_SECONDS)
                finally:  # also after Ctrl-C: a late reply must not become the next request's
                    if reply is _DEAD:
                        self.timeouts += 1
                        self.stop()
                return reply
        raise RuntimeError(f"the answer grader's worker does not start: {sys.executable} -P {__file__} worker")


_DEAD = object()
_worker = _Worker()
atexit.register(lambda: _worker.stop())


def _forget_worker() -> None:
    _worker.lock, _worker.process = threading.Lock(), None


os.register_at_fork(after_in_child=_forget_worker)

# -------- grading


def timeouts() -> int:
    """Answers so far on which this process' grader gave up, for time or memory; each was graded wrong."""
    return _worker.timeouts


def _costly(text: str) -> bool:
    """Text that sympy must not see. One linear scan; what it misses is ended by the worker's clock."""
    flat = re.sub(r"[\s{}()\[\]]", "", text)
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return (
        len(text) > MAX_MATHS
        or deepest > 20
        or text.count("^") > 30
        or re.search(r"\^[-+.\d]*\^|\^[-+]?\d{4}|\d{300}|!!|\d{3}!|[)\]}] ?!", flat) is not None
        or re.search(r"[)\]}] ?!|[^\x20-\x7e°€£¥¢Ω\u4e00-\u9fff]", text) is not None
    )


@functools.lru_cache(maxsize=65536)
def check_gold(gold: str) -> str | None:
    """Reason why `gold` can't be graded, else `None`.

    Plain text, and mathematics too large to calculate with, can be graded: as equal text. Mathematics that
    math-verify can't parse can't.
    """
    if not isinstance(gold, str):
        return "not a string"
    text = _clean(strip_prefix(gold)) if len(gold) <= MAX_TEXT else gold
    if not re.search(r"[^\W_]|\\[A-Za-z]", text):
        return "empty"
    if text.count("{") != text.count("}"):
        return "unbalanced braces"
    if len(gold) > MAX_TEXT or _is_words(text) or _costly(text):
        return None  # compared as text
    if _letter(text) or _same_number(text, text) is not None:
        return None
    reply = _worker.ask("unparseable", text)
    if reply is _DEAD:
        reply = _worker.ask("unparseable", text)
    if reply is _DEAD:
        return "takes too long to parse"
    return f"not parseable as mathematics: {reply!r}" if reply else None


def _is_words(text: str) -> bool:
    return not re.search(r"[\\\d=<>+*/^]", text) and bool(re.search(r"[^\W\d_]{2}", text))


def grade(gold: str, answer: str) -> bool:
    """Whether `answer` (text inside the answer tags) has the value of `gold` `[ours]`.

    Equal text first; the letter decides where the gold names an option; numbers are compared exactly, units of
    one quantity are converted and a missing unit is no error; the rest is math-verify's. No answer makes it
    raise, run code or take unbounded time. Raises `ValueError` for a gold that `check_gold` refuses.
    """
    if reason := check_gold(gold):
        raise ValueError(f"this gold answer can't be graded ({reason}): {str(gold)[:200]!r}")
    if not isinstance(answer, str):
        return False
    gold, answer = strip_prefix(gold), strip_prefix(answer)
    if gold == answer:
        return True
    if max(len(gold), len(answer)) > MAX_TEXT:
        return False
    gold, answer = _clean(gold), _clean(answer)
    if letter := _letter(gold):
        return letter == _letter(answer)
    if not answer or _fold(gold) == _fold(answer):
        return bool(answer)
    if verdict := _yes_no(gold):
        return verdict == _yes_no(answer)
    if _letter(answer) and (option := _OPTION.fullmatch(answer))["rest"]:
        answer = option["rest"].strip()
    plain = _number(_quantity(gold)[0]) is not None or re.fullmatch(r"\d+ ?: ?\d+", gold)
    if plain and (sentence := _SENTENCE.match(answer)):
        answer = answer[sentence.end() :]
    verdict = _same_number(gold, answer)
    if verdict is None and not (_is_words(gold) or _is_words(answer) or _costly(gold) or _costly(answer)):
        verdict = _worker.ask("same", gold, answer) is True
    return bool(verdict)


_SENTENCE = re.compile(
    r"(?!.*\b(?:not|no|never|neither|nor|cannot|false|wrong|incorrect|without|except|if|or)\b)(?!.*n't)"
    r"[A-Za-z][A-Za-z ,']{0,80}? (?:is|are|equals|was|has|have)(?: equal to)?:? (?=[-+$(\d\\.])"
)


if __name__ == "__main__":
    _serve(float(sys.argv[2]))
