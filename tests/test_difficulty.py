"""Pass rates of the prompts of a recipe, and the band of them that a recipe keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from runs import ROOT
from vision_r1_recipes import data, difficulty, recipe, toy
from vision_r1_recipes.data import OUTSIDE, load_processor, load_rows
from vision_r1_recipes.recipe import RecipeError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("difficulty")
    toy.build(folder, num_base=40, num_cold=20, num_train=12, num_test=4)
    (folder / "grpo.yaml").write_text(
        recipe.dump(
            {
                "base": str(ROOT / "recipes/toy/ptst.yaml"),
                "model_name_or_path": str(folder / "model"),
                "datasets": [{"path": str(folder / "rl"), "limit": 10}],
                "stages": [{"max_completion_length": 8, "num_generations": 4, "steps": 1}],
            }
        )
    )
    return folder


@pytest.fixture(scope="module")
def file(world):
    """The pass rates of an untrained model, made by the command line."""
    command = [sys.executable, "-m", "vision_r1_recipes.data", "difficulty", str(world / "grpo.yaml")]
    old = world / "rl.pass_rates.parquet"
    pd.DataFrame({"model": ["another"]}).to_parquet(old)
    command += [str(world / "model"), "--n", "2", "--top_k", "5", "--repetition_penalty", "1"]
    done = subprocess.run(command, cwd=world, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "without the recipe's top_k\n" in done.stdout and f"{old} had the pass rates of another" in done.stdout
    assert "10 prompts, mean pass rate 0.0%" in done.stdout and "10 with a pass rate of 0" in done.stdout
    return world / "rl.pass_rates.parquet"


@pytest.mark.slow
def test_samples_are_those_of_the_first_stage(world, file):
    rates = pd.read_parquet(file)
    assert list(rates["id"]) == [f"row {i}" for i in range(10)] and rates["digest"].nunique() == 10
    assert (rates["pass_rate"] == 0).all() and (rates["samples"] == 2).all() and (rates["mean_tokens"] <= 8).all()
    assert (rates["model"] == str(world / "model")).all()
    summary = json.loads((next((world / "runs/difficulty").iterdir()) / "rl/summary.json").read_text())
    assert summary["questions"] == 10 and summary["samples_per_question"] == 2
    sampling = summary["sampling"]
    assert (sampling["max_new_tokens"], sampling["temperature"], sampling["top_p"]) == (8, 1.0, 1.0)


def with_rates(world, file, tmp_path, rates) -> dict:
    """A source whose file has these pass rates."""
    pd.read_parquet(file).assign(pass_rate=rates).to_parquet(tmp_path / "rates.parquet")
    return {"path": str(world / "rl"), "limit": 10, "pass_rates": str(tmp_path / "rates.parquet")}


@pytest.mark.slow
def test_a_band_is_kept_and_counted(world, file, tmp_path):
    source = with_rates(world, file, tmp_path, [0, 0.125, 0.5, 0.875, 1] * 2)
    processor = load_processor(str(world / "model"))
    # A second source without rates comes first: rows are found by their own place.
    sources = [{"path": str(world / "rl"), "limit": 3}, {**source, "pass_rate_band": [0.125, 0.875]}]
    rows, report = load_rows(sources, "rl", processor, max_dropped_share=0.0)
    assert list(rows.with_format(None)["id"]) == [f"row {i}" for i in (0, 1, 2, 1, 2, 3, 6, 7, 8)]
    assert report.dropped == {OUTSIDE: 4} and report.examples[OUTSIDE][:2] == ["row 0: 0", "row 4: 1"]
    with pytest.raises(RecipeError, match="no row is left"):
        load_rows([{**source, "pass_rate_band": [0.3, 0.4]}], "rl", processor)


@pytest.mark.slow
def test_rates_of_other_rows_are_refused(world, file, tmp_path):
    source = {**with_rates(world, file, tmp_path, 0.5), "pass_rate_band": [0, 1]}
    processor = load_processor(str(world / "model"))
    with pytest.raises(RecipeError, match="has none for row 10: it was made of other rows"):
        load_rows([{**source, "limit": 12}], "rl", processor)
    other = pd.read_parquet(world / "rl/train.parquet").sample(frac=1, random_state=0)
    other.to_parquet(tmp_path / "other.parquet")
    with pytest.raises(RecipeError, match="was made of other rows"):
        load_rows([{**source, "path": str(tmp_path / "other.parquet")}], "rl", processor)
    Path(source["pass_rates"]).write_bytes(b"nothing")
    with pytest.raises(RecipeError, match="can't read"):
        load_rows([source], "rl", processor)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"pass_rate_band": [0.1, 0.9]}, "go together"),
        ({"pass_rates": "no.parquet"}, "go together"),
        ({"pass_rates": "no.parquet", "pass_rate_band": [0.1, 0.9]}, "there is no file no.parquet"),
        ({"pass_rates": "no.parquet", "pass_rate_band": [0.9, 0.1]}, r"needs \[low, high\]"),
        ({"pass_rates": "no.parquet", "pass_rate_band": 0.5}, r"needs \[low, high\]"),
        ({"pass_rates": "no.parquet", "pass_rate_band": [0.1, True]}, r"needs \[low, high\]"),
    ],
)
def test_a_wrong_band_is_told(more, said):
    with pytest.raises(RecipeError, match=said):
        data.check_source({"path": "x", **more}, "datasets[0]")


@pytest.mark.parametrize("stages", [[{"max_completion_length": 8}], "abc", [5]])
def test_stages_that_are_none_are_named(stages):
    with pytest.raises(RecipeError, match=r"stages\[0\] = .*: needs exactly the keys"):
        difficulty.measure({"stages": stages}, "model")


@pytest.mark.parametrize(
    "datasets, said",
    [
        (None, "`datasets` is empty"),
        ([], "`datasets` is empty"),
        (5, "`datasets`: 5, needs a list of sources"),
        ({"path": "rl"}, "needs a list of sources"),
        (["rl"], "write {path: rl}"),
        ([{"path": "rl", "split": 5}], "`split`: 5, needs a text"),
        ([{"path": "rl", "data_files": ["a.json", 3]}], "`data_files`: .* needs the name of a file"),
        ([{"path": "a"}, {"path": "b"}, {"path": "b"}], "would write data/b.pass_rates.parquet"),
    ],
)
def test_sources_that_are_none_are_named(datasets, said):
    stages = [{"max_completion_length": 8, "num_generations": 2, "steps": 1}]
    with pytest.raises(RecipeError, match=said):
        difficulty.measure({"stages": stages, "datasets": datasets}, "model")


def test_pass_rates_need_stages():
    with pytest.raises(RecipeError, match="`stages` is missing"):
        difficulty.measure({"datasets": []}, "model")


def test_places(tmp_path):
    (tmp_path / "v1.0").mkdir()
    found = [
        difficulty.beside({"path": str(tmp_path / "v1.0"), **more})
        for more in ({}, {"split": "test"}, {"data_files": ["a.parquet"]}, {"name": "hard"})
    ]
    names = ["v1.0", "v1.0.test", "v1.0.a", "v1.0.hard"]
    assert found == [tmp_path / f"{name}.pass_rates.parquet" for name in names]
    (tmp_path / "v1.0/train.parquet").touch()
    inside = difficulty.beside({"path": str(tmp_path / "v1.0/train.parquet")})
    assert inside == tmp_path / "v1.0.train.pass_rates.parquet"
    assert difficulty.beside({"path": "Osilly/Vision-R1-rl"}) == Path("data/Vision-R1-rl.pass_rates.parquet")
    stages = {
        "stages": [{"max_completion_length": 8, "num_generations": 2, "steps": 1}],
        "datasets": [{"path": "x"}, {"path": "x", "limit": 3}],
    }
    with pytest.raises(RecipeError, match="two sources would write"):
        difficulty.measure(stages, "model")
    for more in ({"limit": 3}, {"data": "x"}):
        with pytest.raises(RecipeError, match=f"`--{next(iter(more))}`: the recipe's sources say"):
            difficulty.measure(stages, "model", **more)
    with pytest.raises(RecipeError, match="unknown key `temprature`"):
        difficulty.measure({**stages, "temprature": 1}, "model")


def test_the_reward_counts():
    samples = pd.DataFrame(
        {
            **{"id": ["a", "a", "b", "b"], "problem": ["p", "p", "q", "q"], "solution": ["1", "1", "2", "2"]},
            **{"sample": [0, 1, 0, 1], "correct": [True, True, False, True], "format": [True, False, True, True]},
            **{"tokens": [3, 5, 1, 1], "truncated": False},
        }
    )
    rates = difficulty.pass_rates(samples)
    assert list(rates["pass_rate"]) == [0.5, 0.5] and list(rates["accuracy"]) == [1, 0.5]
    assert list(rates["mean_tokens"]) == [4, 1] and list(rates["id"]) == ["a", "b"]
    assert "2 prompts" in difficulty.describe(rates["pass_rate"])


def test_the_command_takes_the_options_of_evaluate_and_the_recipe_s_keys(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(difficulty, "measure", lambda values, model, **options: asked.append((values, model, options)))
    command = ["difficulty", str(ROOT / "recipes/toy/ptst.yaml"), "m"]
    data.main([*command, "--n", "2", "--buckets", "4", "8", "--datasets", "[{path: x}]", "--data", "y"])
    values, model, options = asked[0]
    assert model == "m" and options == {"n": 2, "buckets": [4, 8]}
    assert values["datasets"] == [{"path": "x"}] and values["data"] == "y" and values["stages"]
    with pytest.raises(SystemExit):
        data.main(["difficulty", "--help"])
    said = capsys.readouterr().out
    assert "--backend" in said and "--data" not in said and "the recipe's" in said
