# ruff: noqa: RUF001
"""The rewards: golden cases, properties, hostile answers, TRL's call forms, and the life of the worker processes."""

import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from vision_r1_recipes import golds
from vision_r1_recipes.grading import POOL, grade_all, workers
from vision_r1_recipes.rewards import accuracy_reward, check_gold, format_reward, grade, hfrrf, parse_format


GOLDEN = yaml.safe_load(pathlib.Path(__file__).with_name("golden").joinpath("answers.yaml").read_text())
CASES = [
    (entry["gold"], answer, key == "right")
    for entry in GOLDEN
    for key in ("right", "wrong")
    for answer in entry.get(key, [])
]
HARD = [(r"2\sqrt{3}", rf"\sqrt{{12 \cdot {n}^2}} / {n}") for n in range(2, 40)]  # only sympy can tell

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
    "long decimal": "7." + "0" * 500_000 + "1",
    "brackets around a million digits": "(" * 60 + "8" * 1_000_000 + ")" * 60,
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


# What no look at the text gives away: the worker's clock ends it.
BOMBS = [
    r"\binom{99999999}{44444444}",
    "e^{e^{e^{e^{e}}}}",
    "(10^{9})!",
    r"9^{\frac{9^{99}}{1}}",
]


def slowly(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture
def impatient(monkeypatch):
    """A short clock for the workers, who all start anew."""
    monkeypatch.setattr(workers, "CPU_SECONDS", 0.2)
    POOL.stop()
    yield
    POOL.stop()


@pytest.mark.parametrize("entry", GOLDEN, ids=lambda entry: f"{entry['kind']}-{entry['gold'][:20]!r}")
def test_golden(entry):
    for answer in entry.get("right", ()):
        assert grade(entry["gold"], answer) is True, (entry["reason"], answer)
    for answer in entry.get("wrong", ()):
        assert grade(entry["gold"], answer) is False, (entry["reason"], answer)


def test_the_golden_file_is_what_it_says():
    assert len(CASES) >= 500
    assert len(set(CASES)) == len({case[:2] for case in CASES}) == len(CASES)
    assert all(entry["kind"] and entry["reason"] for entry in GOLDEN)


# -------- hostile answers


@pytest.mark.parametrize("gold", ["x+1", *slowly("7", "B", "Yes", "(1, 2)", "x > 5", "a red dot")])
def test_hostile_answers_are_wrong(gold, impatient):
    for kind, answer in HOSTILE.items():
        assert grade(gold, answer) is False, kind
    assert grade(*next(unused)), "the worker still works"
    assert not os.path.exists("/tmp/hfrrf_was_here")


def test_the_clock_ends_what_hangs(impatient):
    logged = {}
    texts = [f"<think>a</think><answer>{bomb}</answer>" for bomb in (*BOMBS, *BOMBS, "1+x")]
    assert hfrrf(texts, ["x+1"] * len(texts), log_metric=logged.__setitem__) == [0.0] * 8 + [1.0]
    assert logged["grader_timeouts"] == 8, "a time-out is wrong, counted, and costs its own item only"


@pytest.mark.parametrize(
    "text",
    [TOWER, "7" * 1_000_000, "7" * 5000, HOSTILE["big matrix"], "99999999!", "\ud800 a", "(" * 5_000 + "a", *BOMBS],
    ids=lambda text: text[:12],
)
def test_equal_text_passes_before_any_parsing(text):
    assert grade(text, text)
    assert not grade(text, text + "8")


def test_digits_beyond_the_limit_of_int():
    assert grade("7" * 5000, "7" * 5000 + ".0")
    assert grade("7", "7." + "0" * 500_000)
    assert not grade(r"\frac{1}{3}", "0." + "3" * 500_000)
    assert grade("7" * 20_000, f"{'7' * 2},{','.join(['777'] * 6666)}")
    assert not grade("7" * 20_000, "7" * 19_999 + "8")
    assert not grade("7" * 5000, "7" * 4999 + "8")


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(["7", "B", "Yes", "x+1", "(1, 2)", "x > 5", "a red dot", "12 cm"]), st.text(max_size=60))
def test_no_answer_raises(gold, answer):
    assert grade(gold, answer) in (True, False)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from([*"0127xyB ().,:;=<>+-*/^_{}[]|!%$°√π−\\", r"\frac", r"\sqrt", "or", "cm"]), max_size=12
    ).map("".join)
)
def test_a_gold_is_refused_or_equals_itself(gold):
    if check_gold(gold) is None:
        assert grade(gold, gold)


# -------- properties

NUMBERS = st.one_of(
    st.integers(-(10**7), 10**7).map(Fraction),
    st.builds(Fraction, st.integers(-999, 999), st.integers(2, 60)),
    st.builds(lambda n, k: Fraction(n, 10**k), st.integers(-(10**6), 10**6), st.integers(1, 4)),
)
# What a model puts around an answer, from the inside out.
WRAPPERS = [
    ["{}", " {} ", "${}$", r"\boxed{{{}}}", r"$\boxed{{{}}}$", "**{}**", r"\( {} \)", "`{}`"],
    ["{}", "x = {}", "({})"],
    ["{}", "{}.", "Final Answer:{}", "The answer is {}", "Therefore, the answer is {}.", "答案：{}"],
]


@st.composite
def styled(draw, values=NUMBERS):
    """`(value, text)`: a number in one of the ways to write it."""
    value = draw(values)
    sign, size = "-" if value < 0 else "", abs(value)
    forms = [f"{value.numerator}/{value.denominator}", rf"{sign}\frac{{{size.numerator}}}{{{size.denominator}}}"]
    forms.append(rf"\dfrac{{{3 * value.numerator}}}{{{3 * value.denominator}}}")
    if value.denominator == 1:
        forms += [str(value), f"{int(value):,}", f"{value}.0", str(value).replace("-", "−")]
        forms.append(str(value).translate(str.maketrans("0123456789", "０１２３４５６７８９")))
    elif size > 1:
        whole, rest = divmod(size, 1)
        forms.append(f"{sign}{whole} {rest.numerator}/{rest.denominator}")
    if 10**6 % value.denominator == 0:
        forms.append(
            f"{sign}{size.numerator * 10**6 // size.denominator // 10**6}."
            f"{size.numerator * 10**6 // size.denominator % 10**6:06d}"
        )
    return value, draw(st.sampled_from(forms))


@settings(deadline=None, max_examples=200)
@given(st.data(), st.tuples(*map(st.sampled_from, WRAPPERS)))
def test_equal_numbers_stay_right_in_any_style(data, wrappers):
    value, gold = data.draw(styled())
    _, answer = data.draw(styled(st.just(value)))
    assume(not ("," in answer and "({})" in wrappers))  # a pair
    for wrapper in wrappers:
        answer = wrapper.format(answer)
    assert grade(gold, answer), (gold, answer)


@settings(deadline=None, max_examples=200)
@given(styled(), styled())
def test_other_numbers_stay_wrong(one, other):
    assume(one[0] != other[0])
    gold, answer = one[1], other[1]
    assert not grade(gold, answer)
    for hedge in (
        "{0} or {1}",
        "{1}, {0}",
        r"\boxed{{{0}}} \boxed{{{1}}}",
        "{0} and {1}",
        "({0}, {1})",
        "not {0}",
        "{1} = {0}",
    ):
        assert not grade(gold, hedge.format(gold, answer)), hedge


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 12),
    st.integers(2, 40),
    st.integers(1, 9),
    st.sampled_from(["{}", "${}$", "x = {}", r"\boxed{{{}}}"]),
)
def test_roots_and_polynomials(a, b, c, wrapper):
    for gold, right, wrong in [
        (rf"{a} \sqrt {{ {b} }}", rf"\sqrt{{{a * a * b}}}", rf"\sqrt{{{a * a * b + c}}}"),
        (rf"{a}\pi", f"π·{a}", rf"{a + c}\pi"),
        (
            f"(x+{a})(x-{b})",
            f"x^2+{a - b}x-{a * b}".replace("+-", "-"),
            f"x^2+{a - b + c}x-{a * b}".replace("+-", "-"),
        ),
        (f"({a}, {b})", rf"\left({a}, \frac{{{b * c}}}{{{c}}}\right)", f"({a}, {b + c})"),
        (f"{a} cm", f"{a * 10} mm", f"{a * 10 + c} mm"),
    ]:
        assert grade(gold, wrapper.format(right)), (gold, right)
        assert not grade(gold, wrapper.format(wrong)), (gold, wrong)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.permutations(range(0, len(CASES), 12)))
def test_the_order_of_a_batch_does_not_matter(order):
    texts, solutions = (
        [f"<think>a</think><answer>{CASES[i][1]}</answer>" for i in order],
        [CASES[i][0] for i in order],
    )
    expected = [float(CASES[i][2] and bool(CASES[i][1].strip())) for i in order]
    assert hfrrf(texts, solutions) == expected


# Each says something else, wherever it stands.
INTRUDERS = [*"3489xyB?/^_<>|'&@²不", "\\pm ", " or ", " not ", " 4"]


@pytest.mark.parametrize(
    "gold", ["347", "2.75", "38/11", "2x+13", "(12, 35)", "x > 57", "12 cm", "15π", "[10, 25)", "the red circle"]
)
def test_an_intruder_makes_it_wrong(gold):
    answers = [gold[:i] + intruder + gold[i:] for i in range(len(gold) + 1) for intruder in INTRUDERS]
    answers = [answer for answer in answers if answer != "B(12, 35)"]  # a point may have a name
    verdicts = grade_all([gold] * len(answers), answers)
    assert not [answer for answer, right in zip(answers, verdicts, strict=True) if right]


# -------- golds


@pytest.mark.parametrize(
    "gold",
    [
        *("", "  ", "$$", "**", ".", "Final Answer:", "?", r"\frac{1}{", "3+", "x =", "x <", "1/0", None, 7),
        *(r"\text{}", r"$\mathrm{ }$", "![](a.png)", "![the graph](images/3.jpg)", r"\includegraphics{a.png}"),
        *("see the figure", "See figure.", "as shown in the figure", "Omitted", "略", "（略）", "答案略。", "见解析"),
        *("Answers will vary", "The answer is", "解:略", "解析略", "答案不唯一"),
        *(r"\begin{cases} x=1", r"x=1 \end{cases}"),
    ],
)
def test_a_gold_that_cannot_be_graded(gold):
    assert check_gold(gold)
    with pytest.raises(ValueError, match="can't be graded"):
        grade(gold, "7")
    with pytest.raises(ValueError, match="can't be graded"):
        hfrrf(["<think>a</think><answer>7</answer>"], [gold])


@pytest.mark.parametrize(
    "gold",
    [entry["gold"] for entry in GOLDEN]
    + [
        TOWER,
        "7" * 20_000,
        "O'Brien",
        "10:15",
        r"\text{cm}",
        "the figure on the left",
        "图1",
        "省略号",
        "none",
        "5' 6\"",
        r"\begin{cases} a+b=1 \\ a-b=2 \end{cases}",
    ],
)
def test_a_gold_that_can_be_graded(gold):
    assert check_gold(gold) is None
    assert grade(gold, gold)


def test_the_golds_of_a_dataset(tmp_path, capsys):
    file = tmp_path / "rl.jsonl"
    lines = [
        '"7"',
        '"7"',
        r'"2 \\sqrt { 3 }"',
        '"B"',
        '"A, C"',
        '"12 cm"',
        '"see figure"',
        '"0,5"',
        r'"\\frac{1}{"',
        "null",
    ]
    file.write_text("".join(f'{{"answer": {line}}}\n' for line in lines))
    assert golds.main(["check", str(file)]) == 1
    said = capsys.readouterr().out
    assert "10 golds, 9 different" in said
    for line in (
        r"2  number                   '7'",
        r"1  expression               '2 \\sqrt { 3 }'",
        "1  option letter            'B'",
        "can't be graded: 3",
        r"1  unbalanced braces, for example row 8 '\\frac{1}{'",
        "1  empty, for example row 9 None",
        "1  several option letters: all of them are asked for, for example row 4 'A, C'",
        "1  a comma that may be decimal, for example row 7 '0,5'",
        "1  the answer is elsewhere, for example row 6 'see figure'",
    ):
        assert line in said, said
    file.write_text('{"answer": "7"}\n')
    assert golds.main(["check", str(file)]) == 0
    file.write_text('{"text": "7"}\n')
    with pytest.raises(SystemExit):
        golds.main(["check", str(file)])
    assert "no column solution, answer or conversations" in capsys.readouterr().err


def test_the_golds_of_a_cold_start(toy, capsys):
    assert golds.main(["check", str(toy / "cold/vision_r1_llava_cot_full.json")]) == 0
    assert "can't be graded: 0" in capsys.readouterr().out


# -------- format

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


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "<answer>", "</answer>", "a", " ", "7", "\n", "<|im_end|>"]),
        max_size=12,
    )
)
def test_only_one_order_of_tags_is_right(parts):
    text = "".join(parts)
    if parse_format(text) is not None:
        assert [part for part in parts if part[0] == "<" and "|" not in part] == [*parse_tags()]
        assert text.strip().startswith("<think>")


def parse_tags():
    return "<think>", "</think>", "<answer>", "</answer>"


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
    assert hfrrf([[{"role": "assistant"}]], ["7"]) == [0.0]
    assert (
        hfrrf([[], [{"role": "assistant", "content": ""}], [{"role": "assistant", "content": None}]], ["7"] * 3)
        == [0.0] * 3
    )
    with pytest.raises(ValueError, match="zip"):
        hfrrf(texts, ["7"])


def test_thinking_that_the_generation_prompt_has_opened():
    prefilled, whole = "a</think><answer>7</answer>", GOOD
    assert hfrrf([prefilled, whole], ["7"] * 2, generation_prefix=["<think>"] * 2) == [1.0, 0.0]
    assert hfrrf([prefilled, whole], ["7"] * 2, generation_prefix=[""] * 2) == [0.0, 1.0]
    assert format_reward([prefilled, whole]) == [0.0, 1.0]


# -------- worker processes


def test_the_same_verdicts_from_other_threads():
    rows, wrong = CASES[::3], []

    def work(part):
        wrong.extend(row for row in rows[part::4] if grade(row[0], row[1]) is not row[2])
        answers = [answer for _, answer in HARD[part::4]]
        wrong.extend(v for v in grade_all([HARD[0][0]] * len(answers), answers) if v is not True)

    threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def fresh():
    """The pool's one busy worker, started, and a question that no cache knows."""
    POOL.stop()
    assert grade(*next(unused))
    (worker,) = [worker for worker in POOL.workers if worker.process and worker.process.poll() is None]
    return worker


unused = iter((r"2\sqrt{5}", rf"\sqrt{{20 \cdot {n}^2}} / {n}") for n in range(2, 1000))


def test_a_dead_worker_is_replaced():
    worker = fresh()
    first = worker.process
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert grade(*next(unused)), "killed between two items: no item is lost"
    assert worker.process.pid != first.pid


def test_a_worker_killed_in_the_middle_costs_its_item_only(monkeypatch):
    worker = fresh()
    read, first = workers.Worker._read, worker.process

    def killed(self, seconds):
        monkeypatch.setattr(workers.Worker, "_read", read)
        self.stop()
        return read(self, seconds)

    monkeypatch.setattr(workers.Worker, "_read", killed)
    assert not grade(*next(unused)), "the item scores 0 and raises nothing"
    assert grade(*next(unused))
    assert worker.process.pid != first.pid


def test_a_late_reply_is_not_the_next_items(monkeypatch):
    fresh()

    def interrupted(self, seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(workers.Worker, "_read", interrupted)
        grade("2x+1", "1+x+x")  # right, which the worker says too late
    assert not grade("2x+1", "3+x+x")
    assert grade(*next(unused))


def test_the_wall_clock_is_the_last_resort(monkeypatch):
    worker = fresh()
    monkeypatch.setattr(workers, "WALL_SECONDS", 0.2)
    os.killpg(worker.process.pid, signal.SIGSTOP)  # uses no CPU time and never answers
    assert not grade(*next(unused))
    monkeypatch.undo()
    assert grade(*next(unused))


def test_the_clock_costs_no_import(impatient):
    worker = fresh()
    keeper = worker.process.pid
    assert grade_all(["x+1"], [BOMBS[0]]) == [None]
    assert grade(*next(unused))
    assert worker.process.pid == keeper, "its child alone was ended"


SCRIPT = """
import multiprocessing, os, sys, threading, time
from vision_r1_recipes import grading
assert not {"torch", "trl", "transformers", "sympy", "math_verify"} & set(sys.modules), "imports stay light"
def one(answer="x+x+1"):
    verdict = grading.grade("2x+1", answer)
    pids = [worker.process.pid for worker in grading.POOL.workers if worker.process]
    print(*pids, verdict, flush=True)
if __name__ == "__main__":
    print("main runs")
    one()
    thread = threading.Thread(target=one); thread.start(); thread.join()
    for method in ("fork", "spawn"):
        child = multiprocessing.get_context(method).Process(target=one, args=("x+1+x",))
        child.start(); child.join()
    if sys.argv[1] == "raise":
        raise KeyboardInterrupt
    if sys.argv[1] == "wait":
        print("waits", flush=True)
        grading.grade_all(["x+1"] * 9, [rf"\\binom{{99999999}}{{4444444{i}}}" for i in range(9)])
"""


def alive(pids):
    return [
        pid
        for pid in pids
        if os.path.exists(f"/proc/{pid}") and "serve" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    ]


def children(pid):
    return pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


@pytest.mark.parametrize("end", ["exit", *slowly("SIGINT", "raise", "SIGTERM", "SIGKILL")])
def test_no_worker_is_left_behind(tmp_path, end):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), "wait" if end.startswith("SIG") else end], stdout=subprocess.PIPE, text=True
    )
    lines = [process.stdout.readline().strip() for _ in range(5)]
    assert lines[0] == "main runs"
    pids, verdicts = zip(*(line.split() for line in lines[1:]), strict=True)
    assert verdicts == ("True",) * 4
    assert pids[0] == pids[1] and len(set(pids)) == 3, "a thread shares the worker, a child has its own"
    if end.startswith("SIG"):
        assert process.stdout.readline() == "waits\n"
        pids += tuple(children(process.pid)) + tuple(child for pid in children(process.pid) for child in children(pid))
        process.send_signal(getattr(signal, end))
    process.stdout.close()
    process.wait(60)
    deadline = time.monotonic() + 60
    while alive(pids):
        assert time.monotonic() < deadline, alive(pids)
        time.sleep(0.05)


TRAINING = r"""
import os, sys, threading
from datasets import Dataset
from PIL import Image
from vision_r1_recipes import VisionGRPOConfig, VisionGRPOTrainer, hfrrf
from vision_r1_recipes.grading import POOL

ANSWERS = ["1+2x", "x+x+1", "2x+3", r"\binom{99999999}{44444444}"]

def reward(completions, **kwargs):  # the model can't answer yet: answers that only sympy can tell
    texts = [f"<think>a</think><answer>{ANSWERS[i % 4]}</answer>" for i in range(len(completions))]
    rewards = hfrrf([[{"role": "assistant", "content": text}] for text in texts], **kwargs)
    assert rewards == [1.0, 1.0, 0.0, 0.0] * (len(texts) // 4), rewards
    return rewards

question = [{"role": "user", "content": "How long is it?"}]
rows = Dataset.from_list(
    [{"prompt": question, "image": Image.new("RGB", (84, 84)), "solution": "2x+1"}] * 8
)
args = VisionGRPOConfig(
    output_dir=sys.argv[2], stages=[{"max_completion_length": 8, "num_generations": 4, "steps": 2}],
    prompts_per_rollout=4, use_cpu=True, bf16=False, report_to="none",
)
trainer = VisionGRPOTrainer(sys.argv[1], reward_funcs=reward, args=args, train_dataset=rows)
thread = threading.Thread(target=trainer.train)
thread.start()
thread.join()
assert trainer.state.global_step == 2
log = trainer.state.log_history[0]
assert log["reward"] == 0.5 and log["accuracy_rate"] == 0.5 and log["grader_timeouts"] > 0, log
pids = [str(worker.process.pid) for worker in POOL.workers if worker.process]
assert pids
with open(f"{sys.argv[2]}/rank-{trainer.accelerator.process_index}", "w") as file:
    file.write(" ".join(pids))
"""


@pytest.mark.slow
def test_two_processes_that_train_in_a_thread(toy, tmp_path):
    (tmp_path / "train.py").write_text(TRAINING)
    config = pathlib.Path(__file__).parents[1] / "recipes/accelerate/ddp.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    command += [tmp_path / "train.py", toy / "model", tmp_path]
    subprocess.run(list(map(str, command)), check=True, timeout=300)
    pids = [pid for rank in (0, 1) for pid in (tmp_path / f"rank-{rank}").read_text().split()]
    assert len(set(pids)) == len(pids) >= 2
    assert not alive(pids)


def _grade_hard(rows):
    return [grade(*row) for row in rows]


@pytest.mark.parametrize("method", ["fork", *slowly("spawn", "forkserver")])
def test_under_multiprocessing(method):
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(_grade_hard, [HARD[:3], HARD[3:6]]) == [[True] * 3] * 2
