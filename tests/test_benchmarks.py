"""
The paper's benchmarks on small files in each one's layout, against servers on this machine. What needs lmms-eval is
skipped where it is not: `make test-lmms`, or name the Python of an environment that has it in `LMMS_PYTHON`.
"""

import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Pictures

from runs import ROOT
from vision_r1_recipes import benchmarks as bm
from vision_r1_recipes.bridge.endpoint import EndpointConfig
from vision_r1_recipes.lmms_tasks import utils as mm_math
from vision_r1_recipes.recipe import RecipeError


PYTHON = os.environ.get("LMMS_PYTHON", str(ROOT / ".venv-lmms/bin/python"))
MODEL, JUDGE, KEY = "runs/ptst", "small-judge", "sk-of-the-judge"


@pytest.fixture(scope="module")
def lmms_python():
    try:
        bm.find_lmms_eval(PYTHON)
    except RecipeError as error:
        (pytest.fail if "LMMS_REQUIRED" in os.environ else pytest.skip)(f"{error} Then: make test-lmms")
    return PYTHON


# -------- a server that plays the model and the judge

# Question -> what the model says; several are said one after the other.
SAYS = {
    "How many dots are red?": "<think> I count 3. </think><answer> Final Answer:3 </answer>",
    "Which bar is longest?": "<think> It is B. </think> <answer> Final Answer:B </answer>",
    "What is the mean?": "<think> 7.25, or 1.5? </think><answer> Final Answer:1.5 </answer>",  # 7.2
    "Find the angle": "<think> So it is A. </think><answer> Final Answer:A </answer>",  # the gold of some versions
    "Find the length of AB": [
        "<think> wait, wait, wait",  # until the cap
        "<think> 5 + 0.005 </think><answer> Final Answer:5.005 </answer>",
    ],
    "Find the area": r"<think> hm </think><answer> Final Answer:2\sqrt{3}\text{ cm}^2 </answer>",
    "Find x": "<think> two roots </think><answer> Final Answer:1 </answer>",  # and 4
    "What is the slope": "<think> rise and run </think><answer> Final Answer:A </answer>",  # of F: no F here
    "Is f even": "<think> f(x) is f(-x) </think><answer> Final Answer:it is even </answer>",  # of even: the judge's
}


def judged(prompt: str) -> str:
    """A judge that goes by the tags and by whole words."""
    said = re.findall(r"<answer>(.*?)</answer>", prompt)
    if prompt.rstrip().endswith("Extracted answer:"):
        return said[-1] if said else prompt.rsplit("\n\n", 2)[1]
    blocks = re.findall(r"```\n(.*?)\n```", prompt, re.S)
    if len(blocks) < 2:
        return "1"
    gold, answer = blocks[-2:]
    return str(int(gold in re.sub("<.*?>", " ", answer).split()))


class Servers(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.lock = [], threading.Lock()
        self.draws: Counter[str] = Counter()
        self.judge_status = 200

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Servers

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply(200, {"data": [{"id": MODEL}, {"id": JUDGE}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append((body, self.headers.get("Authorization")))
        content, reason = body["messages"][-1]["content"], "stop"
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        if body["model"] == JUDGE:
            if self.server.judge_status != 200:
                return self.reply(self.server.judge_status, {"error": {"message": f"no credit left for {KEY}"}})
            says = judged(text)
        else:
            question = next(question for question in SAYS if question in text)
            says = SAYS[question]
            if isinstance(says, list):
                with self.server.lock:
                    says = says[min(self.server.draws[question], len(says) - 1)]
                    self.server.draws[question] += 1
            reason = "stop" if "</answer>" in says else "length"
        message = {"role": "assistant", "content": says}
        usage = {"prompt_tokens": 1, "completion_tokens": len(says.split()), "total_tokens": 1 + len(says.split())}
        made = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
        self.reply(200, {**made, "choices": [{"index": 0, "message": message, "finish_reason": reason}]})

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def servers():
    with Servers() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


# -------- small copies of the datasets


def picture(shade):
    return Pictures.new("RGB", (56, 56), (shade, 40, 90))


TEXT = Value("string")


def write(rows, path, **features):
    columns = {name: features.get(name, TEXT) for name in rows[0]}
    path.parent.mkdir(parents=True)
    Dataset.from_list(rows, Features(columns)).to_parquet(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`mathvista`, `mathverse`, `mm_math` and `dynamath`, in the columns and files of the published ones."""
    folder = tmp_path_factory.mktemp("benchmarks")
    about = {"category": "math", "context": "figure", "grade": "high school", "img_height": 56, "img_width": 56}
    about |= {
        "language": "english",
        "skills": ["geometry"],
        "source": "GeoQA",
        "split": "testmini",
        "task": "geometry",
    }
    kinds = dict.fromkeys(about, TEXT) | dict.fromkeys(("img_height", "img_width"), Value("int64"))

    def vista(pid, question, choices, answer, question_type, answer_type, precision):
        return {
            **{"pid": pid, "question": question, "image": f"images/{pid}.jpg", "decoded_image": picture(int(pid))},
            **{"choices": choices, "unit": None, "precision": precision, "answer": answer},
            **{"question_type": question_type, "answer_type": answer_type, "metadata": about},
            "query": f"Hint: Please answer.\nQuestion: {question}",
        }

    write(
        [
            vista("1", "How many dots are red?", None, "3", "free_form", "integer", None),
            vista("2", "Which bar is longest?", ["red", "blue", "green"], "blue", "multi_choice", "text", None),
            vista("3", "What is the mean?", None, "7.2", "free_form", "float", 1.0),
        ],
        folder / "mathvista/data/testmini-00000-of-00001-725687bf7a18d64b.parquet",
        decoded_image=Image(),
        choices=List(TEXT),
        precision=Value("float64"),
        metadata={**kinds, "skills": List(TEXT)},
    )

    versions = ["Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only"]
    write(
        [
            {
                **{"sample_index": str(5 * k + i), "problem_index": str(k), "problem_version": version},
                **{"question": "Find the angle", "image": picture(10 * k + i), "answer": "A" if k else "B"},
                "question_type": "multi-choice",
                "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
                **{"query_wo": f"Please directly answer. Question {k}: Find the angle", "query_cot": "Please reason."},
                "question_for_eval": "Find the angle",
            }
            for k in range(2)
            for i, version in enumerate(versions)
        ],
        folder / "mathverse/testmini.parquet",
        image=Image(),
        metadata=dict.fromkeys(("split", "source", "subject", "subfield"), TEXT),
    )
    splits = "  data_files:\n  - split: testmini\n    path: testmini.parquet\n"
    others = (
        "- config_name: testmini_text_only\n  data_files:\n  - split: testmini_text_only\n    path: none.parquet\n"
    )
    (folder / "mathverse/README.md").write_text(f"---\nconfigs:\n- config_name: testmini\n{splits}{others}---\n")

    home = folder / "mm_math/MM_Math"
    home.mkdir(parents=True)
    solutions = {
        "Find the length of AB": r"\textbf{Solution:} So $AB=\boxed{5}$.",
        "Find the area": r"\textbf{Solution:} Hence $S=\boxed{2\sqrt{3}}$.",
        "Find x": r"\textbf{Solution:} $x=\boxed{1}$ or $x=\boxed{4}$.",
        "Prove it": r"\textbf{Solution:} It follows.",  # nothing to grade
    }
    with zipfile.ZipFile(home / "MM_Math.zip", "w") as archive, (home / "MM_Math.jsonl").open("w") as lines:
        for k, (question, solution) in enumerate(solutions.items()):
            file = io.BytesIO()
            picture(100 + k).save(file, "png")
            archive.writestr(f"MM_Math/{k}.png", file.getvalue())
            knowledge = {"level_1": "Figures", "level_2": "Triangles"}
            row = {"question": f"As shown in the figure, {question}.", "file_name": f"{k}.png", "solution": solution}
            lines.write(json.dumps({**row, "year": "eight", "difficult": "medium", "knowledge": knowledge}) + "\n")

    write(
        [
            {
                **{"id": seed, "question": f"{question} {variant}?", "image": f"images/{seed}.png"},
                **{"decoded_image": picture(200 + variant), "ground_truth": truth, "answer_type": kind},
                **{"subject": "algebra", "knowledge_level": "high school", "question_id": f"{seed}-{variant}"},
            }
            for seed, question, truth, kind in (
                ("1", "What is the slope", "F", "multiple choice"),
                ("2", "Is f even", "even", "text"),
            )
            for variant in range(2)
        ],
        folder / "dynamath/data/test-00000-of-00001.parquet",
        decoded_image=Image(),
    )
    return folder


def run(servers, output_dir, **options):
    judge = {"judge_model": JUDGE, "judge_url": servers.url, "judge_key_env": "KEY_OF_THE_JUDGE"}
    return bm.benchmarks(MODEL, servers.url, output_dir=str(output_dir), **{**judge, **options})


# -------- all of it


@pytest.mark.slow
def test_the_paper_s_table(servers, data, lmms_python, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KEY_OF_THE_JUDGE", KEY)
    options = {"data_dir": str(data), "lmms_python": lmms_python, "name": "Vision-R1"}
    summary = run(servers, tmp_path / "out", **options)
    first, retried = summary["rows"]
    assert {name: (s["questions"], s["groups"]) for name, s in first["scores"].items()} == {
        "mathvista": (3, 3),
        "mathverse": (10, 2),
        "mm_math": (3, 3),
        "dynamath": (4, 2),
    }
    right = {name: round(s["accuracy"] * s["questions"]) for name, s in first["scores"].items()}
    # The overrun has no answer. `Final Answer:A` is not F, and only the judge knows that "it is even" is right.
    assert right == {"mathvista": 2, "mathverse": 5, "mm_math": 1, "dynamath": 2}
    assert retried["scores"]["mm_math"]["accuracy"] == pytest.approx(2 / 3)
    assert retried["scores"]["mm_math"]["retried"] == pytest.approx(1 / 3)
    assert first["scores"]["mm_math"]["truncated"] == first["scores"]["mm_math"]["without an answer"] > 0.3
    assert first["scores"]["mm_math"]["left_out"] == 1 and "left_out" not in first["scores"]["dynamath"]
    assert retried["scores"]["mathverse"] == first["scores"]["mathverse"]

    table = (tmp_path / "out/benchmarks.md").read_text()
    assert table in capsys.readouterr().out
    assert re.search(r"\| Vision-R1 \| 66.7 ± \S+ \| 50.0 ± \S+ \| 33.3 ± \S+ \| 50.0 ± \S+ \| 50.0 ± \S+ \|", table)
    assert "| Vision-R1, up to 4 retries |" in table and "| questions | 3 | 10 | 3 |" in table
    assert f"Judge: {JUDGE} at {servers.url} for MathVista, MathVerse, DynaMath." in table
    assert "temperature 0.6, top_p 0.95, no top-k and no repetition penalty" in table and "16,000 tokens" in table
    assert "1 left out, whose gold can't be graded" in table

    # What the servers were asked.
    completions = [body for body, _ in servers.asked if body["model"] == MODEL]
    assert len(completions) == 3 + 10 + 3 + 4 + 1  # and one retry
    for body in completions:
        sampling = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 16000, "repetition_penalty": 1.0, "top_k": -1}
        assert sampling.items() <= body.items()
        assert [message["role"] for message in body["messages"]] == ["user"]  # DynaMath's task has a system prompt
        (url,) = (part["image_url"]["url"] for part in body["messages"][0]["content"] if part["type"] == "image_url")
        assert Pictures.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size == (56, 56)
    seeds = [body["seed"] for body in completions]
    assert len(set(seeds)) == len(seeds)
    assert {key for body, key in servers.asked if body["model"] == JUDGE} == {f"Bearer {KEY}"}
    assert {key for body, key in servers.asked if body["model"] == MODEL} == {"Bearer none"}
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or path.is_symlink() or KEY not in path.read_text(errors="replace"), path

    # Asked for again, nobody is; other settings are refused.
    before = len(servers.asked)
    again = run(servers, tmp_path / "out", **options, tasks=["mm_math"])["rows"]
    assert [row["scores"]["mm_math"] for row in again] == [row["scores"]["mm_math"] for row in summary["rows"]]
    assert len(servers.asked) == before
    with pytest.raises(RecipeError, match=r"`temperature` was 0\.6, is 0\.0"):
        run(servers, tmp_path / "out", **options, temperature=0.0)


@pytest.mark.slow
def test_the_command_and_a_server_of_its_own(data, lmms_python, tmp_path):
    """It starts the toy world's scripted server, which only describes pictures."""
    server = f"{sys.executable} -m vision_r1_recipes.toy_server --port {{port}} --models {{model}}"
    words = [MODEL, "--serve", server, "--tasks", "mm_math", "--data_dir", data, "--retries", "0", "--limit", "2"]
    words += ["--output_dir", tmp_path / "out", "--lmms_python", lmms_python]
    command = [sys.executable, "-W", "ignore", "-m", "vision_r1_recipes.benchmarks", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MM-Math: 0.0 % of 2 questions" in done.stdout and "Only the first 2 questions" in done.stdout
    assert "Judge of MM-Math: rules, within 0.01." in done.stdout and "- Judge: " not in done.stdout
    summary = json.loads((tmp_path / "out/benchmarks.json").read_text())
    assert summary["server"] == server and summary["rows"][0]["scores"]["mm_math"]["without an answer"] == 1


@pytest.mark.slow
def test_a_judge_that_fails_stops_the_run(servers, data, lmms_python, tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_THE_JUDGE", KEY)
    options = {"data_dir": str(data), "lmms_python": lmms_python, "tasks": ["mathverse"], "retries": 0}
    probe = bm._probe

    def no_credit(relay):
        probe(relay)
        servers.judge_status = 402

    monkeypatch.setattr(bm, "_probe", no_credit)
    with pytest.raises(RecipeError, match=r"MathVerse: .* refuses access: 402") as caught:
        run(servers, tmp_path, **options)
    assert KEY not in str(caught.value)
    servers.judge_status = 200
    monkeypatch.setattr(bm, "_probe", probe)
    before = sum(body["model"] == MODEL for body, _ in servers.asked)
    assert run(servers, tmp_path, **options)["rows"][0]["scores"]["mathverse"]["accuracy"] == 0.5
    assert before == 10 == sum(body["model"] == MODEL for body, _ in servers.asked)


# -------- what is wrong is told first


@pytest.fixture
def pretended(monkeypatch):
    found = {"tasks": "/none", "lmms-eval": bm.LMMS_EVAL, "math-verify": "0.9.0"}
    monkeypatch.setattr(bm, "find_lmms_eval", lambda python: found)


def test_no_lmms_eval(tmp_path):
    with pytest.raises(RecipeError, match=r"has no lmms-eval. Install it: `make lmms`, or in a new venv `pip install"):
        bm.benchmarks(MODEL, "http://127.0.0.1:1/v1", lmms_python=str(tmp_path / "python"))
    with pytest.raises(RecipeError, match="has no lmms-eval"):
        bm.benchmarks(MODEL, "http://127.0.0.1:1/v1", lmms_python=sys.executable)


def test_wrong_arguments(pretended, servers, data, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    (tmp_path / "file").touch()
    rules = {"tasks": ["mm_math"], "output_dir": str(tmp_path)}
    for said, arguments in {
        "needed: `--base_url` of a running server, or `--serve`": {**rules, "base_url": None},
        r"`serve`: false ended with code 1\. The end of": {**rules, "base_url": None, "serve": "false"},
        "`tasks`: mathvision: known are mathvista, mathverse": {"tasks": ["mathvision"]},
        "the judge of MathVista: .* OPENAI_API_KEY is not set": {"tasks": ["mathvista", "mm_math"]},
        "no server answers at http://127.0.0.1:1/v1/models": {**rules, "base_url": "http://127.0.0.1:1/v1"},
        "has no runs/other. It serves runs/ptst, small-judge": {**rules, "model": "runs/other"},
        "mm_math is missing, a copy of MM-Math's dataset": {**rules, "data_dir": str(tmp_path)},
        "`retries`: -1, needs at least 0": {**rules, "retries": -1},
        "`limit`: 0, needs at least 1": {**rules, "limit": 0},
        "`base_url`: .*, `serve`: vllm serve: keep one": {**rules, "serve": "vllm serve"},
        "temperature nan": {**rules, "temperature": float("nan")},
        "file/out can't be a folder, .*file is a file": {**rules, "output_dir": str(tmp_path / "file/out")},
        "temperature -1": {**rules, "temperature": -1.0},
    }.items():
        with pytest.raises(RecipeError, match=said):
            bm.benchmarks(**{"model": MODEL, "base_url": servers.url, **arguments})
    assert servers.asked == []


# -------- the relay alone


def ask(relay, text, role="user"):
    return relay.answer("model", {"model": "relay", "messages": [{"role": role, "content": text}]}).result(30)


def relay_to(servers, folder, **options):
    extra = {"extra_body": {"repetition_penalty": 1.0}}
    config = EndpointConfig(MODEL, servers.url, 0.6, 0.95, 100, **extra)
    return bm.Relay(folder, config, None, {"model": MODEL}, **options)


def test_equal_questions_are_draws_of_their_own(servers, tmp_path):
    with relay_to(servers, tmp_path, seed=1) as relay:
        for _ in range(2):
            assert ask(relay, "How many dots are red?") == "<think> I count 3. </think><answer>3</answer>"
        relay.begin(0)
        ask(relay, "How many dots are red?")
        assert len(servers.asked) == 2
    seeds = [body["seed"] for body, _ in servers.asked]
    with relay_to(servers, tmp_path / "again", seed=1) as relay:
        ask(relay, "How many dots are red?")
    assert seeds[0] != seeds[1] and servers.asked[-1][0]["seed"] == seeds[0]


def test_a_half_written_response_is_asked_again(servers, tmp_path):
    for cut in (0, 9, 0):
        with relay_to(servers, tmp_path, system_prompt="Think.") as relay:
            ask(relay, "Find the area")
        path = tmp_path / "responses.jsonl"
        path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])
    assert len(servers.asked) == 2
    assert servers.asked[0][0]["messages"][0] == {"role": "system", "content": "Think."}
    with relay_to(servers, tmp_path), pytest.raises(RecipeError, match="another process is working"):
        relay_to(servers, tmp_path).__enter__()


def test_a_damaged_response_is_named(servers, tmp_path):
    with relay_to(servers, tmp_path) as relay:
        ask(relay, "Find the area")
    path = tmp_path / "responses.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"tokens"', b'"toke'))
    with pytest.raises(RecipeError, match=r"responses.jsonl is damaged in line 2. Delete it .*sed -i '2,\$d'"):
        relay_to(servers, tmp_path).__enter__()


def test_a_retry_that_finds_no_answer_either(servers, tmp_path, monkeypatch):
    monkeypatch.setitem(SAYS, "Find the length of AB", ["<think> wait"])
    with relay_to(servers, tmp_path) as relay:
        relay.begin(4)
        assert ask(relay, "Find the length of AB") == "<think> wait"
    assert len(servers.asked) == 5
    shares = bm._shares(relay.counts)
    assert shares == {
        **{"mean_tokens": 2, "truncated": 1, "without an answer": 1, "retried": 1},
        **{"refused": 0, "judged": 0},
    }


# -------- the table's arithmetic


def test_the_standard_error_is_over_groups():
    alone = bm.score([(1, k) for k in range(6)] + [(0, k) for k in range(6, 8)])
    assert alone["accuracy"] == 0.75 and alone["accuracy_se"] == pytest.approx((0.75 * 0.25 / 8) ** 0.5)
    tenfold = bm.score([(right, k) for k, right in enumerate([1] * 6 + [0] * 2) for _ in range(10)])
    assert tenfold["accuracy_se"] == pytest.approx(alone["accuracy_se"])
    assert (tenfold["questions"], tenfold["groups"]) == (80, 8)
    none = bm.score([(0, k) for k in range(20) for _ in range(10)])
    assert (none["accuracy_se"], none["accuracy_interval"]) == (0, 0.15)  # the rule of three


def test_the_paper_s_average():
    paper = {"mathvista": 73.5, "mathverse": 52.4, "mm_math": 40.2, "dynamath": 56.3}  # [paper]
    scores = {name: {"accuracy": value / 100, "accuracy_interval": 0.03} for name, value in paper.items()}
    mean, half = bm.average(scores)
    assert round(100 * mean, 1) == 55.4 and half == pytest.approx(0.03 / 3**0.5)
    assert bm.average({name: scores[name] for name in ("mathvista", "mm_math")}) is None


def test_the_table_says_what_it_depends_on():
    counts = {"mean_tokens": 2057.0, "truncated": 0.02, "without an answer": 0.021, "retried": 0.0, "refused": 1}
    scores = {
        name: {"accuracy": 0.5, "accuracy_interval": 0.0196, "questions": 5010, **counts} for name in bm.BENCHMARKS
    }
    summary = {
        **{"name": "mine", "server": "http://gpu:8000/v1", "date": "2026-01-31"},
        "settings": {
            **{"model": MODEL, "temperature": 0.6, "top_p": 0.95, "max_tokens": 16000, "seed": 7},
            **{"system_prompt": None, "limit": None},
        },
        "judge": {"model": "gpt-4o-mini", "base_url": "https://api.openai.com/v1"},
        "rows": [{"retries": retries, "scores": scores} for retries in (0, 4)],
        "versions": {"lmms-eval": "0.7.3"},
    }
    text = bm.markdown(summary)
    head, _, row, retried, questions, *said = text.splitlines()
    assert head == "| Model | MathVista | MathVerse | MM-Math | DynaMath | Avg |"
    assert row == "| mine | 50.0 ± 2.0 | 50.0 ± 2.0 | 50.0 ± 2.0 | 50.0 ± 2.0 | 50.0 ± 1.1 |"
    assert retried.startswith("| mine, up to 4 retries | 50.0") and questions.startswith("| questions | 5,010 |")
    said = "\n".join(said)
    for part in (
        *("gpt-4o-mini at https://api.openai.com/v1", "rules, within 0.01", "temperature 0.6, top_p 0.95"),
        *("at most 16,000 tokens, seed 7", "system prompt: none", "lmms-eval 0.7.3; 2026-01-31"),
        "MathVista, no retries: 2057 tokens on average, 2.0 % truncated, 2.1 % without an answer",
        *("DynaMath, 4 retries:", "1 refused"),
    ):
        assert part in said, part
    del summary["rows"][1], scores["mathverse"], scores["mathvista"], scores["dynamath"]
    text = bm.markdown({**summary, "judge": None})
    assert text.startswith("| Model | MM-Math | Avg |") and "| 50.0 ± 2.0 |  |" in text and "gpt" not in text


# -------- the judge of MM-Math

GOLDEN = [
    # gold, right, wrong
    ("12", ["12", "12.0", "12.01", r"\boxed{12}", "twelve"], ["12.02", "11.98", "21", ""]),
    ("3.14", ["3.15", "3.13", r"\frac{157}{50}"], ["3.16", "31.4"]),
    (r"60^{\circ}", ["60", "60°", "60 degrees", "60.005°"], ["61", "60 cm"]),
    ("5 cm", ["5", "0.05 m", r"5.01\text{ cm}"], ["5 m", "5.02 cm", "5 cm^2"]),
    (r"\frac{1}{3}", ["0.33", "1/3", r"\dfrac{2}{6}"], ["0.3", "3"]),
    (r"2\sqrt{3}+1", ["4.46", r"1+\sqrt{12}", "4.47"], ["4.5", r"2\sqrt{3}"]),
    (r"\frac{8\pi}{3}", ["8.38", r"8\pi/3"], ["8", r"\frac{8}{3}"]),
    (r"\frac{\sqrt{5}-1}{2}", ["0.618"], ["1.618"]),
    ("1, 4", ["4, 1", "1 and 4", "x=1 or x=4.005", r"\{1, 4\}"], ["1", "1, 4, 5", "1, 5"]),
    (r"\pm 3", ["3, -3", "-3.001, 3"], ["3"]),
    ("(3, 4)", ["(3.005, 4)", "(3,4)"], ["(4, 3)", "[3, 4]", "3"]),
    ("x=3", ["3", "x = 2.995", "x=3.0"], ["y=3.001", "x=4"]),
    ("y=2x+1", ["y = 1 + 2x"], ["y=2x+1.001", "y=2x"]),
    ("-1<x<2", ["(-1, 2)", "-1 < x < 2"], ["-1<x<2.5"]),
    ("parallel", ["Parallel"], ["perpendicular", "0"]),
    ("1:2", ["1 : 2"], ["2:1"]),
    # Where the official judge is laxer.
    ("50", ["50"], ["0.5", "5000"]),
    ("50%", ["0.5", "50 %"], ["0.2"]),
    # What must not take for ever.
    ("10", [], ["9^{9^{9^9}}", "((((" * 50, r"\sqrt{" * 60, "1/0", "(-8)^{1/3}", "10^{400}"]),
]


@pytest.mark.parametrize("gold, right, wrong", GOLDEN, ids=[gold for gold, *_ in GOLDEN])
def test_golden_cases(gold, right, wrong):
    assert [answer for answer in right if not mm_math.is_right(gold, answer)] == []
    assert [answer for answer in wrong if mm_math.is_right(gold, answer)] == []


def test_what_is_judged():
    row = {"solution": r"First $a=3$. So $\boxed {x=\frac{1}{2}}$ or \boxed{ 3 }. \boxed{lost"}
    assert mm_math.gold(row) == r"x=\frac{1}{2}, 3"
    for completion, accuracy in {
        "<think> so </think><answer> Final Answer:3, 0.5 </answer>": 1.0,
        "<answer>0.505 and 3</answer>": 1.0,  # lmms-eval has taken the thinking out
        r"so \boxed{\frac{1}{2}, 3}": 1.0,
        "<think> it is 0.5 and 3": 0.0,
        "": 0.0,
    }.items():
        assert mm_math.judge(row, [completion]) == {"accuracy": accuracy}, completion


def test_rows_and_pictures(data, tmp_path, monkeypatch):
    lines = pd.read_json(data / "mm_math/MM_Math/MM_Math.jsonl", lines=True)
    rows = Dataset.from_pandas(lines[["question", "solution", "file_name"]])
    monkeypatch.setenv("MM_MATH_LEFT_OUT", str(tmp_path / "left_out"))
    assert mm_math.gradable(rows)["file_name"] == ["0.png", "1.png", "2.png"]
    assert (tmp_path / "left_out").read_text() == "1"
    archive = data / "mm_math/MM_Math/MM_Math.zip"
    zipfile.ZipFile(archive).extractall(tmp_path / "unpacked")
    for source in (archive, tmp_path / "unpacked"):
        monkeypatch.setenv("MM_MATH_IMAGES", str(source))
        mm_math._files.cache_clear()
        assert mm_math.pictures(rows[2])[0].getpixel((0, 0)) == (102, 40, 90)
        with pytest.raises(FileNotFoundError, match=r"picture 9\.png is missing; there are 4"):
            mm_math.pictures({"file_name": "images/9.png"})
    mm_math._files.cache_clear()
