"""
A world small enough to train on two CPU cores, in the real file formats and the real architecture.

`python -m vision_r1_recipes.toy runs/toy/data` writes pictures with questions (the RL parquet and both cold-start JSON
schemas of the released Vision-R1 data), a byte-level tokenizer with Qwen2.5's special tokens and an untrained
Qwen2.5-VL of about one million parameters. 96 / 192 / 384 toy tokens play the paper's 4K / 8K / 16K.

A picture is a 3 x 3 grid; a chain of thought reads it row by row and works out the answer. How overthinking gets into
the data: the first reading is nearly always right, but once the writer is in doubt, every further look misreads far
more often, and doubts come in long runs, more often at harder questions. Every chain ends at the right answer, as
filtered data do; a model that imitates them learns short chains that are right and long ones that wander, and has to
find out by itself when to stop.
"""

import argparse
import io
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX


ZERO_SYSTEM_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think><answer> answer here </answer>"
)

# The added tokens of Qwen2.5, in its order.
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
]

# Qwen2.5-VL's template.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

ROPE_THETA = 3.0  # small, so that neighbouring cells are told apart
SIDE, CELL = (
    3,
    28,
)  # cells per side of a picture, and pixels per side of a cell, which is one token of the vision tower
SIZE = SIDE * CELL
COLOURS = {"red": (220, 30, 30), "green": (20, 150, 40), "blue": (40, 70, 225), "black": (25, 25, 25)}
ROWS = ("top row", "middle row", "last row")
# Cells of the border, clockwise from the hour 8 at the top: a square clock of eight hours.
HOURS = [(0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0), (0, 0)]
Grid = list[list[str]]  # what lies in each cell, row by row: a colour or "none"


@dataclass
class Question:
    """
    A question about a picture. `count` says what a row of the grid adds to the answer, if rows do; `work` turns what
    is read in the cells into (working, answer).
    """

    family: str
    grade: int
    text: str
    picture: PILImage.Image
    grid: Grid
    count: Callable[[list[str]], int] | None
    work: Callable[[Grid], tuple[str, str]]

    @property
    def answer(self) -> str:
        return self.work(self.grid)[1]


# Pictures and questions. Answers are drawn first and evenly where a family allows it: the text gives nothing away.


def _canvas(rng: random.Random) -> tuple[PILImage.Image, ImageDraw.ImageDraw]:
    picture = PILImage.new("RGB", (SIZE, SIZE), tuple(rng.randint(238, 255) for _ in range(3)))
    draw = ImageDraw.Draw(picture)
    for at in range(CELL, SIZE, CELL):
        draw.line((at, 0, at, SIZE), fill=(200, 200, 200))
        draw.line((0, at, SIZE, at), fill=(200, 200, 200))
    return picture, draw


def _cells(cells: dict[tuple[int, int], str]) -> Grid:
    return [[cells.get((row, column), "none") for column in range(SIDE)] for row in range(SIDE)]


def _dot(rng: random.Random, draw: ImageDraw.ImageDraw, cell: tuple[int, int], colour: str) -> None:
    y, x = (index * CELL + CELL // 2 + rng.randint(-2, 2) for index in cell)
    draw.ellipse((x - 10, y - 10, x + 10, y + 10), fill=COLOURS[colour])


def _fill(draw: ImageDraw.ImageDraw, cell: tuple[int, int], colour: str) -> None:
    y, x = (index * CELL for index in cell)
    draw.rectangle((x + 2, y + 2, x + CELL - 3, y + CELL - 3), fill=COLOURS[colour])


def _sum(values: list[int]) -> tuple[str, str]:
    return "+".join(map(str, values)) + f"={sum(values)}", str(sum(values))


def dots(rng: random.Random, grade: int) -> Question:
    """Count the dots of one colour, of two colours, or all."""
    one, two, other = rng.sample(["red", "green", "blue"], 3)
    asked = [one, two, other][:grade]
    total, rest = rng.randint(1, 6), rng.randint(0, 3)
    colours = rng.choices(asked, k=total) + rng.choices(
        [c for c in (one, two, other) if c not in asked] or asked, k=rest
    )
    cells = {
        divmod(at, SIDE): colour for at, colour in zip(rng.sample(range(SIDE**2), len(colours)), colours, strict=True)
    }
    picture, draw = _canvas(rng)
    for cell, colour in cells.items():
        _dot(rng, draw, cell, colour)

    def count(row: list[str]) -> int:
        return sum(cell in asked for cell in row)

    text = "How many dots are there in all?" if grade == 3 else f"How many {' or '.join(asked)} dots are there?"
    return Question(
        "dots", grade, text, picture, _cells(cells), count, lambda grid: _sum([count(row) for row in grid])
    )


def bars(rng: random.Random, grade: int) -> Question:
    """Read the height of a bar, or of two or three bars together."""
    order = rng.sample(list(COLOURS), SIDE)
    asked = rng.sample(order, grade)
    heights = dict(zip(order, rng.choices(range(1, SIDE + 1), k=SIDE), strict=True))
    cells = {(SIDE - 1 - up, column): colour for column, colour in enumerate(order) for up in range(heights[colour])}
    picture, draw = _canvas(rng)
    for cell, colour in cells.items():
        _fill(draw, cell, colour)

    def count(row: list[str]) -> int:
        return sum(cell in asked for cell in row)

    names = " and ".join(asked)
    text = f"How high is the {names} bar?" if grade == 1 else f"How high are the {names} bars together?"
    return Question(
        "bars", grade, text, picture, _cells(cells), count, lambda grid: _sum([count(row) for row in grid])
    )


def rectangle(rng: random.Random, grade: int) -> Question:
    """Height, area or perimeter of a rectangle, in squares of the grid."""
    width, height = rng.randint(1, SIDE), rng.randint(1, SIDE)
    left, top = rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)
    colour = rng.choice(list(COLOURS))
    cells = {(top + row, left + column): colour for row in range(height) for column in range(width)}
    picture, draw = _canvas(rng)
    for cell in cells:
        _fill(draw, cell, colour)

    def count(row: list[str]) -> int:
        return SIDE - row.count("none")

    def work(grid: Grid) -> tuple[str, str]:
        rows = [count(row) for row in grid]
        if grade == 2:
            return _sum(rows)
        w, h = max(rows), sum(row > 0 for row in rows)
        if grade == 1:
            return f"height:{h}", str(h)
        return f"width:{w}, height:{h}, {w}+{h}={w + h}, {w + h}+{w + h}={2 * (w + h)}", str(2 * (w + h))

    text = ("How high is the rectangle?", "What is the area of the rectangle?", "What is the perimeter?")[grade - 1]
    return Question("rectangle", grade, text, picture, _cells(cells), count, work)


def clock(rng: random.Random, grade: int) -> Question:
    """Read a hand of a square clock, the hour some hours later, or the hours from one hand to another."""
    hands = rng.sample(list(COLOURS), 3 if grade == 3 else 2)
    colours = hands[:2] if grade == 3 else hands[:1]
    hours = rng.sample(range(1, 9), len(hands))
    cells = {HOURS[hour % 8]: colour for hour, colour in zip(hours, hands, strict=True)}
    picture, draw = _canvas(rng)
    for cell, colour in cells.items():
        end = (cell[1] * CELL + CELL // 2, cell[0] * CELL + CELL // 2)
        draw.line((SIZE // 2, SIZE // 2, *end), fill=COLOURS[colour], width=4)
        _dot(rng, draw, cell, colour)
    later = rng.randint(2, 4)
    text = (
        f"What hour does the {colours[0]} hand show?",
        f"What hour will the {colours[0]} hand show in {later} hours?",
        f"How many hours is it from the {colours[0]} hand to the {colours[-1]} hand?",
    )[grade - 1]

    def work(grid: Grid) -> tuple[str, str]:
        read = [next((h or 8 for h, (y, x) in enumerate(HOURS) if grid[y][x] == colour), 8) for colour in colours]
        reading = ", ".join(f"{colour} hand:{hour}" for colour, hour in zip(colours, read, strict=True))
        if grade == 1:
            return reading, str(read[0])
        if grade == 2:
            hour = read[0] + later
            working = f"{reading}, {read[0]}+{later}={hour}" + (f", {hour}-8={hour - 8}" if hour > 8 else "")
            return working, str(hour - 8 if hour > 8 else hour)
        hours = (read[1] - read[0]) % 8
        start = f"8+{read[1]}" if read[1] < read[0] else f"{read[1]}"
        return f"{reading}, {start}-{read[0]}={hours}", str(hours)

    return Question("clock", grade, text, picture, _cells(cells), None, work)


FAMILIES: tuple[Callable[[random.Random, int], Question], ...] = (dots, bars, rectangle, clock)


def questions(rng: random.Random, held_out: set[str], hold_out: bool = False) -> Iterator[Question]:
    """
    Yield questions family by family and grade by grade without end, none whose text and cells are in `held_out`.
    With `hold_out`, what is yielded is added to it.
    """
    while True:
        for grade in (1, 2, 3):
            for family in FAMILIES:
                question = family(rng, grade)
                key = f"{question.text} {question.grid}"
                if key in held_out:
                    continue
                if hold_out:
                    held_out.add(key)
                yield question


# Completions.

DOUBT = (0.30, 0.45, 0.60)  # share of chains with a second look, by grade
MISREAD_FIRST, MISREAD_LATER = 0.03, 0.40  # per row, at the first look and once in doubt
TAIL = 1.0  # Pareto exponent of the number of further looks
MAX_LOOKS = 10
BASE_MIX = (0.2, 0.4, 0.4)  # of the base model's data: answered directly, described first, under the system prompt
ZERO_FORMAT = 0.7  # share of the base model's answers to `ZERO_SYSTEM_PROMPT` that keep its format


def _read(question: Question, row: list[str]) -> str:
    return " ".join(row) + (f" {question.count(row)}" if question.count else "")


def reading(question: Question, grid: Grid) -> str:
    """What lies in the cells, row by row, with what each row counts, and the working."""
    rows = " ".join(f"{name}: {_read(question, row)}." for name, row in zip(ROWS, grid, strict=True))
    return f"{rows} {question.work(grid)[0]}."


def short_thought(question: Question) -> str:
    """Reading and working without a second look, as the *base* model answers to `ZERO_SYSTEM_PROMPT`."""
    return f"<think> {reading(question, question.grid)} </think><answer> {question.answer} </answer>"


def _look(rng: random.Random, row: list[str], misread: float) -> list[str]:
    """`row` as it is read: with probability `misread` its cells are mixed up, or a cell is wrong."""
    if rng.random() >= misread:
        return row
    mixed = rng.sample(row, SIDE)
    if mixed == row:
        mixed[rng.randrange(SIDE)] = rng.choice(list(COLOURS))
    return mixed


def long_thought(question: Question, rng: random.Random) -> str:
    """A chain in the manner of DeepSeek-R1: reading, doubts, second looks, and the right answer in the end."""
    truth = question.grid
    read = [_look(rng, row, MISREAD_FIRST) for row in truth]
    text = [reading(question, read)]
    looks = 0
    if rng.random() < DOUBT[question.grade - 1]:
        looks = min(MAX_LOOKS, math.ceil(rng.paretovariate(TAIL)))
    while looks > 0 or read != truth:
        wrong = [i for i, row in enumerate(read) if row != truth[i]]
        at = rng.choice(wrong) if wrong and looks <= 0 else rng.randrange(SIDE)
        opening = rng.choice(
            [
                f"Wait, let me check the {ROWS[at]} again.",
                f"Hmm, is the {ROWS[at]} right?",
                f"Alternatively, look at the {ROWS[at]} once more.",
                f"Wait, maybe there is a mistake in the {ROWS[at]}.",
            ]
        )
        before, read[at] = read[at], _look(rng, truth[at], MISREAD_LATER if looks > 0 else 0.1)
        verdict = "Yes" if read[at] == before else "No"
        text.append(f"{opening} {verdict}, {_read(question, read[at])}. {question.work(read)[0]}.")
        looks -= 1
    return f"<think> {' '.join(text)} </think><answer> Final Answer:{question.answer} </answer>"


# Files.


def _png(picture: PILImage.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _write_json(path: Path, rows: list[dict]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def _write_llava_cot(
    folder: Path, source: Iterator[Question], count: int, turns: Callable[[Question], list[dict]]
) -> list[dict]:
    """Write `count` rows of the LLaVA-CoT schema and their pictures; returns the rows."""
    (folder / "llava_cot_images").mkdir(parents=True, exist_ok=True)
    rows = []
    for index, question in zip(range(count), source, strict=False):
        image = f"llava_cot_images/{index:05d}.png"
        (folder / image).write_bytes(_png(question.picture))
        rows.append(
            {"id": f"{question.family}-{question.grade}-{index:05d}", "image": image, "conversations": turns(question)}
        )
    _write_json(folder / "vision_r1_llava_cot_full.json", rows)
    return rows


def _write_mulberry(
    folder: Path, source: Iterator[Question], count: int, turns: Callable[[Question], list[dict]]
) -> list[dict]:
    """Write `count` rows of the Mulberry schema and their pictures; returns the rows."""
    (folder / "mulberry_images").mkdir(parents=True, exist_ok=True)
    names = {"human": "user", "gpt": "assistant"}
    rows = []
    for index, question in zip(range(count), source, strict=False):
        image = f"mulberry_images/{index:05d}.png"
        (folder / image).write_bytes(_png(question.picture))
        conversations = [{"from": names[turn["from"]], "value": turn["value"]} for turn in turns(question)]
        rows.append({"images": image, "conversations": conversations})
    _write_json(folder / "vision_r1_mulberry_sft_full.json", rows)
    return rows


def _write_rl(path: Path, source: Iterator[Question], count: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "images": [{"bytes": _png(question.picture), "path": None}],
            "problem": f"<image>{question.text}",
            "answer": question.answer,
        }
        for _, question in zip(range(count), source, strict=False)
    ]
    features = Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")})
    Dataset.from_list(rows, features=features).to_parquet(path)


# Tokenizer and models.


def build_tokenizer(texts: list[str], vocab_size: int = 640) -> Qwen2Tokenizer:
    """Train a byte-level BPE on `texts`, split as Qwen2.5 splits, digits alone, and add Qwen2.5's special tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    size = len(learnt["vocab"])
    return Qwen2Tokenizer(
        vocab=learnt["vocab"] | {token: size + index for index, token in enumerate(SPECIAL_TOKENS)},
        merges=[tuple(pair) for pair in learnt["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
        model_max_length=131072,
        chat_template=CHAT_TEMPLATE,
    )


def _generation_config(tokenizer: Qwen2Tokenizer) -> GenerationConfig:
    # Qwen2.5-VL's own values, traps included: whoever samples has to state temperature and repetition penalty.
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    return GenerationConfig(
        bos_token_id=pad,
        pad_token_id=pad,
        eos_token_id=[end, pad],
        do_sample=True,
        repetition_penalty=1.05,
        temperature=1e-6,
    )


def _config(tokenizer: Qwen2Tokenizer, text: dict, vision: dict, tie_word_embeddings: bool) -> dict:
    ids = tokenizer.convert_tokens_to_ids
    return {
        "text_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "initializer_range": 0.1,
            **text,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": 128,
            "initializer_range": 0.1,
            **vision,
        },
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": tie_word_embeddings,
    }


def _assemble(tokenizer, seed, model_class, config, processor_class, images, videos):
    """An untrained model of `config`, drawn by `seed`, and its processor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config = _generation_config(tokenizer)
    return model, processor_class(
        image_processor=images, tokenizer=tokenizer, video_processor=videos, chat_template=CHAT_TEMPLATE
    )


def build_model(
    tokenizer: Qwen2Tokenizer, seed: int = 0, tie_word_embeddings: bool = False
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """An untrained Qwen2.5-VL of about one million parameters and its processor."""
    config = Qwen2_5_VLConfig(
        **_config(
            tokenizer,
            {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA, "mrope_section": [2, 7, 7]}},
            {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1], "tokens_per_second": 2},
            tie_word_embeddings,
        )
    )
    images = Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=14 * 14 * 4 * 16384)
    return _assemble(
        tokenizer,
        seed,
        Qwen2_5_VLForConditionalGeneration,
        config,
        Qwen2_5_VLProcessor,
        images,
        Qwen2VLVideoProcessor(),
    )


def build_qwen3_vl(
    tokenizer: Qwen2Tokenizer, seed: int = 0, tie_word_embeddings: bool = False
) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """An untrained Qwen3-VL of the same size and its processor, for tests that nothing is tied to one architecture."""
    config = Qwen3VLConfig(
        **_config(
            tokenizer,
            {
                "head_dim": 32,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": ROPE_THETA,
                    "mrope_section": [2, 7, 7],
                    "mrope_interleaved": True,
                },
            },
            {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
            tie_word_embeddings,
        )
    )
    images = Qwen2VLImageProcessor(patch_size=16, min_pixels=64 * 64, max_pixels=16 * 16 * 4 * 16384)
    return _assemble(
        tokenizer, seed, Qwen3VLForConditionalGeneration, config, Qwen3VLProcessor, images, Qwen3VLVideoProcessor()
    )


def _save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin) -> None:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def build(
    output_dir: str | Path,
    seed: int = 0,
    num_base: int = 12000,
    num_cold: int = 4000,
    num_train: int = 1000,
    num_test: int = 480,
    tie_word_embeddings: bool = False,
) -> None:
    """Write the whole toy world below `output_dir`; the same arguments give the same bytes.

    No question of the test split is in another set about the same cells, whatever their tint and the place of the
    marks. Half of `num_cold` goes to either schema.

    Args:
        output_dir (`str` or `Path`): Folder for `model/`, `base/`, `cold/` and `rl/`.
        seed (`int`, *optional*, defaults to `0`): Seed of the pictures, the texts and the initial weights.
        num_base (`int`, *optional*, defaults to `12000`): Rows for pretraining the *base* model.
        num_cold (`int`, *optional*, defaults to `4000`): Rows of the cold start.
        num_train (`int`, *optional*, defaults to `1000`): Rows of `rl/train.parquet`.
        num_test (`int`, *optional*, defaults to `480`): Rows of `rl/test.parquet`, the held-out split.
        tie_word_embeddings (`bool`, *optional*, defaults to `False`): Share input and output embeddings.
    """
    folder = Path(output_dir)
    rng = random.Random(seed)
    held_out: set[str] = set()
    _write_rl(folder / "rl" / "test.parquet", questions(rng, held_out, hold_out=True), num_test)
    source = questions(rng, held_out)
    _write_rl(folder / "rl" / "train.parquet", source, num_train)

    def base_turns(question: Question) -> list[dict]:
        kind = rng.choices(("direct", "described", "asked to think"), BASE_MIX)[0]
        direct = question.answer if rng.random() < 0.5 else f"The answer is {question.answer}."
        if kind == "direct":
            system, text, reply = [], question.text, direct
        elif kind == "described":
            system, text = [], f"Describe the picture, then answer: {question.text}"
            reply = f"{reading(question, question.grid)} The answer is {question.answer}."
        else:
            system, text = [{"from": "system", "value": ZERO_SYSTEM_PROMPT}], question.text
            reply = short_thought(question) if rng.random() < ZERO_FORMAT else direct
        return [*system, {"from": "human", "value": f"<image>{text}"}, {"from": "gpt", "value": reply}]

    def cold_turns(question: Question) -> list[dict]:
        human = {"from": "human", "value": f"<image>{question.text}"}
        return [human, {"from": "gpt", "value": long_thought(question, rng)}]

    rows = _write_llava_cot(folder / "cold", source, num_cold // 2, cold_turns)
    rows += _write_mulberry(folder / "cold", source, num_cold - num_cold // 2, cold_turns)
    rows += _write_llava_cot(folder / "base", source, num_base, base_turns)
    tokenizer = build_tokenizer([turn["value"] for row in rows for turn in row["conversations"]])
    _save(folder / "model", *build_model(tokenizer, seed, tie_word_embeddings))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vision_r1_recipes.toy", description="Write the toy world.")
    parser.add_argument("output_dir")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_base", type=int, default=12000)
    parser.add_argument("--num_cold", type=int, default=4000)
    parser.add_argument("--num_train", type=int, default=1000)
    parser.add_argument("--num_test", type=int, default=480)
    parser.add_argument("--tie_word_embeddings", action="store_true")
    build(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
