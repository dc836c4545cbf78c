"""
Train and evaluate a list of recipes at several seeds, then report.

```shell
python -m vision_r1_recipes.sweep recipes/toy/table_ptst.yaml                   # one after another
python -m vision_r1_recipes.sweep recipes/table_ptst.yaml --slurm="--gpus=8"    # as SLURM arrays
```

A sweep is a YAML file with `base:` inheritance like a recipe's; any key can be set behind it:

- `rows`: `{label, recipe}`, a recipe beside the sweep; or `{label, model}`, a model that is only evaluated. A row may
  have `evaluate`, settings of its own.
- `seeds`: every row is trained with each of them.
- `root`, `output_dir`: a seed lives in a folder of its own. What the recipes have below `root` is for seed 1 below
  `output_dir/seed-1`: outputs, data, and the start model that another row has made, which is trained first. A model
  from elsewhere is evaluated once.
- `launch`, `num_processes`: the command before the script. `setup`: a command that is run once for each seed, with
  `{seed}` and `{root}`, the seed's folder.
- `evaluate`: `data` and the options of `evaluate.py`.
- `title`, `baseline` (the label that the others are compared with): for the report, in `output_dir/NAME-OF-THE-SWEEP`.

What is finished is skipped, so that the same command goes on after an interruption; sweeps of one `output_dir` share
their runs. A row that fails doesn't stop the others. A sweep that is killed with SIGKILL leaves its run, and the run
its lock: the next sweep says so.
"""

from __future__ import annotations

import argparse
import fcntl
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import checkpoints, preflight, recipe
from .evaluate import argument_parser, evaluate
from .plan import plan
from .recipe import RecipeError
from .results import read_json


KEYS = {
    **{"title": str, "rows": list, "seeds": list, "root": str, "output_dir": str, "launch": str},
    **{"num_processes": int, "setup": str, "evaluate": dict, "baseline": str},
}
OPTIONAL = ("title", "setup", "baseline")
ROW_KEYS = ("label", "recipe", "model", "evaluate")


@dataclass
class Unit:
    """One row at one seed."""

    label: str
    seed: int | None  # `None`: not trained here
    folder: Path  # of the run, or the model of a row that is only evaluated
    evaluation: Path
    evaluate: dict[str, Any]
    recipe: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)  # the resolved recipe of this seed
    overrides: list[str] = field(default_factory=list)  # behind the recipe on the command line
    parent: Unit | None = None  # has made the start model

    @property
    def name(self) -> str:
        return self.label if self.seed is None else f"seed {self.seed}, {self.label}"

    @property
    def start(self) -> Path:
        """The model that it begins with."""
        return Path(self.values.get("model_name_or_path") or "") if self.recipe else self.folder

    @property
    def level(self) -> int:
        """Rows that have to be trained before."""
        return 0 if self.parent is None else 1 + self.parent.level

    @property
    def trained(self) -> bool:
        return self.recipe is None or checkpoints.finished(self.folder)

    @property
    def done(self) -> bool:
        return self.trained and (self.evaluation / "summary.json").is_file()


class Failed(Exception):
    """A row could not be trained or evaluated."""


def load(argv: Sequence[str]) -> dict[str, Any]:
    """
    Read a sweep, `argv` being its file and overrides, and check it.

    Raises:
        `RecipeError`: everything wrong with it.
    """
    sweep = recipe.merge(recipe.load(argv[0]), recipe.parse_overrides(argv[1:]))
    problems = recipe.unknown_keys(sweep, KEYS)
    for key, kind in KEYS.items():
        if key not in sweep and key not in OPTIONAL:
            problems.append(f"`{key}` is missing.")
        elif key in sweep and (
            not isinstance(sweep[key], kind) or isinstance(sweep[key], bool) or sweep[key] in ("", [], {})
        ):
            hint = f" Write [{sweep[key]}]." if kind is list and not isinstance(sweep[key], list) else ""
            problems.append(f"`{key}`: {sweep[key]!r} is empty, or not a value of type {kind.__name__}.{hint}")
    preflight.check(problems)
    options = inspect.signature(evaluate).parameters.keys() - {"model", "name", "output_dir", "loaded", "check"}
    problems += recipe.unknown_keys(sweep["evaluate"], options, "evaluate.")
    for i, row in enumerate(sweep["rows"]):
        named = isinstance(row, dict) and all(
            isinstance(row.get(key, ""), str) for key in ("label", "recipe", "model")
        )
        if not named or "label" not in row or ("recipe" in row) == ("model" in row):
            problems.append(
                f"rows[{i}]: {row!r} needs a `label`, and either a `recipe` or a `model`, all of them text."
            )
        elif not isinstance(row.get("evaluate", {}), dict):
            problems.append(f"rows[{i}].evaluate: {row['evaluate']!r} is not a value of type dict.")
        else:
            problems += recipe.unknown_keys(row, ROW_KEYS, f"rows[{i}].")
            problems += recipe.unknown_keys(row.get("evaluate", {}), options, f"rows[{i}].evaluate.")
    for key in ("launch", "setup"):
        try:
            sweep.get(key, "").format(seed=0, root="", num_processes=1)
        except (KeyError, IndexError, ValueError) as error:
            problems.append(f"`{key}`: {sweep[key]!r}: {error} in braces is none of seed, root, num_processes.")
    if sweep["num_processes"] < 1:
        problems.append(f"`num_processes`: {sweep['num_processes']}, needs at least 1.")
    wrong = [s for s in sweep["seeds"] if not isinstance(s, int) or isinstance(s, bool) or s < 0]
    if wrong or len(set(sweep["seeds"])) < len(sweep["seeds"]):
        problems.append(f"`seeds`: {sweep['seeds']!r}: give different whole numbers of at least 0.")
    if "data" not in sweep["evaluate"]:
        problems.append("`evaluate` needs `data`, the questions.")
    preflight.check(problems)
    labels = [row["label"] for row in sweep["rows"]]
    problems += [f"`rows`: the label {label!r} is used twice." for label in {x for x in labels if labels.count(x) > 1}]
    if sweep.get("baseline", labels[0]) not in labels:
        problems.append(f"`baseline`: {sweep['baseline']!r} is none of the labels: {', '.join(labels)}.")
    preflight.check(problems)
    sweep["root"] = os.path.normpath(sweep["root"])
    return sweep


def units(path: str | Path, sweep: dict[str, Any]) -> list[Unit]:
    """
    All rows at all seeds, seed by seed, each after the row that makes its start model.

    Raises:
        `RecipeError`: rows that would write over each other, or that need each other in a circle.
    """
    found: list[Unit] = []
    for seed in sweep["seeds"]:
        home = Path(sweep["output_dir"], f"seed-{seed}")
        rows = [_unit(Path(path).parent, sweep, row, seed, home) for row in sweep["rows"]]
        rows = [unit for unit in rows if unit.seed is not None or seed == sweep["seeds"][0]]
        makers: dict[Path, Unit] = {}
        for unit in rows:
            if unit.recipe and makers.setdefault(unit.folder, unit) is not unit:
                raise RecipeError(
                    f"`rows`: {makers[unit.folder].label} and {unit.label} have the same output_dir, {unit.folder}. "
                    "To evaluate one run twice, give the second row a `model` and `evaluate`."
                )
        for unit in rows:
            unit.parent = makers.get(unit.start)
        for unit in rows:
            chain = [unit]
            while chain[-1].parent is not None and chain[-1].parent not in chain:
                chain.append(chain[-1].parent)
            if chain[-1].parent is not None:
                raise RecipeError(f"`rows`: {' needs '.join(u.label for u in chain)} needs {chain[-1].parent.label}.")
        found += sorted(rows, key=lambda unit: unit.level)
    places = [unit.evaluation for unit in found]
    for unit in found:
        if places.count(unit.evaluation) > 1:
            raise RecipeError(f"`rows`: {unit.label} and another row would write to {unit.evaluation}: rename one.")
    return found


def _unit(folder: Path, sweep: dict[str, Any], row: dict[str, Any], seed: int, home: Path) -> Unit:
    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        if isinstance(value, list):
            return [moved(item) for item in value]
        below = isinstance(value, str) and value.startswith(sweep["root"] + "/")
        return f"{home}/{value.removeprefix(sweep['root'] + '/')}" if below else value

    own = row.get("evaluate", {})
    name = "eval" if not own else "eval_" + re.sub(r"\W+", "_", row["label"]).strip("_")
    settings = moved({**sweep["evaluate"], **own})
    if "model" in row:
        model = Path(moved(row["model"]))
        if model.is_relative_to(home):
            return Unit(row["label"], seed, model, model / name, settings)
        place = home.parent / "models" / re.sub(r"[^\w.-]+", "_", row["model"]).strip("_")
        return Unit(row["label"], None, model, place / name, settings)
    path = folder / row["recipe"]
    before = recipe.load(path)
    values = {**moved(before), "seed": seed}
    overrides = []
    for key, value in values.items():
        if value != before.get(key):
            overrides += [f"--{key}", _as_argument(value)]
    if not isinstance(values.get("output_dir"), str):
        raise RecipeError(f"{path}: `output_dir` is missing: name a folder of its own below {sweep['root']}.")
    run = Path(values["output_dir"])
    if not run.is_relative_to(home):
        raise RecipeError(
            f"{path}: `output_dir`: {before['output_dir']} is not below the sweep's `root`, {sweep['root']}: all "
            "seeds would write there."
        )
    return Unit(row["label"], seed, run, run / name, settings, path, values, overrides)


def _as_argument(value: Any) -> str:
    """`value` as the command line reads it back."""
    try:
        plain = isinstance(value, str) and recipe.parse_overrides(["--key", value]) == {"key": value}
    except RecipeError:
        plain = False
    return value if plain else json.dumps(value)


def check(sweep: dict[str, Any], todo: Sequence[Unit]) -> None:
    """Raise [`RecipeError`] with all that is wrong with any recipe or evaluation, before the first is trained."""
    problems = []
    for unit in todo:
        first = unit.seed in (None, sweep["seeds"][0])
        if first and unit.recipe:
            origin = unit
            while origin.parent is not None:
                origin = origin.parent
            start = ["--model_name_or_path", origin.values.get("model_name_or_path") or ""]
            found = plan([str(unit.recipe), *unit.overrides, *start], sweep["num_processes"])[1]
            problems += [f"{unit.recipe}: {problem}" for problem in found]
        parser = argument_parser()
        parser.error = recipe.refuse
        try:
            parser.parse_args(evaluate_command(unit)[3:])
        except RecipeError as error:
            problems.append(f"evaluation of {unit.label}: {error}")
        made_by_setup = "setup" in sweep and not Path(sweep["output_dir"], f"seed-{unit.seed}", "setup.json").is_file()
        if unit.parent is None and not made_by_setup and _is_missing(unit.start, sweep):
            problems.append(f"{unit.name} starts from {unit.start}, which is not there: add the row that makes it.")
        problems += _outdated(unit)
    preflight.check(list(dict.fromkeys(problems)))


def _is_missing(model: Path, sweep: dict[str, Any]) -> bool:
    """Whether `model` is one that the sweep should have made; any other may be a Hub id."""
    return model.is_relative_to(sweep["output_dir"]) and not model.exists()


def _outdated(unit: Unit) -> list[str]:
    """What is finished with other settings than those of now."""
    problems = []
    if unit.recipe and unit.trained:
        before = recipe.load(unit.folder / "recipe.yaml")
        changed = checkpoints.changes(checkpoints.identity(before), checkpoints.identity(unit.values))
        if not changed and before.get("stages") != unit.values.get("stages"):
            changed = [f"`stages`: {before['stages']} before, {unit.values['stages']} now"]
        if changed:
            problems += [f"{unit.folder} holds another run, finished: move it away, or name another output_dir."]
            problems += changed
    summary = read_json(unit.evaluation / "summary.json")
    if summary is not None:
        edges = [bucket["up_to"] for bucket in summary["by_length"] if bucket["up_to"]]
        sampling = summary["sampling"] if summary["sampling"]["do_sample"] else {"temperature": 0}
        before = {**sampling, "split": summary["data"]["split"], "limit": summary["data"]["limit"]}
        before |= {"data": summary["data"]["path"], "buckets": edges}
        for key, now in unit.evaluate.items():
            if key in before and before[key] != (sorted(set(now)) if key == "buckets" else now):
                problems.append(
                    f"{unit.evaluation} holds an evaluation with `{key}`: {before[key]!r}, now {now!r}: move it away."
                )
    return problems


def train_command(sweep: dict[str, Any], unit: Unit) -> list[str]:
    launch = shlex.split(sweep["launch"].format(num_processes=sweep["num_processes"]))
    entry = [str(Path(__file__).with_name(recipe.script(unit.values))), str(unit.recipe)]
    return [*launch, *entry, *unit.overrides, "--resume_from_checkpoint", "auto"]


def evaluate_command(unit: Unit) -> list[str]:
    command = [sys.executable, "-m", "vision_r1_recipes.evaluate", str(unit.folder)]
    options = {**unit.evaluate, "name": unit.label, "output_dir": str(unit.evaluation)}
    for key, value in options.items():
        if value is not None:
            command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return command


def setup_command(sweep: dict[str, Any], seed: int) -> list[str]:
    """What makes a seed's world, empty when it is there or needs nothing."""
    home = Path(sweep["output_dir"], f"seed-{seed}")
    if "setup" not in sweep or (home / "setup.json").is_file():
        return []
    return shlex.split(sweep["setup"].format(seed=seed, root=home))


def run_setup(sweep: dict[str, Any], seed: int) -> None:
    home = Path(sweep["output_dir"], f"seed-{seed}")
    mark = home / "setup.json"
    command = setup_command(sweep, seed)
    if not command:
        return
    home.mkdir(parents=True, exist_ok=True)
    with (home / "setup.wait").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)  # the tasks of an array begin together
        if not mark.is_file():
            _call(command, home / "setup", f"seed {seed}, setup")
            mark.write_text(json.dumps(command) + "\n")


def run_unit(sweep: dict[str, Any], unit: Unit, place: str = "") -> None:
    """
    Train and evaluate what is not finished yet.

    Raises:
        `Failed`: one of them, or the row that makes the start model.
    """
    said = f"{place}{unit.name}"
    if unit.done:
        print(f"{said}: finished before", flush=True)
        return
    if unit.parent is not None and not unit.parent.trained:
        raise Failed(f"{said}: not begun, its start model is missing: {unit.parent.label} of this seed")
    if not unit.trained:
        if _is_missing(unit.start, sweep):
            raise Failed(f"{said}: not begun, its start model {unit.start} is not there: add the row that makes it")
        _call(train_command(sweep, unit), unit.folder, f"{said}: training")
        if not unit.trained:
            raise Failed(f"{said}: ended without an error and is not finished; see {unit.folder}.log")
    _call(evaluate_command(unit), unit.evaluation, f"{said}: evaluation")


def _call(command: list[str], folder: Path, said: str) -> None:
    """Run `command` with its output in `folder`.log, under a lock that lives as long as it does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = Path(f"{folder}.log")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with Path(f"{folder}.lock").open("w") as lock, log.open("a") as output:
        try:
            # The child has the same open file: a sweep that was killed leaves its run, and the run the lock.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failed(f"{said}: at work already, from another sweep or one that was killed; see {log}") from None
        start = time.perf_counter()
        print(f"{said} ... ({log})", flush=True)
        output.write(f"{shlex.join(command)}\n")
        output.flush()
        try:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                pass_fds=(lock.fileno(),),
                env={**os.environ, "PATH": path},
                start_new_session=True,  # a launcher may not hand signals on
            )
        except OSError as error:
            raise Failed(f"{said}: can't start {command[0]}: {error}") from error
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
    if code:
        tail = re.split(r"[\n\r]", log.read_text(errors="replace").rstrip())[-15:]
        raise Failed("\n    ".join([f"{said}: failed, exit code {code}. The end of {log}:", *tail]))
    print(f"{said}: {time.perf_counter() - start:.0f} s", flush=True)


def run_all(sweep: dict[str, Any], todo: Sequence[Unit]) -> int:
    """Setup, training and evaluation of all units, one after another; returns the number of failures."""
    failures = 0
    for i, unit in enumerate(todo):
        try:
            if unit.seed is not None:
                run_setup(sweep, unit.seed)
            run_unit(sweep, unit, f"[{i + 1}/{len(todo)}] ")
        except Failed as failure:
            failures += 1
            print(f"error: {failure}", file=sys.stderr, flush=True)
    return failures


def submit(argv: Sequence[str], sweep: dict[str, Any], todo: Sequence[Unit], options: str, dry_run: bool) -> None:
    """
    One SLURM array for the rows that can be trained at once, the next after it, and the report at the end.

    The arrays follow each other with `afterany`: a failed task stops those that need its model, and no others.
    """
    name, previous = Path(argv[0]).stem, None
    # The tasks are numbers of rows: they read the sweep as it is now, whatever becomes of its file meanwhile.
    copy = Path(sweep["output_dir"], name, f"{name}.yaml")
    rows = [
        {**row, **({"recipe": str(Path(argv[0]).parent.resolve() / row["recipe"])} if "recipe" in row else {})}
        for row in sweep["rows"]
    ]
    if not dry_run:
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(recipe.dump({**sweep, "rows": rows}))
    this = [sys.executable, "-m", "vision_r1_recipes.sweep", str(copy)]

    def sbatch(what: list[str], task: str, *more: str) -> str:
        command = ["sbatch", "--parsable", f"--job-name={name}", *shlex.split(options), *more]
        command += [f"--dependency=afterany:{previous}"] if previous else []
        command += ["--wrap", shlex.join(what) + task]
        print(shlex.join(command), flush=True)
        if dry_run:
            return "JOB"
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise RecipeError("sbatch is not here: --slurm needs a SLURM cluster, on its login node.") from None
        if done.returncode:
            raise RecipeError(f"sbatch refused: {done.stderr.strip()}")
        return done.stdout.strip().partition(";")[0]

    for level in sorted({unit.level for unit in todo}):
        tasks = [str(i) for i, unit in enumerate(todo) if unit.level == level and not unit.done]
        if tasks:
            task = ' --task "$SLURM_ARRAY_TASK_ID"'
            previous = sbatch(this, task, f"--array={','.join(tasks)}")
    sbatch([*this, "--report_only"], "")


def dry_run(sweep: dict[str, Any], todo: Sequence[Unit]) -> None:
    """Print the commands that are left, in their order."""
    for seed in dict.fromkeys(unit.seed for unit in todo):
        if seed is not None and (command := setup_command(sweep, seed)):
            print(f"# seed {seed}, setup\n{shlex.join(command)}")
        for unit in [unit for unit in todo if unit.seed == seed]:
            print(f"# {unit.name}" + (": finished" if unit.done else ""))
            if not unit.trained:
                print(shlex.join(train_command(sweep, unit)))
            if not unit.done:
                print(shlex.join(evaluate_command(unit)))


def write_report(argv: Sequence[str], sweep: dict[str, Any], todo: Sequence[Unit]) -> None:
    """The report of what there is."""
    from . import report, results

    report.check_installed()
    labels = [row["label"] for row in sweep["rows"]]
    runs, evaluations, notes = [], [], []
    for unit in sorted(todo, key=lambda unit: labels.index(unit.label)):
        if "stages" in unit.values:
            run = results.load_run(unit.label, unit.folder, unit.seed) if results.state(unit.folder) else None
            if run and run.rows:
                runs.append(run)
            else:
                notes.append(f"{unit.name}: no log yet.")
        if (unit.evaluation / "summary.json").is_file():
            evaluations.append(results.load_evaluation(unit.label, unit.evaluation, unit.seed))
        else:
            notes.append(f"{unit.name}: not evaluated yet.")
    if not runs and not evaluations:
        seeds = ", ".join(map(str, sweep["seeds"]))
        raise RecipeError(f"nothing to report: no row has begun at `seeds` {seeds} in {sweep['output_dir']}.")
    home = Path(sweep["output_dir"], Path(argv[0]).stem)
    baseline = sweep.get("baseline") if any(e.label == sweep.get("baseline") for e in evaluations) else None
    print(report.write(runs, evaluations, notes, home, baseline, sweep.get("title", home.name)))
    print(f"\nwritten to {home}/: report.html, report.md and the figures")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vision_r1_recipes.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("sweep", help="its YAML file; `--key value` behind it sets a key")
    parser.add_argument(
        "--slurm", metavar="OPTIONS", nargs="?", const="", help='submit to SLURM: --slurm="options for sbatch"'
    )
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print what would be run")
    parser.add_argument("--report_only", "--report-only", action="store_true", help="report what is there already")
    parser.add_argument("--task", type=int, help=argparse.SUPPRESS)  # the number of one row at one seed
    args, rest = parser.parse_known_args(argv)
    argv = [args.sweep, *rest]
    sweep = load(argv)
    todo = units(args.sweep, sweep)
    if args.report_only:
        write_report(argv, sweep, todo)
        return 0
    check(sweep, todo if args.task is None else [todo[args.task]])
    if args.slurm is not None:
        submit(argv, sweep, todo, args.slurm, args.dry_run)
        return 0
    if args.dry_run:
        dry_run(sweep, todo)
        return 0
    if args.task is not None:
        return 1 if run_all(sweep, [todo[args.task]]) else 0
    failures = run_all(sweep, todo)
    write_report(argv, sweep, todo)
    if failures:
        print(f"error: {failures} of {len(todo)} rows failed, see above", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the `finally` that ends a run
    with preflight.kind_errors():
        sys.exit(main())
