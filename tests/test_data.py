"""Data: every layout on real files, every reason to drop a row, token counts, and messages about unusable sources."""

import io
import json
import shutil

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from qwen_vl_utils import smart_resize

from vision_r1_recipes import data
from vision_r1_recipes.data import load_processor, load_rows
from vision_r1_recipes.recipe import RecipeError
from vision_r1_recipes.rewards import parse_format
from vision_r1_recipes.toy import SIZE


BOUNDS = {"min_pixels": 4 * 28 * 28, "max_pixels": 64 * 28 * 28}
ODD_SIZES = [(112, 112), (37, 211), (500, 333), (20, 20), (1, 1), (900, 100), (290, 1000), (57, 55)]
RL = Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")})


@pytest.fixture(scope="module")
def processor(toy):
    return load_processor(str(toy / "model"), **BOUNDS)


def picture(width=56, height=56, kind="PNG", mode="RGB", colour=7):
    buffer = io.BytesIO()
    PILImage.new(mode, (width, height), colour if mode == "L" else (colour,) * len(mode)).save(buffer, kind)
    return buffer.getvalue()


def parquet(path, rows, features=RL):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)


def rl_row(content=None, problem="<image>How many?", answer="3", **more):
    return {"images": [{"bytes": content or picture(), "path": None}], "problem": problem, "answer": answer, **more}


def turns(question="<image>How many?", answer="<think> 3 </think><answer> 3 </answer>", names=("human", "gpt")):
    return [{"from": name, "value": value} for name, value in zip(names, (question, answer), strict=True)]


def cold(folder, rows, file="cold.json", pictures=("a.png",)):
    (folder / "pics").mkdir(parents=True, exist_ok=True)
    for name in pictures:
        (folder / "pics" / name).write_bytes(picture())
    (folder / file).write_text(json.dumps(rows))
    return str(folder / file)


def load(source, kind, processor, **kwargs):
    return load_rows([source if isinstance(source, dict) else {"path": str(source)}], kind, processor, **kwargs)


# Layouts


def test_geometry3k_folder_with_splits(toy, processor):
    for split, count in (("train", 64), ("test", 32)):
        rows, report = load({"path": str(toy / "rl"), "split": split}, "rl", processor)
        assert (report.read, report.kept, len(rows), report.dropped) == (count, count, count, {})
    row = rows[0]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
    assert row["prompt"][0]["role"] == "user" and "text" not in row["prompt"][0]["content"][0]
    assert isinstance(row["images"][0], PILImage.Image) and row["images"][0].size == (SIZE, SIZE)
    assert isinstance(row["solution"], str) and row["solution"]


@pytest.mark.parametrize("file", ["cold/vision_r1_llava_cot_full.json", "cold/vision_r1_mulberry_sft_full.json"])
def test_released_cold_start_schemas(toy, processor, file):
    folder, _, name = file.partition("/")
    whole, report = load(toy / file, "sft", processor)
    by_files, _ = load({"path": str(toy / folder), "data_files": name}, "sft", processor)
    assert report.kept == report.read == len(whole) == len(by_files) == 32
    row = whole[3]
    assert row["completion"][0]["content"][0]["text"].endswith("</answer>")
    assert [m["role"] for m in row["prompt"] + row["completion"]] == ["user", "assistant"]
    assert row["images"][0].size == (SIZE, SIZE)
    assert row == by_files[3]


def test_reasoning_can_be_left_out(toy, tmp_path, processor):
    """The answer stays as it is; a row without reasoning to leave out is dropped, not passed through."""
    whole, _ = load({"path": str(toy / "cold"), "data_files": "vision_r1_mulberry_sft_full.json"}, "sft", processor)
    source = {"path": str(toy / "cold"), "data_files": "vision_r1_mulberry_sft_full.json", "drop_reasoning": True}
    rows, report = load(source, "sft", processor)
    assert report.kept == len(whole) == len(rows)
    for row, before in zip(rows, whole, strict=True):
        text, longer = (r["completion"][0]["content"][0]["text"] for r in (row, before))
        assert text == f"<think> </think>{longer.partition('</think>')[2]}" and row["prompt"] == before["prompt"]
        assert parse_format(text) == parse_format(longer)
        assert row["tokens"] < before["tokens"]

    plain = [{"image": "pics/a.png", "conversations": turns(answer=answer)} for answer in ("3", "<think> 3</think> 3")]
    path = cold(tmp_path, plain)
    rows, report = load({"path": path, "drop_reasoning": True}, "sft", processor, max_dropped_share=0.5)
    assert len(rows) == 1 and report.dropped == {"no reasoning to leave out": 1}


def test_system_turn_of_a_cold_start_file(toy, processor):
    rows, _ = load(toy / "base" / "vision_r1_llava_cot_full.json", "sft", processor)
    roles = {tuple(message["role"] for message in prompt) for prompt in rows["prompt"]}
    assert roles == {("user",), ("system", "user")}


@pytest.mark.parametrize(
    "fields",
    [
        {"image": "pics/a.png"},
        {"images": "pics/a.png"},
        {"images": ["pics/a.png"]},
        {"image": None, "images": ["pics/a.png"]},
    ],
)
@pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant")])
def test_cold_start_columns(tmp_path, processor, fields, names):
    rows, report = load(cold(tmp_path, [{**fields, "conversations": turns(names=names)}]), "sft", processor)
    assert report.kept == 1 and len(rows[0]["images"]) == 1


def test_image_folder(tmp_path, processor):
    cold(tmp_path / "pictures", [])
    file = cold(tmp_path / "text", [{"image": "pics/a.png", "conversations": turns()}], pictures=())
    source = {"path": file, "image_folder": str(tmp_path / "pictures")}
    assert load(source, "sft", processor)[1].kept == 1
    with pytest.raises(RecipeError, match="missing image"):
        load(file, "sft", processor)


def message(role, text):
    return [{"role": role, "content": text}]


@pytest.mark.parametrize(
    "prompt, completion",
    [
        ("<image>How many?", "three"),
        (message("user", "<image>How many?"), message("assistant", "three")),
        (
            [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "How many?"}]}],
            [{"role": "assistant", "content": [{"type": "text", "text": "three"}]}],
        ),
    ],
)
def test_ready_columns(tmp_path, processor, prompt, completion):
    row = {"prompt": prompt, "images": [{"bytes": picture(), "path": None}]}
    expected = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    for kind, target in (("sft", {"completion": completion}), ("rl", {"solution": "3"})):
        path = tmp_path / f"{kind}.parquet"
        Dataset.from_list([{**row, **target}]).cast_column("images", List(Image())).to_parquet(path)
        got = load(path, kind, processor)[0][0]
        assert got["prompt"] == [{"role": "user", "content": expected}]
        if kind == "sft":
            assert got["completion"][0]["content"] == [{"type": "text", "text": "three"}]
        else:
            assert got["solution"] == "3"


def test_rl_rows_may_be_plainer_than_the_released_ones(tmp_path, processor):
    """One picture instead of a list, a path instead of bytes, a number as the answer, 0 included."""
    one = Features({"images": Image(), "problem": Value("string"), "answer": Value("int64")})
    rows = [{"images": {"bytes": picture(), "path": None}, "problem": "<image>?", "answer": n} for n in (0, 3)]
    got, _ = load(parquet(tmp_path / "one.parquet", rows, one), "rl", processor)
    assert got["solution"][:] == ["0", "3"] and len(got[0]["images"]) == 1
    path = cold(tmp_path, [{"images": ["pics/a.png"], "problem": "<image>?", "answer": "3"}], file="rl.jsonl")
    assert load(path, "rl", processor)[1].kept == 1


def test_hub_like_folder_sources_and_limits(tmp_path, processor):
    for part in range(2):
        rows = [rl_row(answer=str(10 * part + i)) for i in range(3)]
        parquet(tmp_path / "hub" / "data" / f"train-0000{part}-of-00002.parquet", rows)
    parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", [rl_row(answer="99")])
    one = parquet(tmp_path / "one.parquet", [rl_row(answer=str(i)) for i in range(50, 55)])
    hub = str(tmp_path / "hub")
    sources = [
        {"path": hub, "limit": 2},
        {"path": hub, "split": "test", "limit": 10},
        {"path": one, "split": "train[1:3]"},
        {"path": hub, "data_files": ["data/train-00001-of-00002.parquet"], "split": "train"},
    ]
    rows, report = load_rows(sources, "rl", processor)
    assert rows["solution"][:] == ["0", "1", "99", "51", "52", "10", "11", "12"]
    assert report.read == report.kept == 8


def test_two_processes_give_the_same(toy, tmp_path, processor):
    for n in (1, 2):  # two files, or the second would come out of the cache
        shutil.copy(toy / "rl" / "train.parquet", tmp_path / f"{n}.parquet")
    one, two = (load(tmp_path / f"{n}.parquet", "rl", processor, num_proc=n)[0] for n in (1, 2))
    assert len(two.cache_files) == 2
    assert all(one.select_columns(c)[:] == two.select_columns(c)[:] for c in ("prompt", "solution", "tokens"))


# Prompts


@pytest.mark.parametrize(
    "text, parts",
    [
        ("<image>Q", ["image", "Q"]),
        ("Q<image>", ["Q", "image"]),
        ("See <image> and say", ["See ", "image", " and say"]),
        ("A <image> or <image>?", ["A ", "image", " or ", "image", "?"]),
        ("<image><image>Q", ["image", "image", "Q"]),
        ("<image>\nQ\n", ["image", "\nQ\n"]),
    ],
)
def test_markers_keep_their_place(tmp_path, processor, text, parts):
    row = rl_row(problem=text)
    row["images"] = row["images"] * text.count("<image>")
    rows, _ = load(parquet(tmp_path / "r.parquet", [row]), "rl", processor)
    got = [part.get("text", part["type"]) for part in rows[0]["prompt"][0]["content"]]
    assert got == parts and len(rows[0]["images"]) == parts.count("image")


def test_system_prompt(tmp_path, processor):
    conversation = [{"from": "system", "value": "Old."}, *turns()]
    path = cold(tmp_path, [{"image": "pics/a.png", "conversations": conversation}])

    def system(**kwargs):
        first = load(path, "sft", processor, **kwargs)[0][0]["prompt"][0]
        return first["content"][0]["text"] if first["role"] == "system" else None

    assert system() == "Old."
    assert system(system_prompt="New.") == "New."
    rl = parquet(tmp_path / "rl.parquet", [rl_row()])
    plain, told = (load(rl, "rl", processor, system_prompt=prompt)[0][0] for prompt in (None, "New."))
    assert [m["role"] for m in plain["prompt"]] == ["user"]
    assert [m["role"] for m in told["prompt"]] == ["system", "user"] and told["tokens"] != plain["tokens"]


# Pictures and tokens


@pytest.mark.parametrize(
    "bounds", [BOUNDS, {"min_pixels": 12544, "max_pixels": 12544}, {}], ids=["range", "one", "own"]
)
@pytest.mark.parametrize("kind", ["rl", "sft"])
def test_tokens_are_what_the_processor_makes(tmp_path, toy, kind, bounds):
    processor = load_processor(str(toy / "model"), **bounds)
    if kind == "rl":
        path = parquet(tmp_path / "r.parquet", [rl_row(picture(*size), answer="3") for size in ODD_SIZES])
    else:
        rows = [{"image": f"pics/{i}.png", "conversations": turns()} for i in range(len(ODD_SIZES))]
        path = cold(tmp_path, rows, pictures=())
        for i, size in enumerate(ODD_SIZES):
            (tmp_path / "pics" / f"{i}.png").write_bytes(picture(*size))
    rows, report = load(path, kind, processor)
    assert report.kept == len(ODD_SIZES)
    for row, (width, height) in zip(rows, ODD_SIZES, strict=True):
        limits = data.image_bounds(processor)
        assert row["images"][0].size == smart_resize(height, width, **limits)[::-1]
        messages = row["prompt"] + row.get("completion", [])
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=kind == "rl")
        made = processor(text=[text], images=row["images"], return_tensors="pt")
        assert made["input_ids"].shape[1] == row["tokens"]
        if bounds == BOUNDS:
            assert int(made["image_grid_thw"].prod()) * 14 * 14 == row["images"][0].width * row["images"][0].height


def test_bounds_travel_with_the_processor(tmp_path, processor):
    processor.save_pretrained(tmp_path)
    assert data.image_bounds(load_processor(str(tmp_path))) == {"factor": 28, **BOUNDS}
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize(
    "mode, kind", [("RGBA", "PNG"), ("L", "PNG"), ("CMYK", "JPEG"), ("RGB", "WEBP"), ("L", "GIF")]
)
def test_any_kind_of_picture_comes_out_as_rgb(tmp_path, processor, mode, kind):
    path = parquet(tmp_path / "r.parquet", [rl_row(picture(60, 60, kind, mode))])
    assert load(path, "rl", processor)[0][0]["images"][0].mode == "RGB"


def test_pictures_stay_as_they_are_until_read(tmp_path, processor, monkeypatch):
    content = [picture(60 + i, 60, "JPEG") for i in range(4)]
    rows, _ = load(parquet(tmp_path / "r.parquet", [rl_row(c) for c in content]), "rl", processor)
    opened = []
    real = PILImage.open
    monkeypatch.setattr(PILImage, "open", lambda file: opened.append(1) or real(file))
    assert [images[0]["bytes"] for images in rows.with_format(None)["images"]] == content
    assert rows.select_columns(["prompt", "solution"])[:2]["solution"] == ["3", "3"]
    assert len(rows) == len(rows.shuffle(seed=0).select(range(4))) and not opened
    assert rows[2]["images"][0].size == (56, 56) and len(opened) == 1


# Dropped rows


def damage(kind):
    whole = picture(200, 200, kind)
    return whole[: len(whole) // 2]


def test_every_reason_is_counted_and_listed(tmp_path, processor):
    files = {"cut.png": damage("PNG"), "cut.jpg": damage("JPEG"), "text.png": b"hello", "empty.png": b""}
    files |= {"thin.png": picture(1, 300), "sliver.png": picture(12, 2300), "a.png": picture()}
    bad = [
        ("missing image", {"image": "pics/none.png"}),
        ("missing image", {"image": ""}),
        ("missing image", {"image": "pics"}),
        ("broken image", {"image": "pics/cut.png"}),
        ("broken image", {"image": "pics/cut.jpg"}),
        ("broken image", {"image": "pics/text.png"}),
        ("broken image", {"image": "pics/empty.png"}),
        ("impossible image size", {"image": "pics/thin.png"}),
        ("impossible image size", {"image": "pics/sliver.png"}),
        ("image markers don't match the images", {"conversations": turns("How many?")}),
        ("image markers don't match the images", {"conversations": turns("<image> or <image>?")}),
        ("image markers don't match the images", {"conversations": turns("<image> or <|image_pad|>?")}),
        ("no image", {"image": None}),
        ("empty answer", {"conversations": turns(answer=" \n")}),
        ("empty answer", {"conversations": turns(answer=None)}),
        ("too many tokens", {"conversations": turns(answer="word " * 400)}),
        ("unknown role", {"conversations": turns(names=("human", "robot"))}),
        ("not one question and one answer", {"conversations": turns() + turns()}),
        ("not one question and one answer", {"conversations": turns()[:1]}),
        ("not one question and one answer", {"conversations": turns()[::-1]}),
        ("not one question and one answer", {"conversations": None}),
        ("not one question and one answer", {"conversations": []}),
    ]
    base = {"image": "pics/a.png", "conversations": turns()}
    rows = [{"id": f"bad-{i}", **base, **change} for i, (_, change) in enumerate(bad)]
    path = cold(tmp_path, [{"id": "good", **base}, *rows, {"id": "good", **base}])
    for name, content in files.items():
        (tmp_path / "pics" / name).write_bytes(content)

    kept, report = load(path, "sft", processor, max_length=300, max_dropped_share=0.99)
    assert kept["id"][:] == ["good", "good"]
    assert report.read == len(bad) + 2 and report.read == report.kept + sum(report.dropped.values())
    for reason in {reason for reason, _ in bad}:
        ids = [f"bad-{i}" for i, (r, _) in enumerate(bad) if r == reason]
        assert report.dropped[reason] == len(ids)
        assert [example.split(":")[0] for example in report.examples[reason]] == ids
        assert f"{len(ids)} dropped: {reason}" in str(report)
    report.save(tmp_path / "out" / "report.json")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"] == report.dropped

    with pytest.raises(RecipeError, match=r"(?s)max_dropped_share.*broken image.*bad-3: .*cut.png"):
        load(path, "sft", processor, max_length=300)


def test_rl_rows_that_cannot_be_rewarded(tmp_path, processor):
    rows = [rl_row(), rl_row(answer=""), rl_row(answer=None), rl_row(answer="   "), rl_row(problem=None)]
    rows += [rl_row(problem="<image>" + "long " * 400), rl_row(b"not a picture"), rl_row(damage("PNG"))]
    rows += [{**rl_row(), "images": None}, {**rl_row(), "images": []}, rl_row(answer=r"$\frac{1}{$")]
    rows += [{**rl_row(), "images": [{"bytes": None, "path": None}]}]
    path = parquet(tmp_path / "r.parquet", rows)
    kept, report = load(path, "rl", processor, max_length=300, max_dropped_share=0.99)
    assert len(kept) == 1
    assert report.dropped == {
        "empty answer": 3,
        "image markers don't match the images": 1,
        "too many tokens": 1,
        "broken image": 2,
        "no image": 2,
        "answer can't be graded": 1,
        "missing image": 1,
    }
    (example,) = report.examples["too many tokens"]
    assert example.startswith("row 5: ") and example.endswith("the limit is 300")


@pytest.mark.parametrize("limit, kept", [(0, 0), (-1, 1)])
def test_token_limit_is_exact(tmp_path, processor, limit, kept):
    path = parquet(tmp_path / "r.parquet", [rl_row(), rl_row(problem="<image>" + "longer " * 20)])
    tokens = load(path, "rl", processor)[0]["tokens"][:]
    got = load(path, "rl", processor, max_length=tokens[1] + limit, max_dropped_share=0.5)[1]
    assert got.dropped.get("too many tokens", 0) == kept


def test_share_that_may_be_dropped(tmp_path, processor):
    path = parquet(tmp_path / "r.parquet", [rl_row()] * 19 + [rl_row(answer="")])
    assert load(path, "rl", processor, max_dropped_share=0.05)[1].kept == 19
    with pytest.raises(RecipeError, match=r"5.0% .* allows 4.0%.*(?s:.)*1 dropped: empty answer"):
        load(path, "rl", processor, max_dropped_share=0.04)
    none_left = parquet(tmp_path / "n.parquet", [rl_row(answer="")])
    with pytest.raises(RecipeError, match="0 of 1 rows kept"):
        load(none_left, "rl", processor, max_dropped_share=1.0)


def test_mended_and_lost_pictures_are_noticed(tmp_path, processor):
    """`datasets` keeps what was checked; a second start must still see what has changed on the disk."""
    path = cold(tmp_path, [{"image": f"pics/{n}.png", "conversations": turns()} for n in "ab"], pictures=("a.png",))

    def dropped():
        return load(path, "sft", processor, max_dropped_share=0.99)[1].dropped

    assert dropped() == {"missing image": 1}
    (tmp_path / "pics" / "b.png").write_bytes(b"half a download")
    assert dropped() == {"broken image": 1}
    (tmp_path / "pics" / "b.png").write_bytes(picture())
    assert dropped() == {}
    (tmp_path / "pics" / "a.png").unlink()
    assert dropped() == {"missing image": 1}


# Sources that can't be used


@pytest.mark.parametrize(
    "source, kind, parts",
    [
        ({"path": "{tmp}/none"}, "rl", ["datasets[0]", "{tmp}/none", "no such path"]),
        ({"path": "nobody/none-such"}, "rl", ["datasets[0]", "nobody/none-such", "Hub id"]),
        ({"path": "{tmp}/empty"}, "rl", ["datasets[0]", "{tmp}/empty"]),
        ({"path": "{tmp}/table.csv"}, "rl", ["table.csv", ".parquet, .json or .jsonl"]),
        ({"path": "{tmp}/broken.parquet"}, "rl", ["broken.parquet"]),
        ({"path": "{tmp}/broken.json"}, "sft", ["broken.json"]),
        ({"path": "{tmp}", "data_files": "none.json"}, "sft", ["no file {tmp}/none.json"]),
        ({"path": "{tmp}/rl.parquet", "split": "train["}, "rl", ["datasets[0]", "train["]),
        ({"path": "{tmp}/hub", "split": "validation"}, "rl", ["datasets[0]", "validation"]),
        ({"path": "{tmp}/rl.parquet"}, "sft", ["answer, images, problem", "sft", "conversations"]),
        ({"path": "{tmp}/cold.json"}, "rl", ["conversations", "kind rl", "images, problem, answer"]),
        (
            {"path": "{tmp}/cold.json", "image_folder": "{tmp}/pix"},
            "sft",
            ["`image_folder`", "{tmp}/pix", "not a folder"],
        ),
        ({"path": "{tmp}/cold.json", "imagefolder": "x"}, "sft", ["datasets[0].`imagefolder`", "`image_folder`"]),
        ({"paht": "x"}, "sft", ["`paht`", "`path`"]),
        ({"limit": 3}, "sft", ["no `path`"]),
        ({"path": "{tmp}/cold.json", "limit": "ten"}, "sft", ["`limit`", "'ten'"]),
        ({"path": "{tmp}/cold.json", "limit": 0}, "sft", ["`limit`", "0"]),
        ({"path": "{tmp}/cold.json", "drop_reasoning": "no"}, "sft", ["`drop_reasoning`", "'no'", "true or false"]),
        ({"path": "{tmp}/rl.parquet", "drop_reasoning": True}, "rl", ["`drop_reasoning`", "no reasoning"]),
    ],
)
def test_unusable_sources(tmp_path, processor, source, kind, parts):
    (tmp_path / "empty").mkdir()
    for file in ("table.csv", "broken.parquet", "broken.json"):
        (tmp_path / file).write_text("a,b\n1,2\n")
    parquet(tmp_path / "rl.parquet", [rl_row()])
    parquet(tmp_path / "hub" / "train.parquet", [rl_row()])
    cold(tmp_path, [{"image": "pics/a.png", "conversations": turns()}])
    source = {k: v.format(tmp=tmp_path) if isinstance(v, str) else v for k, v in source.items()}
    with pytest.raises(RecipeError) as error:
        load(source, kind, processor)
    assert all(part.format(tmp=tmp_path) in str(error.value) for part in parts), error.value


def test_no_sources(processor):
    with pytest.raises(RecipeError, match="`datasets` is empty"):
        load_rows([], "rl", processor)
    with pytest.raises(RecipeError, match=r"datasets\[0\]: 'runs/toy/rl'.*path: runs/toy/rl"):
        load_rows(["runs/toy/rl"], "rl", processor)


def test_load_processor_refuses(toy, tmp_path):
    for path in ("runs/none-such", str(tmp_path)):
        with pytest.raises(RecipeError, match=f"`model_name_or_path`: {path}"):
            load_processor(path)
    with pytest.raises(RecipeError, match="`min_pixels` 500 is over `max_pixels` 400"):
        load_processor(str(toy / "model"), 500, 400)
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(toy / "model" / file, tmp_path)
    with pytest.raises(RecipeError, match="image processor"):
        load_processor(str(tmp_path))


def test_a_folder_with_a_card_is_read_as_it_is_now(tmp_path):
    """`datasets` caches such a folder by its name."""
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/*.parquet}\n---\n"

    def answers(folder, *made):
        parquet(folder / "data" / "train.parquet", [rl_row(answer=answer) for answer in made])
        (folder / "README.md").write_text(card)
        return data.open_source({"path": str(folder)}, "here")["answer"][:]

    assert answers(tmp_path / "a" / "dataset", "1", "2") == ["1", "2"]
    assert answers(tmp_path / "b" / "dataset", "3") == ["3"]
    assert answers(tmp_path / "a" / "dataset", "4", "5") == ["4", "5"]


@pytest.mark.parametrize("kind", ["parquet", "json"])
def test_a_file_damaged_inside_is_named_with_the_cause(tmp_path, kind):
    """`datasets` says of it that an error occurred."""
    rows = [{"problem": f"{i}", "answer": "1" * 99} for i in range(100)]
    for i in range(3):
        getattr(Dataset.from_list(rows), f"to_{kind}")(tmp_path / f"train-{i}.{kind}")
    bad = tmp_path / f"train-1.{kind}"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:4] + b"?" * 500 + whole[504:])
    for source in (
        {"path": str(tmp_path)},
        {"path": str(tmp_path), "data_files": [f"train-{i}.{kind}" for i in range(3)]},
        {"path": str(bad)},
    ):
        with pytest.raises(
            RecipeError, match=f"datasets.0.: can't read .*train-1.{kind}.*: (OSError|Arrow|Value)"
        ) as told:
            data.open_source(source, "datasets[0]")
        assert "DatasetGenerationError" not in str(told.value) and "\n" not in str(told.value)


def test_a_broken_picture_is_named_by_its_place(tmp_path):
    (tmp_path / "empty.png").touch()
    for image in (
        {"bytes": None, "path": "empty.png"},
        {"bytes": b"", "path": "empty.png"},
        {"bytes": b"?", "path": None},
    ):
        with pytest.raises(data.Drop) as drop:
            data.open_image(image, str(tmp_path))
        assert drop.value.reason == "broken image" and "BytesIO" not in drop.value.detail
        assert (image["path"] or "embedded") in drop.value.detail
