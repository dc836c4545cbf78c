# ruff: noqa: RUF001, RUF005
"""The rewards: format, answers (ordinary and hostile), TRL's call forms, and the life of the worker process."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from vision_r1_recipes import grading
from vision_r1_recipes.rewards import accuracy_reward, check_gold, format_reward, grade, hfrrf, parse_format


# (gold, answers that are right, answers that are wrong); the comment is the reason
ANSWERS = [
    # option letters: bare, dressed, with the option's text, in a sentence
    (
        "B",
        [
            "B",
            "B.",
            "(B)",
            "(B) 65",
            "B) text",
            "B. 65",
            "B: 2π",
            "b",
            "[B]",
            "B.\nAnswer:B",
            r"\text{B}",
            r"\boxed{B}",
        ]
        + ["option B", "Option B.", "The answer is B", "The answer is (B).", "**B**", "**B. 65**", "$B$", "B 65", "Ｂ"]
        + [
            "B is correct",
            "The correct option is B",
            "Final Answer: B",
            r"$\text{(B)}$",
            "`B`",
            "B. Point A",
            "It is B",
            "B (65)",
            "答案：B",
        ],
        [
            "A",
            "A. B",
            "B or C",
            "A B C D",
            "BC",
            "B, C",
            "B/C",
            "not B",
            "B and D",
            "65",
            "",
            "B is wrong",
            "B is not it",
        ]
        + ["(B) or (C)", "B) 65 C) 70", "ABCD", "The answer is not B", "Option A, not B", "A rectangle", "Both", "8"]
        + ["B.\nAnswer:C", "beta", "B'", "the answer isn't B", r"\boxed{A} \boxed{B}", "neither", "C. B", "B? or A"]
        + ["B, but maybe A", "B is false", "B = 5", "Bob"],
    ),
    ("(100,200)", ["(100, 200)"], ["100200", "(200,100)"]),  # no thousands comma
    ("B. 65", ["B", "B. 65", "(B)", "b) 65"], ["C. 65", "C", "65 or 66"]),  # the letter decides
    ("B.\nAnswer:B", ["B", "Option B"], ["C", "A.\nAnswer:B"]),
    ("option B.", ["B", "B."], ["A"]),
    ("A", ["A. a cat", "A"], ["a cat", "An apple", "a"[:0], "all", "A, B, C and D"]),
    # integers: no rounding, no substring
    (
        "7",
        [
            "7",
            "7.",
            "7.0",
            " 7 ",
            "+7",
            "07",
            "$7$",
            r"\boxed{7}",
            "**7**",
            "x = 7",
            "x=7",
            "７",
            r"\(7\)",
            "(7)",
            "7 dots",
        ]
        + [
            "The answer is 7.",
            "There are 7 red dots.",
            "It is 7",
            "14/2",
            "n = 7",
            "3+4",
            "7 in total",
            "C. 7",
            "3 + 4 = 7",
        ],
        [
            "77",
            "-7",
            "7.01",
            "17",
            "7/2",
            "3 or 7",
            "7 or 8",
            "7, 8",
            "6 or 7 dots",
            "not 7",
            "≠7",
            "x ≠ 7",
            "> 7",
            "x > 7",
        ]
        + [
            "≤7",
            "7!",
            "7x",
            "y = 2x+7",
            "7 million",
            "7^2",
            "seven hundred",
            "6",
            "",
            "7 7",
            "C",
            r"\boxed{6} \boxed{7}",
        ]
        + [
            "The answer is not 7",
            "It is never 7",
            "6-7",
            "7?8",
            "7:1",
            "7 hundred",
            "x + y = 7",
            "2x = 7",
            "(7, 7)",
            "±7",
            "7_2",
            "7'",
            r"7\%\%",
            r"\phantom{7}",
            r"7_{0}",
            r"7 \lor 8",
            r"7 \implies 8",
            "7 nope",
            "7 dots or 8 dots",
        ],
    ),
    (
        "1000000",
        ["1,000,000", "1000000", "10^6", r"10^{6}", "1 000 000", "1e6", r"1{,}000{,}000"],
        ["1000001", "100000"],
    ),
    ("1000000000000000000001", ["1000000000000000000001"], ["1000000000000000000000", "1e21"]),  # floats lose this
    ("1e400", ["10^{400}", "1" + "0" * 400], ["1e500", "inf", r"\infty"]),  # both would be inf as floats
    ("-3", ["-3", "−3", "–3", "- 3", "x = -3", "$-3$"], ["3", "±3", "--3"]),
    ("0", ["0", "0.0", "-0", "x = 0"], ["O", "", "1 = 0", "y + 1 = 0", "{}", "1"]),
    # decimals are exact
    ("3.14", ["3.14", "3.140", "314/100", "$3.14$"], ["3.15", "3.1415", r"\pi", "22/7", "3,14159"]),
    ("0.5", [".5", "1/2", r"\frac{1}{2}", "½", "0.50"], ["50%", "5", "0.05", "1/3"]),
    (
        r"\frac{8}{11}",
        ["8/11", r"\dfrac{8}{11}", r"$\frac{8}{11}$", "16/22", "8 / 11", "B. 8/11"],
        ["0.7272727", "11/8", "8"],
    ),
    ("1/3", [r"\frac13", "2/6", r"\frac{1}{3}"], ["0.333333", "0.33", "1/30"]),  # a rounded third is another number
    ("2.5", [r"2\frac{1}{2}", "2 1/2", "5/2", "2½"], ["2 1", "25", "21/2"]),
    ("-1/2", [r"-\frac{1}{2}", r"\frac{-1}{2}", "-0.5"], [r"\frac{1}{2}", "1/-3"]),
    ("3.2e-5", [r"3.2 \times 10^{-5}", "3.2×10⁻⁵", "0.000032"], ["3.2e5", "3.2"]),
    # percent: SEMANTICS 28
    ("50%", ["50", "50 %", r"50\%", "50 percent", "0.5", "1/2"], ["5%", "0.05", "0.5%", "5"]),
    ("50", ["50%", "50 percent"], ["0.5", "5000%"]),
    # units: missing on one side is right, of one quantity is converted, of another is wrong
    (
        "12 cm",
        [
            "12",
            "12cm",
            "12 cm.",
            r"12\text{ cm}",
            r"12 \mathrm{~cm}",
            "0.12 m",
            "120 mm",
            "12 centimeters",
            "x = 12 cm",
            "24/2 cm",
        ]
        + ["The perimeter is 12 cm.", "AB = 12 cm"],
        ["12 kg", "12 m", "12 cm^2", "12 cm²", "13 cm", "1.2 cm", "12 s", "12°", "12%", "12 apples", "12 cm or 13 cm"],
    ),
    ("0.5 m", ["50 cm", "0.5", "500 mm", "0.5 meters"], ["50 m", "5 cm", "50"]),
    (
        r"64 \text{ ft}^2",
        ["64", "64 ft^2", "64 ft²", "64 square feet", "64 sq ft", r"64 \mathrm{ft}^{2}"],
        ["64 ft", "64 ft^3", "64 m^2"],
    ),
    ("60 km/h", ["60", "60 km/h", "60 kilometers per hour", "1 km/min"], ["60 km", "60 m/s"]),
    (
        "90",
        ["90°", r"90^\circ", r"90^{\circ}", "90 degrees", r"\angle A = 90^\circ", "∠ABC = 90°", "∠1 = 90°"],
        ["9", "90.5°"],
    ),
    ("45°", ["45", "45 degrees", r"45^{\circ}"], ["45 cm", "54°"]),
    ("$5", ["5", "$5", r"\$5", "5 dollars", "$5.00", "500 cents"], ["$50", "5 euros"]),
    ("5 people", ["5", "5 people"], ["5 kg", "6 people", "5 dogs"]),
    (
        "12",
        ["12 square units", "12 units", r"12 \text{ cm}", "12 apples"],
        ["12 dozen", "12 or more", "12 squared", "about 12 or 13"],
    ),
    # roots, pi and expressions go to math-verify; no rounding there either
    (
        r"2 \sqrt { 221 }",
        [
            r"2\sqrt{221}",
            "2√221",
            r"$2\sqrt{221}$",
            "2√(221)",
            "2*sqrt(221)",
            r"\sqrt{884}",
            r"x = 2\sqrt{221}",
            r"2\sqrt{221} cm",
        ],
        ["221", "2", "29.73", "29.732137494637", r"\sqrt{221}", "442", r"2\sqrt{22}1", r"-2\sqrt{221}"],
    ),
    (
        r"2\pi",
        ["2π", "2 pi", r"2 \pi", r"\pi + \pi", r"2\pi cm", r"\frac{4\pi}{2}"],
        ["6.28", "6.283185307179586", r"\pi^2", "2"],
    ),
    (r"20\sqrt{2} mm", [r"2\sqrt{2} cm", r"20\sqrt2"], [r"2\sqrt{2}", r"20\sqrt{2} cm"]),
    (
        "2x+3",
        ["2x + 3", "3+2x", "y = 2x+3", r"$2x+3$", "2(x+1)+1", "2*x+3"],
        ["2x-3", "3", "2y+3", "5x", "2x+3 or 3", "x = 3"],
    ),
    ("(x+1)^2", ["x^2+2x+1", "(1+x)²"], ["x^2+1", "x^2"]),
    ("x^{10}", ["x^10", "x**10"], ["x^1", "10x", "x"]),
    (
        r"\frac{\sqrt{3}}{2}",
        ["√3/2", r"\sqrt{3}/2", r"\dfrac{\sqrt3}{2}", r"\sqrt{\frac{3}{4}}"],
        ["0.8660254", r"\frac{\sqrt{2}}{2}"],
    ),
    # equations and inequalities
    ("x = 5", ["5", "x = 5", "x=5", "$x=5$", "5.0"], ["y = 5", "x = 6", "x > 5", "x ≠ 5", "x + 5"]),
    ("x = 0", ["x=0", "0"], ["y = 0", "x + 1 = 0", "x^2+1=0", "0=0"]),
    ("x^2+y^2=1", ["y^2+x^2=1", "x^2+y^2-1=0", "x² + y² = 1"], ["x^2+y^2=2", "1", "0=0", "x^2-y^2=1", "x+y=1"]),
    ("y = 2x+3", ["2x+3", "y=3+2x", "2x - y + 3 = 0"], ["y=2x", "3", "x=2y+3", "y > 2x+3"]),
    ("x > 5", ["x>5", "5 < x", r"x \gt 5"], ["x ≥ 5", "x < 5", "5", "x = 5", "x > 6", "y > 5"]),
    (r"x \leq -2", ["x ≤ -2", "x<=-2", r"x \leqslant -2"], ["x < -2", "x ≥ -2", "-2"]),
    # several values: count, order, brackets
    (
        "3, 4",
        ["3,4", "4, 3", "3 and 4", "3 or 4", r"\{3, 4\}", "{4,3}", r"3 \text{ and } 4"],
        ["3", "4", "3, 4, 5", "3, 5", "7", "34", "3 4"],
    ),
    (
        "(3, 4)",
        ["(3,4)", r"\left(3, 4\right)", "( 3 , 4 )", "(3.0, 8/2)"],
        ["(4, 3)", "34", "[3, 4]", "(3, 4]", "3", "(3, 4, 5)"],
    ),
    ("(1,2), (3,4)", ["(3,4),(1,2)", "(1, 2) and (3, 4)"], ["(2,1), (3,4)", "(1,2)"]),
    ("[0, 1)", ["[0,1)", r"\left[0,1\right)"], ["(0,1)", "[0,1]", "0,1"]),
    (r"(-\infty, 5]", ["(-∞, 5]"], ["(-∞, 5)", r"(\infty, 5]", "5"]),
    (r"\pm 3", ["±3", "3, -3", "-3 or 3", "x = ±3"], ["3", "-3", "9"]),
    ("x=1, y=2", ["y=2, x=1", "x = 1 and y = 2"], ["x=2, y=1", "1", "2, 1"]),
    # words: case, stop and spaces don't matter, every word does
    (
        "Yes",
        ["yes", "Yes.", "YES", "Yes, it is parallel.", "Yes it is", "**Yes**", "The answer is yes"],
        ["No", "yes or no", "Yes and no", "No, yes", "maybe"],
    ),
    ("No", ["no", "No.", "No, they are not."], ["Yes", "None", "Not yes"]),
    (
        "the red circle",
        ["The red circle.", "the  red circle", "The answer is the red circle"],
        ["the blue circle", "red", "circle", "red the circle"],
    ),
    ("isosceles triangle", ["Isosceles triangle"], ["triangle", "equilateral triangle"]),
    ("dog", ["Dog"], ["god", "d*o*g"]),  # not a product of symbols
    ("3:45", ["3:45", "3 : 45", "The time is 3:45."], ["3:54", "3", "1/15", "0.0666"]),
    (r"\triangle ABC \cong \triangle DEF", [r"\triangle ABC\cong\triangle DEF"], [r"\triangle ABC"]),
    ("三角形", ["三角形", "三角形。"], ["正方形"]),
    ("12厘米", ["12", "12 cm", "１２厘米"], ["12千克", "13厘米"]),
]
TABLE = [(g, a, True) for g, right, _ in ANSWERS for a in right] + [
    (g, a, False) for g, _, wrong in ANSWERS for a in wrong
]

TOWER = "9^{9^{9^{9}}}"
HOSTILE = {
    "power tower": TOWER,
    "tower of **": "9**9**9**9",
    "tower through a fraction": r"9^{\frac{9^{99}}{1}}",
    "tower in brackets": "(9^9)^(9^9)^9",
    "huge exponent": "10^{100000000}",
    "huge scientific": "1e999999999",
    "exponent too long for int": "1e" + "9" * 5000,
    "factorial": "99999999!",
    "factorial of a factorial": "((9!)!)!",
    "double factorial": "9!!!!!!",
    "binomial": r"\binom{99999999}{44444444}",
    "long sum": r"\sum_{i=1}^{10000000000} \frac{1}{i}",
    "product": r"\prod_{i=1}^{999999} i",
    "integral": r"\int_0^1 \sin(\cos(\tan(e^{x^x}))) dx",
    "hard root": r"\sqrt[99]{x^{98}+x^{97}+x+1} + \sqrt[98]{x^{99}+1}",
    "deep brackets": "(" * 500 + "1" + ")" * 500,
    "very deep brackets": "(" * 100_000,
    "deep braces": r"\frac{1}{" * 100 + "1" + "}" * 100,
    "deep roots": r"\sqrt{" * 60 + "2" + "}" * 60,
    "megabyte": "1+" * 500_000,
    "megabyte of spaces": "7" + " " * 1_000_000 + "8",
    "regex bomb of letters": "a" * 9_000 + "!",
    "regex bomb of numbers": "1,111" * 1_900 + "x",
    "regex bomb of spaces": "1" + " " * 9_000 + "x",
    "regex bomb of signs": "-" * 9_000,
    "regex bomb of brackets": "(a" * 4_000,
    "regex bomb of roots": r"\sqrt(" * 1_500,
    "regex bomb of units": "7 " + "cm " * 3_000,
    "regex bomb of labels": "_a" * 4_000 + "=7",
    "regex bomb of digits": "7" * 9_000 + "x",
    "regex bomb of dollars": "$" * 9_000,
    "regex bomb of backslashes": "\\" * 9_000,
    "regex bomb of lead-ins": "the answer is " * 700,
    "regex bomb of words": "The " + "is " * 3_000,
    "null bytes": "7\x00\x00",
    "lone surrogate": "\ud800 8",
    "right to left": "\u202e7\u202c8",
    "code": "__import__('os').system('touch /tmp/hfrrf_was_here')",
    "code in LaTeX": r"\text{__import__('os')._exit(0)}",
    "shell": "$(touch /tmp/hfrrf_was_here)",
    "JSON": '7"]\n["same", ["7", "7"]]',
    "newlines": "8\n" * 4_000,
    "million digits": "8" * 1_000_000,
    "big matrix": r"\begin{pmatrix}" + r"\\".join(["&".join(["1"] * 100)] * 90) + r"\end{pmatrix}",
    "matrix power": r"\begin{pmatrix}1&x\\y&2\end{pmatrix}^{999}",
    "many letters": "+".join(f"{a}{b}" for a in "abcdefgh" for b in "stuvwxyz"),
    "big polynomial": "(a+b+c+d+e+f)^{99}+(a-b-c-d-e-f)^{98}",
    "zero division": r"\frac{7}{0}",
    "nan": "nan",
    "long list": ",".join(["x^2+1"] * 80),
    "empty box": r"\boxed{}",
    "unbalanced": r"\frac{7}{",
}

ENDS_THE_WORKER = ("tower through a fraction", "binomial", "matrix power", "big polynomial")


@pytest.mark.parametrize(("gold", "answer", "right"), TABLE, ids=lambda value: repr(value)[:40])
def test_grade(gold, answer, right):
    assert grade(gold, answer) is right


@pytest.mark.parametrize("gold", ["7", "B", "Yes", "x+1", "(1, 2)", "x > 5", "a red dot"])
def test_hostile_answers_are_wrong_and_bounded(gold, monkeypatch):
    monkeypatch.setattr(grading, "CPU_SECONDS", 0.2)
    grading._worker.stop()
    for kind, answer in HOSTILE.items():
        if gold == "7" and kind in ENDS_THE_WORKER:
            continue  # seen with x+1
        start = time.perf_counter()
        assert grade(gold, answer) is False, kind
        assert time.perf_counter() - start < grading.WALL_SECONDS, kind
    assert grade(r"2\sqrt{3}", r"\sqrt{12}"), "the worker still works"
    grading._worker.stop()
    assert not os.path.exists("/tmp/hfrrf_was_here")


@pytest.mark.parametrize(
    "text",
    [TOWER, "7" * 1_000_000, "7" * 5000, HOSTILE["big matrix"], "99999999!", "\ud800 a", "(" * 5_000 + "a"],
    ids=lambda t: t[:12],
)
def test_equal_text_passes_before_any_parsing(text):
    assert grade(text, text)
    assert not grade(text, text + "8")


def test_digits_beyond_the_limit_of_int():
    assert grade("7" * 5000, "7" * 5000 + ".0")
    assert not grade("7" * 5000, "7" * 4999 + "8")


@pytest.mark.parametrize("gold", ["", "  ", "$$", "**", ".", "Final Answer:", "?", r"\frac{1}{", "3+", None, 7])
def test_a_gold_that_cannot_be_graded(gold):
    assert check_gold(gold)
    with pytest.raises(ValueError, match="can't be graded"):
        grade(gold, "7")
    with pytest.raises(ValueError, match="can't be graded"):
        hfrrf(["<think>a</think><answer>7</answer>"], [gold])


@pytest.mark.parametrize(
    "gold", [row[0] for row in ANSWERS] + [TOWER, "7" * 20_000, "O'Brien", "10:15", "A, C", "5' 6\""]
)
def test_a_gold_that_can_be_graded(gold):
    assert check_gold(gold) is None
    assert grade(gold, gold)


FORMATS = [
    ("<think>a</think><answer>7</answer>", "7"),
    ("<think> a </think><answer> Final Answer:7 </answer>", "7"),
    ("<think>a</think>\n\n<answer>final answer : B. 65</answer>\n", "B. 65"),
    (" \n<think>\na\n</think> <answer>\n7\n</answer><|im_end|>\n", "7"),
    ("<think>a</think><answer>7</answer><|im_end|><|endoftext|>", "7"),
    ("<think></think><answer>7</answer>", "7"),  # nothing says that thinking is obligatory
    ("<think>is 1 < 2 <b>?</think><answer>x < 5</answer>", "x < 5"),
    ("<think>the word answer</think><answer>a</b></answer>", "a</b>"),
    ("", None),
    ("7", None),
    ("<answer>7</answer>", None),
    ("<think>a</think>", None),
    ("<think>a</think>7", None),
    ("<think>a</think><answer>7", None),  # cut off
    ("<think>a<answer>7</answer>", None),
    ("a</think><answer>7</answer>", None),
    ("x<think>a</think><answer>7</answer>", None),
    ("<think>a</think>so<answer>7</answer>", None),
    ("<think>a</think><answer>7</answer>.", None),
    ("<think>a</think><answer>7</answer><|im_end|>more", None),
    ("<|im_end|><think>a</think><answer>7</answer>", None),
    ("<think>a</think><answer></answer>", None),
    ("<think>a</think><answer> \n </answer>", None),
    ("<think>a</think><answer> Final Answer: </answer>", None),
    ("<Think>a</Think><Answer>7</Answer>", None),
    ("<THINK>a</THINK><answer>7</answer>", None),
    ("<think >a</think><answer>7</answer>", None),
    ("<think>a<think>b</think><answer>7</answer>", None),
    ("<think>a</think></think><answer>7</answer>", None),
    ("<think>a <answer>7</answer> </think><answer>7</answer>", None),
    ("<think>say </answer> now</think><answer>7</answer>", None),
    ("<think>a</think><answer><think>7</answer>", None),
    ("<think>a</think><answer>7</answer><answer>8</answer>", None),
    ("<think>a</think><answer><answer>7</answer></answer>", None),
    ("<answer>7</answer><think>a</think>", None),
    ("</think>a<think><answer>7</answer>", None),
    ("<think>a<answer></think>7</answer>", None),
    ("<think>a</answer><answer>7</think>", None),
    ("<think>a</think>\x00<answer>7</answer>", None),
    ("<think>" * 200_000, None),
    ("<think>a</think>" + "<answer>" * 200_000 + "</answer>", None),
]


@pytest.mark.parametrize(("text", "answer"), FORMATS, ids=lambda value: repr(value)[:50])
def test_parse_format(text, answer):
    assert parse_format(text) == answer


def test_a_megabyte_of_thinking_is_no_problem():
    assert hfrrf([f"<think>{'wait, ' * 200_000}</think><answer>7</answer>"], ["7"]) == [1.0]


GOOD, WRONG = "<think>a</think><answer> Final Answer:7 </answer>", "<think>a</think><answer>8</answer>"
NO_FORMAT = "so <answer>6</answer>, wait, <answer>7</answer>"
CUT = "<think>a</think><answer>7"


def test_hfrrf_takes_trls_forms_and_reports():
    texts, logged = [GOOD, WRONG, NO_FORMAT, CUT], {}
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    blocks = [
        [{"role": "assistant", "content": [{"type": "text", "text": text[:9]}, {"type": "text", "text": text[9:]}]}]
        for text in texts
    ]
    for completions in (texts, conversations, blocks):
        assert hfrrf(completions, ["7"] * 4, log_metric=logged.__setitem__, prompts=[None] * 4) == [1.0, 0.0, 0.0, 0.0]
        assert logged == {"format_rate": 0.5, "accuracy_rate": 0.5, "grader_timeouts": 0}
        assert format_reward(completions, solution=["7"] * 4) == [1.0, 1.0, 0.0, 0.0]
        assert accuracy_reward(completions, ["7"] * 4, trainer_state=None) == [1.0, 0.0, 1.0, 0.0]
    assert hfrrf([], []) == []
    assert (
        hfrrf([[], [{"role": "assistant", "content": ""}], [{"role": "assistant", "content": None}]], ["7"] * 3)
        == [0.0] * 3
    )
    with pytest.raises(ValueError, match="zip"):
        hfrrf(texts, ["7"])


def test_the_order_of_a_batch_does_not_matter():
    rows = TABLE[:: max(1, len(TABLE) // 40)]
    texts, golds = [f"<think>a</think><answer>{a}</answer>" for _, a, _ in rows], [g for g, _, _ in rows]
    assert hfrrf(texts, golds) == hfrrf(texts[::-1], golds[::-1])[::-1]


def test_the_same_verdicts_from_other_threads():
    rows, wrong = TABLE[::3], []

    def work(part):
        wrong.extend(row for row in rows[part::4] if grade(row[0], row[1]) is not row[2])
        wrong.extend(k for k in ("power tower", "integral") if grade("x+1", HOSTILE[k]))

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_dead_worker_is_replaced():
    assert grade(r"2\sqrt{3}", r"\sqrt{12}")
    first = grading._worker.process
    first.kill()
    first.wait()
    assert grade(r"2\sqrt{5}", r"\sqrt{20}"), "killed between two items: no item is lost"
    assert grading._worker.process.pid != first.pid


def test_a_worker_killed_in_the_middle_costs_its_item_only(monkeypatch):
    assert grade(r"2\sqrt{3}", r"\sqrt{12}")
    pid = grading._worker.process.pid
    read = grading._worker._read

    def killed(seconds):
        grading._worker.process.kill()
        grading._worker.process.wait()
        monkeypatch.setattr(grading._worker, "_read", read)
        return read(seconds)

    check_gold(r"2\sqrt{7}")
    monkeypatch.setattr(grading._worker, "_read", killed)
    assert not grade(r"2\sqrt{7}", r"\sqrt{2 \cdot 14}"), "the item scores 0 and raises nothing"
    assert grade(r"2\sqrt{7}", r"\sqrt{28}")
    assert grading._worker.process.pid != pid


def test_a_late_reply_is_not_the_next_items(monkeypatch):
    assert grade(r"2\sqrt{3}", r"\sqrt{12}")

    def interrupted(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grading._worker, "_read", interrupted)
        grade(r"2\sqrt{3}", r"\sqrt{13-1}")
    assert not grade(r"2\sqrt{3}", r"\sqrt{13}")


def test_the_wall_clock_is_the_last_resort(monkeypatch):
    assert grade(r"2\sqrt{3}", r"\sqrt{12}")
    monkeypatch.setattr(grading, "WALL_SECONDS", 0.2)
    os.kill(grading._worker.process.pid, 19)  # SIGSTOP: uses no CPU time and never answers
    assert not grade(r"2\sqrt{3}", r"\sqrt{6+6}")
    monkeypatch.undo()
    assert grade(r"2\sqrt{3}", r"\sqrt{6+6}")


SCRIPT = """
import multiprocessing, sys, threading
from vision_r1_recipes import grading
assert not {"torch", "trl", "transformers", "sympy", "math_verify"} & set(sys.modules), "imports stay light"
print("main runs")
def one(queue=None):
    verdict = grading.grade(r"2\\\\sqrt{3}", r"\\\\sqrt{12}")
    print(grading._worker.process.pid, verdict, flush=True)
one()
thread = threading.Thread(target=one); thread.start(); thread.join()
child = multiprocessing.get_context("fork").Process(target=one); child.start(); child.join()
if sys.argv[1] == "raise":
    raise KeyboardInterrupt
"""


@pytest.mark.parametrize("end", ["exit", "raise"])
def test_no_worker_is_left_behind(tmp_path, end):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("\\\\\\\\", "\\\\").replace("\\\\", "\\"))
    result = subprocess.run(
        [sys.executable, str(script), end], capture_output=True, text=True, timeout=60, check=False
    )
    lines = result.stdout.split("\n")
    assert lines.count("main runs") == 1, "no worker runs the user's script again"
    pids, verdicts = zip(*(line.split() for line in lines[1:] if line), strict=True)
    assert verdicts == ("True",) * 3, result.stderr
    assert pids[0] == pids[1] != pids[2], "a thread shares the worker, a forked child has its own"
    deadline = time.monotonic() + 20
    while alive := [
        pid
        for pid in pids
        if os.path.exists(f"/proc/{pid}") and "grading.py" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    ]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
