"""Sweeps: recipes times seeds, in the order that their models need, skipping what is finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from vision_r1_recipes import sweep
from vision_r1_recipes.recipe import RecipeError


ROOT = Path(__file__).parents[1]
TINY = {
    "prompts_per_rollout": 2,
    "prompts_per_update": 2,
    "per_device_train_batch_size": 4,
    "stages": [
        {"max_completion_length": 12, "num_generations": 4, "steps": 2},
        {"max_completion_length": 24, "num_generations": 2, "steps": 2},
    ],
    "eval_every_rollouts": 2,
    "probe_prompts": 0,
}


@pytest.fixture
def home(tmp_path, toy):
    """A folder with three tiny recipes and a sweep over them."""

    def write(name, **content):
        (tmp_path / name).write_text(yaml.safe_dump(content))

    base = {"base": str(ROOT / "recipes/toy/ptst.yaml")}
    cold = {"base": str(ROOT / "recipes/toy/cold_start.yaml"), "model_name_or_path": "runs/toy/data/model"}
    write("cold.yaml", **cold, output_dir="runs/toy/cold", max_steps=2)
    write("ptst.yaml", **base, **TINY, output_dir="runs/toy/ptst", model_name_or_path="runs/toy/cold")
    write("again.yaml", base="ptst.yaml", output_dir="runs/toy/again", model_name_or_path="runs/toy/ptst")
    write(
        "t.yaml",
        **{"root": "runs/toy", "output_dir": str(tmp_path / "out"), "seeds": [3], "num_processes": 1},
        **{"launch": "python", "setup": f"cp -r {toy} {{root}}/data", "title": "Tiny", "baseline": "CI"},
        evaluate={"data": "runs/toy/data/rl", "split": "test", "limit": 8, "max_new_tokens": 16, "buckets": [8]},
        rows=[
            {"label": "Again", "recipe": "again.yaml"},
            {"label": "PTST", "recipe": "ptst.yaml"},
            {"label": "CI", "recipe": "cold.yaml"},
            {"label": "CI, greedy", "model": "runs/toy/cold", "evaluate": {"temperature": 0}},
            {"label": "untrained", "model": "runs/toy/data/model"},
        ],
    )
    return tmp_path


def load(path, *overrides):
    values = sweep.load([str(path), *overrides])
    return values, sweep.units(path, values)


def test_order_and_places(home):
    values, units = load(home / "t.yaml", "--seeds", "[3, 5]")
    assert [(u.seed, u.label) for u in units[:5]] == [
        *((3, "CI"), (3, "untrained"), (3, "PTST"), (3, "CI, greedy"), (3, "Again"))
    ]
    assert [u.level for u in units] == [0, 0, 1, 1, 2] * 2
    ptst = units[2]
    seed = f"{home}/out/seed-3"
    assert str(ptst.folder) == f"{seed}/ptst" and ptst.values["model_name_or_path"] == f"{seed}/cold"
    assert ptst.values["seed"] == 3 and ptst.values["datasets"] == [{"path": f"{seed}/data/rl"}]
    command = sweep.train_command(values, ptst)
    assert command[0] == "python" and command[1].endswith("/grpo.py") and command[-1] == "auto"
    assert command[command.index("--model_name_or_path") + 1] == f"{seed}/cold"
    assert "stages" not in " ".join(command)  # only what differs from the recipe
    greedy = sweep.evaluate_command(units[3])
    options = dict(zip(greedy[4::2], greedy[5::2], strict=True))
    assert greedy[3] == f"{seed}/cold" and options["--data"] == f"{seed}/data/rl" and options["--temperature"] == "0"
    assert str(units[3].evaluation) == f"{seed}/cold/eval_CI_greedy"
    assert str(units[1].evaluation) == f"{seed}/data/model/eval"


def test_text_that_yaml_would_read_otherwise_is_quoted(home):
    (home / "cold.yaml").write_text((home / "cold.yaml").read_text() + "run_name: runs/toy/a\n")
    _, units = load(home / "t.yaml", "--output_dir", "'[1]'")
    overrides = units[0].overrides
    assert sweep.recipe.parse_overrides(overrides)["output_dir"] == "[1]/seed-3/cold"


@pytest.mark.parametrize(
    "override, part",
    [
        ("--seed=1", "unknown key `seed`: 1; did you mean `seeds`"),
        ("--seeds=[1, 1]", "`seeds`"),
        ("--seeds=[]", "`seeds`"),
        ("--seeds=3", "`seeds`: 3 is empty, or not a value of type list"),
        ("--seeds=[true]", "`seeds`"),
        ("--rows=[]", "`rows`: [] is empty"),
        ("--rows=[3]", "rows[0]: 3"),
        ("--rows=[{label: 4, model: x}]", "rows[0]"),
        ("--rows=[{label: a, recipe: 4}]", "rows[0]"),
        ("--rows=[{label: a, model: x, evaluate: null}]", "rows[0].evaluate: None"),
        (
            "--rows=[{label: CI, model: x, evaluate: {seed: 1}}, {label: CI+, model: x, evaluate: {seed: 2}}]",
            "rename one",
        ),
        ("--launch='x {gpus}'", "`launch`: 'x {gpus}': 'gpus' in braces"),
        ("--num_processes=0", "`num_processes`"),
        ("--root=elsewhere", "`output_dir`: runs/toy/again is not below the sweep's `root`, elsewhere"),
        ("--evaluate={splitt: x}", "unknown key evaluate.`splitt`"),
        ("--rows=[{label: CI, model: x, evaluate: {seeed: 3}}]", "unknown key rows[0].evaluate.`seeed`"),
        ("--baseline=cI", "`baseline`: 'cI' is none of the labels: Again, PTST, CI"),
        ("--rows=[{label: a}]", "rows[0]"),
        ("--rows=[{label: a, recipe: b, model: c}]", "rows[0]"),
        ("--rows=[{label: a, recipe: ptst.yaml, colour: red}]", "unknown key rows[0].`colour`"),
        ("--rows=[{label: CI, recipe: cold.yaml}, {label: CI, model: x}]", "'CI' is used twice"),
        ("--rows=[{label: CI, recipe: cold.yaml}, {label: b, recipe: cold.yaml}]", "have the same output_dir"),
        ("--rows=[{label: CI, recipe: clod.yaml}]", "Did you mean cold.yaml"),
    ],
)
def test_wrong_sweeps(home, override, part):
    with pytest.raises(RecipeError) as error:
        load(home / "t.yaml", override)
    assert part in str(error.value)


def test_models_from_elsewhere_are_evaluated_once(home):
    _, units = load(
        home / "t.yaml", "--seeds=[3, 5]", "--rows=[{label: CI, model: Qwen/A}, {label: B, model: Other/A}]"
    )
    assert [(u.label, u.seed) for u in units] == [("CI", None), ("B", None)]
    assert [str(u.evaluation) for u in units] == [f"{home}/out/models/{x}_A/eval" for x in ("Qwen", "Other")]


def test_a_root_may_end_in_a_slash(home):
    _, units = load(home / "t.yaml", "--root=./runs/toy/")
    assert str(units[0].folder) == f"{home}/out/seed-3/cold"


def test_rows_that_need_each_other(home):
    (home / "cold.yaml").write_text((home / "cold.yaml").read_text().replace("runs/toy/data/model", "runs/toy/again"))
    with pytest.raises(RecipeError, match="Again needs PTST needs CI needs Again"):
        load(home / "t.yaml")


@pytest.mark.parametrize(
    "override, part",
    [
        (
            "--evaluate={max_new_tokens: many}",
            "evaluation of CI: argument --max_new_tokens: invalid int value: 'many'",
        ),
        ("--evaluate={buckets: [x]}", "argument --buckets"),
    ],
)
def test_a_wrong_evaluation_is_told_before_anything_runs(home, override, part):
    with pytest.raises(RecipeError) as error:
        sweep.main([str(home / "t.yaml"), override])
    assert part in str(error.value) and not (home / "out").exists()


def test_a_start_model_that_no_row_makes(home):
    values, units = load(home / "t.yaml", "--rows=[{label: CI, recipe: ptst.yaml}]")
    with pytest.raises(sweep.Failed, match=r"start model .*seed-3/cold is not there: add the row"):
        sweep.run_unit(values, units[0])
    del values["setup"]
    with pytest.raises(RecipeError, match=r"starts from .*seed-3/cold, which is not there"):
        sweep.check(values, units)


def test_what_was_finished_with_other_settings_is_not_taken(home):
    _, units = load(home / "t.yaml")
    ptst = next(unit for unit in units if unit.label == "PTST")
    ptst.evaluation.mkdir(parents=True)
    (ptst.folder / "trainer_state.json").write_text(json.dumps({"global_step": 4, "max_steps": 4}))
    sampling = {"do_sample": True, "temperature": 0.6, "max_new_tokens": 16, "seed": 0}
    summary = {"sampling": sampling, "data": {"path": ptst.evaluate["data"], "split": "test", "limit": 8}}
    summary["by_length"] = [{"over": 0, "up_to": 8}, {"over": 8, "up_to": None}]
    (ptst.evaluation / "summary.json").write_text(json.dumps(summary))
    (ptst.folder / "recipe.yaml").write_text(yaml.safe_dump(ptst.values))
    assert ptst.done and sweep._outdated(ptst) == []
    ptst.values = {**ptst.values, "stages": [*ptst.values["stages"], ptst.values["stages"][0]]}
    assert "holds another run, finished" in sweep._outdated(ptst)[0]
    ptst.evaluate = {**ptst.evaluate, "max_new_tokens": 24, "buckets": [4, 8]}
    found = "\n".join(sweep._outdated(ptst))
    assert "`max_new_tokens`: 16, now 24" in found and "`buckets`: [8], now [4, 8]" in found


def test_a_missing_key(home):
    (home / "t.yaml").write_text("rows: []\n")
    with pytest.raises(RecipeError, match=r"(?s)`seeds` is missing.*`output_dir` is missing"):
        load(home / "t.yaml")


def test_a_broken_recipe_is_told_before_anything_runs(home):
    (home / "again.yaml").write_text((home / "again.yaml").read_text() + "learning_rte: 1\n")
    with pytest.raises(RecipeError, match="unknown key `learning_rte`"):
        sweep.main([str(home / "t.yaml")])
    assert not (home / "out").exists()


def test_nothing_to_report_leaves_a_report_alone(home):
    (home / "out" / "t").mkdir(parents=True)
    (home / "out" / "t" / "report.md").write_text("of yesterday")
    with pytest.raises(RecipeError, match=r"nothing to report: no row has begun at `seeds` 99"):
        sweep.main([str(home / "t.yaml"), "--seeds", "[99]", "--report_only"])
    assert (home / "out" / "t" / "report.md").read_text() == "of yesterday"


def test_a_row_without_a_folder_is_told(home):
    text = (home / "cold.yaml").read_text().replace("cold_start.yaml", "base/sft.yaml")
    (home / "cold.yaml").write_text(re.sub(r"(?m)^output_dir:.*\n", "", text))
    with pytest.raises(RecipeError, match=r"cold.yaml: `output_dir` is missing"):
        load(home / "t.yaml")


def test_a_dry_run_prints_what_is_left(home, capsys):
    setup = "--setup=python -m vision_r1_recipes.toy {root}/data --seed {seed}"
    sweep.main([str(home / "t.yaml"), setup, "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    world = f"{home}/out/seed-3/data"
    assert lines[:2] == ["# seed 3, setup", f"python -m vision_r1_recipes.toy {world} --seed 3"]
    assert sum("grpo.py" in line or "sft.py" in line for line in lines) == 3
    (home / "out" / "seed-3" / "data" / "model").mkdir(parents=True)
    (home / "out" / "seed-3" / "setup.json").write_text("[]")
    sweep.main([str(home / "t.yaml"), setup, "--dry_run"])
    assert "# seed 3, setup" not in capsys.readouterr().out
    # a world that is there makes no start model
    with pytest.raises(RecipeError, match="add the row that makes it"):
        sweep.main([str(home / "t.yaml"), setup, "--rows=[{label: CI, recipe: ptst.yaml}]", "--dry_run"])


def test_slurm_arrays(home, capsys):
    sweep.main([str(home / "t.yaml"), "--seeds", "[3, 5]", "--slurm=--partition=gpu --time=1", "--dry_run"])
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"--array=(\S+)", line)[1] for line in lines[:-1]] == ["0,1,5,6", "2,3,7,8", "4,9"]
    assert all("--partition=gpu --time=1" in line for line in lines)
    assert "dependency" not in lines[0] and all("--dependency=afterany:JOB" in line for line in lines[1:])
    assert "--report_only" in lines[-1] and all("$SLURM_ARRAY_TASK_ID" in line for line in lines[:-1])
    assert not (home / "out").exists()


@pytest.mark.skipif(os.path.exists("/usr/bin/sbatch"), reason="SLURM is here")
def test_without_slurm(home):
    with pytest.raises(RecipeError, match="sbatch is not here"):
        sweep.main([str(home / "t.yaml"), "--slurm"])


# Real runs


def run(home, *arguments, **kwargs):
    command = [sys.executable, "-W", "ignore", "-m", "vision_r1_recipes.sweep", str(home / "t.yaml"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=home, **kwargs)


@pytest.mark.full
def test_a_sweep_that_is_killed_goes_on(home):
    """Killed in its second training; the run that it leaves holds its lock; then everything is done once."""
    rows = "--rows=[{label: PTST, recipe: ptst.yaml}, {label: CI, recipe: cold.yaml}]"
    first = run(home, rows)
    log = home / "out/seed-3/ptst.log"
    while not (log.is_file() and "rollout 1," in log.read_text()):
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    child = int(Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()[0])
    os.kill(child, signal.SIGSTOP)  # so that it can't finish before it is looked for
    first.kill()
    first.communicate()
    out, error = run(home, rows).communicate()
    assert "seed 3, CI: finished before" in out and "at work already" in error and "1 of 2 rows failed" in error
    os.kill(child, signal.SIGKILL)
    again = run(home, rows)
    out, error = again.communicate()
    assert again.returncode == 0, error
    assert "seed 3, CI: finished before" in out and "PTST: training ..." in out and "setup" not in out
    assert "| PTST  |" in out and "| Minus CI |" in out
    text = (home / "out/t/report.md").read_text()
    assert text.startswith("# Tiny") and "seeds 3" in text and "12 x 4: 2, 24 x 2: 2" in text
    page = (home / "out/t/report.html").read_text()
    assert page.count("data:image/png;base64,") == 6
    mtimes = {path: path.stat().st_mtime_ns for path in (home / "out").rglob("*.safetensors")}
    out, _ = run(home, rows).communicate()
    assert out.count("finished before") == 2 and "training" not in out
    assert {path: path.stat().st_mtime_ns for path in mtimes} == mtimes

    # A changed recipe is not taken for the finished run.
    (home / "ptst.yaml").write_text((home / "ptst.yaml").read_text() + "beta: 0.5\n")
    changed = run(home, rows)
    assert "holds another run, finished" in changed.communicate()[1] and changed.returncode == 2


@pytest.mark.slow
def test_a_row_that_fails_stops_only_those_that_need_it(home):
    (home / "cold.yaml").write_text((home / "cold.yaml").read_text() + "max_dropped_share: 0\nmax_length: 20\n")
    process = run(home)
    out, error = process.communicate()
    assert process.returncode == 1
    assert "100.0% of the rows had to be dropped" in error and "CI: training: failed, exit code 2" in error
    assert "PTST: not begun, its start model is missing: CI of this seed" in error
    assert "4 of 5 rows failed" in error and "untrained: evaluation: " in out
    text = (home / "out/t/report.md").read_text()
    assert "seed 3, PTST: no log yet" in text and "seed 3, CI: not evaluated yet" in text and "| untrained |" in text


@pytest.mark.full
def test_another_seed_gives_the_committed_numbers(tmp_path):
    """Two rows of the toy tables at a seed of its own, within three standard deviations of what RESULTS.md states."""
    rows = "--rows=[{label: Base, recipe: pretrain.yaml}, {label: Vision-R1-CI, recipe: cold_start.yaml}, "
    rows += "{label: Vision-R1, recipe: ptst.yaml}]"
    path = ROOT / "recipes/toy/table_main.yaml"
    overrides = ["--seeds=[17]", f"--output_dir={tmp_path}", rows]
    subprocess.run([sys.executable, "-m", "vision_r1_recipes.sweep", path, *overrides], check=True, cwd=ROOT)
    text = (ROOT / "recipes/toy/RESULTS.md").read_text()
    for label, folder in (("Vision-R1-CI", "cold_start"), ("Vision-R1", "ptst")):
        cells = next(line for line in text.splitlines() if line.startswith(f"| {label} ")).strip("|").split("|")
        summary = json.loads((tmp_path / "seed-17" / folder / "eval/summary.json").read_text())
        for value, cell in ((100 * summary["accuracy"], cells[1]), (summary["mean_tokens"], cells[2])):
            mean, deviation = map(float, cell.split("±"))
            assert abs(value - mean) < 3 * max(deviation, 1), (label, value, cell)
