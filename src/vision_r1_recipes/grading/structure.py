"""The structure of an answer: lists, sets, points, intervals, inequalities, equations, and what makes two the same."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence

from .quantities import number
from .spelling import closing, fold


MAX_ITEMS = 20  # of a list whose items are not plain numbers

RELATION = re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|[=<>]")
LABEL = re.compile(
    r"(?:\\angle ?\d++|\\(?!sqrt|frac|left|lim|sum|int|pm|mp)[A-Za-z]++|[A-Za-z]++"
    r"|_(?:\{[^{}]*+\}|\w)|\(\w\)|[\s{}'])++"
)
# What an answer may leave out before `=`: a name, a ratio or tuple of names, but no sum or power to be solved.
_NAMES = re.compile(
    rf"(?:{LABEL.pattern}|\\frac|[/:|]|[A-Za-z] ?\([\w, ]{{1,12}}\)|\((?: ?[A-Za-z]\w? ?,)+ ?[A-Za-z]\w? ?\))++"
)

_NO_NAME = re.compile(r"\b(?:not|no|never|nor|or|and|if|unless|without|than|less|more|least|most|n't|Not|No)\b")

# -------- taking apart


def split(text: str, separator: str) -> list[str]:
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


def _named(text: str) -> tuple[str, str]:
    """What stands before `=` and the rest; the first is empty where that is not a name, or not the only relation."""
    name, *rest = split(text, RELATION.pattern)
    if len(rest) == 1 and RELATION.search(text)[0] == "=" and rest[0] and _is_name(name, _NAMES):
        return _name(name), rest[0]
    return "", text


def _is_name(text: str, names: re.Pattern) -> bool:
    return len(text) < 40 and names.fullmatch(text) is not None and not _NO_NAME.search(text)


def items_of(text: str) -> tuple[str, list[str]]:
    """What holds it together (`()`, `(]`, `{}`, `,`, empty for words or nothing) and the items of a tuple, interval,
    set, list or single value."""
    body = text.replace(r"\{", "{").replace(r"\}", "}")
    if body[:1] in ("(", "[", "{") and closing(body) == len(body) - 1:
        items = split(body[1:-1], "[,;]")
        if len(items) > 1 or body[0] == "{":
            return body[0] + body[-1], _signed(items) if any(items) else []
    thousands = r",(?!(?<=\d,)\d{3}(?!\d))"
    if re.search(rf"{thousands}(?! )", text):  # 1,3,59,177
        thousands = ","
    word = r"(?<![A-Za-z])(?:and|or)(?![A-Za-z])"
    commas = split(text, f"{thousands}|;")
    items = split(text, rf"{thousands}(?: ?{word})?|;|{word}")
    return "," if 1 < len(commas) == len(items) else "", _signed(items)


def _signed(items: list[str]) -> list[str]:
    """The items, one with `\\pm` as two."""
    return [item.replace(r"\pm", sign) for item in items for sign in ("+-" if item.count(r"\pm") == 1 else "+")]


# A condition is `(left, sign, right)` with the sign `<`, `<=` or `!=`; an interval bounds the nameless variable ``.
Condition = tuple[str, str, str]


def region_of(text: str) -> list[list[Condition]] | None:
    """Intervals and inequalities as a union of conjunctions of conditions; `None` for anything else."""
    found = []
    for part in split(text, r"\\cup(?![A-Za-z])| or | U "):
        if part == r"\mathbb{R}":
            part = r"(-\infty,\infty)"
        conditions = _interval(part) if re.match(r"[(\[\]]", part) else _inequalities(part)
        if not conditions:
            return None
        found.append(conditions)
    return found


def _interval(text: str) -> list[Condition] | None:
    if text[-1] not in ")][":
        return None
    ends = split(text[1:-1], "[,;]")
    if len(ends) != 2 or not all(ends):
        return None
    left, right = text[0], text[-1]
    infinite = [re.fullmatch(r"[+-]? ?\\infty ?", end) is not None for end in ends]
    if left + right in ("()", "[]") and not any(infinite):
        return None  # (1, 2) may be a point and [1, 2] a list
    if (infinite[0] and (ends[0][0] != "-" or left == "[")) or (infinite[1] and (ends[1][0] == "-" or right == "]")):
        return None
    conditions = [] if infinite[0] else [(ends[0], "<=" if left == "[" else "<", "")]
    conditions += [] if infinite[1] else [("", "<=" if right == "]" else "<", ends[1])]
    return conditions or [("", "<", "\\infty")]


def _inequalities(text: str) -> list[Condition] | None:
    conditions = []
    for clause in split(text, ",| and "):
        signs, sides = RELATION.findall(clause), [side.strip() for side in RELATION.split(clause)]
        if not signs or "=" in signs or len(signs) > 2 or not all(sides):
            return None
        for sign, left, right in zip(signs, sides, sides[1:], strict=False):
            if sign == r"\ne":
                conditions.append((left, "!=", right))
            elif sign in ("<", r"\le"):
                conditions.append((left, "<" if sign == "<" else "<=", right))
            else:
                conditions.append((right, "<" if sign == ">" else "<=", left))
    return conditions


# -------- comparing


def _matched(golds: Sequence, answers: Sequence, same: Callable) -> bool:
    """Whether each gold has an answer of its own."""
    left = list(answers)
    for gold in golds:
        found = next((i for i, answer in enumerate(left) if same(gold, answer)), None)
        if found is None:
            return False
        del left[found]
    return not left


class Comparison(ABC):
    """Compares two cleaned answers part by part; the arithmetic is the subclass'."""

    @abstractmethod
    def same_value(self, gold: str, answer: str) -> bool:
        """Whether two single values, perhaps with units, are the same."""

    @abstractmethod
    def ratio(self, a: str, b: str, c: str, d: str) -> float:
        """The constant `(a - b) / (c - d)`, where one text may be empty for the only variable; 0 if it isn't one."""

    def same(self, gold: str, answer: str) -> bool:
        """Whether the whole answers are the same."""
        if fold(gold) == fold(answer):
            return True
        if gold[:1] == "(":
            answer = re.sub(r"^[A-Z] ?(?=\([^()]*,[^()]*\)$)", "", answer)  # a point's name
        gold, answer = (re.sub(r"^[A-Za-z] ?\\in(?![A-Za-z])\s*(?=[(\[\\{])", "", text) for text in (gold, answer))
        (g_name, g_rest), (a_name, a_rest) = _named(gold), _named(answer)
        if (g_name and g_name == a_name) or (g_name and not RELATION.search(answer)):
            return self.same(g_rest, a_rest)
        if a_name and not RELATION.search(gold):
            return self.same(gold, a_rest)
        regions = region_of(gold), region_of(answer)
        if any(regions):
            regions = [region or _pair(text) for region, text in zip(regions, (gold, answer), strict=True)]
            return all(regions) and _matched(*regions, self._same_conditions)
        (g_marks, g_items), (a_marks, a_items) = items_of(gold), items_of(answer)
        if len(g_items) != 1 or len(a_items) != 1 or g_marks == a_marks == "{}":
            return self._same_list(g_marks, g_items, a_marks, a_items)
        return self._same_equation_or_value(gold, answer)

    def _same_equation_or_value(self, gold: str, answer: str) -> bool:
        g_parts, a_parts = split(gold, "="), split(answer, "=")
        if len(g_parts) > 1:
            if sorted(map(fold, g_parts)) == sorted(map(fold, a_parts)):
                return True
            return len(g_parts) == len(a_parts) == 2 and self.ratio(*g_parts, *a_parts) != 0
        if len(a_parts) > 1 and _is_name(a_parts[0], LABEL):
            del a_parts[0]
        return all(self.same_value(gold, part) for part in a_parts)

    def _same_list(self, g_marks: str, g_items: list[str], a_marks: str, a_items: list[str]) -> bool:
        if not a_marks and len(a_items) == 1 and re.fullmatch(r"\d{1,3}(?:,\d{3})+", a_items[0]):
            a_items = a_items[0].split(",")  # 40,150 beside two numbers
        if len(g_items) != len(a_items):
            return False
        marks = {g_marks, a_marks}
        if len(marks) > 1 and not (marks <= {"", ",", "{}"} or marks == {",", "()"}):
            return False
        labels = [[item.partition("=")[0] if "=" in item else "" for item in items] for items in (g_items, a_items)]
        labelled = [len({re.sub(r"_(?:\{\d+\}|\d)|\d+$|\s", "", label) for label in of}) > 1 for of in labels]
        ordered = marks - {"", ",", "{}"} or labelled[0] != labelled[1]  # a tuple, or x=1, y=2 against 1, 2
        values = [[number(item) for item in items] for items in (g_items, a_items)]
        if None not in values[0] and None not in values[1]:
            return values[0] == values[1] if ordered else Counter(values[0]) == Counter(values[1])
        if len(g_items) > MAX_ITEMS:
            return False
        return all(map(self.same, g_items, a_items)) if ordered else _matched(g_items, a_items, self.same)

    def _same_conditions(self, gold: list[Condition], answer: list[Condition]) -> bool:
        return _matched(gold, answer, self._same_condition)

    def _same_condition(self, gold: Condition, answer: Condition) -> bool:
        """Both are `difference < 0`, and one difference is a positive multiple of the other."""
        if gold[1] != answer[1]:
            return False
        sides = [(gold[0], answer[0]), (gold[2], answer[2])]
        for side, other in ((0, 2), (2, 0)):
            if gold[side] and LABEL.fullmatch(gold[side]) and fold(gold[side]) == fold(answer[side]):
                return self.same_value(gold[other], answer[other])
        if "" in (gold[0], gold[2]) and "" in (answer[0], answer[2]):
            return all(g == a == "" or (g and a and self.same_value(g, a)) for g, a in sides)
        ratio = self.ratio(gold[0], gold[2], answer[0], answer[2])
        return ratio > 0 or (gold[1] == "!=" and ratio != 0)


def _pair(text: str) -> list[list[Condition]] | None:
    """`(a, b)` or `[a, b]` as an interval, which it is beside one."""
    marks, ends = items_of(text)
    if marks not in ("()", "[]") or len(ends) != 2:
        return None
    sign = "<" if marks == "()" else "<="
    return [[(ends[0], sign, ""), ("", sign, ends[1])]]


def _name(label: str) -> str:
    """`f(x)` and `y`, `x` and `x_{1}` have one name."""
    label = re.sub(r"\\frac ?\{([^{}]*)\} ?\{([^{}]*)\}", r"\1/\2", label)
    label = re.sub(r"^\s*[fgh] ?\( ?x ?\)\s*$", "y", label)
    return re.sub(r"\([A-Za-z]\)|_(?:\{\d+\}|\d)|[\s{}]", "", label)
