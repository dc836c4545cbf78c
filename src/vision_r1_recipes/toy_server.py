"""
OpenAI-compatible servers of the toy world: a scripted text reasoner, and a scripted MLLM for tests.

```shell
python -m vision_r1_recipes.toy_server --port 8001
```

`toy-reasoner` reads question and description in a prompt of `data/prompts/reasoning.jinja` and thinks about them as
the toy's cold-start data do, in the manner of DeepSeek-R1's API (`reasoning_content`). It is no model: a tiny one
can't write such chains from a text. It has a reasoner's habits, at stated shares: it speaks of "the description",
misses information, changes language, goes in circles, contradicts itself. `toy-mllm` describes a picture of the toy
world without an error. What is asked alike is answered alike.

`--faults 0.2` makes a share of the requests fail, in eight ways; `--refuse 0.02` answers a share of the prompts with
400, always; `--log FILE` gets a line for each request that is answered in full.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import io
import json
import random
import re
import socket
import struct
import threading
import time
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

from PIL import Image

from .toy import CELL, COLOURS, FAMILIES, ROWS, SIDE, Grid, Question, long_thought


HABITS = {  # shares of the scripted reasoner's answers
    "names the description": 0.1,  # mended by the rules
    "still names the description": 0.03,
    "misses information": 0.04,
    "changes language": 0.03,
    "goes in circles": 0.03,
    "contradicts itself": 0.03,
    "names the given answer": 0.03,
    "is cut off": 0.02,
}
DEFAULTS = {
    "models": ["toy-reasoner", "toy-mllm"],
    "latency": 0.0,  # seconds before every answer
    "faults": 0.0,  # share of the requests that fail
    "slow": 5.0,  # seconds that a slow request takes
    "refuse": 0.0,  # share of the prompts that get a 400
    "failing": 0,  # requests that fail first of all
    "api_key": None,
    "log": None,
}
FAULTS = ("429", "500", "503", "slow", "reset", "half a body", "half a JSON", "no choices")
_ROW = re.compile(rf"({'|'.join(ROWS)}): (\w+) (\w+) (\w+)")


@cache
def _by_text() -> dict[str, Question]:
    """One question of every wording; how rows are counted and worked out depends on the wording alone."""
    rng, found = random.Random(0), {}
    for _ in range(600):
        for family in FAMILIES:
            for grade in (1, 2, 3):
                question = family(rng, grade)
                found.setdefault(question.text, question)
    return found


def think(prompt: str, rng: random.Random) -> tuple[str, str, str]:
    """`(reasoning, text, finish_reason)` for a prompt with a description and a question."""
    text = re.search(r"Question: (.*)", prompt)
    description = prompt[: text.start()] if text else prompt
    question = _by_text().get(text[1].strip()) if text else None
    rows = {name: list(cells) for name, *cells in _ROW.findall(description)}
    if question is None or rows.keys() != set(ROWS):
        said = "The description lacks rows. There is not enough information to answer."
        return said, "I need more information about the picture.\nFinal Answer: unknown", "stop"
    question = dataclasses.replace(question, grid=[rows[name] for name in ROWS])
    chain = long_thought(question, rng)
    reasoning = chain[len("<think> ") : chain.index(" </think>")]
    answer = question.answer
    habit = rng.choices([*HABITS, ""], [*HABITS.values(), 1 - sum(HABITS.values())])[0]
    if habit == "names the description":
        reasoning = rng.choice(_OPENINGS) + reasoning
    elif habit == "still names the description":
        reasoning += " That fits all descriptions."
    elif habit == "misses information":
        reasoning += " Still, there is not enough information."
    elif habit == "changes language":
        reasoning += " 让我再检查一遍 图中每一行的颜色和数量都是对的 所以答案没有问题" * 4
    elif habit == "goes in circles":
        reasoning += " Wait, let me look at it once more." * 40
    elif habit == "contradicts itself":
        reasoning += f" So the answer is {int(answer) + 1 if answer.isdigit() else 'none'}."
    elif habit == "names the given answer":
        reasoning += f" Indeed, the given answer is {answer}."
    elif habit == "is cut off":
        return reasoning[: len(reasoning) // 2], "", "length"
    return reasoning, f"The picture gives {question.work(question.grid)[0]}.\n\n**Final Answer:** {answer}", "stop"


# Short, and of the world's own words as far as can be: a tiny model has to learn what is left of them.
_OPENINGS = ("The description says ", "In the description, ", "From the image description, ", "From the text above, ")


def describe(picture: Image.Image) -> str:
    """The cells of a toy picture, row by row, each by the colour that most of its middle has."""

    def colour(row: int, column: int) -> str:
        left, top = column * CELL + CELL // 2 - 6, row * CELL + CELL // 2 - 6
        pixels = list(picture.crop((left, top, left + 12, top + 12)).getdata())
        counts = {name: sum(_near(pixel, value) for pixel in pixels) for name, value in COLOURS.items()}
        best = max(counts, key=counts.get)
        return best if counts[best] > len(pixels) / 2 else "none"

    grid: Grid = [[colour(row, column) for column in range(SIDE)] for row in range(SIDE)]
    return " ".join(f"{name}: {' '.join(cells)}." for name, cells in zip(ROWS, grid, strict=True))


def _near(pixel: tuple[int, int, int], colour: tuple[int, int, int]) -> bool:
    return sum(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 60


def answer(request: dict) -> tuple[str, str, str]:
    """`(reasoning, text, finish_reason)` for a body of `/v1/chat/completions`."""
    content = request["messages"][-1]["content"]
    if isinstance(content, str):
        digest = hashlib.sha256(content.encode()).digest()
        return think(content, random.Random(digest))
    pictures = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    data = base64.b64decode(pictures[0].partition("base64,")[2])
    return "", describe(Image.open(io.BytesIO(data)).convert("RGB")), "stop"


class Server(ThreadingHTTPServer):
    """The server; `options` as on the command line."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, host: str, port: int, **options):
        super().__init__((host, port), _Handler)
        self.options = SimpleNamespace(**{**DEFAULTS, **options})
        self.answered: list[str] = []
        self._lock = threading.Lock()
        _by_text()

    def note(self, name: str | None, received: float) -> None:
        """A request, received at that time, has been answered in full."""
        with self._lock:
            self.answered.append(name)
            if self.options.log:
                with Path(self.options.log).open("a") as log:
                    log.write(json.dumps({"id": name, "received": received}) + "\n")

    def fault(self) -> str | None:
        """Of this request, if it is to fail."""
        with self._lock:
            self.options.failing -= (first := self.options.failing > 0)
        return random.choice(FAULTS) if first or random.random() < self.options.faults else None

    def handle_error(self, request, client_address):
        pass  # clients that are killed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        models = self.server.options.models
        self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

    def do_POST(self):
        received = time.time()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        options = self.server.options
        if options.api_key and self.headers.get("Authorization") != f"Bearer {options.api_key}":
            return self._error(401, f"wrong key {self.headers.get('Authorization')}")
        if request["model"] not in options.models:
            return self._error(404, f"The model `{request['model']}` does not exist.")
        if options.latency:
            time.sleep(options.latency)
        asked = json.dumps(request["messages"], sort_keys=True).encode()
        if random.Random(hashlib.sha256(asked).digest()).random() < options.refuse:
            return self._error(400, "This model's maximum context length is exceeded.")
        fault = self.server.fault()
        if fault in ("429", "500", "503"):
            return self._error(int(fault), "try again", {"Retry-After": "0.1"} if fault == "429" else {})
        if fault == "slow":
            time.sleep(options.slow)
        if fault == "reset":
            return self._reset()
        reasoning, text, finish_reason = answer(request)
        message = {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning else {})
        sizes = {"prompt_tokens": len(asked) // 4, "completion_tokens": (len(reasoning) + len(text)) // 4}
        completion = {
            "id": "toy",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": request["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
            "usage": {**sizes, "total_tokens": sum(sizes.values())},
        }
        data = json.dumps(completion if fault != "no choices" else {**completion, "choices": []}).encode()
        if fault == "half a JSON":
            data = data[: len(data) // 2]
        if fault == "half a body":
            self._send(200, data, half=True)
            return self._reset()
        if fault in (None, "slow"):  # before it is sent: a killed server would not get to it afterwards
            self.server.note(self.headers.get("X-Request-Id", "").rpartition("/")[0], received)
        self._send(200, data)

    def _send(self, status, body, headers=None, half=False):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if half else data)

    def _error(self, status, message, headers=None):
        self._send(status, {"error": {"message": message, "type": "error", "code": status}}, headers)

    def _reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vision_r1_recipes.toy_server",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--models", nargs="+", default=DEFAULTS["models"])
    for name in ("latency", "faults", "slow", "refuse"):
        parser.add_argument(f"--{name}", type=float, default=DEFAULTS[name])
    parser.add_argument("--api_key")
    parser.add_argument("--log")
    with Server(**vars(parser.parse_args())) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
