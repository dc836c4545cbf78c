"""
Vision-R1's rewards: HFRRF (format and answer, all or nothing) and the soft pair of Vision-R1-Zero.

```python
from vision_r1_recipes import hfrrf

GRPOTrainer(model, reward_funcs=hfrrf, train_dataset=rows_with_a_solution_column, ...)
```

The parts work alone: `parse_format(text)`, `grade(gold, answer)`, `check_gold(gold)`. No import of torch or trl.

```shell
python -m vision_r1_recipes.rewards check DATA [--split train]   # every gold of a dataset, before training
```
"""

import re
from collections.abc import Callable, Sequence

from .grading import check_gold, grade, grade_all
from .grading.spelling import strip_prefix


__all__ = ["accuracy_reward", "check_gold", "format_reward", "grade", "hfrrf", "parse_format"]

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "</s>")
SHORT = 200  # characters; a longer text without tags that names no answer has none
_BOXED = re.compile(r"\\boxed\s*(\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})")
_STATED = re.compile(r"\banswer\s*(?:is|:)[\s:*]*(\S.*)", re.IGNORECASE)


def parse_format(text: str) -> str | None:
    """
    Text of the answer when the format is right, else `None` `[paper]`.

    Right is `<think> ... </think><answer> ... </answer>`: each tag exactly once, in this order, only white space
    around and between, a non-empty answer. The optional prefix `Final Answer:` is stripped `[repo]`, and an
    end-of-turn token after the last tag is tolerated. Empty thinking is not an error of format.
    """
    text = text.strip()
    while text.endswith(END_OF_TURN):
        text = text[: text.rindex("<")].rstrip()
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    starts = [text.index(tag) for tag in TAGS]
    between = text[starts[1] + len(TAGS[1]) : starts[2]]
    if starts != sorted(starts) or starts[0] or not text.endswith(TAGS[3]) or between.strip():
        return None
    return strip_prefix(text[starts[2] + len(TAGS[2]) : starts[3]]) or None


def hfrrf(
    completions: list,
    solution: Sequence[str],
    generation_prefix: Sequence[str] | None = None,
    log_metric: Callable | None = None,
    **kwargs,
) -> list[float]:
    """
    Hard formatting result reward function: 1.0 when format and final answer are right, else 0.0 `[paper]`.

    Args:
        completions (`list`):
            N completions, each a list of messages (content: text, or a list of text blocks) or plain text.
        solution (`list[str]`):
            N gold answers.
        generation_prefix (`list[str]`, *optional*):
            N texts that the generation prompt put before the completions and that belong to the format, `<think>` or
            nothing. [`VisionGRPOTrainer`] passes what its chat template does.
        log_metric (`Callable`, *optional*):
            TRL's hook. Gets `format_rate`, `accuracy_rate` (answer right, whatever the format) and `grader_timeouts`
            (answers on which the grader gave up; they count as wrong).

    Returns:
        `list[float]`: N rewards.

    Raises:
        `ValueError`: a gold can't be graded (see [`check_gold`]).
    """
    texts = _texts(completions, generation_prefix)
    answers = [parse_format(text) for text in texts]
    formats = [float(answer is not None) for answer in answers]
    _log(log_metric, "format_rate", formats)
    right = _accuracy(texts, answers, solution, log_metric)
    return [form * answer for form, answer in zip(formats, right, strict=True)]


def format_reward(
    completions: list,
    generation_prefix: Sequence[str] | None = None,
    log_metric: Callable | None = None,
    **kwargs,
) -> list[float]:
    """1.0 where the format is right (see [`parse_format`]), else 0.0; half of Zero's soft reward `[paper]`."""
    rewards = [float(parse_format(text) is not None) for text in _texts(completions, generation_prefix)]
    _log(log_metric, "format_rate", rewards)
    return rewards


def accuracy_reward(
    completions: list,
    solution: Sequence[str],
    generation_prefix: Sequence[str] | None = None,
    log_metric: Callable | None = None,
    **kwargs,
) -> list[float]:
    """
    1.0 where the answer is right (see [`grade`]), else 0.0; half of Zero's soft reward `[paper]`.

    The answer is taken from the last `<answer> ... </answer>` where the format is wrong.
    """
    texts = _texts(completions, generation_prefix)
    return _accuracy(texts, [parse_format(text) for text in texts], solution, log_metric)


def _accuracy(texts: list[str], answers: list[str | None], solution: Sequence[str], log_metric) -> list[float]:
    verdicts = grade_all(solution, [a or last_answer(text) for a, text in zip(answers, texts, strict=True)])
    rewards = [float(verdict is True) for verdict in verdicts]
    _log(log_metric, "accuracy_rate", rewards)
    _log(log_metric, "grader_timeouts", [verdicts.count(None)])
    return rewards


def last_answer(text: str) -> str | None:
    """The last `<answer> ... </answer>` without its prefix, whatever the format; `None` if it is empty or absent."""
    end = text.rfind(TAGS[3])
    start = text.rfind(TAGS[2], 0, max(end, 0))
    return strip_prefix(text[start + len(TAGS[2]) : end]) or None if start >= 0 else None


def extract_answer(text: str) -> str | None:
    """
    The final answer of a completion in any format, for [`grade`].

    The last `<answer>` span; without one, in what follows the reasoning: the last `\\boxed{}`, else the rest of the
    line after the last "answer is" or "answer:", else the whole text if it is short. `None` when there is no answer,
    also when the reasoning or the answer was opened and never closed.
    """
    if tagged := last_answer(text):
        return tagged
    text = text.rpartition("</think>")[2]
    if "<think>" in text or "<answer>" in text:
        return None
    if boxed := _BOXED.findall(text):
        return boxed[-1][1:-1].strip() or None
    if stated := _STATED.findall(text):
        return stated[-1].strip(" *") or None
    return text.strip() or None if len(text) <= SHORT else None


def _texts(completions: list, prefixes: Sequence[str] | None) -> list[str]:
    contents = [c if isinstance(c, str) else c[-1].get("content") if c else "" for c in completions]
    texts = [c if isinstance(c, str) else "".join(block.get("text") or "" for block in c or ()) for c in contents]
    return texts if prefixes is None else [a + b for a, b in zip(prefixes, texts, strict=True)]


def _log(log_metric: Callable | None, name: str, values: list[float]) -> None:
    if log_metric and values:
        log_metric(name, sum(values) / len(values))


if __name__ == "__main__":
    import sys

    from .golds import main

    sys.exit(main())
