"""What the gold answers of a dataset are like, before training: `python -m vision_r1_recipes.rewards check`."""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from . import preflight
from .data import open_source
from .grading import POOL, check_gold, grade, needs_equal_text
from .grading.quantities import number, quantity
from .grading.spelling import clean, letter_of, letters_of, strip_prefix, yes_or_no
from .grading.structure import RELATION, items_of, region_of
from .recipe import RecipeError
from .rewards import parse_format


SHOWN = 3  # examples of each finding


def kind_of(gold: str) -> str:
    """The name of what `gold` is taken for."""
    text = clean(strip_prefix(gold))
    if letter_of(text):
        return "option letter"
    if letters_of(text):
        return "several option letters"
    if yes_or_no(text):
        return "yes or no"
    if number(text) is not None:
        return "number"
    if number(quantity(text)[0]) is not None:
        return "number with a unit"
    if needs_equal_text(text):
        return "text"
    if region_of(text):
        return "interval or inequality"
    if len(items_of(text)[1]) > 1:
        return "list, set or point"
    return "equation" if RELATION.search(text) else "expression"


def doubts(gold: str) -> list[str]:
    """What makes a gradable `gold` suspicious."""
    text, kind = clean(strip_prefix(gold)), kind_of(gold)
    found = {
        "several option letters: all of them are asked for": kind == "several option letters",
        "has digits, but only equal text is right": kind == "text" and re.search(r"\d", text),
        "a sentence: every word of it is asked for": kind == "text" and len(text.split()) > 6,
        "holds markup of an answer": re.search(r"</?(?:think|answer)>|\\boxed|\banswer\s*:", gold, re.I),
        "no answer": text.casefold() in ("none", "n/a", "na", "nan", "null", "unknown"),
        "approximate": re.search(r"\u2248|\\approx|\b(?:about|approximately|roughly)\b", gold),
        "a comma that may be decimal": re.fullmatch(r"-?\d+,(?!\d{3}$)\d+", text),
        "is not right inside \\boxed{}": not grade(gold, rf"\boxed{{{gold}}}"),
    }
    return [name for name, is_so in found.items() if is_so]


def answers_of(row: dict) -> str | None:
    """The gold answer of a row in any layout; `None` where a chain of thought has no right format."""
    for column in ("solution", "answer"):
        if column in row:
            return row[column] if row[column] is None else str(row[column])
    turns = row["conversations"] or []
    return parse_format(turns[-1]["value"] or "") if turns else None


def report(golds: Sequence[str | None]) -> tuple[str, int]:
    """A text with what the golds are, and how many can't be graded."""
    rows = defaultdict(list)
    for i, gold in enumerate(golds):
        rows[gold].append(i)
    different = list(rows)
    reasons = dict(zip(different, POOL.map(lambda gold: check_gold(gold or ""), different), strict=True))
    kinds, odd, bad = Counter(), defaultdict(list), defaultdict(list)
    examples = {}
    for gold, where in rows.items():
        if reason := reasons[gold]:
            bad[reason.partition(":")[0]].append((gold, where))
            continue
        kind = kind_of(gold)
        kinds[kind] += len(where)
        examples.setdefault(kind, gold)
        for doubt in doubts(gold):
            odd[doubt].append((gold, where))
    lines = [f"{len(golds)} golds, {len(different)} different"]
    lines += [f"  {count:6d}  {kind:24s} {_short(examples[kind])}" for kind, count in kinds.most_common()]
    for title, found in (("can't be graded", bad), ("suspicious", odd)):
        total = len({i for of in found.values() for _, where in of for i in where})
        lines.append(f"{title}: {total}")
        for name, of in sorted(found.items(), key=lambda item: -sum(len(where) for _, where in item[1])):
            shown = "; ".join(f"row {where[0]} {_short(gold)}" for gold, where in of[:SHOWN])
            lines.append(f"  {sum(len(where) for _, where in of):6d}  {name}, for example {shown}")
    return "\n".join(lines), sum(len(where) for of in bad.values() for _, where in of)


def _short(gold: str | None) -> str:
    return repr(gold) if gold is None or len(gold) < 60 else f"{gold[:60]!r}..."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vision_r1_recipes.rewards",
        description="Grade nothing yet: look at every gold answer of a dataset.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser(
        "check", help="kinds, unparseable and suspicious golds; exit code 1 when some can't be graded"
    )
    check.add_argument("data", help="Hub id, folder or file with a column solution, answer or conversations")
    check.add_argument("--name", help="configuration of a Hub dataset")
    check.add_argument("--split", default="train")
    args = parser.parse_args(argv)
    with preflight.kind_errors():
        rows = open_source({"path": args.data, "name": args.name, "split": args.split}, args.data)
        columns = {"solution", "answer", "conversations"} & set(rows.column_names)
        if not columns:
            raise RecipeError(
                f"{args.data} has no column solution, answer or conversations, only {rows.column_names}."
            )
        text, bad = report([answers_of(row) for row in rows.select_columns(sorted(columns))])
        print(text)
        return 1 if bad else 0
