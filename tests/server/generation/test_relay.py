"""Output without a reader: no writer waits; whole lines are dropped, counted and reported."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from server.generation.relay import Relay
from waiting import TIMEOUT_S

LINE = b"%06d " + b"x" * 200 + b"\n"


class Stage:
    """A relay in the place of a descriptor with a reader, or without."""

    def __init__(self, reader: int, fd: int) -> None:
        self.reader, self.fd = reader, fd
        self.told: list[int] = []
        self.was_told = threading.Event()
        self.relay = Relay(fd, self._note)

    def _note(self, count: int) -> None:
        self.told.append(count)
        with suppress(OSError):  # The test is over, and has closed it.
            os.write(self.fd, b"%d were dropped\n" % count)
        self.was_told.set()

    def write(self, data: bytes) -> None:
        """Write all of it, from a thread, so that a test fails rather than hangs."""
        thread = threading.Thread(target=self._write, args=(data,), daemon=True)
        thread.start()
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "the writer waits for a reader"

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self.fd, data) :]

    def read(self, end: bytes) -> bytes:
        read = b""
        while not read.endswith(end):
            read += os.read(self.reader, 65536)
        return read


@pytest.fixture(params=[os.pipe, os.openpty], ids=["pipe", "terminal"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    reader, fd = request.param()
    if os.isatty(fd):
        tty.setraw(fd)
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, fd)
        yield Stage(reader, fd)


def test_lines_arrive_as_they_were_written(stage: Stage) -> None:
    assert os.isatty(stage.fd) == os.isatty(stage.reader)
    stage.write(b"one\ntwo\n50 %\r100 %\n")
    assert stage.read(b"100 %\n") == b"one\ntwo\n50 %\r100 %\n"
    stage.relay.flush(TIMEOUT_S)
    assert stage.relay.num_dropped == 0


def test_lines_that_nobody_reads_are_dropped_whole_and_counted(stage: Stage) -> None:
    num_lines = 60_000
    stage.write(b"".join(LINE % number for number in range(num_lines)))
    # There is no reader, so this waits in vain, and no longer than it may.
    stage.relay.flush(1.0)
    read = stage.read(b" were dropped\n").splitlines(keepends=True)
    numbers = [int(line.partition(b" ")[0]) for line in read[:-1]]
    assert numbers == sorted(set(numbers)), "what is kept is kept in order"
    assert {len(line) for line in read[:-1]} == {len(LINE % 0)}
    assert stage.was_told.wait(TIMEOUT_S)
    assert len(numbers) + sum(stage.told) == num_lines
    assert stage.relay.num_dropped == sum(stage.told) > num_lines / 2
    stage.write(b"after\n")
    assert stage.read(b"after\n") == b"after\n"


def test_a_reader_that_is_gone_harms_no_writer() -> None:
    reader, fd = os.pipe()
    stage = Stage(reader, fd)
    os.close(reader)
    for _ in range(3):
        stage.write(b"nobody\n")
        stage.relay.flush(TIMEOUT_S)
    assert (stage.relay.num_dropped, stage.told) == (3, [])
    os.close(fd)


def test_a_descriptor_that_somebody_made_non_blocking_loses_nothing() -> None:
    reader, fd = os.pipe()
    os.set_blocking(fd, False)
    stage = Stage(reader, fd)
    lines = b"".join(LINE % number for number in range(1000))
    stage.write(lines)
    assert stage.read(LINE % 999) == lines
    os.close(reader)
    os.close(fd)


def test_the_end_waits_for_a_reader_as_long_as_it_reads() -> None:
    reader, fd = os.pipe()
    stage = Stage(reader, fd)
    lines = b"".join(LINE % number for number in range(4000))
    received = bytearray()

    def read_slowly() -> None:
        while len(received) < len(lines):
            received.extend(os.read(reader, len(lines) // 40))
            time.sleep(0.05)

    reading = threading.Thread(target=read_slowly)
    stage.write(lines)
    reading.start()
    # All takes four times as long.
    stage.relay.flush(0.5)
    assert not stage.relay._queue.unfinished_tasks
    reading.join(TIMEOUT_S)
    assert received == lines
    os.close(reader)
    os.close(fd)


def test_a_child_does_not_wait_either() -> None:
    reader, fd = os.pipe()
    stage = Stage(reader, fd)
    code = "import os, sys; sys.stderr.write('y' * 99 + '\\n'); os.write(2, b'x\\n' * 3_000_000)"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=fd)
    try:
        assert child.wait(TIMEOUT_S) == 0
    finally:
        child.kill()
    stage.relay.flush(1.0)
    assert stage.relay.num_dropped > 500_000
    os.close(reader)
    os.close(fd)
