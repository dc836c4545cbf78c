"""The three steps of modality bridging, free of any engine: rows and prompts in, generations out."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, TemplateError

from ..grading.spelling import letter_of
from ..recipe import RecipeError


STEPS = ("pseudo_cot", "description", "reasoning")  # the MLLM's two, then the text reasoner's
# Rules that are looked up.
UNANSWERED, REFUSED, DUPLICATE = "no usable response", "request refused", "duplicate id"
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """A question about pictures with its answer; `images` as `datasets` stores them, `{path, bytes}`."""

    position: int  # in all sources together
    id: str
    source: str
    question: str
    answer: str
    images: list[dict[str, Any]] = field(default_factory=list, repr=False)
    digest: str = ""  # of the source's row


@dataclass(frozen=True)
class Generation:
    """What a model wrote: `text`, and apart from it its `reasoning` where it thinks."""

    text: str
    reasoning: str = ""
    finish_reason: str = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def parse(cls, content: str, reasoning: str | None = None, **kwargs) -> Generation:
        """
        Take the reasoning from its own field or from `<think> ... </think>` in the text, whose opening tag the chat
        template may have written.
        """
        if not reasoning and "</think>" in content:
            reasoning, _, content = content.partition("</think>")
            reasoning = reasoning.partition("<think>")[2] or reasoning
        return cls(content.strip(), (reasoning or "").strip(), **kwargs)

    @classmethod
    def whole(cls, content: str, reasoning: str | None = None, **kwargs) -> Generation:
        """The text as the model wrote it, with its reasoning in `<think>` where a server took that out."""
        return cls(f"<think>{reasoning}</think>{content}" if reasoning else content, **kwargs)


class Rejected(Exception):
    """A row that goes no further, with the name of the rule and what to look at."""

    def __init__(self, rule: str, detail: str = ""):
        super().__init__(f"{rule}: {detail}" if detail else rule)
        self.rule, self.detail = rule, detail


class Prompts:
    """
    The Jinja templates of the steps.

    A template knows `question`, `answer`, `multiple_choice` (whether the answer is an option's letter), and what the
    steps before it wrote: `pseudo_cot`, `description`. A step without a template is left out, the pseudo-CoT only.

    Args:
        paths (`dict[str, str]`): Step -> template file, `None` for a step that is left out.
        show_answer (`bool`): Whether the reasoner's template gets the answer; the others always do.

    Raises:
        `RecipeError`: a missing file, a broken template, or a name in it that there is not.
    """

    def __init__(self, paths: Mapping[str, str | None], show_answer: bool = True):
        self.show_answer = show_answer
        self.sources, self.templates, self.hashes = {}, {}, {}
        jinja = Environment(undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True)
        for step in STEPS:
            path = paths.get(step)
            if path is None:
                if step != "pseudo_cot":
                    raise RecipeError(f"`prompts.{step}` is missing: only the pseudo_cot can be left out.")
                continue
            try:
                source = self.sources[step] = Path(path).read_text(encoding="utf-8")
                self.templates[step] = jinja.from_string(source)
                self.hashes[step] = hashlib.sha256(source.encode()).hexdigest()[:16]
                made = {s: Generation("x") for s in self.templates if s != step}
                self.render(step, Row(0, "", "", "x", "x"), made)
            except OSError as error:
                raise RecipeError(f"`prompts.{step}`: can't read {path}: {error.strerror}.") from error
            except TemplateError as error:
                raise RecipeError(f"`prompts.{step}`: {path}: {error}.") from error

    def render(self, step: str, row: Row, made: Mapping[str, Generation]) -> Messages:
        """One user message; the MLLM's begins with the pictures, as parts `{type: image, image: {path, bytes}}`."""
        text = self.templates[step].render(
            question=row.question,
            answer=row.answer if self.show_answer or step != "reasoning" else None,
            multiple_choice=letter_of(row.answer) is not None,
            **{name: generation.text for name, generation in made.items()},
        )
        if step == "reasoning":
            return [{"role": "user", "content": text.strip()}]
        pictures = [{"type": "image", "image": image} for image in row.images]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": text.strip()}]}]


def check(step: str, generation: Generation) -> None:
    """Raise [`Rejected`] when what a step wrote can't be used."""
    if generation.finish_reason == "content_filter":
        raise Rejected("refused content", step)
    if generation.finish_reason == "length":
        raise Rejected("cut off", f"{step}: {generation.completion_tokens} tokens, finish_reason is length")
    if not generation.text:
        raise Rejected("empty completion", step)


async def bridge(
    row: Row,
    generate: Callable[[str, Messages], Awaitable[Generation]],
    prompts: Prompts,
    last: str = STEPS[-1],
) -> dict[str, Generation]:
    """
    Take one row through the steps, up to and with `last`.

    Args:
        row (`Row`): Question, answer and pictures.
        generate (`Callable`): `await generate(step, messages)`: any engine.
        prompts (`Prompts`): What the models are asked.
        last (`str`, *optional*): The step to end with.

    Returns:
        `dict[str, Generation]`: what every step wrote.

    Raises:
        `Rejected`: a step's output can't be used.
    """
    made: dict[str, Generation] = {}
    for step in prompts.templates:
        generation = await generate(step, prompts.render(step, row, made))
        check(step, generation)
        made[step] = generation
        if step == last:
            break
    return made
