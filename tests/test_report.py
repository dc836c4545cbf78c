"""The report of runs and evaluations in the files that training and evaluation write."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.axes import Axes
from PIL import Image

from vision_r1_recipes import figures, report, results
from vision_r1_recipes.evaluate import summarize
from vision_r1_recipes.recipe import RecipeError


TWO_STAGES = [
    {"max_completion_length": 96, "num_generations": 16, "steps": 30},
    {"max_completion_length": 192, "num_generations": 8, "steps": 30},
]


def write_state(folder, rollouts, length=100.0, accuracy=True, held_out=None):
    rows = [
        {
            "step": r,
            "step_time": 2.0,
            "stage/num_generations": 16 if r <= 30 else 8,
            "reward": r / 50,
            **({"accuracy_rate": r / 80} if accuracy else {}),
            "completions/mean_length": length - r,
            "completions/clipped_ratio": 0.25,
            "rollout": r,
            "stage": 1 + (r > 30),
        }
        for r in range(1, rollouts + 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    evals = [
        {"step": r, "rollout": r, "eval_accuracy_rate": y, "eval_completions/mean_length": 60.0 - r}
        for r, y in (held_out or {}).items()
    ]
    log = [*rows, *evals, {"train_runtime": 1.0, "step": rollouts, "rollout": rollouts}]
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": rollouts, "log_history": log}))


def write_run(folder, rollouts=60, seed=1, **kwargs):
    write_state(folder, rollouts, **kwargs)
    content = {"stages": TWO_STAGES, "seed": seed, "prompts_per_rollout": 8}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(folder)


def write_eval(folder, name, right, tokens, first_id=0, buckets=(96, 192), **sampling):
    n = len(right)
    samples = pd.DataFrame(
        {
            "id": [f"row {i + first_id}" for i in range(n)],
            "completion": "Wait, check",
            "tokens": tokens,
            "truncated": False,
            "format": True,
            "correct": right,
        }
    )
    summary = {
        "name": name,
        "data": {"path": "runs/toy/rl", "split": "test", "limit": None, "dropped": {}},
        **summarize(samples, buckets),
        "sampling": {"temperature": 0.6, "top_p": 0.95, "max_new_tokens": 384, "seed": 0, **sampling},
    }
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    samples.to_parquet(folder / "samples.parquet")
    return str(folder)


@pytest.fixture
def evals(tmp_path):
    right = np.arange(400) % 4 > 0  # 75 %
    better = np.arange(400) % 10 > 0  # 90 %
    tokens = np.where(right, 50, 250)
    return [
        write_eval(tmp_path / "ci" / "eval", "ci", right, tokens),
        write_eval(tmp_path / "ptst" / "eval", "Vision-R1", better, np.full(400, 40), system_prompt="x"),
    ]


def cells(text, first):
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_and_figure(tmp_path, evals, capsys):
    out = tmp_path / "report"
    runs = [f"Vision-R1={write_run(tmp_path / 'ptst')}", f"Zero={write_run(tmp_path / 'zero', length=80.0)}"]
    arguments = [*runs, "--evals", f"Vision-R1-CI={evals[0]}", evals[1], "--baseline", "Vision-R1-CI"]
    report.main([*arguments, "--output_dir", str(out)])
    printed, text = capsys.readouterr().out, (out / "report.md").read_text()
    half = 196 * np.sqrt(0.75 * 0.25 / 400)
    assert cells(text, "Vision-R1-CI") == [
        *("Vision-R1-CI", "75.0", "100.0", f"± {half:.1f}", "75.0", "100.0", "50", "0.0", "1", "400")
    ]
    assert cells(text, "Vision-R1")[:4] == ["Vision-R1", "90.0", "40.0", "± 2.9"]
    _, points, tokens, interval, seeds = cells(text[text.index("| Minus Vision-R1-CI ") :], "Vision-R1")
    assert (seeds, points, tokens) == ("1", "+15.0", "-60.0")
    low, high = json.loads(interval.replace("+", ""))
    assert 8 < low < 15 < high < 22
    by_length = text[text.index("| Accuracy % by tokens") :]
    assert cells(by_length, "Vision-R1-CI")[1:] == ["100.0 of 300", "- of 0", "0.0 of 100"]
    assert "system_prompt 'x' against None" in text and "temperature 0.6" in text
    run = cells(text[text.index("| Run ") :], "Vision-R1")
    assert run[1:3] == ["96 x 16: 30, 192 x 8: 30", "60 of 60"]
    assert run[3:7] == ["0.07 → 1.15", "4.4 → 71.9", "96.5 → 42.5", "25.0 → 25.0"]
    sampled = 8 * (16 * sum(100 - r for r in range(1, 31)) + 8 * sum(100 - r for r in range(31, 61)))
    assert run[7:] == [f"{sampled / 1e6:.3g}", "2"]
    assert "| Minus Vision-R1-CI |" in printed and "report.html" in printed
    named = re.findall(r"!\[.+\]\((.+)\)", text)
    assert named == ["length.png", "accuracy.png", "tokens.png", "buckets.png", "reflection.png"]
    for name in named:
        picture = Image.open(out / name).convert("RGB")
        assert picture.width > 700 and len(picture.getcolors(maxcolors=1 << 24)) > 50


def test_the_page_needs_nothing_beside_it(tmp_path, evals):
    out = tmp_path / "report"
    report.main([write_run(tmp_path / "run"), *evals, "--output_dir", str(out), "--title", "A < B"])
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 5 == page.count("src=")
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert '<meta name="viewport" content="width=device-width' in page and "<title>A &lt; B</title>" in page
    assert page.count('<div class="table"><table>') == page.count("<table>") == 5


def test_seeds_are_one_row(tmp_path):
    """Mean and standard deviation over seeds, differences within a seed, curves at equal budgets."""
    arguments = []
    right = {"ci": (200, 240), "ptst": (240, 300)}
    for name, of_seed in right.items():
        for seed, n in enumerate(of_seed):
            folder = tmp_path / f"{name}-{seed}"
            long = {15 * i: 0.1 * i + 0.02 * seed for i in range(1, 5)}
            write_run(folder, 60 if name == "ci" else 30, seed=seed, held_out=long)
            answers = np.arange(400) < n
            evaluation = write_eval(folder / "eval", name, answers, np.full(400, 50 + seed), first_id=1000 * seed)
            arguments += [f"{name}={folder}", f"{name}={evaluation}"]
    report.main([*reversed(arguments), "--output_dir", str(tmp_path / "out"), "--baseline", "ci"])
    text = (tmp_path / "out/report.md").read_text()
    deviation = np.std([50, 60], ddof=1)
    assert cells(text, "ci")[1:3] == [f"55.0 ± {deviation:.1f}", "50.5 ± 0.7"] and cells(text, "ci")[-2:] == [
        "2",
        "800",
    ]
    minus = cells(text[text.index("| Minus ci ") :], "ptst")
    assert (minus[1], minus[-1]) == (f"+12.5 ± {np.std([10, 15], ddof=1):.1f}", "2")
    assert "seeds 0, 1" in text and "± is the standard deviation over seeds" in text
    budgets = text[text.index("| Held-out accuracy % at the same") :]
    assert "30 rollouts" in budgets.splitlines()[0]
    assert cells(budgets, "ci")[1] == f"21.0 ± {np.std([20, 22], ddof=1):.1f}"
    assert cells(text[text.index("| Run ") :], "ptst")[2] == "30 of 60"


def test_tokens_and_minutes_of_rows_that_stand_for_several_rollouts(tmp_path):
    rows = [
        {"rollout": r, "step": 2 * r, "reward": 0.5, "completions/mean_length": 10.0, "step_time": 3.0}
        | {"stage/num_generations": 4}
        for r in (2, 4, 6)
    ]
    state = {"global_step": 14, "log_history": rows}  # 2 optimizer steps a rollout, one rollout not logged yet
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"prompts_per_rollout": 5, "seed": 4}))
    run = results.load_run("x", tmp_path)
    assert list(run.spent("tokens")) == [400, 800, 1200] and list(run.spent("minutes")) == [0.2, 0.4, 0.6]
    assert run.seed == 4
    stages = [{"max_completion_length": 9, "num_generations": g, "steps": 3} for g in (4, 2)]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"prompts_per_rollout": 5, "stages": stages}))
    run = results.load_run("x", tmp_path)  # the second row has one rollout of either stage
    assert list(run.spent("tokens")) == [400, 700, 900]
    (tmp_path / "recipe.yaml").unlink()
    assert np.isnan(results.load_run("x", tmp_path).spent("tokens")).all()


def test_what_the_run_before_spent_counts(tmp_path):
    write_run(tmp_path / "one", 30, held_out={15: 0.2, 30: 0.4})
    write_run(tmp_path / "two", 30, held_out={0: 0.4, 15: 0.5})
    (tmp_path / "two/recipe.yaml").write_text(
        (tmp_path / "two/recipe.yaml").read_text() + f"model_name_or_path: {tmp_path / 'one'}\n"
    )
    runs, _, _ = results.load([str(tmp_path / "one"), str(tmp_path / "two")])
    results.link(runs)
    assert list(runs[1].spent("rollouts")[[0, -1]]) == [31, 60]
    total = runs[0].spent("tokens")[-1]
    assert runs[1].spent("tokens")[-1] == 2 * total
    assert list(runs[1].held_out("rollouts")[0]) == [30, 45] and runs[1].held_out("tokens")[0][0] == total


def test_lengths_of_held_out_questions_are_in_the_figure(tmp_path, monkeypatch):
    drawn = []
    plot = Axes.plot

    def spy(self, *args, **kwargs):
        drawn.append((args, kwargs))
        return plot(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy)
    runs, _, _ = results.load([write_run(tmp_path / "run", 30, held_out={15: 0.2, 30: 0.4})])
    figures.draw(runs, [], tmp_path)
    points = [args[:2] for args, _ in drawn if args[2:] == ("x",)]
    assert [[list(values) for values in pair] for pair in points] == [[[15, 30], [45, 30]]]


@pytest.mark.filterwarnings("error:constrained_layout")
def test_all_text_is_inside_the_figure(tmp_path, monkeypatch):
    """Of a run at a third of its stages, none of whose held-out questions was answered right."""
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    runs, _, _ = results.load([write_run(tmp_path / "run", 20, held_out={10: 0.0, 20: 0.0})])
    figures.draw(runs, [], tmp_path)
    for figure in drawn:
        (axis,) = figure.axes
        renderer = figure.canvas.get_renderer()
        for box in (axis.get_tightbbox(renderer), axis.yaxis.label.get_window_extent(renderer)):
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
    bottoms = [figure.axes[0].get_ylim()[0] for figure in drawn if "held-out" in figure.axes[0].get_ylabel()]
    assert len(drawn) == 4 and bottoms == [0, 0, 0]


def test_seeds_that_were_asked_the_same_questions_are_no_more_questions(tmp_path):
    right = np.arange(400) % 4 > 0
    one = report.pooled([results.load_evaluation("", Path(write_eval(tmp_path / "a", "m", right, right * 1)))])
    arguments = [f"m={write_eval(tmp_path / f's{i}' / 'eval', 'm', right, right * 1)}" for i in range(3)]
    _, evaluations, _ = results.load(arguments)
    pooled = report.pooled(evaluations)
    assert len(pooled) == 400 and np.std(pooled["correct"]) == np.std(one["correct"])
    other = write_eval(tmp_path / "other" / "eval", "m", right, right * 1, first_id=7)
    assert len(report.pooled([*evaluations, results.load_evaluation("m", Path(other))])) == 1600


@pytest.mark.parametrize("seeds, pairs", [([1, 2], 2), ([1, 3], 1), ([3, 4], 0), ([1, 1], 0), ([None, None], 0)])
def test_pairs_are_of_one_seed(tmp_path, seeds, pairs):
    """The seed stands in the recipe of the run, above the evaluation or one folder further up."""
    arguments = []
    for label, of_label in (("ci", [1, 2]), ("new", seeds)):
        for i, seed in enumerate(of_label):
            run = tmp_path / f"{label}-{i}"
            place = run / "eval" / "rl" if i else run / "eval"
            arguments.append(f"{label}={write_eval(place, label, np.arange(40) < 20 + 3 * i, np.full(40, 5))}")
            if seed is not None:
                (run / "recipe.yaml").write_text(yaml.safe_dump({"seed": seed}))
    report.main([*arguments, "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out/report.md").read_text()
    if pairs:
        assert cells(text[text.index("| Minus ci ") :], "new")[-1] == str(pairs)
    else:
        assert "| Minus ci " not in text and "new minus ci: " in text


def test_a_model_that_was_not_trained_here_is_one_of_every_pair(tmp_path):
    right = np.arange(40) < 20
    arguments = [f"base={write_eval(tmp_path / 'base', 'base', right, right * 1)}"]
    for seed in (1, 2):
        arguments.append(f"new={write_eval(tmp_path / f'{seed}/eval', 'new', right, right * 1)}")
        (tmp_path / f"{seed}/recipe.yaml").write_text(f"seed: {seed}\n")
    report.main([*arguments, "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out/report.md").read_text()
    assert cells(text[text.index("| Minus base ") :], "new")[1] == "+0.0 ± 0.0"


def test_a_state_that_is_being_written_is_passed_over(tmp_path):
    folder = tmp_path / "run"
    write_run(folder / "checkpoint-9", 9)
    (folder / "checkpoint-20").mkdir()
    (folder / "checkpoint-20/trainer_state.json").write_text('{"global_step": 20, "log_hist')
    assert len(results.load_run("x", folder).rows) == 9


def test_run_that_is_still_going(tmp_path):
    folder = tmp_path / "run"
    write_run(folder / "checkpoint-9", 9)
    write_state(folder / "checkpoint-20", 20)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"stages": TWO_STAGES}))
    (folder / "checkpoint-30").mkdir()  # being written
    report.main([str(folder), "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert cells(text, "run")[2] == "20 of 60"
    assert "no evaluations given" in text and (tmp_path / "out" / "length.png").is_file()


def test_none_right_is_not_known_without_error(tmp_path):
    none = write_eval(tmp_path / "none", "none", np.zeros(40, bool), np.full(40, 9))
    report.main([none, "--output_dir", str(tmp_path / "out")])
    assert cells((tmp_path / "out/report.md").read_text(), "none")[1:4] == ["0.0", "9.0", "± 7.5"]


def test_without_runs_samples_recipe_or_accuracy(tmp_path, evals):
    (tmp_path / "ci" / "eval" / "samples.parquet").unlink()
    report.main([*evals, "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "no GRPO runs given" in text and "Vision-R1 minus ci: samples.parquet is missing" in text

    write_state(tmp_path / "bare", 5, accuracy=False)
    sft = tmp_path / "sft"
    sft.mkdir()
    (sft / "trainer_state.json").write_text(json.dumps({"global_step": 1, "log_history": [{"loss": 1, "step": 1}]}))
    report.main([str(tmp_path / "bare"), str(sft), "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert cells(text, "bare")[1:5] == ["?", "5 of ?", "0.02 → 0.10", "- → -"]
    assert "sft" in text and "no rollouts in its log" in text


def test_other_questions_and_buckets_are_named(tmp_path, evals):
    right = np.ones(400, bool)
    other = write_eval(tmp_path / "other", "other", right, np.full(400, 9), first_id=5, buckets=(4,))
    report.main([*evals, other, "--output_dir", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "other minus ci: the samples are not of the same questions" in text
    assert "other: other length buckets, not in the figure" in text
    assert cells(text[text.index("| Accuracy % by tokens") :], "other")[4:] == ["- of 0", "100.0 of 400"]


def test_a_path_may_hold_an_equals_sign(tmp_path, evals):
    folder = tmp_path / "lr=1e-6"
    write_run(folder)
    runs, _, _ = results.load([str(folder)])
    assert runs[0].label == "lr=1e-6"
    runs, _, _ = results.load([f"label={folder}"])
    assert runs[0].label == "label" and runs[0].path == folder


def test_bad_input(tmp_path, evals, monkeypatch):
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(RecipeError, match="nothing to report"):
        report.main(out)
    with pytest.raises(RecipeError, match="nowhere is not a folder"):
        report.main(["x=nowhere", *out])
    with pytest.raises(RecipeError, match=r"There is a summary.json in .*ci/eval"):
        report.main([str(tmp_path / "ci"), *out])
    with pytest.raises(RecipeError, match="ci/eval is given twice"):
        report.main([evals[0], f"CI={evals[0]}", *out])
    with pytest.raises(RecipeError, match=r"'CI' is none of the evaluations: ci, Vision-R1"):
        report.main([*evals, "--baseline", "CI", *out])
    for content in ("{", '{"rouge": 1}'):
        (tmp_path / "ci" / "eval" / "summary.json").write_text(content)
        with pytest.raises(RecipeError, match=r"can't read .*ci/eval"):
            report.main([evals[0], *out])
    assert not (tmp_path / "out").exists()

    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"matplotlib is missing: pip install 'vision-r1-recipes\[report\]'"):
        report.main([evals[1], *out])


@pytest.mark.slow
def test_as_a_script(tmp_path):
    run = subprocess.run([sys.executable, report.__file__, "x=nowhere"], capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.strip().endswith("Give a run or an evaluation, or label=folder.")
    assert "Traceback" not in run.stderr
