"""The real HTTP side on a real socket, in a thread of this process, around an engine of choice."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import random
import re
import socket
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import uvicorn
from inline_client import InlineClient
from plain_http import NO_AUTHORITIES

from configs.schema import OctavoConfig, SchedulerSection
from model.fake import FakeRunner
from scheduler.client import (
    CacheCommand,
    CacheStory,
    EngineClient,
    EngineStats,
    EngineUnavailableError,
    ExplainPrefix,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    Started,
    TokenLogprobs,
    TokenOutput,
    Vocabulary,
)
from server import logs
from server.app import create_app
from server.http.lifecycle import Lifecycle
from server.http.protocol import HttpProtocol
from server.structured.checker import GrammarService
from server.text.load import ModelText, load_text
from server.text.template import ChatTemplate
from waiting import TIMEOUT_S

VOCAB_SIZE = 300

ValueT = TypeVar("ValueT")
Script = Callable[["ScriptedClient", GenerateRequest], AsyncGenerator[TokenOutput, None]]


class ScriptedClient:
    """An engine with a test's script: faults of a real one cannot be provoked at will."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.info: ModelInfo = FakeRunner(vocab_size=VOCAB_SIZE).info
        self.is_alive = True
        self.engine_stats = EngineStats()
        self.requests: list[GenerateRequest] = []
        self.commands: list[CacheCommand] = []
        self.observers: list[Callable[[int], None]] = []
        #: Set from the server's loop; tests wait for them in their own thread.
        self.was_asked = threading.Event()
        self.was_closed = threading.Event()

    async def start(self) -> None:
        """Do nothing: there is no engine to start."""

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        self.requests.append(request)
        self.was_asked.set()
        try:
            async for delta in self._script(self, request):
                yield delta
        finally:
            self.was_closed.set()

    async def reset_cache(self) -> int:
        return self.engine_stats.cache.pages_cached

    async def change_cache(self, command: CacheCommand) -> int:
        self.commands.append(command)
        return 7

    async def explain_cache(self, command: ExplainPrefix) -> CacheStory:
        self.commands.append(command)
        return CacheStory()

    def stats(self) -> EngineStats:
        return self.engine_stats

    def on_step(self, observer: Callable[[int], None]) -> None:
        self.observers.append(observer)

    async def close(self) -> None:
        """Do nothing: there is no engine to end."""


class AbsentClient(ScriptedClient):
    """An engine that has not come up."""

    def __init__(self) -> None:
        super().__init__(_absence)
        del self.info
        self.is_alive = False

    async def reset_cache(self) -> int:
        raise EngineUnavailableError("the model is still being loaded")

    async def change_cache(self, command: CacheCommand) -> int:
        del command
        raise EngineUnavailableError("the model is still being loaded")

    async def explain_cache(self, command: ExplainPrefix) -> CacheStory:
        del command
        raise EngineUnavailableError("the model is still being loaded")

    def __getattr__(self, name: str) -> Any:
        if name == "info":
            raise EngineUnavailableError("the model is still being loaded")
        raise AttributeError(name)


async def _absence(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    if request.prompt_token_ids:
        raise EngineUnavailableError("the model is still being loaded")
    yield TokenOutput()


class _Server(uvicorn.Server):
    """Ends at once on request: uvicorn checks ten times a second, and then waits as long again."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.exits = asyncio.Event()

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.exits.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        state = self.server_state
        for connection in list(state.connections):
            connection.shutdown()
        while state.connections or state.tasks:  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0.001)


class LiveServer:
    """A served application; everything in it runs on the loop of its thread."""

    def __init__(
        self,
        client: EngineClient,
        text: ModelText,
        server: dict[str, Any],
        model: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        cache: dict[str, Any] | None = None,
    ) -> None:
        self.client = client
        self.text = text
        self.config = OctavoConfig.model_validate(
            {
                "server": server,
                "model": model or {},
                "scheduler": scheduler or {},
                "cache": cache or {},
            }
        )
        self.log = io.StringIO()
        # asyncio switches Nagle's algorithm off only for a socket whose `proto` is TCP's.
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.loop = asyncio.new_event_loop()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._ready.result(TIMEOUT_S)
        self.http = httpx.Client(base_url=self.url, timeout=TIMEOUT_S, verify=NO_AUTHORITIES)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self.lifecycle, self.grammars = Lifecycle(), GrammarService()
        self.connections_by_address = Counter[str]()
        await self.client.start()
        app = create_app(
            self.config,
            self.client,
            self.text,
            version="0.0.test",
            lifecycle=self.lifecycle,
            chance=random.Random(7),
            grammars=self.grammars,
        )
        self._server = _Server(
            uvicorn.Config(
                app,
                http=partial(  # type: ignore[arg-type] # it is only called
                    HttpProtocol,
                    connections_by_address=self.connections_by_address,
                    max_per_address=self.config.server.max_connections_per_address,
                ),
                log_config=None,
                access_log=False,
                ws="none",
                lifespan="off",
            )
        )
        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0)
        self._ready.set_result(None)
        await serving
        await self.grammars.close()
        await self.client.close()

    def call(self, work: Coroutine[Any, Any, ValueT]) -> ValueT:
        """Do `work` on the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(TIMEOUT_S)

    def wait_idle(self) -> None:
        assert self.call(self.lifecycle.wait_idle(TIMEOUT_S)), "a request does not end"

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def chat(self, content: str = "hello", **body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        return self.post("/v1/chat/completions", messages=messages, **body)

    def log_lines(self) -> list[dict[str, Any]]:
        self.wait_idle()
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def metric(self, series: str) -> float:
        """Return the value of a series, named as in the exposition, without the model's name."""
        found = [
            float(line.rpartition(" ")[2])
            for line in self.http.get("/metrics").text.splitlines()
            if re.sub(r'\{model_name="fake"\}|,?model_name="fake",?', "", line).startswith(
                series + " "
            )
        ]
        assert len(found) == 1, f"{series}: {found}"
        return found[0]

    def close(self) -> None:
        self.http.close()
        self.loop.call_soon_threadsafe(self._server.exits.set)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the server does not stop"
        self.lifecycle.check()


StartServer = Callable[..., LiveServer]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    """Ids below 256 are bytes, those above a space and their number."""
    path: Path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps({"vocab_size": VOCAB_SIZE, "eos_token_id": 0}))
    return load_text(path)


@contextmanager
def _starting(text: ModelText) -> Iterator[StartServer]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with ExitStack() as stack:

        def start(
            client: EngineClient | None = None,
            *,
            words: ModelText | None = None,
            scheduler: dict[str, Any] | None = None,
            runner: FakeRunner | None = None,
            model: dict[str, Any] | None = None,
            cache: dict[str, Any] | None = None,
            **section: Any,
        ) -> LiveServer:
            if client is None:
                runner = runner or FakeRunner(vocab_size=VOCAB_SIZE)
                client = InlineClient(runner, SchedulerSection(**(scheduler or {})), lambda: 0.0)
            live = LiveServer(client, words or text, section, model, scheduler, cache)
            stack.callback(live.close)
            logs.configure("json", live.log)
            return live

        yield start
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def start_server(text: ModelText) -> Iterator[StartServer]:
    """Start servers: `start_server(client=None, scheduler={}, **server_section)`."""
    with _starting(text) as start:
        yield start


@pytest.fixture(scope="module")
def start_shared(text: ModelText) -> Iterator[StartServer]:
    """Start servers for the many tests of a file that leave nothing behind."""
    with _starting(text) as start:
        yield start


@pytest.fixture(scope="module")
def shared(start_shared: StartServer) -> LiveServer:
    """One such server, open to all, with a small limit on bodies."""
    return start_shared(max_request_bytes=4096)


@pytest.fixture
def live(start_server: StartServer) -> LiveServer:
    """The real scheduler around the model that can be computed by hand."""
    return start_server()


@pytest.fixture
def scripted(start_server: StartServer) -> Callable[..., LiveServer]:
    """A server around an engine that follows a script."""
    return lambda script, **section: start_server(ScriptedClient(script), **section)


@pytest.fixture(scope="session")
def scripted_client() -> Callable[[Script], ScriptedClient]:
    """An engine that follows a script."""
    return ScriptedClient


@pytest.fixture
def speaking(scripted: Callable[..., LiveServer], text: ModelText) -> Callable[..., LiveServer]:
    """Start a server whose model outputs `outputs` in turn, `width` tokens at a time."""

    def start(
        *outputs: str,
        template: str,
        width: int = 1,
        reason: FinishReason = FinishReason.STOP,
        cached_tokens: int = 0,
        **section: Any,
    ) -> LiveServer:
        words = ChatTemplate(
            {"default": template}, special_tokens={}, now=lambda: datetime.now(tz=UTC)
        )
        script = _script(outputs, width, reason, cached_tokens)
        return scripted(script, words=replace(text, template=words), **section)

    return start


def _script(outputs: Sequence[str], width: int, reason: FinishReason, cached_tokens: int) -> Script:
    left = list(outputs)

    async def speak(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        token_ids = tuple((left.pop(0) if len(left) > 1 else left[0]).encode())
        started: Started | None = Started(0, 0.0, cached_tokens)
        for start in range(0, len(token_ids), width):
            some = token_ids[start : start + width]
            logprobs: tuple[TokenLogprobs, ...] = ()
            if request.params.logprobs is not None:
                logprobs = tuple(TokenLogprobs(token, -1.0, 1, ()) for token in some)
            yield TokenOutput(some, logprobs, started)
            started = None
        yield TokenOutput(started=started, finish_reason=reason)

    return speak


@pytest.fixture
def absent(start_server: StartServer) -> LiveServer:
    """A server whose engine has not come up."""
    return start_server(AbsentClient())
