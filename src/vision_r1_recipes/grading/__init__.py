"""Does an answer have the value of the gold answer? [`grade`] and [`check_gold`], free of torch and of any trainer.

A verdict goes through the cheapest step that can give it: equal text, option letter, Yes/No, exact number with unit
(`spelling.py`, `quantities.py`), and only then sympy (`maths.py`), in a pool of killable processes (`workers.py`).
"""

import functools
import os
import re
from collections.abc import Sequence

from .quantities import equal_numbers, number, quantity, same_number
from .spelling import FORMULA, OPTION, clean, fold, letter_of, letters_of, strip_prefix, yes_or_no
from .structure import Comparison, items_of
from .workers import LOST, Pool


MAX_TEXT = 10_000  # characters; a longer answer is compared as text only
MAX_MATHS = 600  # characters; a longer expression does not go to sympy
POOL = Pool(size=min(4, os.cpu_count() or 1))


# Golds that are whole although they end in a sign, that are broken, and that are compared as text.
_ION = re.compile(r"[A-Z][a-z]?[\d_^{}]*[+-]\}?$")
_OPEN_END = re.compile(r"\S ?(?:[-+*/^=<>]|\\(?:times|div|cdot|le|ge|ne|pm)) ?$")
_SIGN = re.compile(r"[-+*/<>=]|\\(?:times|div|le|ge|ne) ?")
_DATE = re.compile(r"\d+ ?(?:[-/] ?\d+ ?[-/] ?|- ?)\d+")
# What is nothing to compare with: a picture, a font without a text, and words for `the answer is elsewhere`.
_NOTHING = re.compile(
    r"!\[[^\]]*\]\([^)]*\)|\\includegraphics\S*|\\(?:text|math|[mh]box|operatorname|boldsymbol|underline)[a-z]*"
)
_ELSEWHERE = re.compile(
    r"as shown|(?:please )?(?:see|refer to|(?:as )?shown in)(?: the)?(?: attached)?"
    r"(?: (?:image|figure|diagram|picture|graph|solution|explanation|above|below))+(?: \d+)?"
    r"|(?:the )?(?:answers?|proof|solution)?(?: is)? ?omitted|answers? (?:will|may) vary|(?:the )?answer is"
    r"|(?:答案|解答?|解析|证明|过程|图)?[:\uff1a]?略|答案不唯一|(?:如|见|参见|详见)[上下左右]?(?:图|解析|答案|解答)\d*(?:所示)?",
    re.I,
)
# What a model says around a value, where nothing else in it can be meant.
_NO_DOUBT = r"(?!.*\b(?:not|no|never|neither|nor|cannot|false|wrong|incorrect|without|except|if|or|maybe)\b)(?!.*n't)"
_SENTENCE = re.compile(  # `The area is `, `面积是`
    rf"{_NO_DOUBT}[A-Za-z](?:[A-Za-z ,']|\\(?:angle|triangle) ){{0,80}}? "
    r"(?:is|are|equals|was|has|have|makes?|costs?|weighs?|measures?|earns?|needs?|takes?)(?: equal to)?:? "
    r"(?=[-+$(\[\d\\.]|[A-Za-z] ?=)"
    r"|[\u4e00-\u9fff]{1,10}(?<!不)[是为](?=[-\d\\])"
)
_ASIDE = re.compile(rf"(?: \(|, ?(?=since|because|as )){_NO_DOUBT}[a-z ,]{{3,80}}\)?$")  # `, since it is a square`
_NEGATIONS = {"not", "t", "never", "neither"}


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
        or re.search(r"\^[-+]?\d{5}|\d{300}|!!|\d{4}!", flat) is not None
        or re.search(r"\^\s*[{(]*[-+.\d\s]*\^\s*[{(]*[-+\d\s]", text) is not None  # a power of numbers as the exponent
        or re.search(r"[^\x20-\x7e°€£¥¢Ω\u4e00-\u9fff]", text) is not None
    )


@functools.lru_cache(maxsize=65536)
def check_gold(gold: str) -> str | None:
    """Reason why `gold` can't be graded, else `None`.

    Plain text, and mathematics too large to calculate with, can be graded: as equal text. Mathematics that can't be
    parsed can't.
    """
    if reason := _broken(gold):
        return reason
    text = clean(strip_prefix(gold)) if len(gold) <= MAX_TEXT else ""
    if not text or needs_equal_text(text) or letter_of(text):
        return None
    if all(same_number(item, item) is not None for item in items_of(text)[1]):
        return None
    reply = POOL.ask("unparseable", text)
    if reply is LOST:
        _too_hard.add(text)
        return None
    return _NOT_PARSEABLE.format(reply) if reply else None


@functools.lru_cache(maxsize=65536)
def _broken(gold: str) -> str | None:
    """What can be known to be wrong with a gold without parsing it."""
    if not isinstance(gold, str):
        return "not a string"
    text = clean(strip_prefix(gold)) if len(gold) <= MAX_TEXT else gold
    if not re.search(r"[^\W_]|\\[A-Za-z]|^[-+*/<>=]$", _NOTHING.sub("", text)):
        return "empty"
    if _ELSEWHERE.fullmatch(text):
        return "the answer is elsewhere"
    if text.count("{") != text.count("}"):
        return "unbalanced braces"
    if text.count(r"\begin") != text.count(r"\end"):
        return r"unbalanced \begin and \end"
    if _OPEN_END.search(text) and not _ION.search(text):
        return "nothing behind its last sign"
    return None


_NOT_PARSEABLE = "not parseable as mathematics: {!r}"
_too_hard: set[str] = set()  # golds, cleaned, that sympy was given up on: only equal text is right


def needs_equal_text(text: str) -> bool:
    """Whether a cleaned gold is no mathematics, or too large to calculate with."""
    return _is_text(text) or text in _too_hard or _costly(text)


def _is_text(text: str) -> bool:
    """Whether a cleaned gold is words, a sign, a molecule, a date or a range."""
    return _is_words(text) or any(pattern.fullmatch(text) for pattern in (_SIGN, FORMULA, _DATE))


def _is_words(text: str) -> bool:
    return not re.search(r"[\\\d=<>+*/^]", text) and bool(re.search(r"[^\W\d_]{3}|[^\x00-\x7f]{2}", text))


def agree(a: str, b: str) -> bool:
    """Whether two answers are one, with either as the gold; what can't be a gold is one with an equal text only."""
    return a == b or any(check_gold(gold) is None and grade(gold, answer) for gold, answer in ((a, b), (b, a)))


def grade(gold: str, answer: str) -> bool:
    """Whether `answer` (text inside the answer tags) has the value of `gold` `[ours]`.

    Equal text first; the letter decides where the gold names an option; numbers are compared exactly, units of
    one quantity are converted and a missing unit is no error; the rest is sympy's. No answer makes it raise, run code
    or take unbounded time. Raises `ValueError` for a gold that `check_gold` refuses, unless equal text settles it.
    """
    return grade_all([gold], [answer])[0] is True


def grade_all(golds: Sequence[str], answers: Sequence[str | None]) -> list[bool | None]:
    """[`grade`] of many pairs; `None` where sympy was given up on, for time or memory.

    Each different pair is graded once. Where each worker has a core, a call with `k` pairs given up on takes at most
    `ceil(k / POOL.size) * workers.CPU_SECONDS` and what the others need. (A gold that is itself too hard is found out
    once, in as much time again.)
    """
    pairs = dict.fromkeys(zip(golds, answers, strict=True))
    for gold in dict.fromkeys(golds):
        _refuse(gold, _broken(gold))
    hard = {}
    for gold, answer in pairs:
        verdict = _cheap(gold, answer)
        if isinstance(verdict, tuple):
            hard.setdefault(verdict, []).append((gold, answer))
        else:
            pairs[gold, answer] = verdict
    for question, verdict in zip(hard, POOL.map(_ask, list(hard)), strict=True):
        if isinstance(verdict, str):
            _refuse(hard[question][0][0], _NOT_PARSEABLE.format(verdict))
        pairs.update(dict.fromkeys(hard[question], verdict))
    return [pairs[pair] for pair in zip(golds, answers, strict=True)]


def _refuse(gold: str, reason: str | None) -> None:
    if reason:
        raise ValueError(f"this gold answer can't be graded ({reason}): {str(gold)[:200]!r}")


@functools.lru_cache(maxsize=65536)
def _ask(question: tuple[str, str]) -> bool | str | None:
    """The worker's verdict, what it can't parse of the gold, or `None` when it was given up on."""
    reply = POOL.ask("same", *question)
    if reply is not LOST:
        return reply if isinstance(reply, str) else reply is True
    if POOL.ask("unparseable", question[0]) is LOST:
        _too_hard.add(question[0])
    return None


def _cheap(gold: str, answer: str | None) -> bool | tuple[str, str]:
    """The verdict, or the two cleaned texts that sympy has to compare."""
    if not isinstance(answer, str):
        return False
    gold, answer = strip_prefix(gold), strip_prefix(answer)
    if gold == answer:
        return True
    if max(len(gold), len(answer)) > MAX_TEXT:
        plain, value = fold.__wrapped__, number.__wrapped__  # no megabytes in a cache
        values = value(gold), value(answer)
        return plain(gold) == plain(answer) or (None not in values and equal_numbers(*values))
    answer, *again = re.split(r"\.?\s*\n\s*(?:final )?answer\s*:\s*", answer, flags=re.I)
    lines = [clean(line) for line in answer.split("\n")[1:] if line.strip()]
    gold, answer = clean(gold), clean(answer)
    if any(fold(clean(other)) != fold(answer) for other in again):
        return False
    if letter := letter_of(gold):
        return letter == letter_of(answer) and all(letter_of(line) in (None, letter) for line in lines)
    if not answer or fold(gold) == fold(answer):
        return bool(answer)
    if letters := letters_of(gold):
        return letters == letters_of(answer)
    if verdict := yes_or_no(gold):
        word, reason = yes_or_no(answer) or ("", frozenset())
        return word == verdict[0] and _same_reasons(verdict[1], reason)
    if letter_of(answer) and (option := OPTION.fullmatch(answer))["rest"]:
        answer = option["rest"].strip()
    if not _is_words(gold) and len(answer) < 300:
        if sentence := _SENTENCE.match(answer):
            answer = answer[sentence.end() :]
        if number(quantity(gold)[0]) is not None:
            answer = _ASIDE.sub("", answer)
    if re.fullmatch(r"[\d.]+ ?: ?[\d.]+", gold):
        answer = answer.replace(" to ", ":")
    verdict = same_number(gold, answer)
    if verdict is not None:
        return verdict
    try:
        return _WITHOUT_SYMPY.same(gold, answer)
    except _NeedsSympy:
        return (gold, answer) if not (needs_equal_text(gold) or _costly(answer)) else False


def _same_reasons(gold: frozenset[str], answer: frozenset[str]) -> bool:
    """Whether the words behind a yes or no agree: one may say less than the other, but not the opposite."""
    if not gold or not answer:
        return True
    return (gold <= answer or answer <= gold) and not _NEGATIONS & (gold ^ answer)


class _NeedsSympy(Exception):
    pass


class _WithoutSympy(Comparison):
    def same_value(self, gold: str, answer: str) -> bool:
        verdict = fold(gold) == fold(answer) or same_number(gold, answer)
        if verdict is None and not (_is_words(gold) or _is_words(answer)):
            raise _NeedsSympy
        return bool(verdict)

    def ratio(self, *sides: str) -> float:
        raise _NeedsSympy


_WITHOUT_SYMPY = _WithoutSympy()
