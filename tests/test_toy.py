"""The toy world: file formats, chains of thought, tokenizer and models."""

import json
import random
import re
from collections import Counter, defaultdict

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vision_r1_recipes import toy


SIZES = {"num_base": 60, "num_cold": 96, "num_train": 48, "num_test": 36}
ANSWER = re.compile(r"^<think> (.*) </think><answer> Final Answer:(\w+) </answer>$", re.DOTALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy.build(folder, seed=100, **SIZES)
    return folder


@pytest.fixture(scope="module")
def processor(world):
    return AutoProcessor.from_pretrained(world / "model")


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_same_seed_same_bytes(world, tmp_path):
    toy.build(tmp_path, seed=100, **SIZES)
    files = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert [path for path in files if (world / path).read_bytes() != (tmp_path / path).read_bytes()] == []


def test_another_seed_is_another_world(world, tmp_path):
    toy.build(tmp_path, seed=101, **SIZES)
    for path in ("rl/test.parquet", "cold/vision_r1_llava_cot_full.json", "model/model.safetensors"):
        assert (world / path).read_bytes() != (tmp_path / path).read_bytes()


def test_rl_files_have_the_released_layout(world):
    for split in ("train", "test"):
        rows = load_dataset("parquet", data_files=str(world / "rl" / f"{split}.parquet"), split="train")
        assert rows.column_names == ["images", "problem", "answer"]
        assert len(rows) == SIZES[f"num_{split}"]
        for row in rows:
            assert row["problem"].count("<image>") == len(row["images"]) == 1
            assert row["images"][0].size == (toy.SIZE, toy.SIZE)
            assert re.fullmatch(r"\d+", row["answer"])


def test_cold_files_have_both_released_schemas(world):
    llava = read(world / "cold" / "vision_r1_llava_cot_full.json")
    mulberry = read(world / "cold" / "vision_r1_mulberry_sft_full.json")
    assert len(llava) == len(mulberry) == SIZES["num_cold"] // 2
    assert all(set(row) == {"id", "image", "conversations"} for row in llava)
    assert all(set(row) == {"images", "conversations"} for row in mulberry)
    rows = [(row["image"], row["conversations"], ["human", "gpt"]) for row in llava]
    rows += [(row["images"], row["conversations"], ["user", "assistant"]) for row in mulberry]
    for image, conversations, roles in rows:
        assert [turn["from"] for turn in conversations] == roles
        assert conversations[0]["value"].count("<image>") == 1
        assert Image.open(world / "cold" / image).size == (toy.SIZE, toy.SIZE)
        assert ANSWER.match(conversations[1]["value"])


def test_base_file_teaches_short_answers_and_the_zero_format(world):
    rows = read(world / "base" / "vision_r1_llava_cot_full.json")
    kinds = Counter()
    for row in rows:
        *system, human, gpt = row["conversations"]
        assert human["value"].count("<image>") == 1 and "<image>" not in gpt["value"]
        assert (world / "base" / row["image"]).exists()
        assert not re.search(r"\b(wait|hmm|alternatively|mistake|check)\b", gpt["value"], re.IGNORECASE)
        thinks = gpt["value"].startswith("<think>")
        assert [turn["value"] for turn in system] == [toy.ZERO_SYSTEM_PROMPT] * len(system)
        assert system or not thinks
        kinds[bool(system), thinks] += 1
    assert min(kinds[False, False], kinds[True, True], kinds[True, False]) > 0


def state(text: str, picture: Image.Image) -> tuple:
    """The question and the colours of the cells, without tint and place of the marks."""
    centres = [
        (x * toy.CELL + toy.CELL // 2, y * toy.CELL + toy.CELL // 2) for y in range(toy.SIDE) for x in range(toy.SIDE)
    ]
    colours = {**toy.COLOURS, "none": (247, 247, 247)}
    near = [
        min(
            colours, key=lambda name: sum(abs(a - b) for a, b in zip(picture.getpixel(at), colours[name], strict=True))
        )
        for at in centres
    ]
    return (text.removeprefix("<image>").removeprefix("Describe the picture, then answer: "), *near)


def test_the_test_split_is_held_out(tmp_path):
    toy.build(tmp_path, seed=100, num_base=600, num_cold=600, num_train=300, num_test=240)
    splits = {}
    for split in ("train", "test"):
        rows = load_dataset("parquet", data_files=str(tmp_path / "rl" / f"{split}.parquet"), split="train")
        splits[split] = [state(row["problem"], row["images"][0].convert("RGB")) for row in rows]
    for folder, name, key in (
        ("base", "llava_cot", "image"),
        ("cold", "llava_cot", "image"),
        ("cold", "mulberry_sft", "images"),
    ):
        rows = read(tmp_path / folder / f"vision_r1_{name}_full.json")
        splits[folder + name] = [
            state(row["conversations"][-2]["value"], Image.open(tmp_path / folder / row[key]).convert("RGB"))
            for row in rows
        ]
    test = splits.pop("test")
    assert len(set(test)) == len(test) == 240
    assert not any(set(test) & set(other) for other in splits.values())


@pytest.mark.parametrize("grade", [1, 2, 3])
@pytest.mark.parametrize("family", toy.FAMILIES)
def test_chains_end_at_the_true_answer(family, grade):
    rng = random.Random(0)
    for _ in range(60):
        question = family(rng, grade)
        thought, answer = ANSWER.match(toy.long_thought(question, rng)).groups()
        working = f"{question.work(question.grid)[0]}."
        assert answer == question.answer
        assert thought.endswith(working)
        for sum_, result in re.findall(r"(?<![\d*+-])(\d+(?:[-+*]\d+)+)=(\d+)", thought):
            assert eval(sum_) == int(result)
        assert (
            toy.short_thought(question)
            == f"<think> {toy.reading(question, question.grid)} </think><answer> {answer} </answer>"
        )


def test_harder_questions_run_longer_with_a_heavy_tail():
    rng = random.Random(1)
    lengths = defaultdict(list)
    for _, question in zip(range(3000), toy.questions(rng, set()), strict=False):
        lengths[question.grade].append(len(toy.long_thought(question, rng)))
    means = [sum(lengths[grade]) / len(lengths[grade]) for grade in (1, 2, 3)]
    assert means == sorted(means)
    every = sorted(length for grade in lengths.values() for length in grade)
    assert every[len(every) // 2] < sum(every) / len(every) < every[-len(every) // 50] / 3


def test_text_alone_does_not_reveal_the_answer():
    rng = random.Random(2)
    answers = defaultdict(Counter)
    for _, question in zip(range(6000), toy.questions(rng, set()), strict=False):
        # Colours, options and the number of hours carry nothing but noise: count by the shape of the question.
        shape = re.sub(r"\b(red|green|blue|black|\d+)\b", "_", question.text)
        answers[shape][question.answer] += 1
    hits = sum(counts.most_common(1)[0][1] for counts in answers.values())
    assert hits / 6000 < 0.25
    for shape, counts in answers.items():
        assert counts.most_common(1)[0][1] / counts.total() < 0.4, shape


@pytest.mark.parametrize(
    "text",
    ["<think> a </think><answer> Final Answer:12 </answer>", "naïve 日本語 😀 \t\n\r\n  x", "\x00\u202e ﷺ", "x" * 500],
)
def test_any_text_survives_the_tokenizer(processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


def test_special_tokens_are_those_of_qwen(processor):
    tokenizer = processor.tokenizer
    for token in toy.SPECIAL_TOKENS:
        assert tokenizer(token)["input_ids"] == [tokenizer.convert_tokens_to_ids(token)]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer("<think> 12 </think><|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think> 12 </think>"
    assert not {"<think>", "</think>", "<answer>", "</answer>"} & set(tokenizer.all_special_tokens)


def test_template_adds_the_default_system_line(processor):
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}
    user = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n<|im_start|>assistant\n"
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    system = {"role": "system", "content": "Think."}
    for template in (processor.apply_chat_template, processor.tokenizer.apply_chat_template):
        assert template([question], add_generation_prompt=True, tokenize=False) == default + user
        stated = template([system, question], add_generation_prompt=True, tokenize=False)
        assert stated == "<|im_start|>system\nThink.<|im_end|>\n" + user


def test_checkpoint_loads_like_any_other(world, processor):
    model = AutoModelForImageTextToText.from_pretrained(world / "model")
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert 0.7e6 < model.num_parameters() < 1.3e6
    generation = read(world / "model" / "generation_config.json")
    ids = processor.tokenizer.convert_tokens_to_ids
    assert generation["do_sample"] and generation["temperature"] == 1e-6 and generation["repetition_penalty"] == 1.05
    assert generation["eos_token_id"] == [ids("<|im_end|>"), ids("<|endoftext|>")]
    assert generation["pad_token_id"] == ids("<|endoftext|>")


@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("build_model", [toy.build_model, toy.build_qwen3_vl])
def test_models_run_tied_and_untied(processor, tmp_path, build_model, tie_word_embeddings):
    model, own = build_model(processor.tokenizer, seed=1, tie_word_embeddings=tie_word_embeddings)
    model.save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    own = AutoProcessor.from_pretrained(tmp_path)
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == tie_word_embeddings
    text = "<|vision_start|><|image_pad|><|vision_end|>How many?"
    batch = own(text=[text], images=[Image.new("RGB", (toy.SIZE, toy.SIZE))], return_tensors="pt")
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()
