"""
How fast rewards are: `hfrrf` against TRL's `accuracy_reward`, math-verify and plain string equality.

```shell
python benchmarks/reward.py [--repeats 5]
```

2,000 completions in groups of 16 with 3,000 tokens of thinking and mixed kinds of answers, a tenth of them wrong or
broken; then the same with another tenth hostile. All graders in turns in one process, after one warm-up of each. Those
that know no format get the same format check as ours, and the text inside the answer tags. Prints Markdown tables.
"""

import argparse
import logging
import multiprocessing
import os
import platform
import random
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from math import ceil
from statistics import mean, median
from time import perf_counter

from math_verify import parse, verify
from trl.rewards import accuracy_reward

from vision_r1_recipes import grading
from vision_r1_recipes.grading import workers
from vision_r1_recipes.rewards import hfrrf, parse_format


GROUPS, GROUP, THINKING = 125, 16, 3000
LIMIT = 60  # seconds for a grader that may hang for good
# gold: right answers, wrong answers; by the shares that Vision-R1-rl's sources suggest
KINDS = [
    (5, lambda n: ("ABCD"[n % 4], ["{0}", "{0}. {1}", "({0})", "option {0}."], ["ABCD"[(n + 1) % 4], "A or B"])),
    (4, lambda n: (str(n), ["{0}", "x = {0}", "{0}.0", "${0}$"], [str(n + 1), f"{n} or {n + 1}", f"-{n}"])),
    (2, lambda n: (f"{n}.5", ["{0}", "{0}0", rf"\frac{{{2 * n + 1}}}{{2}}"], [f"{n}.4", str(n)])),
    (2, lambda n: (f"{n} cm", ["{0}", str(n), rf"{n}\text{{ cm}}", f"{10 * n} mm"], [f"{n} m", f"{n + 1} cm"])),
    (3, lambda n: (rf"{n} \sqrt {{ 3 }}", [rf"{n}\sqrt{{3}}", f"{n}√3", rf"\sqrt{{{3 * n * n}}}"], [f"{n}√2", "3"])),
    (1, lambda n: (rf"{n} \pi", [rf"{n}\pi", f"{n}π", rf"\pi \cdot {n}"], [rf"{n + 1}\pi", f"{3.14 * n:.2f}"])),
    (1, lambda n: (f"2x+{n}", ["{0}", f"{n}+2x", f"y = 2x + {n}"], [f"2x-{n}", f"x+{n}"])),
    (1, lambda n: (f"({n}, {n + 3})", ["{0}", rf"\left({n}, {n + 3}\right)"], [f"({n + 3}, {n})", str(n)])),
    (1, lambda n: ("Yes", ["Yes", "yes.", "Yes, it is."], ["No", "Yes or no"])),
]
BROKEN = ["<think>{0}</think>{1}", "{0}<answer>{1}</answer>", "<think>{0}</think><answer>{1}", "<think>{0}"]
HOSTILE = [
    "9^{{9^{{9^{{{n}}}}}}}",
    "{n}99999999!",
    r"\binom{{9999999{n}}}{{4444444{n}}}",
    "(" * 500 + "{n}" + ")" * 500,
    "{n}" + "1+" * 5000 + "1",
    r"\int_0^{{{n}}} \sin(\cos(\tan(x^x))) dx",
    "{n}9" * 3000,
    "e^{{e^{{e^{{e^{{{n}}}}}}}}}",
]


def completions(hostile: bool, seed: int) -> tuple[list[list[dict]], list[str]]:
    rng = random.Random(seed)
    texts, golds = [], []
    for _ in range(GROUPS):
        make = rng.choices([kind for _, kind in KINDS], [share for share, _ in KINDS])[0]
        gold, right, wrong = make(rng.randint(2, 999))
        for _ in range(GROUP):
            thinking = "so the angle is 40, wait, " * (THINKING // 8)
            answer = rng.choice(right).replace("{0}", gold).replace("{1}", "of it")
            if rng.random() < 0.05:
                text = rng.choice(BROKEN).format(thinking, answer)
            else:
                answer = rng.choice(wrong) if rng.random() < 0.05 / 0.95 else answer
                if hostile and rng.random() < 0.1:
                    answer = rng.choice(HOSTILE).format(n=rng.randint(2, 60))
                text = f"<think>{thinking}</think><answer> Final Answer:{answer} </answer>"
            texts.append([{"role": "assistant", "content": text}])
            golds.append(gold)
    return texts, golds


def with_format(grade: Callable) -> Callable:
    """A grader of (gold, answer) pairs behind our format check."""

    def rewards(texts, golds):
        answers = [parse_format(text[0]["content"]) for text in texts]
        return [float(a is not None and bool(grade(g, a))) for g, a in zip(golds, answers, strict=True)]

    return rewards


def in_dollars(gold: str, answer: str) -> bool:
    return verify(parse(f"${gold}$"), parse(f"${answer}$"))


def trl_reward(texts, golds):
    """TRL's reward reads the whole completion and wants `\\boxed{}` in it and `$...$` in the gold: it gets both."""
    answers = [parse_format(text[0]["content"]) for text in texts]
    texts = [[{"role": "assistant", "content": rf"\boxed{{{answer}}}" if answer else ""}] for answer in answers]
    return accuracy_reward(texts, [f"${gold}$" for gold in golds])


GRADERS = {
    "plain string equality": with_format(lambda gold, answer: gold == answer),
    "math-verify, bare": with_format(lambda gold, answer: verify(parse(gold), parse(answer))),
    "math-verify, both in `$...$`": with_format(in_dollars),
    "TRL `accuracy_reward`": trl_reward,
    "`hfrrf`": lambda texts, golds: hfrrf(texts, golds),
}


def run(name: str, texts: list, golds: list) -> tuple[float, float]:
    """Seconds, and the share that got a reward."""
    start = perf_counter()
    rewards = GRADERS[name](texts, golds)
    return perf_counter() - start, sum(reward or 0 for reward in rewards) / len(texts)


def run_apart(name: str, texts: list, golds: list) -> tuple[float, float] | None:
    """[`run`] in a process that is killed after `LIMIT` seconds, for graders that may never return."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        future = pool.submit(run, name, texts, golds)
        try:
            return future.result(LIMIT)
        except TimeoutError:
            for process in pool._processes.values():
                process.kill()
            return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    logging.disable()
    names = ", ".join(f"{name} {version(name)}" for name in ("trl", "math-verify", "sympy"))
    print(f"{date.today()}, {names}, Python {platform.python_version()}, {os.cpu_count()} cores\n")
    for name in GRADERS:
        run(name, *completions(False, seed=-1))
    runs = {name: [] for name in GRADERS}
    for repeat in range(args.repeats):
        texts, golds = completions(False, seed=repeat)
        for name in GRADERS:
            runs[name].append(run(name, texts, golds))
    print(
        "A tenth wrong or broken:\n\n| grader | completions/s | its rate / `hfrrf`'s | rewarded |\n|---|---|---|---|"
    )
    for name, of in runs.items():
        ratios = [ours / theirs for (theirs, _), (ours, _) in zip(of, runs["`hfrrf`"], strict=True)]
        print(
            f"| {name} | {len(texts) / median(seconds for seconds, _ in of):,.0f} | {median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {mean(share for _, share in of):.1%} |"
        )
    print("\nAnother tenth hostile, one run:\n\n| grader | seconds | rewarded |\n|---|---|---|", flush=True)
    texts, golds = completions(True, seed=args.repeats)
    for name in GRADERS:
        of = (run if name == "`hfrrf`" else run_apart)(name, texts, golds)
        print(f"| {name} | {of[0]:.1f} | {of[1]:.1%} |" if of else f"| {name} | killed after {LIMIT} | |", flush=True)
    texts, golds = completions(True, seed=args.repeats + 1)
    logged, start = {}, perf_counter()
    hfrrf(texts, golds, log_metric=logged.__setitem__)
    took, lost, size = perf_counter() - start, round(logged["grader_timeouts"]), grading.POOL.size
    print(
        f"\n`hfrrf` on another such batch: {took:.1f} s, {lost} completions given up on; bound for these "
        f"ceil({lost} / {size}) x {workers.CPU_SECONDS} s = {ceil(lost / size) * workers.CPU_SECONDS:.1f} s"
    )


if __name__ == "__main__":
    main()
