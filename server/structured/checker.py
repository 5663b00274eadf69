"""Has grammars judged before an engine ever sees them, by a process that can be killed.

See `model/grammar_check.py`, which is the other end. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import pickle
import sys
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any

import orjson

from scheduler.client import Vocabulary
from server.errors import unavailable

_COMMAND = (sys.executable, "-m", "model.grammar_check")
#: A judgement may take this long: somewhat more than the deadline of the one who judges.
_PATIENCE_S = 0.85
_START_TIMEOUT_S = 60.0
#: Judged side by side; others wait for their turn.
_MAX_SIDE_BY_SIDE = 4
_MAX_CACHED = 256


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said of a grammar."""

    #: Why it cannot be used, or empty.
    error: str = ""
    #: The line of its text at fault, from 1; 0 where none is to blame.
    error_line: int = 0
    #: What of it is not enforced.
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckerStats:
    """One moment of it."""

    num_waiting: int
    num_cached: int
    is_running: bool


class GrammarChecker:
    """Judges grammars. Starts its process with the first one, and again if it dies."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starts = asyncio.Lock()
        self._places = asyncio.Semaphore(_MAX_SIDE_BY_SIDE)
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[Verdict]] = {}
        #: By the grammar's digest: clients send the same few again and again.
        self._cached: OrderedDict[bytes, Verdict] = OrderedDict()

    async def judge(self, grammar: str, vocabulary: Vocabulary) -> Verdict:
        """Return what is to be said of a grammar, within a second. Raises `ApiError` (503)."""
        digest = hashlib.sha256(grammar.encode()).digest()
        verdict = self._cached.get(digest)
        if verdict is None:
            async with self._places:
                verdict = await self._ask(grammar, vocabulary)
        if verdict is None:
            return Verdict("it is too complex: to understand it takes too long, or too much memory")
        self._cached[digest] = verdict
        self._cached.move_to_end(digest)
        if len(self._cached) > _MAX_CACHED:
            self._cached.popitem(last=False)
        return verdict

    async def _ask(self, grammar: str, vocabulary: Vocabulary) -> Verdict | None:
        """Return the answer; None: there is none."""
        process = await self._started(vocabulary)
        number = next(self._numbers)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            _send(process, number.to_bytes(8, "little") + grammar.encode())
            async with asyncio.timeout(_PATIENCE_S):
                verdict: Verdict = await answer
                return verdict
        except TimeoutError:
            return None
        finally:
            del self._waiting[number]

    async def _started(self, vocabulary: Vocabulary) -> asyncio.subprocess.Process:
        async with self._starts:
            if self._process is None:
                await self._start(vocabulary)
            assert self._process is not None, "it was just started"
            return self._process

    async def _start(self, vocabulary: Vocabulary) -> None:
        process = await asyncio.create_subprocess_exec(
            *_COMMAND,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # What a child says while it is killed is of no use to anybody.
            stderr=asyncio.subprocess.DEVNULL,
        )
        self._process = process
        try:
            _send(process, pickle.dumps(vocabulary))
            async with asyncio.timeout(_START_TIMEOUT_S):
                assert process.stdout is not None, "it is a pipe"
                line = await process.stdout.readline()
        except BaseException:
            await self.close()
            raise
        if not line:
            await self.close()
            raise unavailable("grammars cannot be checked: their process does not start")
        self._reading = asyncio.create_task(self._read(process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None, "it is a pipe"
        async for line in process.stdout:
            told = orjson.loads(line)
            answer = self._waiting.get(told["number"])
            if answer is not None and not answer.done():
                answer.set_result(_verdict(told))
        # It died: whoever waits for it is told by the clock, the next one starts another.
        self._process = None
        await process.wait()

    def stats(self) -> CheckerStats:
        """Return a snapshot."""
        return CheckerStats(len(self._waiting), len(self._cached), self._process is not None)

    def check(self) -> None:
        """Assert that the bounds hold."""
        assert len(self._waiting) <= _MAX_SIDE_BY_SIDE, "more are judged than there are places"
        assert len(self._cached) <= _MAX_CACHED, "too much is remembered"

    async def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if self._reading is not None:
            await self._reading
            self._reading = None


def _verdict(told: dict[str, Any]) -> Verdict:
    return Verdict(told["error"], told["error_line"], tuple(told["warnings"]))


def _send(process: asyncio.subprocess.Process, body: bytes) -> None:
    assert process.stdin is not None, "it is a pipe"
    process.stdin.write(len(body).to_bytes(8, "little") + body)
