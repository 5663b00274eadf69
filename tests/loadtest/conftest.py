"""Servers to put under load: the real application on a model computed by hand, and an odd peer."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import uvicorn
from inline_client import InlineClient

from configs.schema import OctavoConfig, SchedulerSection
from loadtest.records import Failure, Header, Record, Run
from model.fake import FakeRunner
from server.app import create_app
from server.http.lifecycle import Lifecycle
from server.text.load import ModelText, load_text
from waiting import TIMEOUT_S

VOCAB_SIZE = 300

#: The actions of the odd server on a connection, in order: bytes to write, or calls.
RESET, CLOSE, HANG = "reset", "close", "hang"
Step: TypeAlias = bytes | str


class LiveApp:
    """The application on a real socket, in a thread of its own."""

    def __init__(self, text: ModelText, section: dict[str, Any]) -> None:
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._text = text
        self._config = OctavoConfig.model_validate({"server": section})
        self._ready: Future[uvicorn.Server] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        self._server = self._ready.result(TIMEOUT_S)

    async def _serve(self) -> None:
        runner = FakeRunner(VOCAB_SIZE, 4096, page_size=16, num_pages=4096, is_strict=False)
        client = InlineClient(runner, SchedulerSection(), lambda: 0.0)
        await client.start()
        app = create_app(self._config, client, self._text, version="0.0.t", lifecycle=Lifecycle())
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, ws="none", lifespan="off")
        )
        serving = asyncio.create_task(server.serve(sockets=[self._socket]))
        while not server.started and not serving.done():  # noqa: ASYNC110 - uvicorn has no event
            await asyncio.sleep(0)
        self._ready.set_result(server)
        await serving
        client.check()
        await client.close()

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "the server does not stop"


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    """Ids below 256 are bytes, those above a space and their number."""
    path: Path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps({"vocab_size": VOCAB_SIZE, "eos_token_id": 0}))
    return load_text(path)


@pytest.fixture(scope="session")
def start_app(text: ModelText) -> Iterator[Callable[..., LiveApp]]:
    with ExitStack() as stack:

        def start(**section: Any) -> LiveApp:
            live = LiveApp(text, section)
            stack.callback(live.close)
            return live

        yield start


@pytest.fixture(scope="session")
def app(start_app: Callable[..., LiveApp]) -> LiveApp:
    return start_app()


class OddServer:
    """Runs a script on each connection, as a peer with other habits."""

    def __init__(self, connections: Sequence[Sequence[Step]]) -> None:
        self._connections = list(connections)
        self.url = ""
        #: Each request's head and body, as they came.
        self.requests: list[bytes] = []
        self._tasks: list[asyncio.Task[Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)
        try:
            await self._follow(self._connections.pop(0), reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            # The client may leave at any moment; the test ends when it has seen enough.
            pass
        finally:
            writer.close()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)
        await asyncio.sleep(0)  # Closed transports let go of their sockets with the next turn.

    async def _follow(
        self, steps: Sequence[Step], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._read_request(reader)
        for step in steps:
            if step == HANG:
                await reader.read()
            elif step == RESET:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, linger
                )
                writer.transport.abort()
                return
            elif step == "again":
                await self._read_request(reader)
            elif isinstance(step, bytes):
                writer.write(step)
                await writer.drain()
                # The client, in the same loop, reads it before the next is written.
                for _ in range(5):
                    await asyncio.sleep(0)

    async def _read_request(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        self.requests.append(head + await reader.readexactly(int(length or b"0")))


@asynccontextmanager
async def odd_server(*connections: Sequence[Step]) -> AsyncIterator[OddServer]:
    """Serve as many connections as are described."""
    odd = OddServer(connections)
    server = await asyncio.start_server(odd.serve, "127.0.0.1", 0)
    odd.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield odd
    finally:
        server.close()
        await odd.close()


OddServerMaker: TypeAlias = Callable[..., Any]
Work: TypeAlias = Callable[[], Awaitable[None]]


@pytest.fixture(name="odd_server")
def _odd_server() -> OddServerMaker:
    return odd_server


@pytest.fixture
def make_record() -> Callable[..., Record]:
    """A request that was sent at 0 and got a token at each of these moments."""

    def make(*arrival_s: float, tokens: Sequence[float] = (), **changes: Any) -> Record:
        known: dict[str, Any] = {
            "lane": "all",
            "conversation": 0,
            "turn": 0,
            "due_s": 0.0,
            "sent_s": 0.0,
            "ended_s": arrival_s[-1] if arrival_s else 0.0,
            "max_tokens": len(arrival_s),
            "arrival_s": arrival_s,
            "arrival_tokens": tuple(tokens) or (1.0,) * len(arrival_s),
            "output_tokens": int(sum(tokens)) or len(arrival_s),
        }
        return Record(**known | changes)

    return make


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """A run of these records, under a header with these changes."""

    def make(*records: Record, duration_s: float = 10.0, **changes: Any) -> Run:
        known: dict[str, Any] = {
            "name": "ours",
            "url": "http://127.0.0.1:8000",
            "model": "small",
            "server_version": "1.2",
            "date": "2026-11-22T00:00:00+00:00",
            "workload": "fixed",
            "load": {"loop": "closed", "concurrency": 8},
            "seed": 0,
            "host": {"cpu": "a CPU", "cores": 2, "system": "Linux", "load_average": 0.0},
        }
        return Run(Header(**known | changes), records, duration_s)

    return make


@pytest.fixture
def reset() -> Failure:
    return Failure("reset", "the first message")
