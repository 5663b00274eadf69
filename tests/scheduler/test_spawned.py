"""A process that is started before its engine is known."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
from functools import partial
from pathlib import Path

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner
from scheduler.engine_process import EngineStartError, spawn
from scheduler.process import ProcessClient
from waiting import TIMEOUT_S, wait_until

_CONFIG = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=32)


def _leave_a_mark(path: Path) -> None:
    path.write_text(str(os.getpid()))


def _fail() -> None:
    raise ValueError("a module is missing")


def _runner_after(path: Path) -> FakeRunner:
    assert path.read_text() == str(os.getpid())
    return FakeRunner()


def test_the_first_engine_is_built_in_it_after_the_preload(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    spawned = spawn(partial(_leave_a_mark, mark))
    # Without a message.
    wait_until(mark.exists)
    pid = spawned.process.pid

    async def serve() -> None:
        client = ProcessClient(partial(_runner_after, mark), _CONFIG, spawned=spawned)
        await client.start()
        assert client.engine_pid == pid
        await client.close()

    asyncio.run(serve())
    # The engine's owner has ended it.
    spawned.discard()


def test_the_next_engine_gets_a_process_of_its_own() -> None:
    async def serve() -> None:
        client = ProcessClient(FakeRunner, _CONFIG, spawned=spawn())
        await client.start()
        first = client.engine_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(TIMEOUT_S):
            while client.num_restarts < 1 or not client.is_alive:  # noqa: ASYNC110 - it sets no event
                await asyncio.sleep(0.01)
        assert client.engine_pid != first
        await client.close()

    asyncio.run(serve())


def test_a_failed_preload_is_a_failed_start() -> None:
    async def serve() -> None:
        client = ProcessClient(FakeRunner, _CONFIG, spawned=spawn(_fail))
        with pytest.raises(EngineStartError, match="a module is missing"):
            await client.start()

    asyncio.run(serve())


def test_an_unused_process_is_ended() -> None:
    spawned = spawn()
    spawned.discard()
    spawned.discard()
    assert isinstance(spawned.end, socket.socket)
    spawned.process.join(TIMEOUT_S)
    assert spawned.process.exitcode in {0, 1, -signal.SIGKILL}


def test_a_process_ends_with_its_starter() -> None:
    spawned = spawn()
    spawned.end.close()
    spawned.process.join(TIMEOUT_S)
    assert spawned.process.exitcode == 0


def test_a_process_that_cannot_be_started_is_a_shortage() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(EngineStartError, match="cannot be started") as fault:
            spawn()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert fault.value.is_shortage
