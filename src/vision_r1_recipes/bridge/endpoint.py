"""One model behind an OpenAI-compatible server: vLLM, SGLang, `transformers serve`, a hosted API."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import itertools
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import openai
from openai.types.chat import ChatCompletion
from PIL import Image

from ..recipe import RecipeError
from .steps import REFUSED, UNANSWERED, Generation, Messages, Rejected


BACK_OFF, MAX_BACK_OFF, MAX_RETRY_AFTER = 0.5, 60.0, 300.0  # seconds
# Fields without which vLLM and SGLang would take the model's own, from its generation_config: both off.
NOT_INHERITED = {"repetition_penalty": 1.0, "top_k": -1}
FINISHED = ("stop", "length", "content_filter")
POLL = 0.5  # seconds between two looks at a server that starts


@dataclass
class EndpointConfig:
    """
    The keys of `mllm` and `reasoner`.

    Args:
        model (`str`): The name that the server knows.
        base_url (`str`): Of the API, up to and with `/v1`.
        temperature (`float`), top_p (`float`), max_tokens (`int`):
            Sampling. `max_tokens` covers reasoning and answer.
        extra_body (`dict`, *optional*):
            More fields of every request. A server may take what is not sent from the model's own generation_config,
            a repetition penalty for one.
        api_key_env (`str`, *optional*): Name of the environment variable with the key. Keys have no place in recipes.
        concurrency (`int`, *optional*, defaults to 64): Requests at a time.
        requests_per_minute (`float`, *optional*), tokens_per_minute (`float`, *optional*):
            Limits. Tokens are those of prompts and completions; before a response is there, their mean so far counts.
        timeout (`float`, *optional*, defaults to 1800): Seconds for one request.
        max_retries (`int`, *optional*, defaults to 8): Of one request, while others succeed.
        max_refused (`int`, *optional*, defaults to 20):
            Requests refused in a row until the run stops, and takes these verdicts back: it is hardly the rows' fault.
        server_timeout (`float`, *optional*, defaults to 900):
            Seconds without a single success until the server counts as gone; also to wait for `serve` to be ready.
        serve (`str`, *optional*):
            Command that starts the server; it is ended with the run. `{port}`, here and in `base_url`, is a free port,
            `{model}` the model.
    """

    model: str
    base_url: str
    temperature: float
    top_p: float
    max_tokens: int
    extra_body: dict = field(default_factory=dict)
    api_key_env: str | None = None
    concurrency: int = 64
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = 1800.0
    max_retries: int = 8
    max_refused: int = 20
    server_timeout: float = 900.0
    serve: str | None = None

    def problems(self, where: str) -> list[str]:
        url = urlsplit(self.base_url if self.serve is None else self.base_url.replace("{port}", "1"))
        found = []
        if url.scheme not in ("http", "https") or not url.hostname:
            found.append(f"`{where}.base_url`: {self.base_url!r} is no URL, for example http://localhost:8000/v1.")
        if url.password or url.username:
            found.append(f"`{where}.base_url` holds a user or password: use `api_key_env`.")
        if url.query or url.fragment:
            found.append(f"`{where}.base_url` holds a query or fragment: a key goes into `api_key_env`.")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            found.append(f"`{where}.api_key_env` is no name of an environment variable; the key itself stays out.")
        for name in (
            "max_tokens",
            "max_refused",
            "concurrency",
            "requests_per_minute",
            "tokens_per_minute",
            "timeout",
        ):
            if (value := getattr(self, name)) is not None and value <= 0:
                found.append(f"`{where}.{name}`: {value}, needs to be over 0.")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            found.append(
                f"`{where}`: temperature {self.temperature}, top_p {self.top_p}: at least 0; over 0, up to 1."
            )
        return found

    def key(self) -> str:
        """The API key, empty where none is named; raises [`RecipeError`] when it is not in the environment."""
        key = os.environ.get(self.api_key_env or "", "").strip()
        if self.api_key_env and not key:
            raise RecipeError(f"`api_key_env`: {self.api_key_env} is not set in the environment.")
        if not re.fullmatch(r"[!-~]*", key):
            raise RecipeError(f"`api_key_env`: {self.api_key_env} holds a blank or another character that no key has.")
        return key

    @property
    def identity(self) -> dict[str, Any]:
        """What a response depends on; where it came from does not count."""
        names = ("model", "temperature", "top_p", "max_tokens", "extra_body")
        return {name: getattr(self, name) for name in names}


class ServerGone(RecipeError):
    """No request has succeeded for `server_timeout` seconds."""


class _Budget:
    """At most `per_minute` units a minute on average, and in any burst a tenth of it; 0 is no limit."""

    def __init__(self, per_minute: float):
        self.per_second = per_minute / 60
        self.burst = max(1.0, 6 * self.per_second)
        self.left, self.at = self.burst, time.monotonic()

    async def wait(self, spend: float) -> None:
        """Wait until there is something left, and spend; what was spent too much is added to `left` again."""
        if not self.per_second:
            return
        while True:
            now = time.monotonic()
            self.left, self.at = min(self.burst, self.left + (now - self.at) * self.per_second), now
            if self.left > 0:
                break
            await asyncio.sleep(-self.left / self.per_second + 0.01)
        self.left -= spend


class Endpoint:
    """A client with bounded concurrency, limits, and retries on what may pass: 408, 409, 429, 5xx, lost connections,
    time-outs, and responses that are none."""

    def __init__(
        self,
        config: EndpointConfig,
        world_size: int = 1,
        parse: Callable[..., Generation] = Generation.parse,
    ):
        self.parse = parse  # (content, reasoning or None, **counts)
        share = world_size if config.serve is None else 1  # of limits that ranks have on one server together
        self.config, self._key = config, config.key()
        self.client = openai.AsyncOpenAI(
            base_url=config.base_url, api_key=self._key or "none", timeout=config.timeout, max_retries=0
        )
        self.slots = asyncio.Semaphore(config.concurrency)
        self.requests = _Budget((config.requests_per_minute or 0) / share)
        self.tokens = _Budget((config.tokens_per_minute or 0) / share)
        self.last_success = float("-inf")
        self.answered = self.refused = self.given_up = self.retries = 0
        self.used = 0  # tokens

    async def generate(self, name: str, messages: Messages, **more) -> tuple[Generation, float]:
        """
        One completion and the seconds that it took. `name` is sent as `X-Request-Id`, for the server's log, `more` are
        fields of this request alone.

        Raises:
            `Rejected`: the server refuses this request, or had `max_retries` tries at it while others succeeded.
            `RecipeError`: it would refuse all: an unknown model, no permission.
            `ServerGone`: it is down.
        """
        try:
            sent = await asyncio.to_thread(_with_pictures, messages)
        except OSError as error:
            raise Rejected("missing image", f"{name}: {error}") from error
        failures = 0
        async with self.slots:
            begun = since = time.monotonic()
            for attempt in itertools.count():
                expected = self.used / self.answered if self.answered else self.config.max_tokens
                await self.requests.wait(1)
                await self.tokens.wait(expected)
                tried = time.monotonic()
                try:
                    generation = self._parse(await self._send(name, sent, more))
                except _Passing as failure:
                    self.tokens.left += expected
                    self.retries += 1
                    now = time.monotonic()
                    failures += failure.answered or self.last_success > since
                    since = now
                    if failures > self.config.max_retries:
                        self.given_up += 1
                        if self.given_up > self.config.concurrency:
                            raise self._gone(f"has failed {self.given_up} rows in a row", failure) from failure
                        raise Rejected(UNANSWERED, f"{name}: {failure}") from failure
                    if now - max(self.last_success, begun) > self.config.server_timeout:
                        raise self._gone(
                            f"has not answered for {self.config.server_timeout:g} s", failure
                        ) from failure
                    pause = min(MAX_BACK_OFF, BACK_OFF * 2 ** min(attempt, 10)) * random.uniform(0.5, 1.0)
                    await asyncio.sleep(max(pause, min(failure.retry_after, MAX_RETRY_AFTER)))
                    continue
                self.last_success, self.given_up, self.refused = time.monotonic(), 0, 0
                tokens = generation.prompt_tokens + generation.completion_tokens
                self.used, self.answered = self.used + tokens, self.answered + 1
                self.tokens.left += expected - tokens
                return generation, self.last_success - tried

    def _gone(self, said: str, failure: _Passing) -> ServerGone:
        return ServerGone(
            f"{self.config.base_url} {said}, the last time: {failure}. Nothing is lost: see to it, then run the same "
            "command again."
        )

    async def _send(self, name: str, messages: Messages, more: dict[str, Any]) -> Any:
        config = self.config
        try:
            async with asyncio.timeout(config.timeout):  # the client's own begins again with every byte
                return await self.client.chat.completions.create(
                    model=config.model,
                    messages=messages,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    max_tokens=config.max_tokens,
                    extra_body={**config.extra_body, **more},
                    extra_headers={"X-Request-Id": f"{quote(name)}/{uuid.uuid4().hex[:8]}"},  # vLLM refuses one twice
                )
        except TimeoutError:
            raise _Passing(f"no response within {config.timeout:g} s") from None
        except openai.NotFoundError as error:
            raise RecipeError(
                f"`model`: {config.base_url} has no {config.model}: {self._clean(error)}{await self._served()}"
            ) from None
        except openai.APIStatusError as error:
            raise self._judged(name, error) from None
        except openai.APIResponseValidationError as error:
            raise _Passing(f"no valid response: {self._clean(error)}", answered=True) from None
        except openai.APIConnectionError as error:
            raise _Passing(self._clean(error.__cause__ or error)) from None
        except (ValueError, RecursionError) as error:
            raise _Passing(f"no valid JSON: {self._clean(error)}", answered=True) from None

    def _judged(self, name: str, error: openai.APIStatusError) -> Exception:
        """What a status means: it may pass, it is this request's own, or every request would have it."""
        status, said = error.status_code, f"{error.status_code}: {self._clean(error)}"
        if status in (408, 409, 429) or status >= 500:
            wait = error.response.headers.get("retry-after", "")
            retry_after = float(wait) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]+)?", wait) else 0.0
            return _Passing(said, retry_after, answered=status == 500)
        if status in (401, 402) or (status == 403 and not self.answered):
            fix = f"Is {self.config.api_key_env} right?" if self.config.api_key_env else "Set `api_key_env`."
            return RecipeError(f"{self.config.base_url} refuses access: {said} {fix if status != 402 else ''}".strip())
        self.refused += 1
        if self.refused >= self.config.max_refused:
            return AllRefused(
                f"{self.config.base_url} has refused {self.refused} requests in a row: {said}. Nothing is lost: see "
                "to it, then run the same command again; if these rows are like that, raise `max_refused`."
            )
        return Rejected(REFUSED, f"{name}: {said}")

    def _parse(self, response: Any) -> Generation:
        if not isinstance(response, ChatCompletion) or not response.choices:
            raise _Passing(f"a response without choices: {self._clean(response)}"[:300], answered=True)
        try:
            message, usage = response.choices[0].message, response.usage
            extra = message.model_extra or {}
            generation = self.parse(
                _writable(message.content),
                _writable(extra.get("reasoning_content") or extra.get("reasoning")),
                finish_reason=response.choices[0].finish_reason or "stop",
                prompt_tokens=_count(usage and usage.prompt_tokens),
                completion_tokens=_count(usage and usage.completion_tokens),
            )
        except (AttributeError, TypeError, KeyError) as error:
            raise _Passing(f"no valid response: {error}", answered=True) from None
        if generation.finish_reason not in FINISHED:
            raise _Passing(f"finish_reason is {generation.finish_reason}", answered=True)
        return generation

    async def _served(self) -> str:
        try:
            return f" It serves {', '.join([model.id async for model in self.client.models.list()])}."
        except openai.OpenAIError:
            return ""

    def _clean(self, error: Any) -> str:
        """A message of one line without the key, which servers like to repeat."""
        text = f"{type(error).__name__}: {error}"
        text = text.replace(self._key, "***") if self._key else text
        return " ".join(text.split())[:500]


class AllRefused(RecipeError):
    """Not one of the last requests was accepted: it is hardly the rows' fault."""


class _Passing(Exception):
    """A failure that a later try may not have; `answered`: the server is there."""

    def __init__(self, message: str, retry_after: float = 0.0, answered: bool = False):
        super().__init__(message)
        self.retry_after, self.answered = retry_after, answered


def _count(value: Any) -> int:
    return value if isinstance(value, int) and 0 <= value < 2**40 else 0


def _writable(text: str | None) -> str:
    """Without halves of surrogate pairs, which no file takes."""
    return (text or "").encode("utf-8", "replace").decode()


def _with_pictures(messages: Messages) -> Messages:
    """Pictures as data URLs, in their own bytes."""

    def part(content: dict[str, Any]) -> dict[str, Any]:
        if content["type"] != "image":
            return content
        data = content["image"]["bytes"]
        if data is None:
            data = Path(content["image"]["path"]).read_bytes()
        kind = Image.open(io.BytesIO(data)).format
        if (mime := Image.MIME.get(kind)) is None:
            raise Rejected("unsupported image format", str(kind))
        return {"type": "image_url", "image_url": {"url": f"data:{mime};base64,{base64.b64encode(data).decode()}"}}

    return [
        {**m, "content": m["content"] if isinstance(m["content"], str) else [part(c) for c in m["content"]]}
        for m in messages
    ]


@contextlib.contextmanager
def served(config: EndpointConfig, log: Path) -> Iterator[EndpointConfig]:
    """
    Start `config.serve`, if there is one, wait until it answers, and end it afterwards; it writes to `log`. `{port}`
    in it and in `base_url` is a port that nobody uses; `{model}` in it is the model.
    """
    if config.serve is None:
        yield config
        return
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = config.serve.replace("{port}", str(port)).replace("{model}", config.model)
    config = replace(config, base_url=config.base_url.replace("{port}", str(port)))
    log.parent.mkdir(parents=True, exist_ok=True)
    process = None
    try:
        with log.open("ab") as output:
            try:
                process = subprocess.Popen(
                    shlex.split(command), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                raise RecipeError(f"`serve`: {command}: {error.strerror}.") from error
        deadline = time.monotonic() + config.server_timeout
        while process.poll() is not None or not _ready(config.base_url):
            if process.returncode is not None or time.monotonic() > deadline:
                said = "is not ready" if process.returncode is None else f"ended with code {process.returncode}"
                last = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise RecipeError(f"`serve`: {command} {said}. The end of {log}:\n{last}")
            time.sleep(POLL)
        yield config
    finally:
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def _ready(base_url: str) -> bool:
    """vLLM, SGLang and `transformers serve` have `/health`; others list their models."""
    for url in (base_url.rstrip("/").removesuffix("/v1") + "/health", base_url.rstrip("/") + "/models"):
        try:
            with urllib.request.urlopen(url, timeout=5):
                return True
        except OSError as error:
            code = getattr(error, "code", None)
            if code != 404:
                return code in (401, 403)
    return False
