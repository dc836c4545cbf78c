"""The arithmetic that needs sympy. Runs in a worker process (see `workers.py`)."""

import functools
import logging
import re
from fractions import Fraction

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from .quantities import DEGREE, RADIAN, factor_of, number, quantity, same_number
from .spelling import fold
from .structure import LABEL, RELATION, Comparison, items_of, split


_COMMANDS = (
    "frac|sqrt|pi|infty|times|cdot|div|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|exp|alpha|"
    "beta|gamma|delta|theta|lambda|mu|rho|sigma|phi|omega|cup|cap|setminus|angle|triangle|overline|binom|begin|end|"
    "emptyset|mathbb|lfloor|rfloor|lceil|rceil|bar|vec|hat|pm|circ|epsilon|tau|psi|xi|eta|varphi|nu|kappa|zeta|Delta|"
    "hbar|chi|Gamma|Theta|Lambda|Sigma|Phi|Psi|det|lim|to|int|sum|prod|varepsilon|backslash"
)
# Whatever the LaTeX parser might drop or read in its own way (`7_2`, `7'`, `1 2`, a command it doesn't know) is text.
_TEXT_ONLY = re.compile(
    rf"(?<!\\)\\(?!(?:{_COMMANDS})(?![A-Za-z])|[\\{{}}])"
    r"|\d [\d.]|\d ?[_']|[^\w\s\\{}()\[\]+*/^.,|<>=!&-]|\b(?:or|and|not|no|is|in|of|if)\b|\.\."
    r"|(?<!\\)\b[A-Za-z]+\d+(?![\d^A-Za-z({\\])|[-+*/^=<>] ?(?:[)\]}]|$)|[({\[] ?[*/^]"
    r"|\\infty ?[\w\\]|\([^()\[\]]*\]|\[[^()\[\]]*\)"
)
# `ABC` is a triangle and `H2O` water, no product, unless there is more of a formula about it.
_NAME = re.compile(r"(?s)(?!.*\\(?!angle|triangle|overline|to)).*[A-Z][A-Z\d]")
_DEGREES = re.compile(r"\\(sin|cos|tan|cot|sec|csc) ?[({]?(\d+(?:\.\d+)?) ?°[)}]?")
# Where two expressions are compared; primes, so that no constant of an answer hides a difference by chance.
_POINTS = [
    [sympy.Rational(p, q) for p, q in row]
    for row in (
        [(17, 23), (29, 31), (37, 41), (43, 47), (53, 59), (61, 67), (71, 73), (79, 83)],
        [(89, 29), (97, 43), (101, 31), (103, 53), (107, 37), (109, 61), (113, 47), (127, 71)],
        [(-131, 97), (-137, 59), (139, 79), (-149, 83), (151, 89), (-157, 71), (163, 101), (-167, 61)],
        [(173, 13), (-179, 17), (181, 11), (191, 19), (-193, 23), (197, 29), (-199, 31), (211, 37)],
        [(-223, 19), (227, 23), (-229, 17), (-233, 29), (239, 31), (-241, 37), (251, 41), (-257, 43)],
        [(13, 1), (7, 1), (5, 1), (11, 1), (3, 1), (17, 1), (2, 1), (19, 1)],
    )
]
_DIGITS = 60


class WithSympy(Comparison):
    """Compares expressions by their values at some points, and what has none (matrices, sets) with math-verify."""

    def same_value(self, gold: str, answer: str) -> bool:
        if fold(gold) == fold(answer):
            return True
        if (verdict := same_number(gold, answer)) is not None:
            return verdict
        whole = gold, answer
        (gold, gold_unit), (answer, answer_unit) = quantity(gold), quantity(answer)
        factor = factor_of(gold_unit, answer_unit)
        if factor is None and {gold_unit, answer_unit} == {DEGREE, RADIAN}:
            factor = sympy.pi / 180 if gold_unit == RADIAN else 180 / sympy.pi
        if factor is None:
            return False
        if self._same_parsed(gold, answer, factor):
            return True
        # perhaps no unit but a factor: 0.5N
        return (gold_unit is None) != (answer_unit is None) and self._same_parsed(*whole, 1)

    def _same_parsed(self, gold: str, answer: str, factor: Fraction | sympy.Expr) -> bool:
        gold, answer = _parse(gold), _parse(answer)
        if gold is None or answer is None:
            return False
        if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
            return _equal(gold, answer * sympy.sympify(factor))
        return factor == 1 and verify(gold, answer, numeric_precision=50, timeout_seconds=None)

    def ratio(self, *sides: str) -> float:
        parsed = [_parse(side) if side else None for side in sides]
        if "" in sides:
            names = set().union(*(side.free_symbols for side in parsed if isinstance(side, sympy.Expr)))
            if len(names) == 1:
                parsed = [
                    names.copy().pop() if side == "" else value for side, value in zip(sides, parsed, strict=True)
                ]
        if not all(isinstance(value, sympy.Expr) for value in parsed):
            return 0
        a, b, c, d = parsed
        values = _values(a - b, c - d)
        ratios = [g / h for g, h in values or () if h.is_finite and h != 0 and g != 0]
        as_one = sum((g == 0) != (h == 0) for g, h in values or ()) == 0  # the same solutions among the points
        if not ratios or not as_one or not all(_near(ratios[0], ratio) for ratio in ratios[1:]):
            return 0
        return float(ratios[0]) if ratios[0].is_real else 0


@functools.lru_cache(maxsize=4096)
def _parse(text: str):
    """Sympy object of a LaTeX expression, or `None`. Decimals become fractions, so that nothing is rounded."""
    words = re.sub(r"\\(?:begin|end) ?\{[a-z]+\}|\\[A-Za-z]+|_\{[^{}]*\}", " ", text)
    text = _DEGREES.sub(r"\\\1 (\\frac{\2 \\pi}{180})", text)
    text = re.sub(r"(?<=[\d})]) ?°(?![\w.])", "", text)
    if (
        _TEXT_ONLY.search(re.sub(r"(?<=[A-Za-z])_\{\w+\}", "", text))
        or _NAME.match(text)
        or re.search(r"[A-Za-z]{4}", words)
        or not text.isascii()
    ):
        return None
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<![A-Za-z\\])([IE])_\{(\w+)\}", r"X_{\1\2}", text)  # a current and a field, not i and e
    # The parser reads 2(3) as a mixed number and i(2) as a function.
    text = re.sub(r"(?<=\d) ?\(|(?<![A-Za-z\\])(?<=i) ?\(", r"\\cdot (", text)
    text = re.sub(r"\d*\.\d+|\d+\.", lambda m: "(\\frac{{{}}}{{{}}})".format(*Fraction(m[0]).as_integer_ratio()), text)
    dressing = NormalizationConfig(boxed="none", nits=True)
    config = [LatexExtractionConfig(normalization_config=dressing)]
    found = parse(f"${text}$", config, fallback_mode="no_fallback", parsing_timeout=None)
    if len(found) != 1:
        return None
    imaginary = {symbol: sympy.I for symbol in getattr(found[0], "free_symbols", ()) if symbol.name == "i"}
    return found[0].subs(imaginary) if imaginary else found[0]


def _values(*expressions: sympy.Expr) -> list[tuple] | None:
    """Their values at some points, those where the first is not real left out if it is real elsewhere; `None` where
    there are too few to go by."""
    names = sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)
    if len(names) > len(_POINTS[0]):
        return None
    real, others = [], []
    for point in _POINTS if names else _POINTS[:1]:
        at = list(zip(names, point, strict=False))
        values = tuple(expression.subs(at).evalf(_DIGITS) for expression in expressions)
        if not all(value.is_number for value in values):  # an unknown function
            return None
        if values[0].is_finite:
            (real if values[0].is_real else others).append(values)
    found = real or others
    return found if len(found) >= (3 if names else 1) else None


def _near(a: sympy.Expr, b: sympy.Expr) -> bool:
    size = max(abs(a), abs(b))
    return a == b or bool(a.is_finite and b.is_finite and abs(a - b) <= size * sympy.Float(10) ** (10 - _DIGITS))


def _equal(gold: sympy.Expr, answer: sympy.Expr) -> bool:
    """Whether two expressions have one value wherever the gold has a real one: exactly for rational numbers, else in
    50 digits."""
    gold, answer = gold.doit(), answer.doit()
    if gold.has(sympy.zoo, sympy.nan):
        return False
    if gold == answer:
        return True
    rational = {gold.is_rational, answer.is_rational}
    if rational == {True}:
        return gold - answer == 0
    if rational == {True, False}:
        return False
    values = _values(gold, answer)
    return values is not None and all(_near(g, a) or (g == 0 and _near(a + 1, sympy.Integer(1))) for g, a in values)


@functools.lru_cache(maxsize=4096)
def unparseable(gold: str) -> str | None:
    """The part of a cleaned gold that looks like mathematics and that the LaTeX parser can't read."""
    if r"\begin" in gold or r"\to " in gold:
        return None
    for item in items_of(gold)[1]:
        for part in filter(None, split(item, RELATION.pattern)):
            value = quantity(part.strip())[0]
            words = re.search(r"[^\W\d_]{4}", re.sub(r"\\[A-Za-z]+", "", value))
            plain = (
                _TEXT_ONLY.search(value)
                or _NAME.match(value)
                or words
                or not value.isascii()
                or LABEL.fullmatch(value)
            )
            if plain or number(value) is not None:
                continue
            parsed = _parse(value)
            if parsed is None or (isinstance(parsed, sympy.Expr) and parsed.has(sympy.zoo, sympy.nan)):
                return value
    return None


def same(gold: str, answer: str) -> bool | str:
    """The verdict, or the part of the gold that can't be read."""
    return unparseable(gold) or WithSympy().same(gold, answer)


REQUESTS = {"same": same, "unparseable": unparseable}


def warm_up() -> None:
    """What sympy's first calls cost, paid once by the keeper."""
    logging.disable()
    same(r"\frac{1}{2} \sqrt{3}", r"\sin 2 + \pi^{2}")
    same("2x+y=3", "(y-1)^{2}+3=x")
