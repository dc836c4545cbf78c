"""
The bridge's local runner against a bare asyncio client that sends the same three requests to the same server.

```shell
python benchmarks/bridge.py                     # throughput
python benchmarks/bridge.py --memory            # peak memory over 1,000 and 100,000 rows
python benchmarks/bridge.py --rules             # 10,000 rows filtered and repaired
```
"""

import argparse
import asyncio
import base64
import contextlib
import json
import multiprocessing
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import openai

from vision_r1_recipes import recipe
from vision_r1_recipes.bridge import Generation, Prompts, Row, run
from vision_r1_recipes.bridge.rows import Sources
from vision_r1_recipes.bridge.rules import Rules, finish
from vision_r1_recipes.bridge.steps import STEPS, Rejected
from vision_r1_recipes.toy import questions
from vision_r1_recipes.toy_server import think


ROOT = Path(__file__).parents[1]


def world(folder: Path, count: int) -> None:
    """`count` rows in the LLaVA-CoT schema over 200 pictures."""
    import random

    (folder / "pictures").mkdir(parents=True)
    source = questions(random.Random(0), set())
    pool = [next(source) for _ in range(200)]
    for i, question in enumerate(pool):
        question.picture.save(folder / "pictures" / f"{i}.png")
    with (folder / "rows.jsonl").open("w") as file:
        for i in range(count):
            question = pool[i % len(pool)]
            turns = [{"from": "human", "value": f"<image>{question.text}"}, {"from": "gpt", "value": question.answer}]
            row = {"id": f"{i:06d}", "image": f"pictures/{i % len(pool)}.png", "conversations": turns}
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def server(latency: float):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "vision_r1_recipes.toy_server", "--port", str(port), "--latency", str(latency)]
    process = subprocess.Popen(words)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()


def values(folder: Path, output_dir: Path, address: str, concurrency: int) -> dict:
    made = recipe.load(ROOT / "recipes" / "toy" / "bridge.yaml")
    common = {"base_url": address, "serve": None, "concurrency": concurrency}
    datasets = [{"path": str(folder), "data_files": "rows.jsonl"}]
    return recipe.merge(
        made,
        {
            "output_dir": str(output_dir),
            "datasets": datasets,
            "mllm": {"model": "toy-mllm", **common},
            "reasoner": common,
        },
    )


def ours(made: dict) -> float:
    job = run.Run(made)
    sources = Sources(job.config.datasets)
    begun = time.perf_counter()
    with job.journal() as journal:
        run.work_rank(job, sources, journal)
    return time.perf_counter() - begun


async def _bare(made: dict) -> float:
    prompts = Prompts(made["prompts"])
    rows = [row for row, _ in Sources(made["datasets"]).read()]
    clients = {
        name: openai.AsyncOpenAI(base_url=made[name]["base_url"], api_key="none") for name in ("mllm", "reasoner")
    }
    slots = {name: asyncio.Semaphore(made[name]["concurrency"]) for name in clients}
    queue = iter(rows)

    async def worker() -> None:
        for row in queue:
            done = {}
            for step in STEPS:
                name = "reasoner" if step == STEPS[-1] else "mllm"
                content = prompts.render(step, row, done)[0]["content"]
                if not isinstance(content, str):
                    data = base64.b64encode(Path(row.images[0]["path"]).read_bytes()).decode()
                    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
                    content = [picture, content[-1]]
                async with slots[name]:
                    response = await clients[name].chat.completions.create(
                        model=made[name]["model"],
                        messages=[{"role": "user", "content": content}],
                        temperature=made[name]["temperature"],
                        top_p=made[name]["top_p"],
                        max_tokens=made[name]["max_tokens"],
                    )
                done[step] = Generation(response.choices[0].message.content)

    begun = time.perf_counter()
    workers = 2 * made["mllm"]["concurrency"]
    await asyncio.gather(*(worker() for _ in range(workers)))
    return time.perf_counter() - begun


def bare(made: dict) -> float:
    return asyncio.run(_bare(made))


def apart(function, *args) -> tuple[float, float]:
    """Seconds, and peak memory in MiB, of a call in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_measured, args=(queue, function, *args))
    process.start()
    seconds, memory = queue.get()
    process.join()
    return seconds, memory


def _measured(queue, function, *args) -> None:
    seconds = function(*args)
    queue.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def throughput(count: int, concurrency: int, latency: float, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder, server(latency) as address:
        folder = Path(folder)
        world(folder / "data", count)
        rates: dict[str, list[float]] = {"ours": [], "bare": []}
        for repeat in range(repeats):
            for name, function in (("ours", ours), ("bare", bare)):
                made = values(folder / "data", folder / f"run-{repeat}", address, concurrency)
                rates[name].append(3 * count / apart(function, made)[0])
        ratios = [a / b for a, b in zip(rates["ours"], rates["bare"], strict=True)]
        cells = [f"{statistics.median(rates[name]):.0f}" for name in rates]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {1000 * latency:g} | {concurrency} | {count} | {' | '.join(cells)} | {spread} |", flush=True)


def memory(counts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder, server(0.0) as address:
        folder = Path(folder)
        for count in counts:
            world(folder / f"data-{count}", count)
            made = values(folder / f"data-{count}", folder / f"run-{count}", address, 32)
            seconds, peak = apart(ours, made)
            print(f"| {count:,} | {peak:.0f} | {seconds:.0f} |", flush=True)


def rules(count: int) -> None:
    import random

    source, checked = questions(random.Random(1), set()), Rules.load(ROOT / "data" / "rules" / "toy.yaml")
    prompts = Prompts(recipe.load(ROOT / "recipes" / "toy" / "bridge.yaml")["prompts"])
    rows = []
    for i in range(count):
        question = next(source)
        row = Row(i, str(i), "toy", question.text, question.answer)
        names = ("top row", "middle row", "last row")
        described = " ".join(f"{n}: {' '.join(c)}." for n, c in zip(names, question.grid, strict=True))
        content = prompts.render("reasoning", row, {"description": Generation(described)})[0]["content"]
        reasoning, text, finish_reason = think(content, random.Random(i))
        rows.append((row, Generation(text, reasoning, finish_reason)))
    begun, kept, repaired = time.perf_counter(), 0, 0
    for row, generation in rows:
        try:
            repaired += bool(finish(row, generation, checked)[1])
            kept += 1
        except Rejected:
            pass
    print(f"{count:,} rows in {time.perf_counter() - begun:.1f} s: {kept:,} kept, {repaired:,} of them mended")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rules", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000)
    args = parser.parse_args()
    if args.memory:
        memory([1000, 100_000])
    elif args.rules:
        rules(10_000)
    else:
        for latency, concurrency in ((0.0, 16), (0.05, 16), (0.5, 64)):
            throughput(args.rows, concurrency, latency, args.repeats)
