"""
MM-Math for lmms-eval: its rows, pictures and judge.

```shell
lmms-eval --include_path src/vision_r1_recipes/lmms_tasks --tasks mm_math --model ...
```

Rows are those of `THU-KEG/MM_Math`: `question`, `file_name` of the picture, `solution` with the answer in `\\boxed{}`,
`difficult`, `year`, `knowledge`. The pictures are the dataset's zip, or the zip or folder in the environment variable
`MM_MATH_IMAGES`.

The judge `[repo]` takes the answer as right if it has the gold's value, by our grader, or a value within 0.01 of it.
Where the official one is laxer, it is not followed: 50 is not 0.5, and a length in m is not one in cm.
"""

import functools
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vision_r1_recipes.grading import check_gold, grade
from vision_r1_recipes.grading.quantities import factor_of, number, quantity
from vision_r1_recipes.grading.spelling import clean, closing, fold, strip_prefix
from vision_r1_recipes.grading.structure import LABEL, items_of
from vision_r1_recipes.rewards import extract_answer


TOLERANCE = 1e-2 * 1.01  # absolute, with the margin for what 0.01 is in binary [repo]


def gold(row: Mapping[str, Any]) -> str:
    """All that is boxed in the row's solution, several with commas between them `[repo]`; empty if nothing is."""
    text, found = row["solution"], []
    for start in re.finditer(r"\\boxed\s*(?=\{)", text):
        end = closing(text[start.end() :])
        found.append(text[start.end() + 1 : start.end() + end].strip() if end > 0 else "")
    return ", ".join(filter(None, found))


def gradable(rows):
    """
    The rows of a `Dataset` whose gold the grader can read; the others can't be answered rightly. How many these are is
    written to the file in the environment variable `MM_MATH_LEFT_OUT`, if it is set.
    """
    kept = rows.filter(lambda row: bool(gold(row)) and check_gold(gold(row)) is None)
    if file := os.environ.get("MM_MATH_LEFT_OUT"):
        Path(file).write_text(str(len(rows) - len(kept)))
    return kept


@functools.cache
def _files() -> tuple[zipfile.ZipFile | None, dict[str, str]]:
    """The zip, if it is one, and the name of a picture -> where it is."""
    source = os.environ.get("MM_MATH_IMAGES")
    if not source:
        from huggingface_hub import hf_hub_download

        source = hf_hub_download("THU-KEG/MM_Math", "MM_Math/MM_Math.zip", repo_type="dataset")
    if Path(source).is_dir():
        return None, {path.name: str(path) for path in Path(source).rglob("*") if path.is_file()}
    archive = zipfile.ZipFile(source)
    return archive, {Path(name).name: name for name in archive.namelist() if not name.endswith("/")}


def pictures(row: Mapping[str, Any]) -> list[Image.Image]:
    """The row's picture. Raises `FileNotFoundError` if it is missing."""
    archive, places = _files()
    name = Path(row["file_name"]).name
    if name not in places:
        raise FileNotFoundError(f"MM-Math's picture {name} is missing; there are {len(places)}.")
    if archive is None:
        return [Image.open(places[name]).convert("RGB")]
    with archive.open(places[name]) as file:
        return [Image.open(file).convert("RGB")]


def judge(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`{accuracy}` of the completion `results[0]`, 0 or 1."""
    return {"accuracy": float(is_right(gold(row), extract_answer(results[0])))}


def is_right(gold: str, answer: str | None) -> bool:
    """
    Whether an answer has the value of a gold that can be graded, or values within the tolerance, one for each of the
    gold's; their order counts in points and intervals only.
    """
    if not answer:
        return False
    if grade(gold, answer):
        return True
    (g_marks, golds), (a_marks, answers) = (items_of(clean(strip_prefix(text))) for text in (gold, answer))
    if len(golds) != len(answers):
        return False
    if {g_marks, a_marks} - {"", ",", "{}"}:
        return g_marks == a_marks and all(map(_near, golds, answers))
    for item in golds:
        found = next((i for i, other in enumerate(answers) if _near(item, other)), None)
        if found is None:
            return False
        del answers[found]
    return True


def _near(gold: str, answer: str) -> bool:
    (g_name, gold), (a_name, answer) = _named(gold), _named(answer)
    if g_name and a_name and g_name != a_name:
        return False
    (g_text, g_unit), (a_text, a_unit) = quantity(gold), quantity(answer)
    factor = factor_of(g_unit, a_unit)
    g, a = _value(g_text), _value(a_text)
    return None not in (factor, g, a) and abs(g - a * float(factor)) <= TOLERANCE


def _named(text: str) -> tuple[str, str]:
    """`x` and `3` of `x=3`."""
    name, sign, value = text.partition("=")
    name = name.strip()
    named = sign and "=" not in value and LABEL.fullmatch(name)
    return (fold(name), value.strip()) if named else ("", text)


_ARGUMENT = r" ?\{([^{}]*)\}"
_ARITHMETIC = [
    (re.compile(r"\\left|\\right|(?<=[\d)}]) ?°"), ""),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "*"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\pi(?![A-Za-z])"), f"({math.pi})"),
    (re.compile(r"\^ ?(\d)"), r"^{\1}"),
]
_BRACES = [  # innermost first, so that what is in them has none
    (re.compile(rf"\\frac{_ARGUMENT}{_ARGUMENT}"), r"((\1)/(\2))"),
    (re.compile(rf"\\sqrt ?\[(\d+)\]{_ARGUMENT}"), r"((\2)**(1/\1))"),
    (re.compile(rf"\\sqrt{_ARGUMENT}"), r"((\1)**(1/2))"),
    (re.compile(rf"\^{_ARGUMENT}"), r"**(\1)"),
]


@functools.lru_cache(maxsize=65536)
def _value(text: str) -> float | None:
    """Of a number or an expression of numbers; in floating point, so that no power is too much work."""
    if (plain := number(text)) is not None:
        return float(plain) if abs(plain) < 1e300 else None
    if len(text) > 200:
        return None
    for pattern, new in _ARITHMETIC:
        text = pattern.sub(new, text)
    before = None
    while text != before:
        before = text
        for pattern, new in _BRACES:
            text = pattern.sub(new, text)
    text = re.sub(r"(?<=[\d)]) ?(?=\()|(?<=\)) ?(?=\d)", "*", text)
    text = re.sub(r"\d+(?:\.\d*)?|\.\d+", lambda m: f"{float(m[0]):.17f}", text)
    if not re.fullmatch(r"[\d.+*/() -]+", text):
        return None
    try:
        value = eval(text, {"__builtins__": {}})
    except (ArithmeticError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return value if isinstance(value, float) and math.isfinite(value) else None
