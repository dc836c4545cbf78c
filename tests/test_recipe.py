"""Recipes: inheritance, types, overrides, the command line, and every file under recipes/."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from trl import ModelConfig

from vision_r1_recipes import recipe
from vision_r1_recipes.configs import DataArguments, VisionGRPOConfig, VisionSFTConfig
from vision_r1_recipes.preflight import KNOWN_MODELS, model_config
from vision_r1_recipes.recipe import RecipeError, load, parse, parse_overrides


ROOT = Path(__file__).parents[1]
FILES = sorted(p for p in ROOT.glob("recipes/**/*.yaml") if "accelerate" not in p.parts)
SWEEPS = [p for p in FILES if p.stem.startswith("table")]
BRIDGES = [p for p in FILES if p.stem.startswith("bridge")]
RECIPES = [p for p in FILES if p not in SWEEPS + BRIDGES]
RUNS = [p for p in RECIPES if "base" not in p.parts]
GRPO, SFT = (DataArguments, VisionGRPOConfig, ModelConfig), (DataArguments, VisionSFTConfig, ModelConfig)
MINIMAL = """
output_dir: out
use_cpu: true
bf16: false
prompts_per_rollout: 4
per_device_train_batch_size: 4
datasets: [{path: x}]
stages: [{max_completion_length: 8, num_generations: 4, steps: 2}]
"""


def name(path):
    return str(path.relative_to(ROOT / "recipes"))


@pytest.fixture
def write(tmp_path):
    def write(file, text):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write


# Inheritance


def test_inheritance_is_deep_and_relative(write):
    write("a/base.yaml", "x: 1\nd: {a: 1, in: {p: 1, q: 2}}\nl: [{k: 1}, {k: 2}]\ny: keep\n")
    write("a/middle.yaml", "base: base.yaml\nx: 2\nd: {in: {q: 3}}\n")
    child = write("b/child.yaml", "base: ../a/middle.yaml\nl: [{k: 9}]\nd: {b: 4}\nz: null\n")
    assert load(child) == {
        "x": 2,
        "d": {"a": 1, "b": 4, "in": {"p": 1, "q": 3}},
        "l": [{"k": 9}],
        "y": "keep",
        "z": None,
    }


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-6", 1e-6),
        ("1E6", 1e6),
        ("-2.5e+3", -2500.0),
        ("1.0e-6", 1e-6),
        ("1e", "1e"),
        ("'1e-6'", "1e-6"),
        ("e5", "e5"),
    ],
)
def test_yaml_numbers(write, text, value):
    assert load(write("r.yaml", f"x: {text}")) == {"x": value}


@pytest.mark.parametrize(
    "text, parts",
    [
        ("base: nonne.yaml", ["nonne.yaml", "r.yaml", "Did you mean none.yaml"]),
        ("base: none.yaml", ["circle of bases", "none.yaml -> ", "r.yaml -> "]),
        ("base: [a.yaml]", ["`base`", "['a.yaml']", "r.yaml"]),
        ("- a\n- b", ["r.yaml", "key: value", "list"]),
        ("", ["r.yaml", "NoneType"]),
        ("a: {", ["r.yaml", "not valid YAML"]),
        ("a: 1\nb: 2\na: 3", ["repeated key a", "r.yaml"]),
        ("d: {k: 1, k: 2}", ["repeated key k", "r.yaml"]),
    ],
)
def test_broken_files(write, text, parts):
    write("none.yaml", "base: r.yaml\n")
    path = write("r.yaml", text)
    with pytest.raises(RecipeError) as error:
        load(path)
    assert all(part in str(error.value) for part in parts), error.value


def test_missing_recipe_names_near_ones():
    with pytest.raises(RecipeError, match=r"no recipe at .*ptts.yaml.*Did you mean ptst.yaml"):
        load(ROOT / "recipes" / "ptts.yaml")


def test_not_utf8(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        load(tmp_path / "r.yaml")


# Overrides


@pytest.mark.parametrize(
    "argv, expected",
    [
        (["--seed", "3"], {"seed": 3}),
        (["--seed=3"], {"seed": 3}),
        (["--learning-rate", "1e-5"], {"learning_rate": 1e-5}),
        (["--bf16"], {"bf16": True}),
        (["--bf16", "--seed", "1"], {"bf16": True, "seed": 1}),
        (["--system_prompt="], {"system_prompt": None}),
        (["--beta", "-1"], {"beta": -1}),
        (["--reward_weights", "0.5", "1"], {"reward_weights": [0.5, 1]}),
        (["--stages", "[{steps: 1}, {steps: 2}]"], {"stages": [{"steps": 1}, {"steps": 2}]}),
        (["--stages", "{steps: 1}", "{steps: 2}"], {"stages": [{"steps": 1}, {"steps": 2}]}),
        (["--model_init_kwargs", "{a: {b: 1}}"], {"model_init_kwargs": {"a": {"b": 1}}}),
        (["--x=a=b"], {"x": "a=b"}),
    ],
)
def test_overrides(argv, expected):
    assert parse_overrides(argv) == expected


@pytest.mark.parametrize("argv, part", [(["3"], "'3'"), (["--p", "a: b: c"], "`p`"), (["--p={a"], "`p`")])
def test_broken_overrides(argv, part):
    with pytest.raises(RecipeError, match=part):
        parse_overrides(argv)


@pytest.mark.parametrize("form", ["{r} --seed 7", "--config {r} --seed 7", "--seed 7 --config {r}", "{r} --seed=7"])
def test_command_line_forms(write, form):
    values, data, args, _ = parse(form.format(r=write("r.yaml", MINIMAL)).split(), GRPO)
    assert (values["seed"], args.seed, data.datasets) == (7, 7, [{"path": "x"}])


@pytest.mark.parametrize("argv", [[], ["--seed", "7"], ["--config"], ["r.yaml", "more.yaml"]])
def test_no_recipe(write, argv):
    argv = [write(a, MINIMAL) if a == "r.yaml" else a for a in argv]
    with pytest.raises(RecipeError, match=r"name a recipe first|unexpected argument"):
        parse(argv, GRPO)


# Keys and types


@pytest.mark.parametrize(
    "key, near",
    [
        ("num_generation", "num_generations"),
        ("max_competion_length", "max_completion_length"),
        ("learing_rate", "learning_rate"),
        ("prompt_per_rollout", "prompts_per_rollout"),
        ("max_pixel", "max_pixels"),
        ("model_name_or_pth", "model_name_or_path"),
    ],
)
def test_unknown_key(write, key, near):
    with pytest.raises(RecipeError, match=f"unknown key `{key}`: 1; did you mean `{near}`"):
        parse([write("r.yaml", MINIMAL + f"{key}: 1\n")], GRPO)


@pytest.mark.parametrize(
    "path, config, parts",
    [("ptst.yaml", VisionSFTConfig, ["grpo.py", "`stages`"]), ("cold_start.yaml", VisionGRPOConfig, ["sft.py"])],
)
def test_a_recipe_of_the_other_script(path, config, parts):
    with pytest.raises(RecipeError) as error:
        parse([str(ROOT / "recipes" / path)], (DataArguments, config, ModelConfig))
    assert all(part in str(error.value) for part in parts)
    assert "\n" not in str(error.value)


def test_all_unknown_keys_are_named(write):
    with pytest.raises(RecipeError, match=r"(?s)`qqqq`.*remove it.*`sed`.*`seed`"):
        parse([write("r.yaml", MINIMAL + "qqqq: 1\nsed: 2\n")], GRPO)


@pytest.mark.parametrize(
    "key, text",
    [
        ("seed", "[1]"),
        ("seed", "'1.5'"),
        ("seed", "1.5"),
        ("seed", "true"),
        ("seed", ".inf"),
        ("seed", "null"),
        ("learning_rate", "abc"),
        ("learning_rate", "true"),
        ("learning_rate", "{a: 1}"),
        ("use_vllm", "3"),
        ("use_vllm", "maybe"),
        ("output_dir", "5"),
        ("run_name", "2025-01-01"),
        ("report_to", "no"),
        ("save_strategy", "no"),
        ("reward_weights", "[a, b]"),
        ("reward", "soft_pair"),
        ("dtype", "bf16"),
        ("lr_scheduler_type", "constnt"),
        ("stages", "5"),
        ("prompts_per_rollout", "0"),
        ("prompts_per_update", "0"),
        ("prompts_per_update", "-2"),
        ("per_device_train_batch_size", "0"),
        ("num_iterations", "0"),
        ("log_every_rollouts", "0"),
        ("save_every_rollouts", "0"),
    ],
)
def test_wrong_values_are_refused_by_name(write, key, text):
    with pytest.raises(RecipeError) as error:
        parse([write("r.yaml", MINIMAL), f"--{key}={text}"], GRPO)
    assert key in str(error.value)
    value = yaml.safe_load(text)
    assert str(value) in str(error.value) or repr(value) in str(error.value)


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("seed", "8.0", 8),
        ("learning_rate", "1", 1.0),
        ("learning_rate", "'1e-6'", 1e-6),
        ("system_prompt", "null", None),
        ("reward_weights", "0.5", [0.5]),
        ("report_to", "wandb", ["wandb"]),
        ("report_to", "[wandb, tensorboard]", ["wandb", "tensorboard"]),
        ("model_init_kwargs", "{a: 1}", {"a": 1}),
        ("gradient_checkpointing_kwargs", "{use_reentrant: false}", {"use_reentrant": False}),
        ("lora_target_modules", "all-linear", "all-linear"),
        ("datasets", "{path: y}", [{"path": "y"}]),
        ("resume_from_checkpoint", "true", True),
        ("max_grad_norm", "1e0", 1.0),
    ],
)
def test_right_values_arrive(write, key, text, value):
    parsed = parse([write("r.yaml", MINIMAL), f"--{key}={text}"], GRPO)
    got = next(getattr(part, key) for part in parsed[1:] if hasattr(part, key))
    assert got == value and (isinstance(value, float) or type(got) is type(value))


# Saving


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_saved_copy_loads_the_same(tmp_path, path):
    values = load(path)
    recipe.save(values, tmp_path)
    assert load(tmp_path / "recipe.yaml") == values
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert set(recipe.PACKAGES) <= set(environment["packages"]) and environment["packages"]["trl"]
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    assert environment["git_commit"] == (git.stdout.strip() if git.returncode == 0 else None)


# The command line


def command(capsys, *argv):
    code = recipe.main([str(arg) for arg in argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_expand_and_get(capsys):
    path = ROOT / "recipes" / "ptst.yaml"
    code, out, _ = command(capsys, "expand", path, "--seed", "5")
    assert code == 0 and yaml.safe_load(out) == {**load(path), "seed": 5}
    for key, value in [
        ("output_dir", "runs/ptst"),
        ("stages.1.steps", "100"),
        ("use_vllm", "true"),
        ("stages.0", "{"),
    ]:
        code, out, _ = command(capsys, "get", path, key)
        assert code == 0 and (out.strip() == value or yaml.safe_load(out) == load(path)["stages"][0])
    assert command(capsys, "get", path, "seed", "--seed", "5")[:2] == (0, "5\n")
    for key in ("nope", "stages.2.steps", "stages.x", "output_dir.a", "stages.0.nope"):
        code, _, err = command(capsys, "get", path, key)
        assert code == 2 and key in err


@pytest.mark.parametrize("argv", [["expand", "none.yaml"], ["plan", "none.yaml"]])
def test_missing_file_on_the_command_line(capsys, argv):
    code, _, err = command(capsys, *argv)
    assert code == 2 and "none.yaml" in err


@pytest.mark.parametrize("world", ["0", "-1"])
def test_plan_needs_processes(capsys, world):
    code, _, err = command(capsys, "plan", ROOT / "recipes" / "ptst.yaml", "--gpus", world)
    assert code == 2 and world in err


def worlds(path):
    if "toy" in path.parts:
        return [2]
    if "scale" in path.parts:
        gpus = re.search(r"(\w+) GPUs? of 80 GB", path.read_text())[1]
        return [1 if gpus == "one" else int(gpus)]
    return [8, 32] if "global_batch_size" in load(path) else [8, 64]


@pytest.mark.parametrize(
    "path, world", [(p, w) for p in RUNS for w in worlds(p)], ids=lambda v: v if isinstance(v, int) else name(v)
)
def test_every_recipe_plans(capsys, path, world):
    zero = ("--zero-stage", "0") if "lora" in path.name else ()
    code, out, _ = command(capsys, "plan", path, "--world-size", world, *zero)
    assert code == 0, out
    assert "problem" not in out and f"{world} process" in out
    if "toy" not in path.parts:
        assert "memory of each GPU" in out and "warning" not in out


def test_plan_refuses_and_says_what_works(capsys):
    path = ROOT / "recipes" / "cold_start.yaml"
    code, out, _ = command(capsys, "plan", path, "--gpus", "64")
    assert code == 2 and re.search(r"32 / \(per_device_train_batch_size 1 x 64 processes\).*processes: .*32", out)
    assert command(capsys, "plan", path, "--gpus", "64", "--global_batch_size", "64")[0] == 0
    code, out, _ = command(capsys, "plan", ROOT / "recipes" / "ptst.yaml", "--gpus", "60")
    assert code == 2 and "64" in out and "2 problem(s)" in out


def test_plan_says_what_to_expect(capsys, toy):
    seven = ("--model_name_or_path", "Qwen/Qwen2.5-VL-7B-Instruct")
    code, out, _ = command(
        capsys, "plan", ROOT / "recipes" / "ptst.yaml", "--gpus", "64", "--seconds-per-rollout", "360", *seven
    )
    assert code == 0
    flat = re.sub(" +", " ", out)
    for part in (
        "prompts per rollout 512 512",
        "completions per rollout 8192 4096",
        "completions per update 2048 1024",
        "rows per micro-batch 4 2",
        "tokens per micro-batch, at most 20,480 18,432",
        "longest sequence 9216 tokens, vllm_max_model_length 9216",
        "rows unknown",
        "8 prompts",
        "8.29 billion parameters",
        "checkpoint: 116 GB",
        "at 360 s a rollout",
    ):
        assert part in flat or part == "8 prompts", part
    hours = re.search(r"a rollout: ([\d.]+) h, ([\d,]+) GPU-h", out)
    assert float(hours[1]) * 64 == pytest.approx(float(hours[2].replace(",", "")), abs=1)
    data = json.dumps([{"path": str(toy / "rl")}])
    _, out, _ = command(capsys, "plan", ROOT / "recipes" / "toy" / "ptst.yaml", "--datasets", data)
    assert "data: 64 rows before any is dropped, 5.00 passes over them" in out


def test_plan_finds_the_model_at_the_beginning(capsys):
    _, out, _ = command(capsys, "plan", ROOT / "recipes/ablations/chained_3.yaml", "--gpus", "8")
    assert "GRPO of runs/ablations/chained_2, reward" in out
    assert "8.29 billion parameters, those of Qwen/Qwen2.5-VL-7B-Instruct, which it starts from" in out
    _, out, _ = command(
        capsys, "plan", ROOT / "recipes/ptst.yaml", "--gpus", "8", "--model_name_or_path", "runs/nowhere"
    )
    assert "note: runs/nowhere is not here" in out


@pytest.mark.parametrize(
    "source, said",
    [
        ({}, None),
        ({"split": "train[:50%]+test"}, None),
        ({"split": "trian"}, "rl has no split trian, only train, test."),
        ({"data_files": "test.parquet", "split": "any"}, None),
        ({"data_files": ["test.parquet"], "name": "is no config of"}, None),
        ({"path": "r.yaml"}, "r.yaml can't be found here or on the Hub: r.yaml is not a .parquet, .json or"),
        ({"split": "train[:1]", "path": "rl/train.parquet"}, None),
        ({"data_files": "nope.parquet"}, "rl can't be found here or on the Hub: "),
        ({"path": "rl/test.parquet", "split": "any"}, None),
        ({"path": "rl/test.parquet", "image_folder": "rl/nope"}, "`image_folder`: rl/nope is not a folder."),
        ({"path": "nope"}, "nope can't be found here or on the Hub: "),
    ],
)
def test_plan_here_looks_for_what_the_recipe_names(tmp_path, monkeypatch, capsys, write, source, said):
    (tmp_path / "rl").mkdir()
    for split in ("train", "test"):
        pd.DataFrame({"problem": ["1 + 1"], "answer": ["2"]}).to_parquet(tmp_path / "rl" / f"{split}.parquet")
    monkeypatch.chdir(tmp_path)
    model = KNOWN_MODELS / "Qwen2.5-VL-7B-Instruct"
    path = write("r.yaml", MINIMAL + f"model_name_or_path: {model}\n")
    code, out, _ = command(capsys, "plan", path, "--here", "--datasets", json.dumps([{"path": "rl", **source}]))
    assert code == (0 if said is None else 2) and out.count("\n- ") == (said is not None), out
    assert said is None or f"- `datasets[0]`: {said}" in out
    if "[" in source.get("split", ""):
        assert "rows unknown, not all of it is here or taken" in out


def test_a_model_s_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(RecipeError, match=r"config.json can't be read"):
        model_config(str(tmp_path))


def test_plan_survives_a_circle_of_start_models(capsys, write):

    def text(output_dir, model):
        return MINIMAL.replace("output_dir: out", f"output_dir: {output_dir}  # where\nmodel_name_or_path: {model}")

    write("a.yaml", text("runs/a", "runs/b"))
    b = write("b.yaml", text("'runs/b'", "runs/a"))
    write("broken.yaml", "{")
    code, out, _ = command(capsys, "plan", b)
    assert code == 0 and "GRPO of runs/a" in out and "is not here" in out
    write("a.yaml", text("runs/a", "Qwen/Qwen2.5-VL-3B-Instruct"))
    assert "those of Qwen/Qwen2.5-VL-3B-Instruct" in command(capsys, "plan", b)[1]


def test_plan_says_what_bounds_the_memory(capsys):
    path, eight = ROOT / "recipes/ptst.yaml", ("--world-size", "8")
    _, out, _ = command(capsys, "plan", path, *eight)
    assert "always: weights 2.1, gradients 2.1, optimizer 12.4, reference 2.1" in out
    assert "the rollout bounds, its largest part: vLLM" in out and "= 56 sequences of 9,216 tokens" in out
    _, out, _ = command(capsys, "plan", path, *eight, "--zero-stage", "0")
    assert "warning: over 80 GB" in out
    _, out, _ = command(capsys, "plan", path, *eight, "--gpu-memory", "140")
    assert "warning" not in out
    _, out, _ = command(capsys, "plan", path, *eight, "--vllm_gpu_memory_utilization", "0.2")
    assert "warning: no longest sequence fits" in out
    _, out, _ = command(capsys, "plan", path, *eight, "--vllm_enable_sleep_mode", "false")
    assert "the update bounds" in out
    _, out, _ = command(capsys, "plan", path, *eight, "--beta", "0")
    assert "reference" not in out


@pytest.mark.slow
def test_plan_splits_gpus_with_a_server(capsys):
    server = ("--vllm_mode", "server", "--vllm_tensor_parallel_size", "4")
    path = ROOT / "recipes" / "ptst.yaml"
    code, out, _ = command(capsys, "plan", path, "--gpus", "64", *server)
    assert code == 2 and "on 60 process(es) and 4 GPU(s) of a vLLM server" in out
    assert re.search(r"near 60 \+ 4 that work: .*64 \+ 4 = 68", out)
    code, out, _ = command(capsys, "plan", path, "--gpus", "68", *server)
    assert code == 0
    assert "server: trl vllm-serve --model runs/cold_start --tensor_parallel_size 4 --max_model_len 9216" in out
    assert command(capsys, "plan", path, "--gpus", "4", *server)[0] == 2


@pytest.mark.slow
def test_serve_prints_nothing_but_the_command():
    """Scripts run what it prints, and transformers writes to stdout when it is imported with Weights & Biases off."""
    ask = [sys.executable, "-m", "vision_r1_recipes.recipe", "serve", ROOT / "recipes/ptst.yaml"]
    options = ("--vllm_mode", "server")
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run([*ask, *options], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("trl vllm-serve ") and done.stdout.count("\n") == 1


def test_plan_of_a_base_asks_for_stages(capsys):
    code, out, _ = command(capsys, "plan", ROOT / "recipes" / "base" / "grpo.yaml")
    assert code == 2 and "`stages` is missing" in out


# The recipes themselves


def repeated(child, inherited, at=""):
    for key, value in child.items():
        if isinstance(value, dict) and isinstance(inherited.get(key), dict):
            yield from repeated(value, inherited[key], f"{at}{key}.")
        elif key in inherited and inherited[key] == value:
            yield f"{at}{key}"


@pytest.mark.parametrize("path", RECIPES + BRIDGES, ids=name)
def test_no_recipe_repeats_what_it_inherits(path):
    child = yaml.load(path.read_text(), Loader=recipe._Loader)
    inherited = load(path.parent / child["base"]) if "base" in child else {}
    assert not list(repeated(child, inherited))


def test_diff(capsys, write):
    a = write("a.yaml", "x: 1\nstages: [{steps: 1}, {steps: 2}]\nonly_a: [1, 2]\nsame: {k: 1}\ntext: long words\n")
    b = write("b.yaml", "base: a.yaml\nx: null\nstages: [{steps: 1}]\ntext: other\nonly_b: true\n")
    code, out, _ = command(capsys, "diff", a, b)
    assert code == 0
    assert out.splitlines() == [
        *("x:", "  - 1", "  + null", "stages:", "  - - {steps: 1}", "  - - {steps: 2}", "  + - {steps: 1}"),
        *("text:", "  - long words", "  + other", "only_b:", "  - (not set)", "  + true"),
    ]
    code, out, _ = command(capsys, "diff", a, a, "--x", "3")
    assert code == 0 and out == "x:\n  - 1\n  + 3\n"
    assert command(capsys, "diff", a, a)[:2] == (0, "the same\n")
    assert command(capsys, "diff", a, a, "--x", '"1"')[1] == "x:\n  - 1\n  + '1'\n"
    assert command(capsys, "diff", a, "none.yaml")[0] == 2


# Forks and twins


FORKS = [p for p in RUNS if "toy" not in p.parts and "base" not in p.parts]


@pytest.mark.parametrize("path", [p for p in RUNS if p.parent != ROOT / "recipes"], ids=name)
def test_an_ablation_is_short(path):
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) < 15


@pytest.mark.parametrize("path", [p for p in FORKS if "scale" not in p.parts], ids=name)
def test_every_recipe_has_a_toy_twin_of_the_same_shape(path):
    real, toy = load(path), load(ROOT / "recipes" / "toy" / path.relative_to(ROOT / "recipes"))
    assert toy["output_dir"] == real["output_dir"].replace("runs/", "runs/toy/")
    base = {"Qwen/Qwen2.5-VL-7B-Instruct": "runs/toy/base"}
    start = real["model_name_or_path"]
    assert toy["model_name_or_path"] == base.get(start, start.replace("runs/", "runs/toy/"))
    for key in ("reward", "reward_weights", "system_prompt", "epsilon", "beta", "scale_rewards", "loss_type"):
        assert toy.get(key) == real.get(key), key
    dropped = [source.get("drop_reasoning") for source in real["datasets"]]
    assert [source.get("drop_reasoning") for source in toy["datasets"]] == dropped

    def shape(stages, length, steps):
        return [(s["max_completion_length"] / length, s["num_generations"], s["steps"] / steps) for s in stages]

    if "4k_equal_tokens" in path.name:  # its steps follow from measured lengths, which differ
        assert [s["num_generations"] for s in toy["stages"]] == [16]
        assert 20 < toy["stages"][0]["steps"] < 40 and 100 < real["stages"][0]["steps"] < 200
    elif "stages" in real:
        assert shape(toy["stages"], 96, 20) == shape(real["stages"], 4096, 100)


def test_every_recipe_has_its_row():
    text = (ROOT / "recipes" / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    linked = [re.match(r"\| \[([\w/]+)\]\(([\w/]+)\.yaml\)", row).groups() for row in rows]
    assert all(shown == file for shown, file in linked)
    files = [name(path).removesuffix(".yaml") for path in RUNS + SWEEPS + BRIDGES if path.stem != "table"]
    assert sorted(file for _, file in linked) == sorted(files)
    assert all(cell.strip() for row in rows for cell in row.strip("|").split("|"))


@pytest.mark.parametrize("path", BRIDGES, ids=name)
def test_every_bridge_recipe_is_whole(path, monkeypatch):
    from vision_r1_recipes.bridge.run import Run

    monkeypatch.chdir(ROOT)
    run = Run(load(path))
    assert ("pseudo_cot" in run.prompts.templates) == ("no_pseudo_cot" not in path.stem)


def test_a_recipe_of_another_kind_names_its_command(capsys):
    from vision_r1_recipes.bridge.run import Run

    with pytest.raises(RecipeError, match=r"it has `stages`.*launch src/vision_r1_recipes/grpo.py"):
        Run(load(ROOT / "recipes" / "ptst.yaml"))
    code, _, err = command(capsys, "plan", ROOT / "recipes" / "bridge.yaml")
    assert code == 2 and "it has `mllm`, `reasoner`): python -m vision_r1_recipes.bridge run RECIPE" in err


@pytest.mark.parametrize("path", [p for p in RUNS if "scale" in p.parts], ids=name)
def test_scale_recipes_say_what_to_do_without_memory(path):
    assert re.search(r"# Out of memory\? Change these, in this order:\n# 1\. ", path.read_text())
    assert re.search(r"GPUs? of 80 GB.*Bound by", path.read_text(), re.DOTALL)


BOOKKEEPING = {
    "base",
    "output_dir",
    "seed",
    "datasets",
    "data_files",
    "vllm_max_model_length",
    "remove_unused_columns",
}
BOOKKEEPING |= {"report_to", "logging_steps", "log_completions", "log_unique_prompts", "log_multimodal"}
BOOKKEEPING |= {"mllm", "reasoner", "prompts", "rules"}  # a bridge's, tagged inside
BOOKKEEPING |= {"num_completions_to_print", "stages"}  # every stage has its own line, and its own tag
TAG = re.compile(r"\[(paper|repo|author|easyr1|llamafactory|ours)\]")


@pytest.mark.parametrize("path", [p for p in RECIPES + BRIDGES if "toy" not in p.parts], ids=name)
def test_values_carry_their_source(path):
    lines = [line for line in path.read_text().splitlines() if re.match(r"(\w+:|  - \{)", line)]
    untagged = [line for line in lines if line.split(":")[0] not in BOOKKEEPING and not TAG.search(line)]
    assert not untagged


PAPER = {
    "ptst.yaml": {
        "stages": [(4096, 16, 100), (8192, 8, 100)],
        **{"prompts_per_rollout": 512, "prompts_per_update": 128, "learning_rate": 1e-6, "weight_decay": 0.01},
        **{"beta": 0.01, "epsilon": 0.2, "scale_rewards": "group", "temperature": 1.0, "top_p": 1.0},
        **{"max_prompt_length": 1024, "min_pixels": 262144, "max_pixels": 4194304, "repetition_penalty": 1.0},
        **{"reward": "hfrrf", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 1.0},
        **{"loss_type": "dapo", "mask_truncated_completions": False, "vllm_importance_sampling_correction": False},
    },
    "ablations/ptst_three_stages.yaml": {"stages": [(4096, 16, 100), (8192, 8, 100), (16384, 4, 100)], "beta": 0.01},
    "ablations/4kx16_4kx16.yaml": {"stages": [(4096, 16, 200)], "model_name_or_path": "runs/cold_start"},
    "ablations/4kx16_8kx16.yaml": {"stages": [(4096, 16, 100), (8192, 16, 100)], "reward": "hfrrf"},
    "ablations/4kx16_6kx12_8kx8.yaml": {"stages": [(4096, 16, 100), (6144, 12, 100), (8192, 8, 100)]},
    "ablations/16kx16.yaml": {"stages": [(16384, 16, 200)], "model_name_or_path": "runs/cold_start"},
    "ablations/zero_ptst.yaml": {"stages": [(4096, 16, 100), (8192, 8, 100)], "reward": "soft"},
    "ablations/no_cot_ptst.yaml": {"stages": [(4096, 16, 100), (8192, 8, 100)], "reward": "hfrrf"},
    "long.yaml": {"stages": [(16384, 4, 300)], "reward": "hfrrf", "model_name_or_path": "runs/cold_start"},
    "zero.yaml": {"stages": [(4096, 16, 300)], "reward": "soft", "reward_weights": [0.5, 0.5]},
    "cold_start.yaml": {
        **{"global_batch_size": 32, "learning_rate": 5e-6, "num_train_epochs": 2, "warmup_steps": 0.05},
        **{"lr_scheduler_type": "cosine", "max_length": 16384, "max_pixels": 589824, "freeze_vision": True},
    },
}


@pytest.mark.parametrize("file", PAPER)
def test_science_is_the_papers(file):
    values = load(ROOT / "recipes" / file)
    values["stages"] = [tuple(stage.values()) for stage in values.get("stages", [])]
    assert {key: values[key] for key in PAPER[file]} == PAPER[file]
    assert ("system_prompt" in values) == ("zero" in file)


def test_system_prompt_of_zero():
    from vision_r1_recipes.toy import ZERO_SYSTEM_PROMPT

    for file in ("zero.yaml", "toy/zero.yaml"):
        assert load(ROOT / "recipes" / file)["system_prompt"] == ZERO_SYSTEM_PROMPT
    rows = load(ROOT / "recipes" / "toy" / "table_main.yaml")["rows"]
    assert [row["evaluate"]["system_prompt"] for row in rows if "evaluate" in row] == [ZERO_SYSTEM_PROMPT]
