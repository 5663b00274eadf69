"""Checks grammars before an engine receives them, in a process that can be killed.

`model/grammar/check.py` is the other end. The engine gets the vocabulary that it needs to follow
them. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import pickle
import signal
import sys
from array import array
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, count

import orjson

from scheduler.client import EngineClient, ModelInfo, Vocabulary
from server.http.errors import unavailable
from server.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_COMMAND = (sys.executable, "-m", "model.grammar.check")
#: The process bounds a check by its processor time, and reports while it uses some. A longer
#: silence is a hang: on no machine does it wait so long for a processor.
_TIMEOUT_S = 30.0
_MAX_TRIES = 2
_START_TIMEOUT_S = 120.0
#: Grammars checked at the same time; others wait.
_MAX_SIDE_BY_SIDE = 4
_MAX_CACHED, _MAX_CACHED_CHARS = 256, 64 * 1024
#: More than the longest grammar of an answer takes in JSON.
_MAX_ANSWER_BYTES = 5 * 2**20


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check."""

    #: Why it cannot be used, or empty.
    error: str = ""
    #: The line of its text at fault, from 1; 0: unknown.
    error_line: int = 0
    #: The parts of it that are not enforced.
    warnings: tuple[str, ...] = ()
    #: For the engine: the grammar as its library keeps it.
    grammar: str = ""


class _NoAnswerError(Exception):
    """The process, or the one it had forked for this grammar, ended before it answered."""


class GrammarChecker:
    """Checks grammars. Starts its process with the first one, and again if it ends or hangs."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starts = asyncio.Lock()
        self._places = asyncio.Semaphore(_MAX_SIDE_BY_SIDE)
        self._numbers = count()
        #: Checks of the present process; the next one has its own.
        self._waiting: dict[int, asyncio.Future[Verdict]] = {}
        #: Checks that reported progress since the last look.
        self._progressed: set[int] = set()
        #: By the grammar's digest: clients send the same few repeatedly.
        self._cached: OrderedDict[bytes, Verdict] = OrderedDict()

    async def judge(self, grammar: str, vocabulary: Vocabulary) -> Verdict:
        """Check a grammar. Raises `ApiError` (503) if the process gives no answer."""
        digest = hashlib.sha256(grammar.encode()).digest()
        verdict = self._cached.get(digest)
        if verdict is None:
            async with self._places:
                verdict = await self._ask(grammar, vocabulary)
        if len(verdict.grammar) <= _MAX_CACHED_CHARS:
            self._cached[digest] = verdict
            self._cached.move_to_end(digest)
        if len(self._cached) > _MAX_CACHED:
            self._cached.popitem(last=False)
        return verdict

    async def _ask(self, grammar: str, vocabulary: Vocabulary) -> Verdict:
        """Return the answer. A process without an answer is replaced, and the check repeated."""
        for _ in range(_MAX_TRIES):
            process = await self._started(vocabulary)
            waiting, number = self._waiting, next(self._numbers)
            answer = waiting[number] = asyncio.get_running_loop().create_future()
            try:
                _send(process, number.to_bytes(8, "little") + grammar.encode())
                self._progressed.add(number)
                while not answer.done() and number in self._progressed:
                    self._progressed.discard(number)
                    await asyncio.wait([answer], timeout=_TIMEOUT_S)
                if answer.done():
                    verdict: Verdict = answer.result()
                    return verdict
                _log.warning("the grammar check hangs and is replaced")
            except _NoAnswerError:
                _log.warning("the grammar check has ended and is replaced")
            finally:
                del waiting[number]
                self._progressed.discard(number)
            self._end(process)
        raise unavailable("grammars cannot be checked: their process gives no answer")

    async def _started(self, vocabulary: Vocabulary) -> asyncio.subprocess.Process:
        async with self._starts:
            if self._process is None:
                if self._reading is not None:
                    await self._reading
                self._process, self._waiting = await _start(vocabulary), {}
                self._reading = asyncio.create_task(self._read(self._process, self._waiting))
            return self._process

    async def _read(
        self, process: asyncio.subprocess.Process, waiting: dict[int, asyncio.Future[Verdict]]
    ) -> None:
        """Read the answers of a process until it ends or sends an invalid one."""
        assert process.stdout is not None, "it is a pipe"
        try:
            async for line in process.stdout:
                number, *result = orjson.loads(line)
                answer = waiting.get(number)
                if not result:
                    self._progressed.add(number)
                elif answer is not None and not answer.done():
                    error, error_line, warnings, grammar = result
                    if not error and not grammar:
                        raise ValueError("neither a fault nor a grammar")  # noqa: TRY301 - as below
                    answer.set_result(Verdict(error, error_line, tuple(warnings), grammar))
        except Exception:  # noqa: BLE001 - after any fault the process is replaced
            _log.exception("an answer of the grammar check cannot be read")
        finally:
            self._end(process)
            for answer in waiting.values():
                if not answer.done():
                    answer.set_exception(_NoAnswerError("it ended"))
            await process.wait()

    def _end(self, process: asyncio.subprocess.Process) -> None:
        """Kill a process and send it no more checks; `_read` fails the waiting ones."""
        if self._process is process:
            self._process = None
        _kill(process)

    def check(self) -> None:
        """Assert that the bounds hold."""
        assert len(self._waiting) <= _MAX_SIDE_BY_SIDE, "more checks run than there are places"
        assert len(self._cached) <= _MAX_CACHED, "too many results are kept"

    async def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._end(self._process)
        if self._reading is not None:
            await self._reading
            self._reading = None


class GrammarService:
    """One for each engine. Does and holds nothing until the first grammar."""

    def __init__(self) -> None:
        self.checker = GrammarChecker()
        self._vocabulary: Vocabulary | None = None
        self._reads = asyncio.Lock()

    async def judge(self, grammar: str, client: EngineClient, tokenizer: Tokenizer) -> Verdict:
        """Check a grammar; afterwards the engine can take it.

        Raises `ApiError` (503) if it cannot be checked.
        """
        async with self._reads:
            if self._vocabulary is None:
                vocabulary = await asyncio.to_thread(vocabulary_of, tokenizer, client.info)
                client.set_vocabulary(vocabulary)
                self._vocabulary = vocabulary
        return await self.checker.judge(grammar, self._vocabulary)

    async def close(self) -> None:
        """End the process of the checker."""
        await self.checker.close()


def vocabulary_of(tokenizer: Tokenizer, info: ModelInfo) -> Vocabulary:
    """Return the bytes of the model's tokens; ids that the tokenizer lacks are empty.

    Takes 1 µs a token.
    """
    pieces = [tokenizer.token_bytes(token_id) for token_id in range(info.vocab_size)]
    special = tokenizer.special_token_ids | set(info.eos_token_ids)
    return Vocabulary(
        packed=b"".join(pieces),
        ends=array("I", accumulate(map(len, pieces))),
        special_token_ids=tuple(sorted(one for one in special if 0 <= one < info.vocab_size)),
        eos_token_ids=info.eos_token_ids,
    )


async def _start(vocabulary: Vocabulary) -> asyncio.subprocess.Process:
    """Return a process that is ready. Raises `ApiError` (503) with the reason if none starts."""
    process = await asyncio.create_subprocess_exec(
        *_COMMAND,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # Its forks are killed with it. (uvloop does not support `process_group`.)
        start_new_session=True,
        limit=_MAX_ANSWER_BYTES,
    )
    assert process.stdout is not None, "it is a pipe"
    assert process.stderr is not None, "it is a pipe"
    is_ready, reason = False, f"it is not ready after {_START_TIMEOUT_S:.0f} s"
    try:
        # The output of a process that has already ended has the reason.
        with suppress(_NoAnswerError):
            _send(process, pickle.dumps(vocabulary))
        with suppress(TimeoutError):
            async with asyncio.timeout(_START_TIMEOUT_S):
                is_ready = bool(await process.stdout.readline())
                if is_ready:
                    return process
                output = (await process.stderr.read()).decode(errors="replace").strip()
                reason = output or f"exit status {await process.wait()}"
    finally:
        if not is_ready:
            _kill(process)
            await process.wait()
    _log.error("the grammar check does not start: %s", reason)
    last = reason.splitlines()[-1]
    raise unavailable(f"grammars cannot be checked: their process does not start ({last})")


def _send(process: asyncio.subprocess.Process, body: bytes) -> None:
    """Write a message. Raises `_NoAnswerError` if the process has closed its input."""
    assert process.stdin is not None, "it is a pipe"
    try:
        process.stdin.write(len(body).to_bytes(8, "little") + body)
    except RuntimeError as error:  # uvloop's, for a transport that is closed
        raise _NoAnswerError("it has closed its input") from error


def _kill(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
