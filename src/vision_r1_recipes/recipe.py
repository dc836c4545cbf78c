"""
Read a recipe: one YAML file per run, `base:` inheritance, unknown keys fatal, the resolved copy saved with the run.

```shell
python -m vision_r1_recipes.recipe expand recipes/ptst.yaml                  # the recipe after inheritance
python -m vision_r1_recipes.recipe get recipes/ptst.yaml output_dir          # one value, for scripts
python -m vision_r1_recipes.recipe diff recipes/ptst.yaml recipes/long.yaml  # what differs after inheritance
python -m vision_r1_recipes.recipe plan recipes/ptst.yaml --world-size 64    # the arithmetic and every problem, no GPU
python -m vision_r1_recipes.recipe state recipes/ptst.yaml                   # finished, a checkpoint, or nothing
```
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


PACKAGES = ("trl", "transformers", "accelerate", "datasets", "deepspeed", "peft", "torch", "vllm", "math-verify")


SLURM = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")

# Keys that only one of the entry points knows.
SCRIPTS = {"grpo.py": ("stages", "prompts_per_rollout"), "sft.py": ("global_batch_size", "freeze_vision")}
BRIDGE = ("mllm", "reasoner")

# Keys whose values have to fit each other.
ENTANGLED = (
    *("stages", "prompts_per_rollout", "prompts_per_update", "per_device_train_batch_size", "global_batch_size"),
    *("num_generations", "num_generations_eval", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("max_completion_length", "max_steps", "num_train_epochs", "steps_per_generation", "generation_batch_size"),
    *("logging_steps", "save_steps", "eval_steps", "save_strategy", "eval_strategy"),
)


ABSENT = "(not set)"  # of a key in a difference


class RecipeError(ValueError):
    """A recipe that can't be run. The message names the key, the value and the fix."""


class _Loader(yaml.SafeLoader):
    """YAML with `1e-6` as a number (YAML 1.1 reads a string) and with repeated keys refused."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise RecipeError(f"repeated key {', '.join(repeated)} at {node.start_mark}: keep one of them.")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def merge(base: dict, child: dict) -> dict:
    """Deep merge of `child` over `base`: dicts are merged, anything else, lists too, is replaced whole."""
    merged = dict(base)
    for key, value in child.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def load(path: str | Path, _children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """
    Read the recipe at `path` and all it inherits by its `base:` key (a path relative to the file that names it).

    Raises:
        `RecipeError`: a missing file, a circle of bases, broken YAML, or a file that is not a mapping.
    """
    path = Path(path).resolve()
    if path in _children:
        raise RecipeError("circle of bases: " + " -> ".join(str(p) for p in (*_children, path)))
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=3)
        named = f", named by `base:` in {_children[-1]}" if _children else ""
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise RecipeError(f"no recipe at {path}{named}.{hint}")
    try:
        with path.open(encoding="utf-8") as file:
            content = yaml.load(file, Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path} must hold `key: value` lines, found {type(content).__name__}.")
    base = content.pop("base", None)
    if base is None:
        return content
    if not isinstance(base, str):
        raise RecipeError(f"`base`: {base!r} in {path}: name one file, relative to this one.")
    return merge(load(path.parent / base, (*_children, path)), content)


def differences(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Every key whose value differs between two resolved recipes, with both values; `ABSENT` where one lacks it."""
    keys = dict.fromkeys([*a, *b])
    return {key: (a.get(key, ABSENT), b.get(key, ABSENT)) for key in keys if a.get(key, ABSENT) != b.get(key, ABSENT)}


def parse_overrides(args: Sequence[str]) -> dict[str, Any]:
    """
    `--key value`, `--key=value` or a bare `--flag` (true) as a dict. Values are read as YAML; several make a list.
    """
    overrides: dict[str, Any] = {}
    key, values = None, []

    def read(text: str) -> Any:
        try:
            return yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"`{key}`: {text!r} is not valid YAML. Quote text: --{key} '\"...\"'.") from error

    def close():
        if key is not None:
            overrides[key] = values[0] if len(values) == 1 else values or True

    for arg in args:
        if arg.startswith("--") and len(arg) > 2:
            close()
            key, equals, value = arg[2:].partition("=")
            key, values = key.replace("-", "_"), [read(value)] if equals else []
        elif key is None:
            raise RecipeError(f"unexpected argument {arg!r}: overrides are written `--key value`.")
        else:
            values.append(read(arg))
    close()
    return overrides


def check_keys(recipe: dict[str, Any], valid: Iterable[str], where: str = "") -> None:
    """Raise [`RecipeError`] naming every key of `recipe` that is not in `valid`, each with its nearest valid name."""
    if problems := unknown_keys(recipe, valid, where):
        raise RecipeError("\n".join(problems))


def unknown_keys(recipe: dict[str, Any], valid: Iterable[str], where: str = "") -> list[str]:
    """A sentence for every key of `recipe` that is not in `valid`, with its nearest valid name."""
    valid = sorted(valid)
    problems = []
    for key in recipe:
        if key not in valid:
            near = difflib.get_close_matches(str(key), valid, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"valid keys: {', '.join(valid)}."
            problems.append(
                f"unknown key {where}`{key}`: {recipe[key]!r}; {hint if len(hint) < 400 else 'remove it.'}"
            )
    return problems


def _fits(value: Any, hint: Any) -> bool:
    """Whether `value` is of the type `hint`. Text is not a number here."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, option) for option in inner)
    if kind is Literal:
        return value in inner
    if kind is list:  # those of dicts have checks of their own, with better messages
        return isinstance(value, list) and (inner[0] is dict or all(_fits(item, inner[0]) for item in value))
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not isinstance(kind, type):  # `Any` and the like
        return True
    return isinstance(value, str if issubclass(kind, Enum) else kind)


def _settle(key: str, value: Any, hint: Any, choices: Iterable | None) -> tuple[Any, str | None]:
    """
    `value` as a field of type `hint` takes it, and a sentence when there is no such value. One item makes a list, 8.0
    is a whole number, and numbers written as text are left to argparse.
    """
    if isinstance(value, float) and value.is_integer() and not _fits(value, hint):
        value = int(value)
    if not _fits(value, hint) and _fits([value], hint):
        value = [value]
    if choices is not None and value is not None and value not in choices:
        return value, f"`{key}`: {value!r} is not one of {', '.join(map(str, choices))}."
    listed = any(get_origin(option) is list for option in (hint, *get_args(hint)))
    if _fits(value, hint) or (isinstance(value, str) and not listed):
        return value, None
    if key == "resume_from_checkpoint" and isinstance(value, bool):
        return value, None
    expected = getattr(hint, "__name__", None) if isinstance(hint, type) and not get_args(hint) else str(hint)
    fix = ""
    if isinstance(value, bool):
        fix = " YAML reads a bare yes, no, on or off as true or false: put text in quotes."
    elif _fits("", hint):
        fix = " Put text in quotes."
    return value, f"`{key}`: {value!r} is not a value of type {expected}.{fix}"


def fill(kind: type, values: Any, where: str = "") -> Any:
    """An instance of the dataclass `kind`; raises [`RecipeError`] with all unknown, missing and mistyped keys."""
    if not isinstance(values, dict):
        raise RecipeError(f"{where.rstrip('.') or 'this'}: {values!r} must hold `key: value` lines.")
    values, hints, problems = dict(values), get_type_hints(kind), unknown_keys(values, get_type_hints(kind), where)
    for field in fields(kind):
        if field.name in values:
            values[field.name], problem = _settle(where + field.name, values[field.name], hints[field.name], None)
            if problem is None and not _fits(values[field.name], hints[field.name]):
                problem = f"`{where}{field.name}`: {values[field.name]!r} is not a value of type {hints[field.name]}."
            problems += filter(None, [problem])
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"`{where}{field.name}` is missing.")
    if problems:
        raise RecipeError("\n".join(problems))
    return kind(**values)


def parse(argv: Sequence[str], dataclass_types: Sequence[type]) -> tuple:
    """
    Parse an entry point's command line: `RECIPE [--key value ...]`, or TRL's `--config RECIPE [--key value ...]`.

    Returns:
        `(recipe, *instances)`: the resolved recipe as a dict, then one instance of each of `dataclass_types`.

    Raises:
        `RecipeError`: everything wrong with the file, the keys and the types of their values.
    """
    recipe, instances, problems = parse_all(argv, dataclass_types)
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe, *instances


def parse_all(argv: Sequence[str], dataclass_types: Sequence[type]) -> tuple[dict[str, Any], tuple | None, list[str]]:
    """
    [`parse`] that goes on after a problem, so that all can be told at once.

    Returns:
        The recipe; instances made of what is right in it, `None` if that is impossible; the problems.

    Raises:
        `RecipeError`: there is no recipe to speak of: a missing file, broken YAML, or one of the other script.
    """
    from trl import TrlParser

    argv = list(argv)
    argv = [part for arg in argv for part in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    if "--config" in argv[:-1]:
        at = argv.index("--config")
        path = argv[at + 1]
        argv[at : at + 2] = []
    elif argv and not argv[0].startswith("--"):
        path = argv.pop(0)
    else:
        raise RecipeError("name a recipe first, for example: recipes/toy/ptst.yaml [--key value ...]")
    recipe = merge(load(path), parse_overrides(argv))
    actions = {action.dest: action for action in TrlParser(dataclass_types)._actions if action.dest != "help"}
    refuse_other_kind(recipe, actions)
    hints = {key: hint for kind in dataclass_types for key, hint in get_type_hints(kind).items()}
    problems = unknown_keys(recipe, actions)
    right = {}
    for key in [key for key in recipe if key in actions]:
        recipe[key], problem = _settle(key, recipe[key], hints[key], actions[key].choices)
        if problem:
            problems.append(problem)
        else:
            right[key] = recipe[key]
    # What was refused is left out at the next try, so that the rest can be looked at.
    while True:
        try:
            return recipe, _instances(right, dataclass_types), problems
        except ValueError as error:
            named = re.match(r"argument --(\w+): (.*)", str(error), re.DOTALL)
            said = f"`{named[1]}`: {right.get(named[1])!r}: {named[2]}" if named else str(error)
            problems += said.splitlines()
            left = {key: value for key, value in right.items() if key not in ([named[1]] if named else ENTANGLED)}
            if left == right:
                return recipe, None, problems
            right = left


def _instances(recipe: dict[str, Any], dataclass_types: Sequence[type]) -> tuple:
    from trl import TrlParser

    parser = TrlParser(dataclass_types)
    parser.set_defaults_with_config(**recipe)
    parser.error = refuse  # argparse would print some hundred lines of usage before its message
    return parser.parse_args_into_dataclasses(args=[])


def refuse_other_kind(recipe: dict[str, Any], valid: Iterable[str]) -> None:
    """Raise [`RecipeError`] naming the entry point of a recipe that has no key of this one, but one of another."""
    commands = {f"launch src/vision_r1_recipes/{script}": marks for script, marks in SCRIPTS.items()}
    for command, marks in {**commands, "python -m vision_r1_recipes.bridge run RECIPE": BRIDGE}.items():
        found = [key for key in marks if key in recipe]
        if found and not set(found) & set(valid):
            named = ", ".join(f"`{key}`" for key in found)
            raise RecipeError(f"this recipe is another's (it has {named}): {command}.")


def script(values: Mapping[str, Any]) -> str:
    """The entry point of a recipe: `grpo.py` or `sft.py`."""
    return "grpo.py" if values.keys() & {*SCRIPTS["grpo.py"], "reward", "max_prompt_length"} else "sft.py"


def saved_system_prompt(model: str) -> str | None:
    """The system prompt in the recipe beside a checkpoint, or in the run's folder around it."""
    saved = [folder / "recipe.yaml" for folder in (Path(model), Path(model).parent)]
    return next((load(path).get("system_prompt") for path in saved if path.is_file()), None)


def refuse(message: str) -> None:
    """Stands for argparse's `error`, which would print its usage and exit."""
    raise RecipeError(message)


def environment() -> dict[str, Any]:
    """Versions of Python and the libraries, this repository's git commit and whether it has changes, the SLURM job."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None

    def git(*args):
        run = subprocess.run(["git", "-C", Path(__file__).parent, *args], capture_output=True, text=True, check=False)
        return run.stdout.strip() if run.returncode == 0 else None

    try:
        commit, dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except FileNotFoundError:  # no git on this machine
        commit, dirty = None, None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "git_commit": commit,
        "git_dirty": dirty,
        "command": sys.argv,
        "slurm": {name: value for name, value in os.environ.items() if name in SLURM},
    }


def save(recipe: dict[str, Any], output_dir: str | Path, **launch: Any) -> None:
    """Write `recipe.yaml` (resolved, a recipe itself) and `environment.json`, with `launch`, into `output_dir`."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "recipe.yaml").write_text(dump(recipe))
    (output_dir / "environment.json").write_text(json.dumps({**environment(), **launch}, indent=2) + "\n")


def dump(recipe: Any) -> str:
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=119)


def _describe_differences(a: dict[str, Any], b: dict[str, Any]) -> str:
    def shown(value: Any, sign: str) -> str:
        flow = yaml.safe_dump(value, default_flow_style=None, sort_keys=False, allow_unicode=True, width=119)
        plain = isinstance(value, str) and yaml.load(flow, Loader=_Loader) == value and flow[0] not in "'\""
        lines = value if plain else flow.removesuffix("...\n")
        return "\n".join(f"  {sign} {line}" for line in lines.rstrip("\n").splitlines())

    found = differences(a, b)
    return "\n".join(f"{k}:\n{shown(old, '-')}\n{shown(new, '+')}" for k, (old, new) in found.items()) or "the same"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vision_r1_recipes.recipe", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    expand = commands.add_parser("expand", help="print the recipe after inheritance and overrides")
    get = commands.add_parser("get", help="print one value")
    state = commands.add_parser("state", help="print what there is of its run: (part) finished, checkpoint or nothing")
    entry = commands.add_parser("script", help="print its entry point: grpo.py or sft.py")
    serve = commands.add_parser("serve", help="print the command of its rollout server")
    plan = commands.add_parser("plan", help="print the arithmetic and every problem; exit code 2 if there is one")
    diff = commands.add_parser("diff", help="print what differs between two recipes after inheritance")
    for command in (expand, get, state, entry, serve, plan, diff):
        command.add_argument("recipe")
    diff.add_argument("other", help="the second recipe, with the overrides that follow")
    get.add_argument("key", help="a dot goes into a dict or a list: stages.0.steps")
    get.add_argument("--default", help="what to print when the recipe has no such key")
    plan.add_argument("--here", action="store_true", help="look at this machine and at output_dir too")
    plan.add_argument("--world-size", "--world_size", type=int, default=1, help="training processes")
    plan.add_argument("--gpus", type=int, help="all GPUs, those of a vLLM server included")
    plan.add_argument("--seconds-per-rollout", type=float, help="measured, for the GPU-hours")
    plan.add_argument("--zero-stage", type=int, choices=range(4), default=3, help="for the memory; 0: no DeepSpeed")
    plan.add_argument("--gpu-memory", type=float, default=80, help="of one GPU, in GB")
    args, rest = parser.parse_known_args(argv)
    try:
        if args.command == "plan" and min(args.world_size, 1 if args.gpus is None else args.gpus) < 1:
            raise RecipeError(f"--world-size {args.world_size}, --gpus {args.gpus}: needs at least 1.")
        if args.command == "plan":
            from .plan import plan as make_plan

            memory = (args.zero_stage, args.gpu_memory)
            text, problems = make_plan(
                [args.recipe, *rest], args.world_size, args.gpus, args.seconds_per_rollout, *memory, args.here
            )
            print(text)
            if problems:
                print(f"\n{len(problems)} problem(s):", *(f"- {problem}" for problem in problems), sep="\n")
            return 2 if problems else 0
        if args.command == "serve":
            with contextlib.redirect_stdout(sys.stderr):  # transformers prints when it is imported
                from .plan import serve

                command = serve([args.recipe, *rest])
            print(command)
            return 0
        if args.command == "diff":
            print(_describe_differences(load(args.recipe), merge(load(args.other), parse_overrides(rest))))
            return 0
        value: Any = merge(load(args.recipe), parse_overrides(rest))
        if args.command == "state":
            from .checkpoints import state as find_state

            value = find_state(value)
        if args.command == "script":
            value = script(value)
        if args.command == "get":
            for part in args.key.split("."):
                try:
                    value = value[int(part)] if isinstance(value, list) else value[part]
                except (KeyError, IndexError, ValueError, TypeError):
                    if args.default is not None:
                        value = args.default
                        break
                    raise RecipeError(f"{args.recipe} has no key `{args.key}`.") from None
        print(value if isinstance(value, str) else dump(value).removesuffix("...\n").rstrip("\n"))
        return 0
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
