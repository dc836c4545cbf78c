"""Modality bridging: rules, faults, resuming and outputs, against a scripted OpenAI-compatible server over HTTP."""

import asyncio
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice

from test_data import cold, parquet, picture, rl_row, turns
from vision_r1_recipes import recipe
from vision_r1_recipes.bridge import Generation, Prompts, Rejected, Row, bridge
from vision_r1_recipes.bridge import report as reports
from vision_r1_recipes.bridge.__main__ import main
from vision_r1_recipes.bridge.endpoint import Endpoint, EndpointConfig, ServerGone, _Budget, _Passing
from vision_r1_recipes.bridge.journal import Journal
from vision_r1_recipes.bridge.rows import Sources
from vision_r1_recipes.bridge.rules import Rules, contradiction, doubled, final_answer, finish, repair
from vision_r1_recipes.bridge.run import Run
from vision_r1_recipes.data import load_processor, load_rows, open_source
from vision_r1_recipes.recipe import RecipeError
from vision_r1_recipes.rewards import grade, parse_format
from vision_r1_recipes.toy_server import HABITS, Server, describe


ROOT = Path(__file__).parents[1]
RULES = Rules.load(ROOT / "data" / "rules" / "vision_r1.yaml")
TOY_RULES = Rules.load(ROOT / "data" / "rules" / "toy.yaml")
THOUGHT = (
    "I see a square with four equal sides in the image, each of them three long, so that it goes around in twelve."
)


@contextlib.contextmanager
def serving(host="127.0.0.1", **options):
    server = Server(host, options.pop("port", 0), **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server():
    with serving() as server:
        yield server


def url(server, host="127.0.0.1"):
    return f"http://{host}:{server.server_address[1]}/v1"


def values(folder, source, address, **more):
    """A recipe's keys: the toy's, against a scripted server that is already there."""
    prompts = {
        step: str(ROOT / path) for step, path in recipe.load(ROOT / "recipes/toy/bridge.yaml")["prompts"].items()
    }
    common = {"base_url": address, "temperature": 1.0, "top_p": 1.0, "max_tokens": 96, "concurrency": 8}
    made = {
        "output_dir": str(folder),
        "datasets": [source if isinstance(source, dict) else {"path": str(source)}],
        "mllm": {"model": "toy-mllm", **common},
        "reasoner": {"model": "toy-reasoner", **common},
        "prompts": prompts,
        "rules": str(ROOT / "data/rules/toy.yaml"),
    }
    return recipe.merge(made, more)


def executed(*args, **kwargs):
    run = Run(values(*args, **kwargs))
    reports.execute(run)
    return run


def outputs(run):
    """`(kept rows, rejected rows)` as anybody reads them."""
    return open_source({"path": str(run.folder / "dataset")}, "here"), rejected_rows(run.folder)


def rejected_rows(folder):
    return [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]


def column(rows, name):
    return [row[name] for row in rows]


def command(*args, **kwargs):
    words = [sys.executable, "-W", "ignore", "-m", "vision_r1_recipes.bridge", *map(str, args)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, **kwargs)


def written(path, made):
    path.write_text(recipe.dump(made))
    return path


# Steps


@pytest.mark.parametrize(
    "content, field, reasoning, text",
    [
        ("Final Answer: 3", "I see three.", "I see three.", "Final Answer: 3"),
        ("<think>\nI see three.\n</think>\n\nFinal Answer: 3", None, "I see three.", "Final Answer: 3"),
        ("I see three.</think>Final Answer: 3", "", "I see three.", "Final Answer: 3"),  # the template opened it
        ("Final Answer: 3", None, "", "Final Answer: 3"),
        ("3 </think> 4", "field", "field", "3 </think> 4"),
    ],
)
def test_reasoning_has_a_field_or_tags(content, field, reasoning, text):
    generation = Generation.parse(content, field)
    assert (generation.reasoning, generation.text) == (reasoning, text)


def released_prompts(**more):
    folder = ROOT / "data" / "prompts"
    return {step: str(folder / f"{step}.jinja") for step in ("pseudo_cot", "description", "reasoning")} | more


def asked(row, prompts):
    """What every step is asked, by a caller of `bridge` that has no engine at all."""
    seen = {}

    async def generate(step, messages):
        content = messages[0]["content"]
        seen[step] = content if isinstance(content, str) else content[-1]["text"]
        pictures = [] if isinstance(content, str) else [part["image"] for part in content[:-1]]
        assert pictures == ([] if step == "reasoning" else row.images)
        return Generation(f"what {step} wrote")

    return seen, asyncio.run(bridge(row, generate, prompts))


def test_each_step_is_asked_what_the_paper_says():
    row = Row(0, "a", "s", "What angle is A?", "40 degrees", [{"path": "a.png", "bytes": None}])
    seen, made = asked(row, Prompts(released_prompts()))
    assert list(made) == ["pseudo_cot", "description", "reasoning"]
    assert "What angle is A?" in seen["pseudo_cot"] and "40 degrees" in seen["pseudo_cot"]
    assert "what pseudo_cot wrote" in seen["description"] and "40 degrees" not in seen["description"]
    assert "what description wrote" in seen["reasoning"] and "what pseudo_cot wrote" not in seen["reasoning"]
    assert "40 degrees" in seen["reasoning"] and "the answer alone" in seen["reasoning"]
    assert "{#" not in "".join(seen.values())


def test_variants_for_options_without_the_answer_and_without_a_pseudo_cot():
    row = Row(0, "a", "s", "Which? A. 1 B. 2", "B", [])
    seen, _ = asked(row, Prompts(released_prompts(), show_answer=False))
    assert "the letter of the option" in seen["reasoning"] and "known to be" not in seen["reasoning"]
    caption = str(ROOT / "data/prompts/caption.jinja")
    seen, made = asked(row, Prompts(released_prompts(pseudo_cot=None, description=caption)))
    assert list(made) == ["description", "reasoning"]
    with pytest.raises(RecipeError, match=r"prompts\.description.*'pseudo_cot' is undefined"):
        Prompts(released_prompts(pseudo_cot=None))


@pytest.mark.parametrize(
    "generation, rule",
    [
        (Generation("x", finish_reason="length"), "cut off"),
        (Generation("x", finish_reason="content_filter"), "refused content"),
        (Generation(""), "empty completion"),
    ],
)
def test_a_step_that_went_wrong_ends_the_row(generation, rule):
    async def generate(step, messages):
        return generation

    with pytest.raises(Rejected) as rejected:
        asyncio.run(bridge(Row(0, "a", "s", "q", "1"), generate, Prompts(released_prompts())))
    assert rejected.value.rule == rule and "pseudo_cot" in rejected.value.detail


def test_a_broken_prompt_is_named(tmp_path):
    broken = tmp_path / "broken.jinja"
    for text, said in [("{{ question", "unexpected end"), ("{{ qestion }}", "'qestion' is undefined")]:
        broken.write_text(text)
        with pytest.raises(RecipeError, match=rf"prompts\.reasoning.*broken\.jinja.*{said}"):
            Prompts(released_prompts(reasoning=str(broken)))
    with pytest.raises(RecipeError, match=r"prompts\.reasoning.*No such file"):
        Prompts(released_prompts(reasoning=str(tmp_path / "none.jinja")))


# Rules


def finished(reasoning=THOUGHT, text="So it is.\n\n**Final Answer:** 12", answer="12", rules=RULES):
    return finish(Row(0, "a", "s", "q", answer), Generation(text, reasoning), rules)


def test_the_final_form():
    completion, repairs = finished()
    assert completion == f"<think> {THOUGHT} </think><answer> Final Answer:12 </answer>"
    assert repairs == [] and parse_format(completion) == "12"
    assert finished(answer="12 cm", text="Final Answer: 0.12 m")[0].endswith("<answer> Final Answer:0.12 m </answer>")


@pytest.mark.parametrize(
    "reasoning, text, rule",
    [
        ("", "Final Answer: 12", "no reasoning"),
        (f"{THOUGHT} <answer>", "Final Answer: 12", "tags in the reasoning"),
        (THOUGHT, "I would rather not say, because there is so much that one could say about it. " * 4, "no answer"),
        (THOUGHT, "Final Answer: 13", "wrong answer"),
        ("Twelve.", "Final Answer: 12", "too short"),
        (" ".join(map(str, range(10001))), "Final Answer: 12", "too long"),
        (f"{THOUGHT} 所以答案是十二", "Final Answer: 12", "wrong language"),
        (f"{THOUGHT} {'Let me check that again. ' * 9}", "Final Answer: 12", "repetition"),
        (f"{THOUGHT} {'no ' * 400}", "Final Answer: 12", "repetition"),
        (f"{THOUGHT} {'the side is three ' * 200}", "Final Answer: 12", "repetition"),
        (f"But I can't see the image. {THOUGHT}", "Final Answer: 12", "missing information"),
        (f"I don\u2019t have the image. {THOUGHT}", "Final Answer: 12", "missing information"),
        (f"The description doesn't mention the side. {THOUGHT}", "Final Answer: 12", "missing information"),
        (f"{THOUGHT} The diagram isn't provided here.", "Final Answer: 12", "missing information"),
        (f"{THOUGHT} There is not enough information.", "Final Answer: 12", "missing information"),
        (THOUGHT, "I need more information.\nFinal Answer: 12", "missing information"),
        (f"{THOUGHT} So the answer is 14.", "Final Answer: 12", "contradiction"),
        (f"{THOUGHT} As the captions have it.", "Final Answer: 12", "names the text"),
        (f"{THOUGHT} In the image the description shows it.", "Final Answer: 12", "doubled words"),
        (f"{THOUGHT} The user wants the perimeter.", "Final Answer: 12", "names the text"),
        (f"{THOUGHT} It fits the description of a square.", "Final Answer: 12", "names the text"),
        (f"{THOUGHT} The sides are described as equal.", "Final Answer: 12", "names the text"),
        (f"{THOUGHT} As per the description mentioned earlier.", "Final Answer: 12", "names the text"),
        (f"{THOUGHT} According to the text, so it is.", "Final Answer: 12", "names the text"),
        (f"{THOUGHT} Indeed, the given answer is 12.", "Final Answer: 12", "names the answer"),
        (f"{THOUGHT} The answer is given as 12.", "Final Answer: 12", "names the answer"),
        (f"{THOUGHT} I was told the answer is 12.", "Final Answer: 12", "names the answer"),
        (f"{THOUGHT} We know the answer is 12.", "Final Answer: 12", "names the answer"),
    ],
)
def test_every_rule_rejects(reasoning, text, rule):
    with pytest.raises(Rejected) as rejected:
        finished(reasoning, text)
    assert rejected.value.rule == rule


@pytest.mark.parametrize(
    "sentence",
    [
        "Wait, is the side 3? Let me check. Yes. Alternatively, count: 3, 6, 9, 12.",
        "The height is not given, but it follows from the area.",
        "I need the length of the other side, which the figure marks as 3.",
        "So the answer is 12.",
        "So the correct answer is 12, and the expected answer should be 12.",
        "So the answer is 3 times 4, which is 12. The answer is 4 x 3 = 12.",
        "Do I need more information? No. Without any additional information, assume it is regular.",
        "The text above the bar says 12.",
        "The angle \u03b8 is \u03c0/2, and \u03b1 + \u03b2 = 90\u00b0.",
        "A circle circumscribes it, and the text on it reads 'exit'.",
    ],
)
def test_ordinary_reasoning_is_kept_as_it_is(sentence):
    completion, repairs = finished(f"{THOUGHT} {sentence}")
    assert sentence in completion and repairs == []


@pytest.mark.parametrize(
    "said, mended",
    [
        ("The description says that the side is 3.", "The image shows that the side is 3."),
        ("According to the image description, the side is 3.", "According to the image, the side is 3."),
        ("From the text above, the side is 3.", "From the image, the side is 3."),
        ("The detailed description of the figure has it.", "The figure has it."),
        ("I know from the description the side.", "I know from the image the side."),
        ("It is as described in the image.", "It is as shown in the image."),
        ("The caption stated that it is 3.", "The image shows that it is 3."),
        ("The image description mentions a square.", "The image shows a square."),
    ],
)
def test_what_speaks_of_a_text_is_made_to_speak_of_the_image(said, mended):
    text, repairs = repair(said, RULES.replace)
    assert text == mended and repairs


def test_published_artefacts_of_blind_replacement_are_not_made():
    text, _ = repair(
        "The description displays that tangents touching it; the image description shows a shows.", RULES.replace
    )
    assert "displays displays" not in text and "tangents touching" in text and not doubled(text)


WORDS = st.sampled_from(
    [
        "the",
        "The",
        "this",
        "image",
        "description",
        "caption",
        "says",
        "shows",
        "that",
        "of",
        "in",
        "given",
        "picture",
        "figure",
        "text",
        "above",
        "user",
        "12",
        "3.5",
        "A",
        "is",
        "as",
        "described",
        "mentioned",
        "provided",
        "detailed",
        "a",
        "square,",
        "and.",
        "because",
    ]
)


@settings(max_examples=400, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=25).map(" ".join))
def test_repair_never_doubles_words_nor_changes_the_answer(text):
    reasoning = f"{THOUGHT} {text}"
    try:
        completion, repairs = finished(reasoning)
    except Rejected:
        return
    assert parse_format(completion) == "12"
    mended = completion[len("<think> ") : completion.index(" </think>")]
    assert not doubled(mended) - doubled(reasoning)
    assert [w for w in mended.split() if any(c.isdigit() for c in w)] == [
        w for w in reasoning.split() if any(c.isdigit() for c in w)
    ]
    assert bool(repairs) == (mended != reasoning)  # nothing is changed in silence


@pytest.mark.parametrize(
    "text, answer",
    [
        ("**Final Answer:** B\n", "B"),
        ("**Final Answer**: 12", "12"),
        ("**Final Answer**\n12", "12"),
        ("So it is.\n### Final Answer\n\n12 cm\n", "12 cm"),
        ("Final Answer: \\boxed{7}", "\\boxed{7}"),
        ("so \\boxed{7}.", "7"),
        ("The answer is 7.", "7."),
        ("Final Answer:", None),
    ],
)
def test_final_answers_are_found(text, answer):
    assert final_answer(text) == answer


def test_a_contradiction_is_between_answers_of_one_kind():
    assert contradiction("So the answer is B.", "C") == "B"
    assert contradiction("So the answer is 1,300.", "1200") == "1300"
    for reasoning, answer in [
        ("So the answer is 5 or so.", "12"),
        ("So the answer is 5.", "C"),
        ("So the answer is 1,200.", "1200"),
        ("The answer is 5. No, the answer is 12.", "12"),
    ]:
        assert contradiction(reasoning, answer) is None


def test_rules_with_faults_are_refused(tmp_path):
    base = f"base: {ROOT / 'data/rules/vision_r1.yaml'}\n"
    for text, said in [
        ("max_word: 3", "did you mean `max_words`"),
        ("names_the_text: ['(']", "names_the_text.*missing \\)"),
        ("replace: [{pattern: a, with: '\\1'}]", "invalid group reference"),
        ("replace: [{pattern: a, with: '\\q'}]", "bad escape"),
        ("replace: [{pattern: a}]", "write {pattern"),
        ("min_words: many", "min_words.*not a value"),
    ]:
        (tmp_path / "rules.yaml").write_text(base + text)
        with pytest.raises(RecipeError, match=said):
            Rules.load(tmp_path / "rules.yaml")
    (tmp_path / "rules.yaml").write_text("min_words: 3")
    with pytest.raises(RecipeError, match="max_words` is missing"):
        Rules.load(tmp_path / "rules.yaml")


# Sources


def test_every_layout_is_read(tmp_path):
    llava = "<SUMMARY> s </SUMMARY><REASONING> r </REASONING><CONCLUSION> The answer is 3. </CONCLUSION>"
    mulberry = "### Rationales: r\n### The final answer is: B"
    cold(tmp_path, [{"id": "x", "image": "pics/a.png", "conversations": turns(answer=llava)}], "llava.json")
    rows = [{"images": ["pics/a.png"], "conversations": turns(answer=mulberry, names=("user", "assistant"))}]
    cold(tmp_path, rows, "mulberry.json")
    parquet(tmp_path / "rl" / "train.parquet", [rl_row()])
    sources = Sources(
        [
            {"path": str(tmp_path), "data_files": "llava.json"},
            {"path": str(tmp_path), "data_files": "mulberry.json"},
            {"path": str(tmp_path / "rl")},
        ]
    )
    read = [(row.id, row.question, row.answer, problem) for row, problem in sources.read()]
    assert read == [
        ("llava/x", "How many?", "3.", None),
        ("mulberry/row-0", "How many?", "B", None),
        ("rl/row-0", "How many?", "3", None),
    ]
    assert sources[1].images == [{"path": str(tmp_path / "pics/a.png"), "bytes": None}]
    ranks = [[row.position for row, _ in sources.read(rank, 2)] for rank in (0, 1)]
    assert ranks == [[0, 2], [1]]


def test_rows_that_cannot_be_used_are_rejected_before_any_request(tmp_path, server):
    rows = [
        {"id": "good", "image": "pics/a.png", "conversations": turns(answer="3")},
        {"id": "good", "image": "pics/a.png", "conversations": turns(answer="3")},
        {"id": "gone", "image": "pics/none.png", "conversations": turns(answer="3")},
        {"id": "broken", "image": "pics/b.png", "conversations": turns(answer="3")},
        {"id": "blank", "image": "pics/a.png", "conversations": turns(answer=" ")},
        {"id": "odd", "image": "pics/a.png", "conversations": turns(answer="{3")},
        {"id": "markers", "image": "pics/a.png", "conversations": turns("<image><image>?", "3")},
        {"id": "long", "image": "pics/a.png", "conversations": turns(answer="3") * 2},
        {"id": "none", "image": None, "conversations": turns("How many?", "3")},
    ]
    path = cold(tmp_path, rows, pictures=("a.png",))
    (tmp_path / "pics" / "b.png").write_bytes(picture()[:60])
    with pytest.raises(RecipeError, match="no row was kept"):  # the good row's picture shows nothing
        executed(tmp_path / "run", path, url(server))
    rejected = rejected_rows(tmp_path / "run")
    assert {row["id"]: row["rule"] for row in rejected if row["id"] != "good"} == {
        "gone": "missing image",
        "broken": "broken image",
        "blank": "empty answer",
        "odd": "answer can't be graded",
        "markers": "image markers don't match the images",
        "long": "not one question and one answer",
        "none": "no image",
    }
    assert [row["rule"] for row in rejected if row["id"] == "good"][-1] == "duplicate id"
    assert len(rejected) == len(rows)
    assert {name.split("/")[0] for name in server.answered} == {"good"}


# Runs


@pytest.fixture(scope="module")
def finished_run(toy, tmp_path_factory):
    with serving() as server:
        run = executed(
            tmp_path_factory.mktemp("bridge") / "run",
            {"path": str(toy / "rl")},
            url(server),
            formats=["llava_cot", "mulberry"],
        )
        run.requests = list(server.answered)
    return run


def test_every_row_ends_once_and_every_request_is_sent_once(finished_run):
    kept, rejected = outputs(finished_run)
    ids = [*kept["id"], *column(rejected, "id")]
    assert sorted(ids) == sorted(f"row-{i}" for i in range(64))
    assert sorted(finished_run.requests) == sorted(
        f"row-{i}/{step}" for i in range(64) for step in ("pseudo_cot", "description", "reasoning")
    )
    assert len(kept) > 30 and len(set(column(rejected, "rule"))) > 2
    for row in kept:
        assert grade(row["answer"], parse_format(row["conversations"][1]["value"]))
    assert any(kept["repairs"])


def test_the_outputs_go_straight_into_the_cold_start(finished_run, toy):
    processor = load_processor(str(toy / "model"))
    kept, _ = outputs(finished_run)
    folder = finished_run.folder
    for source in (
        {"path": str(folder / "dataset")},
        {"path": str(folder / "json"), "data_files": "vision_r1_llava_cot_full.json"},
        {"path": str(folder / "json"), "data_files": "vision_r1_mulberry_sft_full.json"},
    ):
        rows, report = load_rows([source], "sft", processor, max_dropped_share=0)
        assert report.kept == len(kept)
        assert [row["completion"][0]["content"][0]["text"] for row in rows] == [
            row["conversations"][1]["value"] for row in kept
        ]
        assert rows[0]["images"][0].size == rows[1]["images"][0].size


def test_the_report_and_the_card_say_what_was_done(finished_run, capsys):
    kept, rejected = outputs(finished_run)
    main(["report", str(finished_run.folder)])
    card = (finished_run.folder / "dataset" / "README.md").read_text()
    for text in (card, (finished_run.folder / "report.md").read_text()):
        assert f"{len(kept)} of 64 rows" in text
        for rule in set(column(rejected, "rule")):
            assert f"| {rule} " in text
        assert finished_run.prompts.hashes["reasoning"] in text and "Vision-R1-cold" in text
    assert card.startswith("---\n") and "toy-reasoner" in card
    page = (finished_run.folder / "report.html").read_text()
    assert "<table>" in page and "http" not in page.partition("<body>")[0]


def test_show_walks_one_row_through_all_steps(finished_run, capsys):
    kept, rejected = outputs(finished_run)
    mended = next(row for row in kept if row["repairs"])
    main(["show", str(finished_run.folder), mended["id"]])
    said = capsys.readouterr().out
    for part in (
        "pseudo_cot: asked",
        "description: answered",
        "reasoning: reasoning",
        f"mended: {mended['repairs'][0]}",
    ):
        assert part in said
    assert mended["conversations"][1]["value"] in said
    main(["show", str(finished_run.folder), rejected[0]["id"]])
    assert f"dropped: {rejected[0]['rule']}" in capsys.readouterr().out
    with pytest.raises(RecipeError, match=r"no id of .* for example row-0"):
        main(["show", str(finished_run.folder), "row-99"])


def test_other_rules_need_no_request(finished_run, toy, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.folder, folder)
    stricter = tmp_path / "rules.yaml"
    stricter.write_text(f"base: {ROOT / 'data/rules/toy.yaml'}\nmax_words: 60\n")
    with serving() as server:
        run = executed(folder, toy / "rl", url(server), rules=str(stricter))
    assert server.answered == []
    kept, rejected = outputs(run)
    assert column(rejected, "rule").count("too long") > 5 and len(kept) + len(rejected) == 64


def test_a_run_is_not_gone_on_with_under_other_settings(finished_run, toy, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished_run.folder, folder)
    for change, said in [
        ({"reasoner": {"model": "other"}}, "reasoner.model`: was 'toy-reasoner', is 'other'"),
        ({"mllm": {"temperature": 0.5}}, "mllm.temperature"),
        ({"prompts": released_prompts()}, "prompts.pseudo_cot"),
        ({"show_answer": False}, "show_answer"),
    ]:
        with pytest.raises(RecipeError, match=said):
            executed(folder, toy / "rl", "http://127.0.0.1:9/v1", **change)
    other = parquet(tmp_path / "other.parquet", [rl_row(answer=str(i)) for i in range(64)])
    with pytest.raises(RecipeError, match="the sources have changed"):
        executed(folder, other, "http://127.0.0.1:9/v1")


def test_a_refused_run_is_left_as_it_was(finished_run, toy):
    before = {path: path.read_bytes() for path in finished_run.folder.glob("*.*")}
    with pytest.raises(RecipeError, match="begun with other settings"):
        executed(finished_run.folder, toy / "rl", "http://127.0.0.1:9/v1", reasoner={"model": "other"})
    assert {path: path.read_bytes() for path in finished_run.folder.glob("*.*")} == before


def test_shorter_sources_are_told(finished_run, toy, tmp_path):
    shutil.copytree(finished_run.folder, tmp_path / "run")
    with pytest.raises(RecipeError, match="shorter than when it was begun"):
        executed(tmp_path / "run", {"path": str(toy / "rl"), "limit": 5}, "http://127.0.0.1:9/v1")


def test_two_processes_do_not_share_a_run(finished_run):
    with finished_run.journal(), pytest.raises(RecipeError, match="another process"):
        finished_run.journal()


@pytest.mark.parametrize("shared, mode", [(False, "wal"), (True, "truncate")])
def test_hosts_that_share_a_file_system_get_no_wal(tmp_path, shared, mode):
    with Journal(tmp_path / "0.sqlite", shared=shared) as journal:
        assert journal.db.execute("PRAGMA journal_mode").fetchone() == (mode,)


def test_what_is_wrong_with_a_recipe_is_told_at_once(tmp_path, toy, monkeypatch):
    made = values(tmp_path / "run", toy / "rl", "localhost:8000")
    made = recipe.merge(
        made, {"mllm": {"top_p": 2.0}, "reasoner": {"api_key": "secret"}, "formats": ["xml"], "rule": 1}
    )
    with pytest.raises(RecipeError, match="did you mean `rules`"):
        Run(made)
    del made["rule"]
    with pytest.raises(RecipeError) as error:
        Run(made)
    for said in ("mllm.base_url", "top_p 2.0", "`api_key`", "did you mean `api_key_env`", "'xml' is none of"):
        assert said in str(error.value)
    del made["reasoner"]["api_key"]
    made["formats"] = ["llava_cot"]
    made = recipe.merge(made, {"mllm": {"base_url": "http://me:pw@host/v1", "top_p": 1.0}})
    with pytest.raises(RecipeError, match="user or password"):
        Run(made)


# Endpoints


def generated(endpoint, name="row/reasoning", text="Question: ?"):
    async def ask():
        try:
            return await endpoint.generate(name, [{"role": "user", "content": text}])
        finally:
            await endpoint.client.close()

    return asyncio.run(ask())


def endpoint(address, **more):
    common = {"model": "toy-reasoner", "base_url": address, "temperature": 1.0, "top_p": 1.0, "max_tokens": 96}
    return Endpoint(EndpointConfig(**{**common, **more}))


@pytest.mark.parametrize("host", [socket.gethostname(), "127.0.0.2"])
def test_a_server_on_another_host_keeps_its_reasoning(host):
    try:
        socket.gethostbyname(host)
    except OSError:
        pytest.skip(f"{host} has no address")
    with serving(host="0.0.0.0") as server:
        generation, _ = generated(endpoint(url(server, host)))
    assert "description lacks rows" in generation.reasoning and "Final Answer" in generation.text


def test_an_unknown_model_and_a_wrong_key_are_told_without_the_key(monkeypatch):
    monkeypatch.setenv("TOY_KEY", "sk-very-secret")
    with serving(api_key="right") as server, pytest.raises(RecipeError) as error:
        generated(endpoint(url(server), api_key_env="TOY_KEY"))
    assert "TOY_KEY" in str(error.value) and "very-secret" not in str(error.value) and "***" in str(error.value)
    with serving() as server, pytest.raises(RecipeError, match=r"has no other.*It serves toy-reasoner, toy-mllm"):
        generated(endpoint(url(server), model="other"))


def test_the_key_is_in_no_file_of_a_run(tmp_path, toy, monkeypatch, capfd):
    monkeypatch.setenv("TOY_KEY", "sk-very-secret")
    with serving(api_key="sk-very-secret", faults=0.2, slow=0.01, refuse=0.2) as server:
        source = {"path": str(toy / "rl"), "limit": 20}
        key = {"api_key_env": "TOY_KEY"}
        executed(tmp_path / "run", source, url(server), mllm=key, reasoner=key)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or b"very-secret" not in path.read_bytes()
    assert "very-secret" not in "".join(capfd.readouterr())


def test_a_refused_request_is_the_rows_own_end():
    with serving(refuse=1.0) as server, pytest.raises(Rejected) as rejected:
        generated(endpoint(url(server)))
    assert rejected.value.rule == "request refused" and "maximum context length" in rejected.value.detail


@pytest.mark.parametrize("fault", ["429", "500", "503", "reset", "half a body", "half a JSON", "no choices", "slow"])
def test_a_passing_fault_is_tried_again(fault, monkeypatch):
    from vision_r1_recipes import toy_server
    from vision_r1_recipes.bridge import endpoint as module

    monkeypatch.setattr(toy_server, "FAULTS", (fault,))
    monkeypatch.setattr(module, "BACK_OFF", 0.01)
    with serving(failing=2, slow=1.0) as server:
        asking = endpoint(url(server), timeout=0.5)
        generation, _ = generated(asking)
    assert "Final Answer" in generation.text and asking.retries == 2


def test_a_request_that_alone_fails_is_given_up(monkeypatch):
    from vision_r1_recipes import toy_server
    from vision_r1_recipes.bridge import endpoint as module

    monkeypatch.setattr(toy_server, "FAULTS", ("no choices",))
    monkeypatch.setattr(module, "BACK_OFF", 0.01)
    with serving(faults=1.0) as server, pytest.raises(Rejected) as rejected:
        generated(endpoint(url(server), max_retries=3))
    assert rejected.value.rule == "no usable response"
    # but not one row after the other
    asking = endpoint(url(server), max_retries=0, concurrency=3)

    async def ask_all():
        for _ in range(10):
            with contextlib.suppress(Rejected):
                await asking.generate("row/reasoning", [{"role": "user", "content": "?"}])

    with serving(faults=1.0, port=server.server_address[1]), pytest.raises(ServerGone, match="failed 4 rows in a row"):
        asyncio.run(ask_all())


def test_an_outage_costs_no_row(monkeypatch):
    """One success, then nothing for longer than all retries take, then the server is there again."""
    from vision_r1_recipes import toy_server
    from vision_r1_recipes.bridge import endpoint as module

    monkeypatch.setattr(toy_server, "FAULTS", ("503", "reset"))
    monkeypatch.setattr(module, "BACK_OFF", 0.02)
    monkeypatch.setattr(module, "MAX_BACK_OFF", 0.05)

    async def ask(asking, server):
        messages = [{"role": "user", "content": "?"}]
        await asking.generate("first/reasoning", messages)
        server.options.faults = 1.0
        waiting = [asyncio.create_task(asking.generate(f"{i}/reasoning", messages)) for i in range(3)]
        while asking.retries < 30:
            await asyncio.sleep(0.02)
        server.options.faults = 0.0
        return await asyncio.gather(*waiting)

    with serving() as server:
        asking = endpoint(url(server), max_retries=2, server_timeout=60.0)
        assert len(asyncio.run(ask(asking, server))) == 3


def test_a_server_that_is_gone_ends_the_run():
    asking = endpoint("http://127.0.0.1:9/v1", server_timeout=1.0)
    with pytest.raises(ServerGone, match=r"has not answered for 1 s.*Nothing is lost"):
        generated(asking)
    assert asking.retries > 0


@pytest.mark.slow
def test_when_all_requests_are_refused_no_row_is_lost(tmp_path, toy):
    with serving(refuse=1.0) as server, pytest.raises(RecipeError, match=r"refused 20 requests in a row: .*context"):
        executed(tmp_path / "run", toy / "rl", url(server))
    with serving() as server:
        run = executed(tmp_path / "run", toy / "rl", url(server))
    assert "request refused" not in column(outputs(run)[1], "rule")


@pytest.mark.slow
def test_when_a_server_begins_to_refuse_in_the_middle_no_row_is_lost(tmp_path, toy):
    with serving() as server:
        answer = server.options

        def revoke():
            while responses(tmp_path / "run", "reasoning") < 8:
                time.sleep(0.01)
            answer.refuse = 1.0

        answer.latency = 0.05
        threading.Thread(target=revoke, daemon=True).start()
        with pytest.raises(RecipeError, match=r"refused 20 requests in a row"):
            executed(tmp_path / "run", toy / "rl", url(server))
    with serving() as server:
        run = executed(tmp_path / "run", toy / "rl", url(server))
    assert "request refused" not in column(outputs(run)[1], "rule")


def test_a_key_is_never_repeated(monkeypatch):
    monkeypatch.setenv("THE_KEY", " sk-secret\n")
    assert endpoint("http://127.0.0.1:9/v1", api_key_env="THE_KEY")._key == "sk-secret"
    monkeypatch.setenv("THE_KEY", "sk-secret\nx")
    with pytest.raises(RecipeError) as error:
        endpoint("http://127.0.0.1:9/v1", api_key_env="THE_KEY")
    assert "secret" not in str(error.value)


def test_a_key_in_a_wrong_place_is_refused_and_not_repeated(tmp_path, toy):
    for wrong in ({"api_key_env": "sk-live-secret"}, {"base_url": "http://host/v1?api_key=secret"}):
        made = values(tmp_path / "run", toy / "rl", "http://host/v1")
        with pytest.raises(RecipeError) as error:
            Run(recipe.merge(made, {"mllm": wrong}))
        assert "api_key_env" in str(error.value) and "secret" not in str(error.value)


def test_a_malformed_row_or_picture_is_its_own_end(tmp_path, toy):
    from PIL import Image

    Image.new("RGB", (84, 84)).save(tmp_path / "a.dds")
    Image.new("RGB", (84, 84)).save(tmp_path / "b.png")
    turns = [{"from": "human", "value": "<image>How many?"}, {"from": "gpt", "value": "12"}]
    rows = [
        {"id": "dds", "image": "a.dds", "conversations": turns},
        {"id": "null", "image": "b.png", "conversations": [None, turns[1]]},
        {"id": "good", "image": "b.png", "conversations": turns},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with serving() as server, pytest.raises(RecipeError, match="no row was kept"):  # the good one's chain is wrong
        executed(tmp_path / "run", {"path": str(tmp_path), "data_files": "rows.jsonl"}, url(server))
    with Run.load(tmp_path / "run").journals() as (journal,):
        rules = {entry["id"]: entry["rule"] for entry in journal.entries()}
    assert rules == {"dds": "unsupported image format", "null": "malformed row", "good": None}
    assert responses(tmp_path / "run", "reasoning") == 1


def test_several_words_are_not_doubled_either():
    with pytest.raises(Rejected, match="doubled words"):
        finished(f"{THOUGHT} The user says that the image shows that it is so.")
    was, is_ = "Look at the image the description says.", "Look at the image the image shows."
    assert doubled(is_) - doubled(f"the image image. {was}")


def test_a_timeout_counts_the_whole_request(monkeypatch):
    import socket

    def drip(listener):
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(100):
                connection.sendall(b" ")
                time.sleep(0.1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=drip, args=(listener,), daemon=True).start()
        asking = endpoint(f"http://127.0.0.1:{listener.getsockname()[1]}/v1", timeout=0.5, server_timeout=0.1)
        with pytest.raises(ServerGone, match=r"no response within 0.5 s"):
            generated(asking)


def test_odd_responses_are_none():
    asking = endpoint("http://127.0.0.1:9/v1")

    def parsed(content="x", finish_reason="stop", usage=None, message=True):
        message = ChatCompletionMessage.model_construct(role="assistant", content=content) if message else None
        choice = Choice.model_construct(index=0, message=message, finish_reason=finish_reason)
        return asking._parse(ChatCompletion.model_construct(choices=[choice], usage=usage))

    assert parsed().text == "x" and parsed("\ud800").text == "?"
    nothing = CompletionUsage.model_construct(prompt_tokens=None, completion_tokens=None)
    assert parsed(usage=nothing).prompt_tokens == 0
    odd = CompletionUsage.model_construct(prompt_tokens="many", completion_tokens=2**70)
    assert (parsed(usage=odd).prompt_tokens, parsed(usage=odd).completion_tokens) == (0, 0)
    for odd in ({"content": ["x"]}, {"finish_reason": "abort"}, {"message": False}):
        with pytest.raises(_Passing):
            parsed(**odd)


def test_ids_of_any_kind_can_be_sent():
    for name in ("a\nb/reasoning", " a/reasoning", "\u5b57/reasoning"):
        with serving() as server:
            generated(endpoint(url(server)), name)


def test_a_row_without_a_usable_response_is_asked_again_by_the_next_run(tmp_path, toy, monkeypatch):
    from vision_r1_recipes import toy_server
    from vision_r1_recipes.bridge import endpoint as module

    monkeypatch.setattr(toy_server, "FAULTS", ("no choices",))
    monkeypatch.setattr(module, "BACK_OFF", 0.01)
    source = {"path": str(toy / "rl"), "limit": 5}
    with serving(faults=1.0) as server, pytest.raises(RecipeError, match="no row was kept"):
        executed(tmp_path / "run", source, url(server), mllm={"max_retries": 1})
    assert column(rejected_rows(tmp_path / "run"), "rule") == ["no usable response"] * 5
    with serving() as server:
        run = executed(tmp_path / "run", source, url(server))
    assert "no usable response" not in column(outputs(run)[1], "rule")
    assert len(server.answered) == 15


def test_limits_are_kept(monkeypatch):
    clock = [0.0]

    async def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr("vision_r1_recipes.bridge.endpoint.time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr("vision_r1_recipes.bridge.endpoint.asyncio", SimpleNamespace(sleep=sleep))
    budget = _Budget(600)

    async def spend():
        for _ in range(1000):
            await budget.wait(1)

    asyncio.run(spend())
    assert 90 < clock[0] < 101  # 1,000 requests at 600 a minute, 60 at once in the beginning
    budget = _Budget(6000)

    async def spend_tokens():
        begun = clock[0]
        for _ in range(60):
            await budget.wait(1000)
        return clock[0] - begun

    assert asyncio.run(spend_tokens()) > 570  # 60,000 tokens at 6,000 a minute


# Interruptions


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_the_run_goes_on(tmp_path, toy):
    with serving(latency=0.2) as server:
        path = written(tmp_path / "recipe.yaml", values(tmp_path / "run", toy / "rl", url(server)))
        for end in (signal.SIGINT, signal.SIGTERM):
            process = command("run", path)
            before = len(server.answered)
            while len(server.answered) < before + 20:
                assert process.poll() is None, process.stdout.read()
                time.sleep(0.05)
            process.send_signal(end)
            said = process.communicate(timeout=30)[0]
            assert process.returncode == 130 and "Run the same command again" in said and "Traceback" not in said
        main(["report", str(tmp_path / "run")])
        assert "of 64 rows have not come to their end yet" in (tmp_path / "run" / "report.md").read_text()
        process = command("run", path)
        assert process.communicate(timeout=120)[0] and process.returncode == 0
        kept, rejected = outputs(Run.load(tmp_path / "run"))
    assert len(kept) + len(rejected) == 64
    # what was in flight at a stop is asked again, nothing else is
    assert len(server.answered) - 3 * 64 <= 2 * 16


@pytest.mark.slow
def test_a_full_disk_is_told_and_loses_nothing(tmp_path, toy):
    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, 600_000))

    with serving() as server:
        path = written(tmp_path / "recipe.yaml", values(tmp_path / "run", toy / "rl", url(server)))
        process = command("run", path, preexec_fn=small_files)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 2 and "make room" in said and "Traceback" not in said
        with Journal(tmp_path / "run" / "journal" / "00000.sqlite") as journal:
            done = sum(step["responses"] for step in journal.requests().values())
        assert done > 10
        first = len(server.answered)
        executed(tmp_path / "run", toy / "rl", url(server))
    assert len(server.answered) - first == 3 * 64 - done


@pytest.mark.slow
def test_faults_killed_servers_and_killed_clients_lose_nothing_and_repeat_nothing(tmp_path):
    """20 % faults, the server killed and started again twice, the client killed three times, over 500 rows."""
    from vision_r1_recipes.toy import build

    build(tmp_path / "toy", num_base=64, num_cold=2, num_train=500, num_test=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "server.log"
    log.touch()
    options = {"port": port, "faults": 0.2, "slow": 1.5, "refuse": 0.02, "latency": 0.02, "log": log}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]

    def start_server():
        return subprocess.Popen([sys.executable, "-m", "vision_r1_recipes.toy_server", *words])

    more = {"concurrency": 16, "timeout": 1.0, "max_retries": 12, "server_timeout": 60.0}
    made = values(tmp_path / "run", tmp_path / "toy" / "rl", f"http://127.0.0.1:{port}/v1", mllm=more, reasoner=more)
    path = written(tmp_path / "recipe.yaml", made)

    def answered():
        return len(log.read_text().splitlines())

    rng = random.Random(0)
    server, client = start_server(), command("run", path)
    try:
        for at, target in zip(
            sorted(rng.sample(range(100, 1300, 50), 5)), ["client", "server"] * 2 + ["client"], strict=True
        ):
            deadline = time.monotonic() + 120
            while answered() < at:
                assert client.poll() is None, client.stdout.read()
                assert time.monotonic() < deadline
                time.sleep(0.02)
            if target == "client":
                client.kill()
                client.communicate()
                client = command("run", path)
            else:
                server.kill()
                server.wait()
                server = start_server()
        said = client.communicate(timeout=300)[0]
        assert client.returncode == 0, said
    finally:
        client.kill()
        server.kill()
    run = Run.load(tmp_path / "run")
    kept, rejected = outputs(run)
    assert sorted([*kept["id"], *column(rejected, "id")]) == sorted(f"row-{i}" for i in range(500))
    assert (
        "no usable response" not in column(rejected, "rule") and column(rejected, "rule").count("request refused") > 3
    )
    with run.journals() as (journal,):
        query = "SELECT id, step, arrived FROM rows JOIN responses USING (position)"
        arrived = {f"{name}/{step}": at for name, step, at in journal.db.execute(query)}
    served = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(arrived) > 1200 and {entry["id"] for entry in served} >= arrived.keys()
    repeated = [entry for entry in served if entry["received"] > arrived.get(entry["id"], float("inf"))]
    assert repeated == []
    whole = executed_again(tmp_path, made)
    assert kept[:] == outputs(whole)[0][:]  # what is asked alike is answered alike: nothing is mixed up


def executed_again(tmp_path, made):
    with serving(refuse=0.02) as server:
        address = {"base_url": url(server)}
        run = Run(recipe.merge(made, {"output_dir": str(tmp_path / "whole"), "mllm": address, "reasoner": address}))
        reports.execute(run)
    return run


# Servers and clusters


def responses(folder, step):
    found = 0
    for file in folder.glob("journal/*.sqlite"):
        with contextlib.suppress(sqlite3.Error), Journal(file, write=False) as journal:
            found += journal.requests().get(step, {"responses": 0})["responses"]
    return found


@pytest.mark.slurm
def test_the_jobs_on_slurm_are_cancelled_and_go_on(tmp_path, toy, finished_run, slurm):
    cluster = {"tasks": 2, "slurm": {"time": "00:10:00", "partition": "test", "mem_per_cpu_gb": 1}}
    made = served_values(tmp_path / "run", toy / "rl", cluster=cluster)
    for name in ("mllm", "reasoner"):
        made[name]["serve"] += " --latency 1.0"
        made[name]["concurrency"] = 2
    path = written(tmp_path / "recipe.yaml", made)

    def queue():
        listed = subprocess.run(["squeue", "-h", "-o", "%F %j"], capture_output=True, text=True, check=True)
        return [line.split() for line in listed.stdout.splitlines()]

    def wait(ready):
        deadline = time.monotonic() + 300
        while not ready():
            assert time.monotonic() < deadline, queue()
            time.sleep(0.5)

    said = command("run", path).communicate(timeout=120)[0]
    assert any("bridge-reasoning" in name for _, name in queue()), said
    wait(lambda: responses(tmp_path / "run", "description") > 10)
    # datatrove's merging of statistics follows under the same name
    job = min(int(number) for number, name in queue() if name == "bridge-description")
    subprocess.run(["scancel", str(job)], check=True)
    wait(lambda: not queue())  # what depends on it is taken away
    before = responses(tmp_path / "run", "description")
    assert (
        10 < before < 64
        and responses(tmp_path / "run", "pseudo_cot") == 64
        and responses(tmp_path / "run", "reasoning") == 0
    )
    command("run", path).communicate(timeout=120)
    wait(lambda: not queue())
    run = Run.load(tmp_path / "run")
    assert outputs(run)[0][:] == outputs(finished_run)[0][:] and outputs(run)[1] == outputs(finished_run)[1]


def served_values(folder, source, **more):
    serve = {
        "base_url": "http://127.0.0.1:{port}/v1",
        "serve": f"{sys.executable} -m vision_r1_recipes.toy_server --port {{port}}",
    }
    return values(folder, source, "", mllm=serve, reasoner=serve, **more)


@pytest.mark.slow
def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path, toy):
    made = served_values(tmp_path / "run", toy / "rl")
    made["mllm"]["serve"] += " --no_such_option"
    with pytest.raises(RecipeError, match=r"(?s)ended with code 2.*unrecognized arguments: --no_such_option"):
        reports.execute(Run(made))
    made["mllm"]["serve"] = "no-such-command"
    with pytest.raises(RecipeError, match="No such file"):
        reports.execute(Run(made))


@pytest.mark.full
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_the_steps_as_jobs_make_what_a_local_run_makes(tmp_path, toy, finished_run, end):
    made = served_values(tmp_path / "run", toy / "rl", cluster={"tasks": 2, "workers": 2})
    made["mllm"]["serve"] += f" --latency 0.1 --log {tmp_path / 'server.log'}"
    path = written(tmp_path / "recipe.yaml", made)
    process = command("run", path, start_new_session=True)
    deadline = time.monotonic() + 120
    while responses(tmp_path / "run", "pseudo_cot") < 5:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, end)
    process.communicate(timeout=60)
    left = subprocess.run(["pgrep", "-f", f"toy_server.*{tmp_path}"], capture_output=True, text=True).stdout.split()
    assert not left
    process = command("run", path)
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said
    run = Run.load(tmp_path / "run")
    assert outputs(run)[0][:] == outputs(finished_run)[0][:] and outputs(run)[1] == outputs(finished_run)[1]
    with run.journals() as journals:
        assert [len(journal) for journal in journals] == [32, 32]


def test_the_scripted_mllm_reads_its_world(toy):
    from vision_r1_recipes.toy import ROWS, questions

    source = questions(random.Random(5), set())
    for _ in range(60):
        question = next(source)
        truth = " ".join(f"{name}: {' '.join(cells)}." for name, cells in zip(ROWS, question.grid, strict=True))
        assert describe(question.picture.convert("RGB")) == truth
    assert sum(HABITS.values()) < 0.6
