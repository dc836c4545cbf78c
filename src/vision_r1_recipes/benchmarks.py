"""
The paper's benchmarks for a checkpoint behind a server: MathVista, MathVerse, MM-Math and DynaMath.

```shell
python -m vision_r1_recipes.benchmarks runs/ptst --serve "vllm serve {model} --port {port}"
python -m vision_r1_recipes.benchmarks runs/ptst --base_url http://localhost:8000/v1   # one that is running
```

The questions, prompts and judges are lmms-eval's tasks, run by lmms-eval in an environment of its own (`make lmms`);
MM-Math is ours (`lmms_tasks/`). `gpt-4o-mini` judges all but MM-Math `[repo]`, with the key in `OPENAI_API_KEY`.
Writes `benchmarks.md`, the table with judge, sampling, token limit and retries, and `benchmarks.json`.

lmms-eval does not ask the servers itself but a relay in this process, which adds what it has no option for:

- Every sampling field is sent: a server would take what is not from the model's own generation_config. The system
  prompt is the checkpoint's (Vision-R1 has none `[paper]`), not the task's.
- A completion without `</answer>` is drawn again up to 4 times, as the official harness does `[repo]`. The table has a
  row without that and one with it.
- `Final Answer:` is taken out of the answer tags, as there `[repo]`: DynaMath's parser reads its F as an option.
- Every response is kept when it arrives, the judge's too: the same command goes on after a stop and asks none twice.
- A judge that fails is tried again and in the end stops the run. lmms-eval would count the answer as wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from . import preflight, recipe
from .bridge.endpoint import NOT_INHERITED, Endpoint, EndpointConfig, served
from .bridge.run import sigterm_interrupts
from .bridge.steps import Generation, Rejected
from .evaluate import interval
from .progress import check_folder, progress, stops_kindly
from .recipe import RecipeError
from .rewards import TAGS, last_answer


LMMS_EVAL = "0.7.3"
TASKS = Path(__file__).parent / "lmms_tasks"
INSTALL = (
    f"`make lmms`, or in a new venv `pip install lmms-eval=={LMMS_EVAL} Levenshtein 'filelock<4'` and then, on its "
    "own, `pip install math-verify==0.9.0`"
)
HEARTBEAT = 20.0  # seconds; lmms-eval's client gives up a connection that is silent for 600


@dataclass(frozen=True)
class Benchmark:
    """
    Args:
        title (`str`): Of its column.
        file (`str`): The task's file, among lmms-eval's tasks or in `lmms_tasks/`.
        verdict (`Callable`): `(accuracy, group)` of a logged sample; samples of a group are no independent questions.
        judge (`bool`): Whether a model judges.
        workers (`int`): Threads that judge.
    """

    title: str
    file: str
    verdict: Callable[[Mapping[str, Any]], tuple[float, Any]]
    judge: bool = True
    workers: int = 16


BENCHMARKS = {
    "mathvista": Benchmark(
        "MathVista",
        "mathvista/mathvista_testmini_cot.yaml",
        lambda s: (s["llm_as_judge_eval"]["true_false"], s["doc_id"]),
    ),
    "mathverse": Benchmark(
        "MathVerse",
        "mathverse/mathverse_testmini.yaml",
        lambda s: (s["gpt_eval_score"], s["submission"]["problem_index"]),  # in five versions
    ),
    "mm_math": Benchmark("MM-Math", "mm_math.yaml", lambda s: (s["accuracy"], s["doc_id"]), judge=False, workers=4),
    "dynamath": Benchmark(
        "DynaMath",
        "dynamath/reasoning/dynamath.yaml",
        lambda s: (s["dynamath_average"]["acc"], s["dynamath_average"]["variant_id"]),  # ten variants of a question
        workers=1,  # its math-verify sets an alarm, which only the main thread may
    ),
}
LEFT_OUT = "mm_math_left_out"  # a file of the count
AVERAGED = ("mathvista", "mathverse", "mm_math")  # in the paper's Avg


# -------- the relay


class Relay:
    """
    An OpenAI-compatible server on this machine, for lmms-eval: `/model/...` asks the model, `/judge/...` the judge.

    Args:
        folder (`Path`): Of `responses.jsonl`, which keeps every response.
        model (`EndpointConfig`), judge (`EndpointConfig`, *optional*): The servers.
        settings (`dict`): What the responses depend on; a folder with others is refused.
        seed (`int`): Of the sampling; each request gets one of its own.
        system_prompt (`str`, *optional*): In place of the task's.
    """

    def __init__(self, folder, model, judge, settings, seed=0, system_prompt=None):
        self.path, self.settings = folder / "responses.jsonl", settings
        self.configs = {"model": model} | ({"judge": judge} if judge else {})
        self.seed, self.system_prompt = seed, system_prompt
        self.kept: dict[str, dict[str, Any]] = {}
        self.failure: BaseException | None = None
        self.lock = threading.Lock()
        self.begin(0)

    def begin(self, retries: int) -> None:
        """Before each task: how often a completion without `</answer>` is drawn again; counts begin at zero."""
        self.retries = retries
        self.asked: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()

    def __enter__(self) -> Relay:
        self.stack = contextlib.ExitStack()
        lines, self.add = self.stack.enter_context(
            progress(self.path, self.settings, "working on", ("key", "text", "tokens", "truncated"))
        )
        self.kept = {line["key"]: line for line in lines}
        self.loop = asyncio.new_event_loop()
        self.endpoints = {name: Endpoint(config, parse=Generation.whole) for name, config in self.configs.items()}
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.relay = self
        for serve in (self.loop.run_forever, self.server.serve_forever):
            threading.Thread(target=serve, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.stack.close()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/{name}/v1"

    def answer(self, name: str, body: dict[str, Any]) -> asyncio.Future:
        """From any thread: a future of the text that the caller gets for a request."""
        return asyncio.run_coroutine_threadsafe(getattr(self, f"_{name}")(body), self.loop)

    async def _model(self, body: dict[str, Any]) -> str:
        messages = [message for message in body["messages"] if message["role"] != "system"]
        if self.system_prompt:
            messages.insert(0, {"role": "system", "content": self.system_prompt})
        key = _key("model", messages)
        self.asked[key] += 1  # the same question twice is two draws
        for attempt in range(self.retries + 1):
            draw = f"{key}/{self.asked[key]}/{attempt}"
            seed = int(hashlib.sha256(f"{self.seed} {draw}".encode()).hexdigest()[:7], 16)
            try:
                made = await self._ask("model", draw, messages, seed=seed)
            except Rejected:  # too long a prompt, for one: no answer, which is wrong
                self.counts["refused"] += 1
                return ""
            if TAGS[3] in made["text"]:
                break
        self.counts["completions"] += 1
        self.counts["tokens"] += made["tokens"]
        self.counts["truncated"] += made["truncated"]
        self.counts["without an answer"] += TAGS[3] not in made["text"]
        self.counts["retried"] += attempt > 0
        return _without_prefix(made["text"])

    async def _judge(self, body: dict[str, Any]) -> str:
        messages = body["messages"]
        fields = {name: value for name, value in body.items() if name not in ("model", "messages", "stream")}
        self.counts["judged"] += 1
        key = _key("judge", self.configs["judge"].model, messages, fields)
        return (await self._ask("judge", key, messages, **fields))["text"]

    async def _ask(self, name: str, key: str, messages: list, **more) -> dict[str, Any]:
        if key not in self.kept:
            written, _ = await self.endpoints[name].generate(key[:40], messages, **more)
            made = {"text": written.text, "tokens": written.completion_tokens}
            made["truncated"] = written.finish_reason == "length"
            with self.lock:
                self.kept[key] = made
                self.add({"key": key, **made})
        return self.kept[key]


def _key(name: str, *what: Any) -> str:
    return f"{name}-{hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()}"


def _without_prefix(text: str) -> str:
    answer = last_answer(text)
    if answer is None:
        return text
    start, end = text.rfind(TAGS[2], 0, text.rfind(TAGS[3])), text.rfind(TAGS[3])
    return f"{text[:start]}{TAGS[2]}{answer}{text[end:]}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    relay: Relay


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def log_message(self, *args):
        pass

    def do_POST(self):
        relay = self.server.relay
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = relay.answer(self.path.split("/")[1], body)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        try:
            while not _done(answer):
                self.wfile.write(b" ")  # which JSON allows, and which shows that somebody is there
                self.wfile.flush()
            choice = {"index": 0, "finish_reason": "stop"}
            choice["message"] = {"role": "assistant", "content": answer.result()}
            made = {"id": "relay", "object": "chat.completion", "created": 0, "model": body["model"]}
            self.wfile.write(json.dumps({**made, "choices": [choice]}).encode())
        except BrokenPipeError:
            answer.cancel()
        except Exception as error:
            relay.failure = relay.failure or error


def _done(answer) -> bool:
    with contextlib.suppress(TimeoutError):
        answer.exception(HEARTBEAT)
    return answer.done()


# -------- lmms-eval


def find_lmms_eval(python: str) -> dict[str, str]:
    """
    `{tasks, lmms-eval, math-verify}`: the folder of lmms-eval's tasks and the versions in the environment of `python`.

    Raises:
        `RecipeError`: it is not there, or not the version that this module knows.
    """
    code = (
        "import importlib.util as u, importlib.metadata as m, json, os; assert u.find_spec('Levenshtein'); "
        "print(json.dumps({'tasks': os.path.join(os.path.dirname(u.find_spec('lmms_eval').origin), 'tasks'), "
        "**{p: m.version(p) for p in ('lmms-eval', 'math-verify')}}))"
    )
    try:
        found = json.loads(subprocess.run([python, "-c", code], capture_output=True, check=True, text=True).stdout)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise RecipeError(f"`lmms_python`: {python} has no lmms-eval. Install it: {INSTALL}.") from error
    if found["lmms-eval"] != LMMS_EVAL:
        raise RecipeError(f"lmms-eval {found['lmms-eval']} is not the version {LMMS_EVAL} known here: {INSTALL}.")
    return found


def write_task(name: str, folder: Path, tasks: str, data_dir: Path | None) -> dict[str, str]:
    """
    Write the task file `folder/NAME.yaml`, with the data in `data_dir/NAME` if there is a `data_dir`.

    Returns:
        Environment variables that the task needs.

    Raises:
        `RecipeError`: the data are missing.
    """
    ours = TASKS / BENCHMARKS[name].file
    task: dict[str, Any] = {"include": str(ours if ours.is_file() else Path(tasks, BENCHMARKS[name].file))}
    task["task"] = f"vision_r1_{name}"
    variables = {"MM_MATH_LEFT_OUT": str(folder / LEFT_OUT)} if ours.is_file() else {}
    if data_dir is not None:
        home = data_dir / name
        if not home.is_dir():
            raise RecipeError(f"`data_dir`: {home} is missing, a copy of {BENCHMARKS[name].title}'s dataset.")
        if ours.is_file():
            file = next(iter(sorted(home.rglob("*.jsonl"))), None)
            if file is None:
                raise RecipeError(f"`data_dir`: {home} has no .jsonl file with {BENCHMARKS[name].title}'s questions.")
            task["dataset_kwargs"] = {"data_files": {"test": str(file.resolve())}}
            images = next(iter(sorted(home.rglob("*.zip"))), home)
            variables["MM_MATH_IMAGES"] = str(images.resolve())
        else:
            task |= {"dataset_path": str(home.resolve()), "dataset_kwargs": {}}
            if not (home / "README.md").is_file():  # which names the configurations of a copy of the whole repository
                task["dataset_name"] = None
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return variables


def run_lmms_eval(
    name: str, relay: Relay, python: str, folder: Path, options: Sequence[str], variables: Mapping[str, str]
) -> list[dict[str, Any]]:
    """
    Run one task against the relay.

    Returns:
        The logged samples.

    Raises:
        `RecipeError`: lmms-eval has failed, or a server behind the relay has.
    """
    judge = {
        # Both of lmms-eval's ways to a judge, one by its own variables and one by those of the client.
        **{"API_TYPE": "openai", "MODEL_VERSION": "judge", "OPENAI_API_KEY": "relay"},
        **{"USE_LLM_JUDGE": "True", "JUDGE_MODEL_NAME": "judge", "JUDGE_API_KEY": "relay"},
        **{key: relay.url("judge") for key in ("OPENAI_API_URL", "JUDGE_BASE_URL")},
    }
    # This package on its path and nothing else of this environment.
    (folder / "path").mkdir(parents=True, exist_ok=True)
    link = folder / "path" / __package__
    link.unlink(missing_ok=True)
    link.symlink_to(Path(__file__).parent)
    local = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
    environment = {**os.environ, **judge, **variables, **local, "PYTHONPATH": str(folder / "path")}
    results, log = folder / "lmms_eval" / f"{name}-{relay.retries}", folder / f"{name}-{relay.retries}.log"
    shutil.rmtree(results, ignore_errors=True)  # what it can't write it only warns of
    concurrency = relay.configs["model"].concurrency
    command = [
        *(python, "-m", "lmms_eval", "--model", "openai", "--batch_size", "1", "--tasks", f"vision_r1_{name}"),
        # The name stays here: lmms-eval treats some names, and all commas, in ways of its own.
        *("--model_args", f"model=relay,base_url={relay.url('model')},api_key=relay,num_concurrent={concurrency}"),
        *("--include_path", str(folder / "tasks"), "--output_path", str(results), "--log_samples"),
        *("--process_docs_parallel", str(BENCHMARKS[name].workers), *options),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None and relay.failure is None:
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait()
    if relay.failure is not None:
        raise RecipeError(f"{BENCHMARKS[name].title}: {relay.failure}") from relay.failure
    last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    files = list(results.rglob("*_samples_*.jsonl"))
    if process.returncode or not files:
        raise RecipeError(f"lmms-eval has failed on {BENCHMARKS[name].title}. The end of {log}:\n{last}")
    return [json.loads(line) for line in files[0].open()]


# -------- the table


def score(verdicts: Sequence[tuple[float, Any]]) -> dict[str, Any]:
    """
    `{accuracy, accuracy_se, accuracy_interval, questions, groups}`, between 0 and 1, of `(accuracy, group)` pairs. The
    standard error is over groups: ten variants of a question are not ten questions.
    """
    n = len(verdicts)
    mean = sum(right for right, _ in verdicts) / n
    groups: dict[Any, float] = defaultdict(float)
    for right, group in verdicts:
        groups[group] += right - mean
    error = sum(difference**2 for difference in groups.values()) ** 0.5 / n
    half = interval(error, len(groups))
    return {"accuracy": mean, "accuracy_se": error, "accuracy_interval": half, "questions": n, "groups": len(groups)}


def average(scores: Mapping[str, Mapping[str, Any]]) -> tuple[float, float] | None:
    """The paper's Avg, of MathVista, MathVerse and MM-Math, and half its 95 % interval; `None` if one is missing."""
    if not scores.keys() >= set(AVERAGED):
        return None
    half = sum(scores[name]["accuracy_interval"] ** 2 for name in AVERAGED) ** 0.5
    return sum(scores[name]["accuracy"] for name in AVERAGED) / len(AVERAGED), half / len(AVERAGED)


def markdown(summary: Mapping[str, Any]) -> str:
    """The table, and below it all that a number depends on."""
    rows = summary["rows"]
    names = [name for name in BENCHMARKS if any(name in row["scores"] for row in rows)]
    names.sort(key=lambda name: name not in AVERAGED)  # the average stands behind what it is of

    def cell(accuracy: float, half: float) -> str:
        return f"{100 * accuracy:.1f} ± {100 * half:.1f}"

    lines = [["Model", *(BENCHMARKS[name].title for name in names), "Avg"]]
    for row in rows:
        title = summary["name"] + (f", up to {row['retries']} retries" if row["retries"] else "")
        scores = [row["scores"].get(name) for name in names]
        cells = [cell(s["accuracy"], s["accuracy_interval"]) if s else "" for s in scores]
        mean = average(row["scores"])
        lines.append([title, *cells, cell(*mean) if mean else ""])
    last = rows[-1]["scores"]
    lines.append(["questions", *(f"{last[name]['questions']:,}" for name in names), ""])
    table = ["| " + " | ".join(cells) + " |" for cells in lines]
    table.insert(1, "|---" * len(lines[0]) + "|")
    s, judge = summary["settings"], summary["judge"]
    judged = [BENCHMARKS[name].title for name in names if BENCHMARKS[name].judge]
    said = [
        "Accuracy in %, ± is half a 95 % interval; Avg is that of MathVista, MathVerse and MM-Math.",
        f"- Model: {s['model']}, server {summary['server']}; system prompt: {s['system_prompt'] or 'none'}.",
        f"- Sampling: temperature {s['temperature']}, top_p {s['top_p']}, no top-k and no repetition penalty, one "
        f"sample, at most {s['max_tokens']:,} tokens, seed {s['seed']}.",
        *([f"- Judge: {judge['model']} at {judge['base_url']} for {', '.join(judged)}."] if judged else []),
        *(["- Judge of MM-Math: rules, within 0.01."] if "mm_math" in names else []),
    ]
    for row in rows:
        for name, counts in row["scores"].items():
            shares = [
                f"{counts['mean_tokens']:.0f} tokens on average",
                *(f"{100 * counts[key]:.1f} % {key}" for key in ("truncated", "without an answer", "retried")),
                *([f"{counts['refused']} refused"] if counts["refused"] else []),
                *([f"{counts['left_out']} left out, whose gold can't be graded"] if counts.get("left_out") else []),
            ]
            retries = f"{row['retries']} retries" if row["retries"] else "no retries"
            said.append(f"- {BENCHMARKS[name].title}, {retries}: {', '.join(shares)}.")
    if s["limit"]:
        said.append(f"- Only the first {s['limit']} questions of each: not the benchmark.")
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    said.append(f"- {versions}; {summary['date']}.")
    return "\n".join([*table, "", *said]) + "\n"


def benchmarks(
    model: str,
    base_url: str | None = None,
    serve: str | None = None,
    tasks: Sequence[str] = tuple(BENCHMARKS),
    judge_model: str = "gpt-4o-mini",
    judge_url: str = "https://api.openai.com/v1",
    judge_key_env: str = "OPENAI_API_KEY",
    api_key_env: str | None = None,
    data_dir: str | None = None,
    output_dir: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.95,
    max_tokens: int = 16000,
    retries: int = 4,
    seed: int = 0,
    limit: int | None = None,
    system_prompt: str | None = None,
    concurrency: int = 64,
    server_timeout: float = 900.0,
    name: str | None = None,
    lmms_python: str = ".venv-lmms/bin/python",
) -> dict[str, Any]:
    """
    Make the paper's table for one checkpoint; go on with one that was begun.

    Args:
        model (`str`): The name that the server knows.
        base_url (`str`, *optional*): Of a running server's API, up to and with `/v1`.
        serve (`str`, *optional*):
            Or the command that starts one, which is ended afterwards: `vllm serve {model} --port {port}`.
        tasks (`list[str]`, *optional*): Of mathvista, mathverse, mm_math and dynamath; all.
        judge_model (`str`, *optional*, defaults to `"gpt-4o-mini"`): Judges all but MM-Math `[repo]`.
        judge_url (`str`, *optional*): Of the judge's API.
        judge_key_env (`str`, *optional*, defaults to `"OPENAI_API_KEY"`):
            Environment variable with the judge's key; empty if it needs none.
        api_key_env (`str`, *optional*): Environment variable with the model server's key.
        data_dir (`str`, *optional*):
            Folder with copies of the datasets, each in a folder with its task's name; else they are downloaded.
        output_dir (`str`, *optional*): Defaults to `MODEL/benchmarks`, for other names `runs/benchmarks/MODEL`.
        temperature (`float`), top_p (`float`), max_tokens (`int`): Sampling; 0.6, 0.95 and 16,000 `[repo]`.
        retries (`int`, *optional*, defaults to 4): More draws where `</answer>` is missing, for a second row `[repo]`.
        seed (`int`, *optional*, defaults to 0): Of the sampling.
        limit (`int`, *optional*): The first questions of each only, for a trial.
        system_prompt (`str`, *optional*): Defaults to the one in the recipe beside the checkpoint, `""` is none.
        concurrency (`int`, *optional*, defaults to 64): Requests at a time.
        server_timeout (`float`, *optional*, defaults to 900): Seconds that a server may take to start, or be silent.
        name (`str`, *optional*): Label in the table. Defaults to the model's folder.
        lmms_python (`str`, *optional*): Python of the environment with lmms-eval.

    Returns:
        The content of `benchmarks.json`.

    Raises:
        `RecipeError`: a server, a key, lmms-eval or data are missing, or a server has gone. Nothing is lost then.
    """
    if unknown := [task for task in tasks if task not in BENCHMARKS]:
        raise RecipeError(f"`tasks`: {', '.join(unknown)}: known are {', '.join(BENCHMARKS)}.")
    if retries < 0:
        raise RecipeError(f"`retries`: {retries}, needs at least 0.")
    if limit is not None and limit < 1:
        raise RecipeError(f"`limit`: {limit}, needs at least 1.")
    if base_url is not None and serve is not None:
        raise RecipeError(f"`base_url`: {base_url}, `serve`: {serve}: keep one of the two.")
    if base_url is None and serve is None:
        raise RecipeError("needed: `--base_url` of a running server, or `--serve` with the command that starts one.")
    found = find_lmms_eval(lmms_python)
    if system_prompt is None:
        system_prompt = recipe.saved_system_prompt(model)
    asked = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    sampling = {**asked, "extra_body": NOT_INHERITED}
    config = EndpointConfig(
        model,
        base_url or "http://localhost:{port}/v1",
        **sampling,
        api_key_env=api_key_env,
        concurrency=concurrency,
        server_timeout=server_timeout,
        serve=serve,
    )
    problems, judge = config.problems("model"), None
    if any(BENCHMARKS[task].judge for task in tasks):
        key = judge_key_env or None
        judge = EndpointConfig(judge_model, judge_url, 0.0, 1.0, 1024, api_key_env=key, timeout=120.0)
        problems += judge.problems("judge")
    if problems:
        raise RecipeError("\n".join(problems))
    if judge:
        try:
            judge.key()
        except RecipeError as error:
            needed = ", ".join(BENCHMARKS[task].title for task in tasks if BENCHMARKS[task].judge)
            raise RecipeError(f"the judge of {needed}: {error} `--tasks mm_math` needs none.") from None
    home = Path(model, "benchmarks") if Path(model).is_dir() else Path("runs", "benchmarks", Path(model).name)
    folder = Path(output_dir or home).resolve()
    check_folder(folder)
    settings = {"model": model, **asked, "seed": seed, "system_prompt": system_prompt or None}
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    variables = {
        task: write_task(task, folder / "tasks", found["tasks"], Path(data_dir) if data_dir else None)
        for task in tasks
    }
    options = ["--gen_kwargs", f"max_new_tokens={max_tokens},temperature={temperature},top_p={top_p}"]
    options += ["--limit", str(limit)] if limit else []
    rows: list[dict[str, Any]] = []
    with served(config, folder / "server.log") as config:
        check_served(config)
        with Relay(folder, config, judge, settings, seed, system_prompt) as relay:
            if judge:
                _probe(relay)
            for tries in dict.fromkeys((0, retries)):
                scores = {}
                for task in tasks:
                    if tries and not rows[0]["scores"][task]["without an answer"]:
                        scores[task] = rows[0]["scores"][task]  # nothing to draw again
                        continue
                    said = f"{BENCHMARKS[task].title}{f', up to {tries} retries' if tries else ''}"
                    print(f"{said} ...", flush=True)
                    relay.begin(tries)
                    samples = run_lmms_eval(task, relay, lmms_python, folder, options, variables[task])
                    verdicts = [BENCHMARKS[task].verdict(sample) for sample in samples]
                    scores[task] = {**score(verdicts), **_shares(relay.counts)}
                    if "MM_MATH_LEFT_OUT" in variables[task]:
                        scores[task]["left_out"] = int((folder / "tasks" / LEFT_OUT).read_text())
                    print(f"{said}: {100 * scores[task]['accuracy']:.1f} % of {len(samples)} questions", flush=True)
                rows.append({"retries": tries, "scores": scores})
    summary = {
        "name": name or Path(model).resolve().name,
        "server": serve or base_url,
        "settings": {**settings, "limit": limit},
        "judge": {"model": judge_model, "base_url": judge_url} if judge else None,
        "rows": rows,
        "versions": {key: found[key] for key in ("lmms-eval", "math-verify")},
        "date": time.strftime("%Y-%m-%d"),
        "environment": recipe.environment(),
    }
    (folder / "benchmarks.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "benchmarks.md").write_text(markdown(summary))
    print(markdown(summary), f"written to {folder}", sep="\n")
    return summary


def check_served(config: EndpointConfig) -> None:
    """Raise [`RecipeError`] when there is no server or it does not serve the model."""
    url = config.base_url.rstrip("/") + "/models"
    headers = {"Authorization": f"Bearer {config.key()}"} if config.key() else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
            served = [entry["id"] for entry in json.load(response)["data"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "Start one, for example `vllm serve MODEL --port 8000`."
        raise RecipeError(f"`base_url`: no server answers at {url}: {error}. {fix}") from error
    if config.model not in served:
        raise RecipeError(f"`model`: {config.base_url} has no {config.model}. It serves {', '.join(served)}.")


def _probe(relay: Relay) -> None:
    """One question to the judge, before hours of completions."""
    try:
        body = {"model": "judge", "messages": [{"role": "user", "content": "Is 2 = 2? Answer 1 or 0."}]}
        relay.answer("judge", {**body, "temperature": 0.0, "max_tokens": 8}).result()
    except (RecipeError, Rejected) as error:
        raise RecipeError(f"the judge: {error}") from error


def _shares(counts: Mapping[str, int]) -> dict[str, Any]:
    n = max(counts["completions"], 1)
    shares = {key: counts[key] / n for key in ("truncated", "without an answer", "retried")}
    return {"mean_tokens": counts["tokens"] / n, **shares, "refused": counts["refused"], "judged": counts["judged"]}


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vision_r1_recipes.benchmarks",
        allow_abbrev=False,  # slurm/benchmarks.slurm looks for its options
        description=benchmarks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,  # the defaults are those of `benchmarks`
    )
    parser.add_argument("model")
    for option in ("base_url", "serve"):
        parser.add_argument(f"--{option}")
    parser.add_argument("--tasks", nargs="+", choices=BENCHMARKS)
    for option in ("judge_model", "judge_url", "judge_key_env", "api_key_env", "data_dir", "output_dir"):
        parser.add_argument(f"--{option}")
    for option in ("system_prompt", "name", "lmms_python"):
        parser.add_argument(f"--{option}")
    for option in ("max_tokens", "retries", "seed", "limit", "concurrency"):
        parser.add_argument(f"--{option}", type=int)
    for option in ("temperature", "top_p", "server_timeout"):
        parser.add_argument(f"--{option}", type=float)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    benchmarks(**vars(argument_parser().parse_args(argv)))


if __name__ == "__main__":
    with preflight.kind_errors(), sigterm_interrupts(), stops_kindly():
        main()
