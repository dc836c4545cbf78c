# ruff: noqa: RUF001
"""The audit finds every planted fault and nothing else, in small files of the released and the benchmarks' layouts."""

import io
import itertools
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
from vision_r1_recipes.report import html
from vision_r1_recipes.toy import questions


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
    (folder / "mathvista/data").mkdir(parents=True)
    # As on the Hub, with annotations beside the parquet files that are no rows.
    (folder / "mathvista/annot_testmini.json").write_text(json.dumps({"1": {"pid": "1", "question": "?"}}))
    (folder / "mathvista/source.json").write_text(json.dumps({"Geometry3K": {"domain": "geometry"}}))
    pd.DataFrame(
        [
            {"pid": str(k), "question": f"{hint}{text}", "image": f"images/{k}.jpg", "decoded_image": image}
            | {"choices": None, "answer": "1", "question_type": "free_form", "answer_type": "integer"}
            for k, image, text in [*more, (7, again(7), question(7))]
        ]
    ).to_parquet(folder / "mathvista/data/testmini-00000-of-00001.parquet")
    (folder / "mathverse").mkdir()
    verse = [
        {"sample_index": str(k), "problem_index": str(k), "problem_version": "Text Dominant", "image": image}
        | {"question": f"{text}{options}", "answer": "A", "question_type": "multi-choice"}
        for k, image, text in [*more, (8, again(8), question(8))]
    ]
    pd.DataFrame(verse).to_parquet(folder / "mathverse/testmini.parquet")
    text_only = [{**v, "sample_index": f"text {k}", "image": ""} for k, v in enumerate(verse)]
    pd.DataFrame(text_only).to_parquet(folder / "mathverse/testmini_text_only.parquet")
    (folder / "mathverse/testmini.json").write_text(json.dumps([{**v, "image": "images/1.png"} for v in verse]))
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
                **{"min_pixels": 3136, "max_pixels": 40000, "max_prompt_length": 256, "num_proc": None},
                "stages": [{"max_completion_length": 96, "num_generations": 4, "steps": 1}],
            }
        )
    )
    return folder


def flagged(findings: pd.DataFrame, name: str = "datasets") -> dict[str, list[str]]:
    ours = findings[findings["set"] == name]
    return {finding: sorted(group["id"]) for finding, group in ours.groupby("finding")}


def per_set(totals) -> dict[str, int]:
    return dict(audit._per_set(totals))


def test_every_fault_of_an_rl_set_is_found_and_no_clean_row(world):
    rows, findings, totals, not_compared = audit.audit(recipe.load(world / "grpo.yaml"))
    assert flagged(findings) == {**FAULTS, "leaked": ["row 6"]}
    assert flagged(findings, "eval_datasets") == {}
    assert totals == {("datasets", f"{world}/rl"): 31, ("eval_datasets", f"{world}/rl:test"): 9}
    assert not_compared == 0
    details = findings.set_index(["finding", "id"])["detail"]
    assert details["leaked", "row 6"] == f"to row 8 of {world}/rl:test"
    assert details["near duplicate", "row 22"] == f"of row 5 of {world}/rl"
    assert "'4000'" in details["conflicting answers", "row 4"]
    assert details["image markers don't match the images", "row 23"] == "2 x <image>, 1 images"
    assert (rows["kind"][rows["id"].isin([f"row {k}" for k in range(10)])] == "number").all()
    # What the training would drop is what is called unusable, with the same reasons.
    processor = data.load_processor(recipe.load(world / "grpo.yaml")["model_name_or_path"], 3136, 40000)
    _, said = data.load_rows([{"path": str(world / "rl")}], "rl", processor, None, 256, max_dropped_share=1.0)
    assert {reason: len(FAULTS[reason]) for reason in said.dropped} == said.dropped
    assert rows["used"].sum() == said.kept + 9


@pytest.mark.parametrize(
    "name, leaked, told",
    [
        ("mathvista", ["7"], {}),
        ("mathverse", ["8"], {"without a picture": [f"text {k}" for k in range(5)]}),
        ("dynamath", ["9", "10"], {}),
        ("mm_math", ["11"], {"can't be compared": ["row 5"]}),
    ],
)
def test_leaks_to_the_benchmarks_in_their_own_layouts(world, name, leaked, told):
    values = {**recipe.load(world / "grpo.yaml"), "eval_datasets": None}
    _, findings, totals, _ = audit.audit(values, against=[str(world / name)])
    assert flagged(findings) == {**FAULTS, "leaked": sorted(f"row {k}" for k in leaked)}
    assert flagged(findings, "against") == told
    assert per_set(totals)["against"] == {"dynamath": 10, "mathverse": 10, "mm_math": 6}.get(name, 5)
    if name == "mm_math":
        assert "missing image" in findings.set_index("finding")["detail"]["can't be compared"]


def test_the_same_picture_with_another_question_is_told_and_allowed(world, tmp_path):
    pd.DataFrame([row(2, problem=f"<image>{question(300)}")]).to_parquet(tmp_path / "other.parquet")
    values = {**recipe.load(world / "grpo.yaml"), "eval_datasets": None}
    _, findings, totals, _ = audit.audit(values, against=[str(tmp_path / "other.parquet")])
    assert flagged(findings) == {**FAULTS, "shared picture": ["row 2"]}
    verdicts = {v["finding"]: v["holds"] for v in audit.verdicts(findings, totals, 0.3, {})}
    assert verdicts["shared picture"] is True and verdicts["conflicting answers"] is False
    assert verdicts["unusable"] is True and verdicts["broken image"] is True
    assert {v["finding"]: v["holds"] for v in audit.verdicts(findings, totals, 0.1, {})}["unusable"] is False


def test_no_false_alarm_on_the_toy_world_s_pictures():
    """They are dots and squares on a grid, more alike than any real ones, with a dozen different questions."""
    held_out: set[str] = set()
    rows, cells = [], []
    for name, seed, count in (("eval_datasets", 1, 150), ("datasets", 2, 450)):
        source = questions(random.Random(seed), held_out, hold_out=name != "datasets")
        for asked in itertools.islice(source, count):
            looked = audit._look({"images": [stored(asked.picture)]})
            rows.append({"set": name, "source": name, "id": str(len(rows)), "question": asked.text} | looked)
            rows[-1]["answer"] = asked.answer
            cells.append((asked.text, asked.grid))
    found, not_compared = audit._on_pairs(pd.DataFrame(rows))
    assert not not_compared and {f["finding"] for f in found} == {"near duplicate", "shared picture"}
    for f in found:
        if f["finding"] == "near duplicate":  # the same cells before another tint
            assert cells[int(f["id"])] == cells[int(f["detail"].split()[1])], f


def test_rows_outside_of_a_band_of_pass_rates_are_held_against_nothing(world, tmp_path):
    values = {**recipe.load(world / "grpo.yaml"), "eval_datasets": None}
    rows = [row(0), row(1), row(1), row(2)]
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    rates = [{"id": f"row {i}", "digest": data.digest_of(r["problem"], r["answer"])} for i, r in enumerate(rows)]
    pd.DataFrame(rates).assign(pass_rate=[0.5, 0.5, 1.0, 0.0]).to_parquet(tmp_path / "rates.parquet")
    source = {"path": str(tmp_path / "train.parquet"), "pass_rates": str(tmp_path / "rates.parquet")}
    values["datasets"] = [source | {"pass_rate_band": [0.1, 0.9]}]
    _, findings, totals, _ = audit.audit(values)
    assert flagged(findings) == {"pass rate outside the band": ["row 2", "row 3"]}
    assert all(v["holds"] for v in audit.verdicts(findings, totals, 0.0, {}))


def test_all_rows_may_be_unusable(world, tmp_path):
    values = {**recipe.load(world / "grpo.yaml"), "eval_datasets": None}
    pd.DataFrame([row(0, images=[]), row(1, answer="")]).to_parquet(tmp_path / "train.parquet")
    values["datasets"] = [{"path": str(tmp_path / "train.parquet")}]
    assert audit.report(values, "all.yaml", output_dir=str(tmp_path / "out")) == 1
    assert "| 2 | 100.00% |" in " ".join((tmp_path / "out/audit.md").read_text().split())
    with pytest.raises(RecipeError, match="`datasets` is empty"):
        audit.audit({**values, "datasets": []})
    with pytest.raises(RecipeError, match=r"unknown key `dataset`.*`datasets`"):
        audit.audit({**values, "dataset": []})
    with pytest.raises(RecipeError, match="another's"):
        audit.audit(recipe.load(ROOT / "recipes/bridge.yaml"))


def test_every_recipe_s_kind_is_known():
    for file in (ROOT / "recipes").rglob("*.yaml"):
        values = recipe.load(file)
        if values.keys() & {"stages", "global_batch_size"}:
            assert audit._kind(values) == ("rl" if "stages" in values else "sft"), file


def plain_rows(*made: dict) -> pd.DataFrame:
    """Rows as they are when the pictures have been looked at: `p` is a row's picture."""
    return pd.DataFrame(
        {"set": "datasets", "source": "s", "id": str(i), "answer": "1"}
        | {"pixels": str(m["p"]), "phash": f"{m['p']:016x}", "small": bytes([m["p"]]) * 8}
        | {"question": "?"}
        | {k: v for k, v in m.items() if k != "p"}
        for i, m in enumerate(made)
    )


def test_what_is_too_much_to_compare_is_counted_and_exact_leaks_are_found_anyway(monkeypatch):
    monkeypatch.setattr(audit, "TEXT_PAIRS", 10)
    many = [{"p": 0, "question": f"{k} apples?"} for k in range(20)]
    rows = plain_rows(*many, {"p": 0, "question": "19  Apples?", "set": "against"})
    found, not_compared = audit._on_pairs(rows)
    assert not_compared == 21 * 20 // 2 - 10
    assert [f["id"] for f in found if f["finding"] == "leaked"] == ["19"]

    monkeypatch.setattr(audit, "NEIGHBOURS", 3)
    found, not_compared = audit._on_pairs(plain_rows(*({"p": k, "question": f"{k} apples?"} for k in range(8))))
    assert not_compared == 8 * 7 // 2 - (3 * 5 + 2 + 1)
    monkeypatch.undo()
    assert audit._on_pairs(plain_rows(*({"p": k, "question": f"{k} apples?"} for k in range(8))))[1] == 0


def test_a_repeat_leaks_when_its_first_does():
    rows = plain_rows({"p": 1}, {"p": 1}, {"p": 200, "question": "x"}, {"p": 2, "set": "eval_datasets"})
    found, _ = audit._on_pairs(rows)
    assert [f["id"] for f in found if f["finding"] == "leaked"] == ["0", "1"]


def test_text_of_rows_is_shown_as_it_is():
    page = html(f"- {audit._plain('2 x <image>, a_b_c | `x` **y** &lt; [1](2)')}\n", "t", ROOT)
    assert "<li>2 x &#60;image&#62;, a_b_c &#124; `x` **y** &#38;lt; [1](2)</li>" in page
    assert audit._plain("a " * 400).endswith(" ...")


def cold(k: int, **changed) -> dict:
    turns = [
        {"from": "human", "value": f"<image>\n{question(k)}"},
        {"from": "gpt", "value": f"<think> So. </think><answer> Final Answer:{k} </answer>"},
    ]
    return {"id": f"cold-{k}", "image": f"pictures/{k}.png", "conversations": turns} | changed


MUTE = {"from": "gpt", "value": "<think>\n</think><answer> Final Answer:11 </answer>"}
ODD = {"from": "gpt", "value": "<think> So. </think><answer> Final Answer:\\frac{1}{ </answer>"}


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
        cold(9, id="untagged", conversations=[cold(9)["conversations"][0], {"from": "gpt", "value": "It is 9."}]),
        cold(0, id="odd", image="pictures/8.png", conversations=[cold(0)["conversations"][0], ODD]),
        cold(11, id="mute", conversations=[cold(11)["conversations"][0], MUTE]),
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
    _, findings, _, _ = audit.audit(values)
    names = ["again", "missing", "broken", "marked", "long", "untagged", "odd", "mute"]
    ids = dict(zip(names, names if schema == "llava_cot" else [f"row {k}" for k in range(9, 17)], strict=True))
    assert flagged(findings) == {
        "exact duplicate": [ids["again"]],
        "missing image": [ids["missing"]],
        "broken image": [ids["broken"]],
        "image markers don't match the images": [ids["marked"]],
        "too many tokens": [ids["long"]],
        "no <think> and <answer>": sorted([ids["untagged"], ids["mute"]]),
        "suspicious answer": [ids["odd"]],
        "shared picture": [ids["odd"]],
    }
    values["datasets"][0]["drop_reasoning"] = True  # then nobody has any
    left_out = flagged(audit.audit(values)[1])
    assert "no <think> and <answer>" not in left_out and left_out["suspicious answer"] == [ids["odd"]]
    # The same file as a set that an RL run must not have.
    values = {**recipe.load(world / "grpo.yaml"), "eval_datasets": None}
    _, findings, _, _ = audit.audit(values, against=[str(tmp_path)])
    assert set(flagged(findings)["leaked"]) == {f"row {k}" for k in (*range(10), 11, 20, 21, 22)}


@pytest.mark.slow
def test_the_command_and_its_exit_codes(world, tmp_path, capsys):
    command = ["audit", str(world / "grpo.yaml"), "--output_dir", str(tmp_path)]
    assert data.main(command) == 1
    assert "datasets: 1 leaked (3.2%, allowed 0.0%)  <-- too many" in capsys.readouterr().out
    page = (tmp_path / "audit.html").read_text()
    assert "conflicting answers" in page and "data:image/png" in page and "&#60;image&#62;" in page
    assert len(pd.read_parquet(tmp_path / "findings.parquet")) == sum(map(len, FAULTS.values())) + 1
    kept = json.loads((tmp_path / "audit.json").read_text())
    assert kept["rows"] == {"datasets": 31, "eval_datasets": 9} and kept["pairs_not_compared"] == 0
    more = [f"{name}=1" for name in (*audit.ALLOWED, audit.UNUSABLE)]
    assert data.main([*command, "--allow", *more]) == 0
    assert "too many\n" not in capsys.readouterr().out
    assert data.main([*command, "--allow", *more, "leaked=0.01"]) == 1
    with pytest.raises(RecipeError, match="`--allow`: leakd: none of"):
        data.main([*command, "--allow", "leakd=1"])
    with pytest.raises(RecipeError, match="write FINDING=SHARE"):
        data.main([*command, "--allow", "leaked"])
    broken = tmp_path / "broken.parquet"
    broken.write_bytes((world / "rl/train.parquet").read_bytes()[:-100])
    with pytest.raises(RecipeError, match="against: can't read"):
        data.main([*command, "--against", str(broken)])
    command = [sys.executable, "-m", "vision_r1_recipes.data", *command]
    run = subprocess.run([*command, "--datasets", json.dumps([{"path": str(broken)}])], capture_output=True, text=True)
    assert run.returncode == 2 and "error: datasets[0]: can't read" in run.stderr and "Traceback" not in run.stderr


def test_another_set_needs_a_question_and_a_picture(world, tmp_path):
    pd.DataFrame({"text": ["a"], "picture": ["b"]}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(RecipeError, match="has the columns picture, text; needed are"):
        audit._other(str(tmp_path / "x.parquet"), None)
    with pytest.raises(RecipeError, match=r"has the columns domain; needed are .* Name the right file"):
        (tmp_path / "y.json").write_text(json.dumps([{"domain": "geometry"}]))
        audit._other(str(tmp_path / "y.json"), None)


@pytest.mark.parametrize(
    "a, b, near",
    [
        ("What is the length of side AB in the figure?", "What is the lenght of side AB in this figure", True),
        ("Find the colour of the bars.", "Please find the color of the bars.", True),
        ("如图，求∠ADE的度数。", "求∠ADE的度数", True),
        ("What is the length of side AB when it is 3?", "What is the length of side AB when it is 5?", False),
        ("What is the length of side AB in the figure?", "What is the length of side BC in the figure?", False),
        ("What is the value of x in the figure?", "What is the value of y in the figure?", False),
        ("Find the measure of angle A.", "Find the measure of angle B.", False),
        ("Find the perimeter of ABCDE.", "Find the perimeter of ABCDF.", False),
        ("如图，在△ABC中，AB=AC，求∠ADE的度数。", "如图，在△ABC中，AB=AC，求∠C的度数。", False),
        ("如图，DE⊥AC，求线段AD的长。", "如图，DE⊥AC，求线段DE的长。", False),
        ("How many people scored more than 50?", "How many people scored less than 50?", False),
        ("Does Dark Violet have the minimum area?", "Does Dark Violet have the maximum area?", False),
        ("Is Dark Violet less than Dark Orange?", "Is Dark Orange less than Dark Violet?", False),
        ("Is the polygon regular?", "Is the polygon irregular?", False),
        ("Find the roots for x > 3.", "Find the roots for x < 3.", False),
        ("How many bars are red?", "How many bars are not red?", False),
    ],
)
def test_near_texts(a, b, near):
    assert audit._near_texts(audit._words(a), audit._words(b)) == near


def test_a_figure_with_another_label_is_no_leak_and_neither_is_another_thin_figure(world, tmp_path):
    """Both ask `Find x.`: in a held-out set the answers tell them apart; a thin drawing is nearly blank."""

    def labelled(text: str):
        image = picture(3, (640, 480))
        ImageDraw.Draw(image).text((4, 4), text, fill=0)
        return stored(image)

    def thin(*points):
        image = Image.new("RGB", (1000, 800), "white")
        ImageDraw.Draw(image).polygon(points, outline="black")
        return stored(image)

    first, second = thin((100, 700), (800, 650), (420, 120)), thin((150, 680), (850, 700), (380, 160))
    for name, rows in (
        ("train", [(labelled("x=3"), "4"), (labelled("x=4"), "5"), (first, "6")]),
        ("test", [(labelled("x=8"), "9"), (labelled("x=9"), "5"), (second, "6"), (first, "8")]),
    ):
        made = [row(i, problem="<image>Find x.", images=[image], answer=gold) for i, (image, gold) in enumerate(rows)]
        pd.DataFrame(made).to_parquet(tmp_path / f"{name}.parquet")
    values = {
        **recipe.load(world / "grpo.yaml"),
        "datasets": [{"path": str(tmp_path / "train.parquet")}],
        "eval_datasets": [{"path": str(tmp_path / "test.parquet")}],
    }
    _, findings, _, _ = audit.audit(values)
    assert flagged(findings) == {"leaked": ["row 1", "row 2"], "shared picture": ["row 0"]}


HINT = "Hint: Please answer the question and provide the correct option letter at the end.\nQuestion: "
REDS = "How many red bars are there?"
LEAKS = [  # two forms of one question
    ("Find x.", f"{HINT}Find x.\nChoices:\n(A) 1\n(B) 2"),
    ("Find x", "<image>Find x\nAnswer with the option's letter."),
    ("Find x", "Find x (A) 1 (B) 2 (C) 3"),
    ("Find x", "You are an expert. **Question:** Find x Choices: A:145° B:125°"),
    ("AB = 1. Find x", "<question>AB = 1. Find x.</question> Think first."),
    ("Find $x$", "Q: Find x."),
    (r"Find \( \frac{1}{2} \) of $\angle ABC$.", "Find $\\frac12$ of ∠ABC."),
    (r"$AB\,=\,1$. Find $x\quad$.", "AB = 1. Find x."),
    ("Which is right?\nA. red\nB. blue\nC. 1.5", f"{HINT}Which is right?\n(A) 1.5 (B) blue (C) red\nThink."),
    ("求阴影部分的面积。", "问题：求阴影部分的面积？\n选项：A. 1 B. 2"),
    (r"The area is 1,000. Find $\overline{AB}$.", "The area is 1000. Find AB."),
    ("如图,AB∥CD,则∠2等于多少度?", "如图,请回答:如图,AB∥CD,则∠2等于多少度?"),
    (REDS, f"3. {REDS} Answer:"),
    ("Find x", "Find x **Choices:** (A) 1 (B) 2"),
    ("Find x", f"Find x{' ' * 9}(A) 1 (B) 2"),
]
OTHERS = [  # two questions
    ("AB = 1", "AB = 12"),
    ("AB = 1", "AB = 1.5"),
    ("AB = 1", "AB = 1,000"),
    *(("Find x", f"Find x{more}") for more in (" + y", "+y", r" \times 2", "^2", "_1", "'", "%", ", y and z", "y")),
    ("Find x", "Find $x$ + 1"),
    ("Find x", "Find -x"),
    ("Find AB", "Find AB : BC"),
    ("Find AB", "Find AB: BC"),
    ("Find 5", "Find 5!"),
    ("Find the area of the triangle", "Find the area of the triangle whose height is 3"),
    ("How high are the red bars?", REDS),
    ("求面积", "求面积比"),
    ("", REDS),
    ("?", REDS),
    ("Why?", f"{REDS} Why?"),
    ("Which is right?\nA. red\nB. blue", "Which is right?\nA. red\nB. yellow"),
]


@pytest.mark.parametrize("ours_is_longer", [False, True])
def test_a_leak_is_the_whole_question_whatever_stands_around_it(world, tmp_path, ours_is_longer):
    pairs = [pair[::-1] if ours_is_longer else pair for pair in LEAKS + OTHERS]
    ours = [row(k, problem=f"<image>{a.removeprefix('<image>')}") for k, (a, _) in enumerate(pairs)]
    pd.DataFrame(ours).to_parquet(tmp_path / "train.parquet")
    theirs = [{"question": b, "image": again(k)} for k, (_, b) in enumerate(pairs)]
    pd.DataFrame(theirs).to_parquet(tmp_path / "benchmark.parquet")
    values = {**recipe.load(world / "grpo.yaml"), "datasets": [{"path": str(tmp_path / "train.parquet")}]}
    _, findings, _, _ = audit.audit({**values, "eval_datasets": None}, against=[str(tmp_path / "benchmark.parquet")])
    found = {name: {pairs[int(key.split()[1])] for key in ids} for name, ids in flagged(findings).items()}
    assert found["leaked"] == set(pairs[: len(LEAKS)])
    assert found["shared picture"] == set(pairs[len(LEAKS) :])


def test_a_download_is_checked(world, tmp_path):
    module = runpy.run_path(str(ROOT / "data/prepare.py"))
    prepare, expected = module["check"], module["COLD"]
    said, problems = prepare(world / "rl")
    assert "PROBLEM train: 31 rows, about 10,000 expected: run `hf download Osilly/Vision-R1-rl" in said
    assert "ok      test: 9 rows" in said and "train: 1 of 31 rows lack a picture" in said and problems == 2
    (tmp_path / "bare").mkdir()
    bare = [row(1), row(2, images=[{"bytes": None, "path": "2.png"}]), row(3, images=[])]
    pd.DataFrame(bare).to_parquet(tmp_path / "bare/train.parquet")
    said, problems = prepare(tmp_path / "bare")
    assert "2 of 3 rows lack a picture: for example row 1" in said and "test: no parquet file" in said
    assert problems == 3

    folder = tmp_path / "Vision-R1-cold"
    (folder / "llava_cot_images").mkdir(parents=True)
    picture(1).save(folder / "llava_cot_images/1.png")
    rows = [cold(k, image=f"llava_cot_images/{k}.png") for k in (1, 2)]
    (folder / "vision_r1_llava_cot_full.json").write_text(json.dumps(rows))
    said, problems = prepare(folder)
    assert "vision_r1_mulberry_sft_full.json is missing: run `hf download" in said
    assert "2 rows, 63,019 expected" in said and "1 of 2 pictures are missing or empty: for example llava" in said
    assert "put the pictures of Xkev/LLaVA-CoT-100k into" in said and problems == 3

    turns = [{"from": "user", "value": "<image>?"}, {"from": "assistant", "value": "1"}]
    rows = [{"images": ["llava_cot_images/1.png"], "conversations": turns}]
    (folder / "vision_r1_mulberry_sft_full.json").write_text(json.dumps(rows))
    (folder / "llava_cot_images/2.png").touch()
    assert "1 of 2 pictures are missing or empty: for example llava_cot_images/2.png" in prepare(folder)[0]
    picture(2).save(folder / "llava_cot_images/2.png")
    expected |= {"vision_r1_llava_cot_full.json": 2, "vision_r1_mulberry_sft_full.json": 1}
    said, problems = prepare(folder)
    assert "PROBLEM" not in said and problems == 0
    with pytest.raises(RecipeError, match="holds neither"):
        prepare(tmp_path / "Vision-R1-cold/llava_cot_images")
    with pytest.raises(RecipeError, match="there is no folder"):
        prepare(tmp_path / "none")


@pytest.mark.slow
def test_a_damaged_download_is_told_and_the_rest_is_looked_at(world, tmp_path):
    for name in ("Vision-R1-rl", "Vision-R1-cold"):
        (tmp_path / name).mkdir()
    whole = (world / "rl/train.parquet").read_bytes()
    (tmp_path / "Vision-R1-rl/train.parquet").write_bytes(
        b"PAR1" + b"?" * (len(whole) // 2) + whole[-len(whole) // 2 :]
    )
    (tmp_path / "Vision-R1-rl/test.parquet").write_bytes((world / "rl/test.parquet").read_bytes())
    cut = json.dumps([cold(1)] * 20)[:-300]
    (tmp_path / "Vision-R1-cold/vision_r1_llava_cot_full.json").write_text(cut)
    folders = [str(tmp_path / name) for name in ("Vision-R1-cold", "none", "Vision-R1-rl")]
    command = [sys.executable, str(ROOT / "data/prepare.py")]
    run = subprocess.run([*command, *folders], capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr and "there is no folder" in run.stderr
    for said in (
        "PROBLEM vision_r1_llava_cot_full.json: can't read",
        "PROBLEM vision_r1_mulberry_sft_full.json is missing",
        "PROBLEM train: can't read",
        "remove it and run `hf download Osilly/Vision-R1-cold",
        "remove it and run `hf download Osilly/Vision-R1-rl",
        "ok      test: 9 rows",
    ):
        assert said in run.stdout, run.stdout
    assert "DatasetGenerationError" not in run.stdout
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and "exit code 1 when something" in helped.stdout


@pytest.mark.parametrize(
    "more, said",
    [
        (["--num_proc", "0"], "`--num_proc`: 0, needs at least 1"),
        (["--shortest_reasoning", "-5"], "`--shortest_reasoning`: -5, needs at least 0"),
        (["--allow", "leaked=5"], "`--allow leaked`: 5.0 is a share: from 0 to 1"),
        (["--allow", "leaked=nan"], "from 0 to 1"),
        (["--max_dropped_share", "7"], "`max_dropped_share`: 7 is a share: from 0 to 1"),
        (["--max_prompt_length", "long"], "`max_prompt_length`: 'long' is not a value of type"),
        (["--min_pixels", "[1, 2]"], r"`min_pixels`: \[1, 2\] is not a value of type"),
    ],
)
def test_a_wrong_option_is_told(world, tmp_path, more, said):
    with pytest.raises(RecipeError, match=said):
        data.main(["audit", str(world / "grpo.yaml"), "--output_dir", str(tmp_path), *more])


def test_the_report_s_folder_must_be_one(world, tmp_path):
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(RecipeError, match=r"`--output_dir`: .*name a folder"):
            data.main(["audit", str(world / "grpo.yaml"), "--output_dir", str(tmp_path / place)])
