"""What is mended and what is dropped once the reasoner has answered: pure functions over `data/rules/*.yaml`."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import recipe
from ..recipe import RecipeError
from ..rewards import TAGS, extract_answer, grade, parse_format
from .steps import Generation, Rejected, Row


_SENTENCE = re.compile(r"[^.!?\n]+")
_CONCLUSION = re.compile(
    r"\b(?:the|my|final) answer (?:is|should be|must be)[\s:*]*(.*?)(?:[.;!?](?!\d)|$)", re.I | re.M
)
_FINAL = re.compile(r"\bfinal answer[*_ \t]*(?:[:\uff1a]|$)[\s*_]*", re.I | re.M)


@dataclass(frozen=True)
class Rules:
    """The keys of a rules file; see `data/rules/vision_r1.yaml` for what each does."""

    min_words: int
    max_words: int
    max_repeats: int
    min_compressed: float
    max_foreign_share: float
    cannot_see: list[str]
    missing_information: list[str]
    replace: list[dict[str, str]]
    names_the_text: list[str]
    names_the_answer: list[str]

    @classmethod
    def load(cls, path: str | Path) -> Rules:
        """Read and check a file; raises [`RecipeError`] with everything wrong in it."""
        rules = recipe.fill(cls, recipe.load(path), f"{path}: ")
        problems = []
        for name in ("cannot_see", "missing_information", "names_the_text", "names_the_answer"):
            problems += [_pattern_problem(name, pattern) for pattern in getattr(rules, name)]
        for i, item in enumerate(rules.replace):
            if not isinstance(item, dict) or item.keys() != {"pattern", "with"}:
                problems.append(f"replace[{i}]: {item!r}: write {{pattern: ..., with: ...}}.")
            else:
                problems.append(_pattern_problem(f"replace[{i}]", item["pattern"], item["with"]))
        if problems := list(filter(None, problems)):
            raise RecipeError("\n".join(f"{path}: {problem}" for problem in problems))
        return rules


def _pattern_problem(name: str, pattern: Any, replacement: str = "") -> str | None:
    try:
        re.sub(f"(?:{pattern})|", replacement, "", flags=re.I)  # matches, so that `replacement` is looked at too
    except (re.error, TypeError, IndexError) as error:
        return f"`{name}`: {pattern!r}: {error}."
    return None


def finish(row: Row, generation: Generation, rules: Rules) -> tuple[str, list[str]]:
    """
    The completion `<think> ... </think><answer> Final Answer:X </answer>` of one row, and what was mended in it.

    X is the reasoner's own answer, as it wrote it.

    Raises:
        `Rejected`: the first rule that the row breaks.
    """
    reasoning = generation.reasoning
    if not reasoning:
        raise Rejected("no reasoning", "neither reasoning_content nor <think> in the answer")
    if tag := next((tag for tag in TAGS if tag in reasoning), None):
        raise Rejected("tags in the reasoning", tag)
    answer = final_answer(generation.text)
    if answer is None:
        raise Rejected("no answer", generation.text[-80:])
    if not grade(row.answer, answer):
        raise Rejected("wrong answer", f"{answer!r}, the truth is {row.answer!r}")
    if share := foreign_share(reasoning, rules.max_foreign_share):
        raise Rejected("wrong language", f"{share:.0%} of the letters")
    if repeated := most_repeated(reasoning, rules.max_repeats):
        raise Rejected("repetition", f"{repeated[1]} x {repeated[0]!r}")
    if (share := compressed(reasoning)) < rules.min_compressed:
        raise Rejected("repetition", f"the end compresses to {share:.0%}")
    words = len(reasoning.split())
    if words < rules.min_words:
        raise Rejected("too short", f"{words} words")
    if words > rules.max_words:
        raise Rejected("too long", f"{words} words")
    if found := first_match(rules.cannot_see, f"{reasoning}\n{generation.text}"):
        raise Rejected("missing information", found)
    if found := first_match(rules.missing_information, f"{reasoning[-500:]}\n{generation.text}"):
        raise Rejected("missing information", found)
    if conclusion := contradiction(reasoning, answer):
        raise Rejected("contradiction", f"the reasoning ends at {conclusion!r}, the answer is {answer!r}")
    mended, repairs = repair(reasoning, rules.replace)
    if repairs and doubled(mended) - doubled(reasoning):
        raise Rejected("doubled words", "; ".join(repairs))
    for rule in ("names_the_answer", "names_the_text"):
        if found := first_match(getattr(rules, rule), mended):
            raise Rejected(rule.replace("_", " "), found)
    completion = f"<think> {mended} </think><answer> Final Answer:{answer} </answer>"
    if parse_format(completion) != answer:
        raise Rejected("no answer", f"{answer!r} can't stand between the answer tags")
    return completion, repairs


def final_answer(text: str) -> str | None:
    """What stands behind the last "Final Answer:", else what `rewards.extract_answer` finds."""
    parts = _FINAL.split(text)
    if len(parts) > 1:
        lines = parts[-1].strip().splitlines()
        return (lines[0].strip(" *").removesuffix("</answer>").strip() or None) if lines else None
    return extract_answer(text)


def first_match(patterns: Sequence[str], text: str) -> str | None:
    """The first match of any pattern with what stands around it."""
    text = text.replace("\u2019", "'")
    for pattern in patterns:
        if match := re.search(pattern, text, re.I):
            return " ".join(text[max(0, match.start() - 30) : match.end() + 30].split())
    return None


def foreign_share(text: str, limit: float) -> float | None:
    """The share of letters outside the Latin and Greek alphabets, where it is over `limit`."""
    strange = [char for char in text if not char.isascii() and char.isalpha()]
    if not strange:
        return None
    foreign = sum(not unicodedata.name(c, "").startswith(("LATIN", "GREEK", "MATHEMATICAL")) for c in strange)
    share = foreign / sum(map(str.isalpha, text))
    return share if share > limit else None


def compressed(text: str) -> float:
    """Size of the last 2,000 characters after compression, as a share; 1 for a text too short to tell."""
    end = text[-2000:].encode()
    return len(zlib.compress(end)) / len(end) if len(end) > 500 else 1.0


def most_repeated(text: str, limit: int) -> tuple[str, int] | None:
    """The sentence, of four words or more, that stands most often, where that is more than `limit` times."""
    sentences = Counter(" ".join(found.split()) for found in _SENTENCE.findall(text))
    counted = [(sentence, n) for sentence, n in sentences.items() if n > limit and sentence.count(" ") > 2]
    return max(counted, key=lambda item: item[1], default=None)


def contradiction(reasoning: str, answer: str) -> str | None:
    """What the end of the reasoning calls the answer, where both are a letter, or both a number, and they differ."""
    stated = _CONCLUSION.findall(reasoning[-400:])
    conclusion = re.sub(r"(?<=\d),(?=\d{3})", "", stated[-1].strip("()\"'$* ")) if stated else ""
    comparable = _kind(conclusion) is not None and _kind(conclusion) == _kind(answer)
    return conclusion if comparable and not grade(answer, conclusion) else None


def _kind(answer: str) -> str | None:
    if re.fullmatch(r"\(?[A-H]\)?", answer):
        return "letter"
    return "number" if re.fullmatch(r"-?\d+(?:\.\d+)?", answer) else None


def repair(text: str, replacements: Sequence[dict[str, str]]) -> tuple[str, list[str]]:
    """
    `text` with each pattern replaced in order, and a list of `old -> new`.

    A replacement takes over the capital of what it replaces, and drops its first or last words where the text beside
    it has them already ("shows" before "shows").
    """
    repairs: list[str] = []
    for item in replacements:

        def swap(match: re.Match, replacement: str = item["with"]) -> str:
            words = match.expand(replacement).split()
            before = match.string[max(0, match.start() - 200) : match.start()].lower().split()
            after = match.string[match.end() : match.end() + 200].lower().split()
            for n in range(min(len(words) - 1, len(before)), 0, -1):
                if [word.lower() for word in words[:n]] == before[-n:]:
                    words = words[n:]
                    break
            for n in range(min(len(words) - 1, len(after)), 0, -1):
                if [word.lower() for word in words[-n:]] == [re.sub(r"\W+$", "", word) for word in after[:n]]:
                    words = words[:-n]
                    break
            new = " ".join(words)
            if match[0][0].isupper():
                new = new[:1].upper() + new[1:]
            repairs.append(f"{match[0]} -> {new}")
            return new

        text = re.sub(item["pattern"], swap, text, flags=re.I)
    return text, repairs


def doubled(text: str) -> Counter[tuple[str, ...]]:
    """The phrases of up to eight words that are followed by the same words, and how often each is."""
    words = re.findall(r"\w+|[^\w\s]+", text.lower())
    return Counter(
        tuple(words[i : i + n])
        for n in range(1, 9)
        for i in range(len(words) - 2 * n + 1)
        if words[i : i + n] == words[i + n : i + 2 * n] and all(word.isalpha() for word in words[i : i + n])
    )
