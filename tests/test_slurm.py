"""`slurm/` on a real SLURM: two nodes on one host, brought up by the tests."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from runs import ROOT, trace
from vision_r1_recipes import recipe, sft, toy


pytestmark = pytest.mark.slurm

STOPPED = "error: the run was stopped before its end: sbatch it again to go on\n"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A copy of the repository to submit from, with `world/`: one family of questions, and a model that scores."""
    folder = tmp_path_factory.mktemp("home")
    for part in ("slurm", "recipes", "src", "data"):
        shutil.copytree(ROOT / part, folder / part)
    families, toy.FAMILIES = toy.FAMILIES, (toy.rectangle,)
    toy.build(folder / "world", seed=3, num_base=8, num_cold=1200, num_train=64, num_test=8)
    toy.FAMILIES = families
    cold = [{"path": str(folder / "world/cold"), "data_files": "vision_r1_llava_cot_full.json"}]
    sft.main(
        [
            *(str(ROOT / "recipes/toy/cold_start.yaml"), "--model_name_or_path", str(folder / "world/model")),
            *("--datasets", json.dumps(cold), "--max_steps", "100", "--learning_rate", "3e-3"),
            *("--output_dir", str(folder / "world/cold_start")),
        ]
    )
    (folder / "grpo.yaml").write_text(
        recipe.dump(
            {
                "base": "recipes/toy/ptst.yaml",
                "model_name_or_path": "world/cold_start",
                "datasets": [{"path": "world/rl"}],
                **{"eval_datasets": None, "eval_every_rollouts": None},
                "stages": [
                    {"max_completion_length": 96, "num_generations": 8, "steps": 12},
                    {"max_completion_length": 192, "num_generations": 4, "steps": 12},
                ],
                **{"prompts_per_update": 4, "per_device_train_batch_size": 16},
                **{"save_every_rollouts": 1, "save_total_limit": 2},
            }
        )
    )
    return folder


def test_the_scripts_are_clean():
    scripts = [*ROOT.glob("slurm/*.*"), *ROOT.glob("tests/slurm/*.sh"), ROOT / ".ci/run"]
    scripts = [str(path) for path in scripts if path.suffix != ".md"]
    assert len(scripts) == 9
    if shutil.which("shellcheck") is None:
        (pytest.fail if "SLURM_REQUIRED" in os.environ else pytest.skip)("shellcheck is not installed")
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_writes_what_would_be_submitted(home):
    run = ["bash", "slurm/vision_r1.sh", "--dry-run", "--nodes=8", "--comment=a b"]
    environment = {**os.environ, "VENV": sys.prefix, "SBATCH_GPUS_PER_NODE": "8"}
    said = subprocess.run(run, cwd=home, env=environment, capture_output=True, text=True, check=True).stdout
    cold_start, *others = said.splitlines()
    assert cold_start.startswith("cold_start: sbatch ") and "--nodes=4" in cold_start  # 32 rows on 32 GPUs, not on 64
    assert ["--nodes=8 " in others[0], "--nodes=1 " in others[1]] == [True, True]
    folder = home / "runs/slurm/vision_r1"
    assert recipe.load(folder / "ptst.yaml") == recipe.load(ROOT / "recipes/ptst.yaml")
    script = (folder / "submit.sh").read_text()
    assert '--dependency=afterok:"$ptst",singleton' in script and r"--comment=a\ b" in script
    (home / "bin").mkdir()
    (home / "bin/sbatch").write_text('#!/bin/sh\necho "$@" >> submitted\nwc -l < submitted\n')
    (home / "bin/sbatch").chmod(0o755)
    path = {**environment, "PATH": f"{home}/bin:{os.environ['PATH']}"}
    said = subprocess.run(["bash", folder / "submit.sh"], env=path, capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["cold_start: job 1", "ptst: job 2", "evaluate: job 3"]
    submitted = (home / "submitted").read_text().splitlines()
    assert "--dependency=afterok:1,singleton slurm/train.slurm recipes/ptst.yaml" in submitted[1]
    assert "--dependency=afterok:2,singleton slurm/evaluate.slurm runs/ptst" in submitted[2]


class Job:
    """A batch job submitted from `home`."""

    def __init__(self, home: Path, *command: str, **environment: str):
        self.home = home
        submitted = ["sbatch", "--parsable", *map(str, command)]
        done = subprocess.run(
            submitted, cwd=home, env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        self.number = done.stdout.strip()

    @property
    def log(self) -> str:
        file = self.home / f"slurm-{self.number}.log"
        return file.read_text(errors="replace") if file.is_file() else ""

    def about(self, field: str) -> str:
        said = subprocess.run(
            ["scontrol", "show", "job", "-o", self.number], capture_output=True, text=True, check=True
        )
        return dict(part.split("=", 1) for part in said.stdout.split() if "=" in part)[field]

    def wait(self, ready, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, f"{self.about('JobState')}\n{self.log[-3000:]}"
            time.sleep(0.2)

    def started(self, times: int = 1):
        return self.log.count(f"job {self.number}, start ") >= times

    def end(self) -> str:
        """Its state, when it has come to an end."""
        ends = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        self.wait(lambda: self.about("JobState") in ends, 1200)
        return self.about("JobState")


def steps_saved(folder: Path) -> int:
    return max((int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


@pytest.fixture(scope="module")
def whole(slurm, home):
    """The run without an interruption."""
    job = Job(home, "slurm/train.slurm", "grpo.yaml", "--output_dir", "runs/whole")
    assert job.end() == "COMPLETED", job.log
    return job


def test_two_ranks_and_a_finished_run_is_not_trained_again(whole, home):
    environment = json.loads((home / "runs/whole/environment.json").read_text())
    assert environment["num_processes"] == 2 and environment["git_commit"]
    assert environment["slurm"]["SLURM_JOB_ID"] == whole.number
    rewards = [row["reward"] for row in trace(home / "runs/whole")[:-1]]
    assert len(rewards) == 24 and len(set(rewards)) > 4
    for rank in "01":
        assert list((home / f"runs/slurm/{whole.number}/0").glob(f"*/attempt_0/{rank}/stderr.log"))
    before = (home / "runs/whole/model.safetensors").stat().st_mtime_ns
    again = Job(home, "slurm/train.slurm", "grpo.yaml", "--output_dir", "runs/whole")
    assert again.end() == "COMPLETED"
    assert again.log.endswith("there is: finished\n")
    assert (home / "runs/whole/model.safetensors").stat().st_mtime_ns == before


def same_as(home: Path, folder: Path) -> None:
    assert trace(folder)[:-1] == trace(home / "runs/whole")[:-1]
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, home / "runs/whole"))
    assert all(tensor.equal(theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("way, times", [("requeue", 4), ("signal", 5)])
def test_preempted_at_random_moments(whole, home, way, times):
    """`scontrol requeue` leaves five seconds, `scancel --signal` as long as the run likes."""
    rng, folder = random.Random(way), home / f"runs/{way}"
    job = Job(home, "slurm/train.slurm", "grpo.yaml", "--output_dir", folder)
    for start in range(1, times + 1):
        job.wait(lambda start=start: job.started(start))
        target = steps_saved(folder) + rng.choice([0, 2, 4])
        job.wait(lambda target=target: steps_saved(folder) >= target)
        time.sleep(rng.uniform(0, 8))
        command = {
            "requeue": ["scontrol", "requeue", job.number],
            "signal": ["scancel", "--batch", "--signal=USR1", job.number],
        }
        for _ in range(10 if way == "signal" else 1):  # at whatever the script is doing
            subprocess.run(command[way], check=True)
    assert job.end() == "COMPLETED", job.log
    assert job.about("Restarts") == str(times), job.log
    same_as(home, folder)


def test_preempted_by_the_time_limit(whole, home):
    """The limit is set when the run is on its way: it is soon, on a fast machine and on a slow one."""
    folder = home / "runs/limit"
    job = Job(home, "--time=60", "--signal=B:USR1@90", "slurm/train.slurm", "grpo.yaml", "--output_dir", folder)
    job.wait(lambda: steps_saved(folder) >= 2)
    hours, minutes, _ = map(int, job.about("RunTime").split(":"))
    limit = f"TimeLimit={60 * hours + minutes + 2}"
    subprocess.run(["scontrol", "update", f"JobId={job.number}", limit], check=True)
    job.wait(lambda: job.started(2))
    subprocess.run(["scontrol", "update", f"JobId={job.number}", "TimeLimit=60"], check=True)
    assert job.end() == "COMPLETED", job.log
    assert int(job.about("Restarts")) >= 1, job.log
    assert "seconds before the end" in job.log
    same_as(home, folder)


def test_preempted_by_a_job_of_a_higher_priority(whole, home):
    """With a grace time the steps get SIGTERM at once and the script hears nothing before its end."""
    folder = home / "runs/priority"
    job = Job(home, "--nodelist=n1", "slurm/train.slurm", "grpo.yaml", "--output_dir", folder)
    job.wait(lambda: steps_saved(folder) >= 2)
    urgent = Job(home, "--partition=urgent", "--nodelist=n1", "--exclusive", "--wrap=sleep 1")
    assert urgent.end() == "COMPLETED"
    assert job.end() == "COMPLETED", job.log
    assert job.about("Restarts") == "1" and "requeued: the run goes on when the job starts again" in job.log
    same_as(home, folder)


def test_three_starts_without_progress_are_enough(slurm, home):
    job = Job(home, "--hold", "slurm/train.slurm", "grpo.yaml", "--output_dir", "runs/stuck")
    starts = home / f"runs/slurm/{job.number}/starts"
    starts.parent.mkdir(parents=True)
    starts.write_text("nothing\n" * 3)
    subprocess.run(["scontrol", "release", job.number], check=True)
    assert job.end() == "FAILED"
    assert "error: three starts in a row have brought no progress, there is still: nothing." in job.log
    assert not (home / "runs/stuck").exists()


def test_a_typo_ends_the_job_before_anything_is_started(slurm, home):
    job = Job(home, "slurm/train.slurm", "grpo.yaml", "--num_generation", "8", "--output_dir", "runs/typo")
    assert job.end() == "FAILED"
    assert "unknown key `num_generation`: 8; did you mean `num_generations`?" in job.log.splitlines()[-1]
    assert not (home / "runs/typo").exists()
    job = Job(home, "slurm/train.slurm", "grpo.yaml", "--datasets", "[{path: world/nope}]")
    assert job.end() == "FAILED"
    assert "`datasets[0]`: world/nope can't be found here or on the Hub" in job.log.splitlines()[-1]
    job = Job(home, "slurm/train.slurm", "grpo.yaml", "--datasets", "[{path: world/rl, split: trian}]")
    assert job.end() == "FAILED"
    assert job.log.endswith("- `datasets[0]`: world/rl has no split trian, only train, test.\n")
    job = Job(home, "slurm/train.slurm", "no.yaml")
    assert job.end() == "FAILED"
    assert "error: no recipe at" in job.log.splitlines()[-1]
    job = Job(home, "slurm/train.slurm")
    assert job.end() == "FAILED"
    assert job.log == "error: name a recipe: sbatch slurm/train.slurm RECIPE [--key value ...]\n"


def test_what_only_the_ranks_find_stands_in_the_last_line(slurm, home):
    job = Job(home, "slurm/train.slurm", "grpo.yaml", "--max_prompt_length", "8", "--output_dir", "runs/empty")
    assert job.end() == "FAILED"
    said = "error: the training has ended with code 1, see above: 100.0% of the rows had to be dropped"
    assert job.log.splitlines()[-1].startswith(said)


def test_a_run_that_is_told_to_stay_away_does_not_come_back_and_nobody_else_takes_its_folder(slurm, home):
    folder, said = home / "runs/stopped", STOPPED
    train = ("slurm/train.slurm", "grpo.yaml", "--output_dir", folder)
    jobs = [Job(home, "--exclusive=user", f"--nodelist={node}", *train) for node in ("n1", "n2")]
    jobs[0].wait(lambda: "FAILED" in [job.about("JobState") for job in jobs])
    jobs.sort(key=lambda job: job.about("JobState") == "FAILED")
    job, other = jobs
    assert f"error: job {job.number} has {folder}" in other.log
    job.wait(lambda: steps_saved(folder) >= 2)
    (folder / "stop").touch()
    assert job.end() == "FAILED"  # what waits for its model must not start
    assert job.log.endswith(said)
    (folder / "stop").touch()
    job = Job(home, *train)
    assert job.end() == "FAILED" and job.log.endswith(said)
    assert not (folder / "stop").exists() and "going on from" not in job.log
    for ask in ["scancel", "--batch", "--signal=USR1"], ["scontrol", "requeue"]:  # it was told to come back
        job, done = Job(home, *train, "--stop_after_rollouts", "23"), steps_saved(folder)
        job.wait(lambda done=done: steps_saved(folder) > done)
        subprocess.run([*ask, job.number], check=True)
        (folder / "stop").touch()
        assert job.end() == "FAILED" and job.log.endswith(said), job.log
        assert job.about("Restarts") == ("1" if "requeue" in ask else "0")
    assert not (folder / "model.safetensors").exists()
    job = Job(home, *train, "--stop_after_rollouts", "1")
    assert job.end() == "COMPLETED" and job.log.endswith("there is: part finished\n")


def test_a_rank_that_dies_is_named_with_its_last_lines(slurm, home):
    folder = home / "runs/dying"
    job = Job(home, "slurm/train.slurm", "grpo.yaml", "--output_dir", folder)
    job.wait(lambda: steps_saved(folder) >= 2)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        command = (process / "cmdline").read_bytes()
        if {b"RANK=1", f"SLURM_JOB_ID={job.number}".encode()} <= set(environment) and b"grpo.py" in command:
            os.kill(int(process.name), signal.SIGKILL)
    assert job.end() == "FAILED"
    assert "rank      : 1" in job.log and "exitcode  : -9" in job.log
    assert "attempt_0/1/stderr.log:" in job.log
    assert "error: the training has ended with code 1, see above" in job.log


@pytest.mark.parametrize("server", ["dies", "is silent", "is silent, and the run is stopped"])
def test_without_its_rollout_server_the_job_ends(slurm, home, tmp_path, server):
    """vLLM isn't installed: TRL's own launcher says so and ends. Or something stands for it that never answers."""
    (tmp_path / "packages/vllm").mkdir(parents=True)
    (tmp_path / "packages/vllm/__init__.py").touch()
    (tmp_path / "bin").mkdir()
    activate = f'source "{sys.prefix}/bin/activate"\n'
    if server != "dies":
        (tmp_path / "bin/trl").write_text("#!/bin/sh\necho loading forever\nexec sleep 600\n")
        (tmp_path / "bin/trl").chmod(0o755)
        activate += f'export PATH="{tmp_path}/bin:$PATH"\n'
    (tmp_path / "bin/activate").write_text(activate)
    use_server = ["--use_vllm", "true", "--vllm_mode", "server", "--vllm_max_model_length", "640"]
    job = Job(
        home,
        *("slurm/train.slurm", "grpo.yaml", "--output_dir", f"runs/{tmp_path.name}", *use_server),
        VENV=str(tmp_path),
        PYTHONPATH=str(tmp_path / "packages"),
        SERVER_SECONDS="600" if server.endswith("stopped") else "10",
    )
    if server.endswith("stopped"):
        job.wait(lambda: "rollout server on" in job.log)
        (home / "runs" / tmp_path.name / "stop").touch()
        assert job.end() == "FAILED" and job.about("ExitCode") == "3:0" and job.log.endswith(STOPPED), job.log
        return
    assert job.end() == "FAILED"
    said = "has ended" if server == "dies" else "has not answered for 10 s"
    assert job.log.endswith(f"error: the rollout server {said}, see above\n"), job.log
    assert ("vllm" if server == "dies" else "loading forever") in job.log.partition("server.log:")[2]


def test_two_nodes(slurm, home):
    """One rank a node, ZeRO-3; a preemption in the middle."""
    folder = home / "runs/nodes"
    zero3 = ("--accelerate_config", "recipes/accelerate/zero3.yaml", "--output_dir", folder)
    job = Job(home, "--nodes=2", "slurm/train.slurm", "grpo.yaml", *zero3, PROCESSES_PER_NODE="1")
    job.wait(lambda: steps_saved(folder) >= 4)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.number], check=True)
    assert job.end() == "COMPLETED", job.log
    assert job.about("Restarts") == "1" and "going on from" in job.log
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["num_processes"] == 2 and environment["distributed_type"] == "DEEPSPEED ZeRO-3"
    assert len(trace(folder)) == 25


def test_the_bridge_is_preempted_and_comes_back(slurm, home):
    made = recipe.load(home / "recipes/toy/bridge.yaml")
    serve = {"serve": "python -m vision_r1_recipes.toy_server --port {port} --latency 0.5", "concurrency": 2}
    made |= {"mllm": {**made["mllm"], **serve, "model": "toy-mllm"}, "reasoner": {**made["reasoner"], **serve}}
    made |= {"datasets": [{"path": "world/rl"}], "output_dir": "runs/bridge"}
    (home / "bridge.yaml").write_text(recipe.dump(made))
    job = Job(home, "slurm/bridge.slurm", "bridge.yaml")
    job.wait(lambda: "row/s" in job.log)
    time.sleep(5)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job.number], check=True)
    assert job.end() == "COMPLETED", job.log
    assert job.about("Restarts") == "1"
    assert list((home / "runs/bridge/dataset/data").glob("*.parquet"))


def test_a_checkpoint_is_evaluated(slurm, home):
    options = ("--max_new_tokens", "16", "--output_dir", "runs/evaluated")
    job = Job(home, "slurm/evaluate.slurm", "world/cold_start", "--data", "world/rl", *options)
    assert job.end() == "COMPLETED", job.log
    assert json.loads((home / "runs/evaluated/summary.json").read_text())["questions"] == 8


@pytest.mark.parametrize("place", ["world/model/eval", "runs/elsewhere"])
def test_wherever_an_evaluation_writes_it_makes_progress(slurm, home, place):
    """Three starts have ended with no completion; since then there is one."""
    where = ["world/cold_start", "world/model"] if "eval" in place else ["world/model", f"--output_dir={place}"]
    job = Job(home, "--hold", "slurm/evaluate.slurm", *where, *("--data", "world/rl", "--max_new_tokens", "16"))
    starts, done = home / f"runs/slurm/{job.number}/starts", home / place / "x/progress.jsonl"
    starts.parent.mkdir(parents=True)
    starts.write_text(" bytes of completions\n" * 3)
    done.parent.mkdir(parents=True)
    done.write_text("{}\n")
    subprocess.run(["scontrol", "release", job.number], check=True)
    assert job.end() == "COMPLETED", job.log


@pytest.mark.full
def test_the_whole_of_vision_r1(slurm, home):
    """The toy's own recipes at full length, as dependent jobs; what is complete is left out the second time."""
    run = ["bash", "slurm/vision_r1.sh", "--toy"]
    said = subprocess.run(run, cwd=home, capture_output=True, text=True, check=True).stdout
    jobs = dict(line.split(": job ") for line in said.splitlines() if ": job " in line)
    assert list(jobs) == ["pretrain", "cold_start", "ptst", "evaluate"]
    deadline = time.monotonic() + 3600
    while subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout:
        assert time.monotonic() < deadline
        time.sleep(2)
    summary = json.loads((home / "runs/toy/ptst/eval/vision_r1/summary.json").read_text())
    assert summary["questions"] == 480 and summary["format_rate"] > 0.9
    said = subprocess.run(run, cwd=home, capture_output=True, text=True, check=True).stdout
    assert [line.split(", ")[0] for line in said.splitlines()] == [f"{name}: finished" for name in jobs]
