"""Shortages that keep an engine from starting may pass: the client waits for the end of them."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner, fake_output
from model.interface import ModelRunner, SamplingParams
from scheduler.client import EngineUnavailableError, GenerateRequest
from scheduler.process import ProcessClient
from scheduler.shortage import is_shortage
from waiting import TIMEOUT_S

_CONFIG = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=32)
_REQUEST = GenerateRequest((1, 2, 3), SamplingParams(max_tokens=200, ignore_eos=True))
_OUTPUT = fake_output((1, 2, 3), 200)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (OSError(errno.EMFILE, "Too many open files"), True),
        (OSError(errno.ENFILE, "Too many open files in system"), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), True),
        (MemoryError(), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (ValueError("out of memory"), False),
        (RuntimeError("shape mismatch"), False),
    ],
    ids=repr,
)
def test_a_shortage_is_told_from_a_fault(fault: Exception, expected: object) -> None:
    assert is_shortage(fault) is expected


class _Pauses:
    """Stands for the clock: notes how long was waited, and lets something happen meanwhile."""

    def __init__(self, number: int, relief: Callable[[], None]) -> None:
        self.taken_s: list[float] = []
        self.told_s: list[float | None] = []
        self.client: ProcessClient | None = None
        self._number = number
        self._relief = relief

    async def __call__(self, duration_s: float) -> None:
        assert self.client is not None
        assert not self.client.is_alive
        with pytest.raises(EngineUnavailableError) as refused:
            self.client.generate(_REQUEST)
        self.told_s.append(refused.value.retry_after_s)
        self.taken_s.append(duration_s)
        if len(self.taken_s) == self._number:
            self._relief()
        await asyncio.sleep(0)


async def _is_resumed(client: ProcessClient, harm: Callable[[], None]) -> list[int]:
    """Kill the engine under a stream, after `harm`; return all tokens of the stream."""
    await client.start()
    stream = client.generate(_REQUEST)
    told = list((await anext(stream)).token_ids)
    harm()
    assert client.engine_pid is not None
    os.kill(client.engine_pid, signal.SIGKILL)
    async for delta in stream:
        told += delta.token_ids
    return told


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(bounded())


def test_a_full_table_of_files_is_waited_out() -> None:
    """Here every descriptor this process may have is taken, until the ninth pause."""
    held: list[int] = []
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        try:
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE  # noqa: PT017 - the loop ends with it

    def empty() -> None:
        while held:
            os.close(held.pop())

    pauses = _Pauses(9, empty)

    async def test() -> None:
        client = pauses.client = ProcessClient(FakeRunner, _CONFIG, sleep=pauses)
        try:
            assert await _is_resumed(client, fill) == _OUTPUT
            assert client.num_restarts == 1
        finally:
            empty()
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            await client.close()

    _run(test)
    assert pauses.taken_s == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    # A client that retries then finds an engine: after the pause, and the time of a start.
    assert all(
        told is not None and taken <= told < taken + 20
        for told, taken in zip(pauses.told_s, pauses.taken_s, strict=True)
    )


def _build_unless(marker: Path, fault: Exception) -> ModelRunner:
    if marker.exists():
        raise fault
    return FakeRunner()


def _build_with_what_there_is(marker: Path) -> ModelRunner:
    """Fail in one way after the other, as often as there was a start, while the marker is there."""
    if marker.exists():
        number = marker.stat().st_size
        marker.write_bytes(bytes(number + 1))
        if number % 3 == 0:
            # As the kernel does when there is no memory.
            os.kill(os.getpid(), signal.SIGKILL)
        if number % 3 == 1:
            raise MemoryError("the weights")
        raise OSError(errno.ENFILE, "Too many open files in system")
    return FakeRunner()


def test_what_an_engine_lacks_while_it_starts_is_waited_for(tmp_path: Path) -> None:
    marker = tmp_path / "lacks"
    pauses = _Pauses(9, marker.unlink)

    async def test() -> None:
        build = partial(_build_with_what_there_is, marker)
        client = pauses.client = ProcessClient(build, _CONFIG, sleep=pauses)
        assert await _is_resumed(client, marker.touch) == _OUTPUT
        await client.close()

    _run(test)
    assert pauses.taken_s == [1, 2, 4, 8, 16, 30, 30, 30, 30]


def test_a_fault_of_its_own_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    marker = tmp_path / "lacks"
    pauses = _Pauses(100, marker.unlink)

    async def test() -> None:
        build = partial(_build_unless, marker, ValueError("the file is damaged"))
        client = pauses.client = ProcessClient(build, _CONFIG, sleep=pauses)
        lost = asyncio.Event()
        client.on_lost = lost.set
        with pytest.raises(EngineUnavailableError, match="did not come back"):
            await _is_resumed(client, marker.touch)
        await lost.wait()
        # No request waits for an engine that will not start.
        with pytest.raises(EngineUnavailableError):
            await anext(client._streams.generate(_REQUEST, client._isolation.send))
        await client.close()

    _run(test)
    assert pauses.taken_s == [1, 2, 4, 8, 16, 30, 30]


async def _no_clock(_: float) -> None:
    raise RuntimeError("there is no clock")


def test_streams_end_whatever_the_supervisor_meets(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        client = ProcessClient(_StartsOnce(), _CONFIG, sleep=_no_clock)
        lost = asyncio.Event()
        client.on_lost = lost.set
        with pytest.raises(EngineUnavailableError, match="did not come back"):
            await _is_resumed(client, lambda: None)
        await lost.wait()
        assert not client.is_alive
        await client.close()

    _run(test)
    assert "there is no clock" in caplog.text


def test_the_first_start_fails_at_once() -> None:
    async def test() -> None:
        client = ProcessClient(partial(_raise, MemoryError("the weights")), _CONFIG)
        with pytest.raises(EngineUnavailableError, match="the weights"):
            await client.start()
        await client.close()

    _run(test)


def _raise(fault: Exception) -> ModelRunner:
    raise fault


class _StartsOnce:
    """Makes a runner, and cannot be sent to a second process."""

    is_sent = False

    def __call__(self) -> ModelRunner:
        return FakeRunner()

    def __getstate__(self) -> dict[str, Any]:
        if self.is_sent:
            raise OSError("sent only once")
        self.is_sent = True
        return {}


def test_streams_end_also_where_no_process_can_be_started() -> None:
    async def test() -> None:
        pauses = _Pauses(100, lambda: None)
        client = pauses.client = ProcessClient(_StartsOnce(), _CONFIG, sleep=pauses)
        with pytest.raises(EngineUnavailableError, match="did not come back"):
            await _is_resumed(client, lambda: None)
        await client.close()

    _run(test)
