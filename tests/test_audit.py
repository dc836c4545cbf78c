"""The audit finds every planted fault and nothing else, in small files of the released and the benchmarks' layouts."""

import io
import json
import random
import runpy
import subprocess
import sys

import pandas as pd
import pytest
from PIL import Image, ImageDraw

from runs import ROOT
from vision_r1_recipes import audit, data, recipe
from vision_r1_recipes.recipe import RecipeError


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.randrange(150, 256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.randrange(size[0] - 50), rng.randrange(size[1] - 40)
        colour = tuple(rng.randrange(200) for _ in range(3))
        draw.rectangle((x, y, x + rng.randrange(10, 50), y + rng.randrange(10, 40)), fill=colour)
    return image


def stored(image: Image.Image, kind: str = "png", **options) -> dict:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def again(seed: int) -> dict:
    """The same picture as somebody else would have it: half the size and a JPEG."""
    image = picture(seed)
    return stored(image.resize((image.width // 2, image.height // 2)), "jpeg", quality=80)


NOUNS = [
    "angle",
    "side",
    "area",
    "volume",
    "radius",
    "height",
    "width",
    "median",
    "perimeter",
    "diagonal",
    "slope",
    "chord",
]
PLACES = [
    "north of the river",
    "behind the school",
    "on the ship",
    "in the garden",
    "near a mountain",
    "at the market",
]


def question(k: int) -> str:
    rng = random.Random(f"question {k}")
    first, second = rng.sample(NOUNS, 2)
    return (
        f"The {first} of object {k} {rng.choice(PLACES)} is {k + 3}. What is its {second} if all else is {7 * k + 1}?"
    )


def row(k: int, **changed) -> dict:
    return {"images": [stored(picture(k))], "problem": f"<image>{question(k)}", "answer": str(k)} | changed


FAULTS = {  # finding -> id of the row in the training file
    "exact duplicate": ["row 20", "row 21"],
    "conflicting answers": ["row 21", "row 4"],
    "near duplicate": ["row 22"],
    "image markers don't match the images": ["row 23"],
    "no image": ["row 24"],
    "answer can't be graded": ["row 25"],
    "broken image": ["row 26"],
    "never rewarded in stage 1": ["row 27"],
    "too many tokens": ["row 28"],
    "suspicious answer": ["row 27", "row 29"],
    "empty answer": ["row 30"],
}


@pytest.fixture(scope="module")
def world(toy, tmp_path_factory):
    """`rl/` with 20 clean rows and a row for each fault, `test.parquet`, the four benchmarks, and a recipe."""
    folder = tmp_path_factory.mktemp("audit")
    reworded = f"<image>{question(5)}".replace("What is", "what  is").replace("if all else", "when all else")
    rows = [
        *map(row, range(20)),
        row(3, problem=f"<image> {question(3).upper()}"),
        row(4, answer="4000"),
        row(5, images=[again(5)], problem=reworded),
        row(23, problem=f"<image><image>{question(23)}"),
        row(24, images=[]),
        row(25, answer="\\frac{1}{"),
        row(26, images=[{"bytes": stored(picture(26))["bytes"][:200], "path": None}]),
        row(27, answer="the sum of all of the lengths of the sides of the figure " * 5),
        row(28, problem=f"<image>{question(28)}" + " and so on" * 100),
        row(29, answer="A and B"),
        row(30, answer=" "),
    ]
    (folder / "rl").mkdir()
    pd.DataFrame(rows).to_parquet(folder / "rl/train.parquet")
    held_out = [*map(row, range(100, 108)), row(6, images=[again(6)], answer="6")]
    pd.DataFrame(held_out).to_parquet(folder / "rl/test.parquet")

    hint = "Hint: Please answer the question and provide the final value at the end.\nQuestion: "
    options = "\nChoices:\n(A) 1\n(B) 2"
    more = [(200 + k, stored(picture(200 + k)), question(200 + k)) for k in range(4)]
    (folder / "mathvista").mkdir()
    pd.DataFrame(
        [
            {"pid": str(k), "question": f"{hint}{text}", "image": f"images/{k}.jpg", "decoded_image": image}
            | {"choices": None, "answer": "1", "question_type": "free_form", "answer_type": "integer"}
            for k, image, text in [*more, (7, again(7), question(7))]
        ]
    ).to_parquet(folder / "mathvista/testmini-00000-of-00001.parquet")
    (folder / "mathverse").mkdir()
    pd.DataFrame(
        [
            {"sample_index": str(k), "problem_index": str(k), "problem_version": "Text Dominant", "image": image}
            | {"question": f"{text}{options}", "answer": "A", "question_type": "multi-choice"}
            for k, image, text in [*more, (8, again(8), question(8))]
        ]
    ).to_parquet(folder / "mathverse/testmini.parquet")
    (folder / "dynamath").mkdir()
    for variant in (1, 2):
        pd.DataFrame(
            [
                {"id": str(k), "question": text, "image": f"{k}.png", "decoded_image": image, "ground_truth": "1"}
                for k, image, text in [*more, (8 + variant, again(8 + variant), question(8 + variant))]
            ]
        ).to_parquet(folder / f"dynamath/sample_variant{variant}.parquet")
    (folder / "mm_math/images").mkdir(parents=True)
    with (folder / "mm_math/MM_Math.jsonl").open("w") as file:
        for k, image, text in [*more, (11, again(11), question(11)), (12, None, question(12))]:
            if image:
                (folder / f"mm_math/images/{k}.png").write_bytes(image["bytes"])
            made = {
                "question": text,
                "solution": "\\boxed{1}",
                "file_name": f"{k}.png",
                "difficult": "easy",
                "year": "9",
            }
            file.write(json.dumps(made) + "\n")
    (folder / "grpo.yaml").write_text(
        recipe.dump(
            {
                "base": str(ROOT / "recipes/toy/ptst.yaml"),
                "model_name_or_path": str(toy / "model"),
                "datasets": [{"path": str(folder / "rl")}],
                "eval_datasets": [{"path": str(folder / "rl"), "split": "test"}],
                **{"min_pixels": 3136, "max_pixels": 40000, "max_prompt_length": 256},
                "stages": [{"max_completion_length": 96, "num_generations": 4, "steps": 1}],
            }
        )
    )
    return folder


def flagged(findings: pd.DataFrame, name: str = "datasets") -> dict[str, list[str]]:
    ours = findings[findings["set"] == name]
    return {finding: sorted(group["id"]) for finding, group in ours.groupby("finding")}


@pytest.mark.slow
def test_every_fault_of_an_rl_set_is_found_and_no_clean_row(world):
    rows, findings, totals = audit.audit(recipe.load(world / "grpo.yaml"))
    assert flagged(findings) == {**FAULTS, "leaked": ["row 6"]}
    assert flagged(findings, "eval_datasets") == {}
    assert totals == {"datasets": 31, "eval_datasets": 9}
    details = findings.set_index(["finding", "id"])["detail"]
    assert details["leaked", "row 6"] == f"to row 8 of {world}/rl"
    assert details["near duplicate", "row 22"] == f"of row 5 of {world}/rl"
    assert "'4000'" in details["conflicting answers", "row 4"]
    assert (rows["kind"][rows["id"].isin([f"row {k}" for k in range(10)])] == "number").all()
    # What the training would drop is what is called unusable, with the same reasons.
    processor = data.load_processor(recipe.load(world / "grpo.yaml")["model_name_or_path"], 3136, 40000)
    _, said = data.load_rows([{"path": str(world / "rl")}], "rl", processor, None, 256, max_dropped_share=1.0)
    assert {reason: len(FAULTS[reason]) for reason in said.dropped} == said.dropped


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, leaked",
    [("mathvista", ["7"]), ("mathverse", ["8"]), ("dynamath", ["9", "10"]), ("mm_math", ["11"])],
)
def test_leaks_to_the_benchmarks_in_their_own_layouts(world, name, leaked):
    values = {**recipe.load(world / "grpo.yaml"), "eval_datasets": None}
    _, findings, totals = audit.audit(values, against=[str(world / name)])
    assert flagged(findings) == {**FAULTS, "leaked": sorted(f"row {k}" for k in leaked)}
    broken = {"can't be compared": ["row 5"]} if name == "mm_math" else {}
    assert flagged(findings, "against") == broken
    assert totals["against"] == {"dynamath": 10, "mm_math": 6}.get(name, 5)
    if name == "mm_math":
        assert "missing image" in findings.set_index("finding")["detail"]["can't be compared"]


def test_the_same_picture_with_another_question_is_told_and_allowed(world, tmp_path):
    pd.DataFrame([row(2, problem=f"<image>{question(300)}")]).to_parquet(tmp_path / "other.parquet")
    values = {**recipe.load(world / "grpo.yaml"), "eval_datasets": None}
    _, findings, totals = audit.audit(values, against=[str(tmp_path / "other.parquet")])
    assert flagged(findings) == {**FAULTS, "shared picture": ["row 2"]}
    verdicts = {v["finding"]: v["holds"] for v in audit.verdicts(findings, totals, 0.3, {})}
    assert verdicts["shared picture"] is True and verdicts["conflicting answers"] is False
    assert verdicts["unusable"] is True and verdicts["broken image"] is True
    assert {v["finding"]: v["holds"] for v in audit.verdicts(findings, totals, 0.1, {})}["unusable"] is False


def cold(k: int, **changed) -> dict:
    turns = [
        {"from": "human", "value": f"<image>\n{question(k)}"},
        {"from": "gpt", "value": f"<think> So. </think><answer> Final Answer:{k} </answer>"},
    ]
    return {"id": f"cold-{k}", "image": f"pictures/{k}.png", "conversations": turns} | changed


@pytest.mark.slow
@pytest.mark.parametrize("schema", ["llava_cot", "mulberry"])
def test_the_cold_start_s_layouts(world, tmp_path, schema):
    (tmp_path / "pictures").mkdir()
    for k in range(12):
        picture(k).save(tmp_path / f"pictures/{k}.png")
    (tmp_path / "pictures/10.png").write_bytes(b"no picture")
    rows = [
        *map(cold, range(9)),
        cold(2, id="again"),
        cold(50, id="missing"),
        cold(10, id="broken"),
        cold(
            11,
            id="marked",
            conversations=[{"from": "human", "value": "<image><image>x"}, cold(11)["conversations"][1]],
        ),
        cold(9, id="long", conversations=[cold(9)["conversations"][0], {"from": "gpt", "value": "word " * 400}]),
    ]
    if schema == "mulberry":
        roles = {"human": "user", "gpt": "assistant"}
        rows = [
            {
                "images": [r["image"]],
                "conversations": [{"from": roles[t["from"]], "value": t["value"]} for t in r["conversations"]],
            }
            for r in rows
        ]
    (tmp_path / "cold.json").write_text(json.dumps(rows))
    values = recipe.load(ROOT / "recipes/toy/cold_start.yaml") | {
        **{"model_name_or_path": recipe.load(world / "grpo.yaml")["model_name_or_path"], "max_length": 256},
        "datasets": [{"path": str(tmp_path / "cold.json")}],
        **{"min_pixels": 3136, "max_pixels": 40000},
    }
    _, findings, _ = audit.audit(values)
    names = ["again", "missing", "broken", "marked", "long"]
    ids = dict(zip(names, names if schema == "llava_cot" else [f"row {k}" for k in range(9, 14)], strict=True))
    assert flagged(findings) == {
        "exact duplicate": [ids["again"]],
        "missing image": [ids["missing"]],
        "broken image": [ids["broken"]],
        "image markers don't match the images": [ids["marked"]],
        "too many tokens": [ids["long"]],
    }


@pytest.mark.slow
def test_the_command_and_its_exit_codes(world, tmp_path):
    command = [sys.executable, "-m", "vision_r1_recipes.data", "audit", str(world / "grpo.yaml")]
    run = subprocess.run([*command, "--output_dir", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 1 and "datasets: 1 leaked (3.2%, allowed 0.0%)  <-- too many" in run.stdout
    page = (tmp_path / "audit.html").read_text()
    assert "conflicting answers" in page and "data:image/png" in page
    assert len(pd.read_parquet(tmp_path / "findings.parquet")) == sum(map(len, FAULTS.values())) + 1
    assert json.loads((tmp_path / "audit.json").read_text())["rows"] == {"datasets": 31, "eval_datasets": 9}
    more = [f"{name}=1" for name in (*audit.ALLOWED, audit.UNUSABLE)]
    run = subprocess.run([*command, "--output_dir", str(tmp_path), "--allow", *more], capture_output=True, text=True)
    assert run.returncode == 0 and "too many\n" not in run.stdout.replace("too many tokens", "")
    run = subprocess.run([*command, "--allow", "leakd=1"], capture_output=True, text=True)
    assert run.returncode == 2 and "error: `--allow`: leakd: none of" in run.stderr
    broken = tmp_path / "broken.parquet"
    broken.write_bytes((world / "rl/train.parquet").read_bytes()[:-100])
    for more in (["--datasets", json.dumps([{"path": str(broken)}])], ["--against", str(broken)]):
        run = subprocess.run([*command, *more], capture_output=True, text=True)
        assert run.returncode == 2 and "can't read" in run.stderr and "Traceback" not in run.stderr


def test_another_set_needs_a_question_and_a_picture(world, tmp_path):
    pd.DataFrame({"text": ["a"], "picture": ["b"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(RecipeError, match="has the columns picture, text; needed are"):
        audit._benchmark(str(tmp_path / "x.parquet"), "", None)


def test_near_texts():
    near, contained = audit._near_texts, audit._contained
    assert near("what is the length of side ab in the figure", "what is the length of side ab in this figure")
    assert not near("what is the length of side ab when x is 3", "what is the length of side ab when x is 5")
    assert contained("find x", "question: find x.\nchoices: 1, 2") and contained("", "anything")
    assert not contained("how high are the red bars", "how many red bars are there in the upper row")


@pytest.mark.slow
def test_a_download_is_checked(world, tmp_path):
    prepare = runpy.run_path(str(ROOT / "data/prepare.py"))["check"]
    said, problems = prepare(world / "rl")
    assert "train: 31 rows, about 10,000 expected" in said and "ok      test: 9 rows" in said and problems == 1
    folder = tmp_path / "Vision-R1-cold"
    (folder / "llava_cot_images").mkdir(parents=True)
    picture(1).save(folder / "llava_cot_images/1.png")
    rows = [cold(k, image=f"llava_cot_images/{k}.png") for k in (1, 2)]
    (folder / "vision_r1_llava_cot_full.json").write_text(json.dumps(rows))
    said, problems = prepare(folder)
    assert "vision_r1_mulberry_sft_full.json is missing" in said
    assert "2 rows, 63,019 expected" in said and "1 of 2 pictures are missing" in said and problems == 3
    with pytest.raises(SystemExit, match="neither"):
        prepare(tmp_path)
