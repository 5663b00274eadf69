"""The process that judges grammars, when it ends, hangs, waits, answers nonsense or does not start.

The process is the real one; `_broken` starts it with its `_judge` replaced, once or always.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path

import pytest

from model.fake import FakeRunner
from model.interface import Vocabulary
from server.http.errors import ApiError
from server.structured import checker as checker_module
from server.structured.checker import GrammarChecker, vocabulary_of
from server.text.load import ModelText

GOOD = 'start: "a"'
_EITHER = [{"properties": {"a": {"type": "string"}}}, {"properties": {"b": {"type": "integer"}}}]
MONSTER = "start: %json " + json.dumps({"allOf": [{"anyOf": _EITHER}] * 30})

Broken = Callable[..., None]
Test = Callable[[GrammarChecker, Vocabulary], Coroutine[None, None, None]]


@pytest.fixture
def vocabulary(text: ModelText) -> Vocabulary:
    return vocabulary_of(text.tokenizer, FakeRunner(vocab_size=300).info)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Broken:
    def start_with(judge: str, *, is_always: bool = False) -> None:
        mark = tmp_path / "was started"
        code = f"""
import os, signal, time
from pathlib import Path
from model.grammar import check as grammar_check
real = grammar_check._judge
def judge(compiler, turn, number, grammar):
    {judge}
    os._exit(0)
if {is_always} or not Path({str(mark)!r}).exists():
    Path({str(mark)!r}).touch()
    grammar_check._judge = judge
grammar_check.main()
"""
        monkeypatch.setattr(checker_module, "_COMMAND", (sys.executable, "-c", code))
        monkeypatch.setattr(checker_module, "_TIMEOUT_S", 3.0)

    return start_with


def run(test: Test, vocabulary: Vocabulary) -> None:
    async def closed() -> None:
        checker = GrammarChecker()
        try:
            await test(checker, vocabulary)
            checker.check()
            assert not checker._waiting
        finally:
            await checker.close()

    # Not the daemon's uvloop, which complains of pipes at a loop's end; tests/e2e has that one.
    asyncio.run(closed())


#: Faults between a question and its answer, as code of the process.
FAULTS = {
    "it dies": "os.kill(os.getppid(), signal.SIGKILL)",
    "its parent hangs": "os.kill(os.getppid(), signal.SIGSTOP)",
    "it hangs": "os.kill(os.getpid(), signal.SIGSTOP)",
    "it is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "it says nothing": "os._exit(0)",
    "no JSON": 'os.write(1, b"thread panicked at\\n")',
    "no bytes of a text": 'os.write(1, b"\\xff\\xfe\\n")',
    "no list": 'os.write(1, b"7\\n")',
    "an object": 'os.write(1, b"{}\\n")',
    "no grammar": 'os.write(1, b\'[0, "", 0, [], ""]\\n\')',
    "too short": 'os.write(1, b"[0]\\n")',
    "too long": 'os.write(1, b\'[0, "", 0, [], "", 1]\\n\')',
    "the wrong types": 'os.write(1, b\'[0, "", 0, 5, ""]\\n\')',
    "a number that is none": 'os.write(1, b\'[[], "", 0, [], ""]\\n\')',
    "another's number": 'os.write(1, b\'[99, "", 0, [], ""]\\n\')',
    "a line without an end": 'os.write(1, b"x" * 5_000_000)',
    "a line that is cut": 'os.write(1, b"[0,"); os.kill(os.getppid(), signal.SIGKILL)',
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_costs_one_more_try_and_no_verdict(
    broken: Broken, vocabulary: Vocabulary, fault: str
) -> None:
    broken(fault)

    async def test(checker: GrammarChecker, vocabulary: Vocabulary) -> None:
        assert (await checker.judge(GOOD, vocabulary)).error == ""
        assert "nothing" in (await checker.judge("start: nothing", vocabulary)).error

    run(test, vocabulary)


@pytest.mark.parametrize(
    "name", ["it dies", "it hangs", "its parent hangs", "no JSON", "too short"]
)
def test_a_fault_that_stays_is_503_for_all_who_wait(
    broken: Broken, vocabulary: Vocabulary, name: str
) -> None:
    broken(FAULTS[name], is_always=True)

    async def test(checker: GrammarChecker, vocabulary: Vocabulary) -> None:
        asked = [checker.judge(f'start: "{i}"', vocabulary) for i in range(3)]
        for told in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(told, ApiError)
            assert told.status == 503
            assert "Retry-After" in told.headers

    run(test, vocabulary)


@pytest.mark.parametrize(
    "waits",
    ["time.sleep(1.2)", "[sum(range(10**6)) or time.sleep(0.8) for _ in range(4)]"],
    ids=["for long", "again and again"],
)
def test_who_waits_for_a_processor_is_not_too_complex(
    broken: Broken, vocabulary: Vocabulary, waits: str
) -> None:
    broken(f"{waits}; real(compiler, turn, number, grammar)")

    async def test(checker: GrammarChecker, vocabulary: Vocabulary) -> None:
        assert (await checker.judge(GOOD, vocabulary)).error == ""
        # Only the first process has judged it.
        assert next(checker._numbers) == 1

    run(test, vocabulary)


@pytest.mark.parametrize(
    "monster",
    ["all(iter(lambda: True, 0))", "bytearray(2**40)", "os.abort()"],
    ids=["of time", "of memory", "of the stack"],
)
def test_who_reaches_a_limit_is_too_complex_and_harms_nobody(
    broken: Broken, vocabulary: Vocabulary, monster: str
) -> None:
    broken(f"compiler.compile = lambda _: {monster}; real(compiler, turn, number, grammar)")

    async def test(checker: GrammarChecker, vocabulary: Vocabulary) -> None:
        for grammar in (GOOD, 'start: "b"'):
            assert "too complex" in (await checker.judge(grammar, vocabulary)).error
        # Both were judged by the process that is broken: it was not replaced.
        assert checker._process is not None

    run(test, vocabulary)


def test_neighbours_of_a_monster_are_judged(vocabulary: Vocabulary) -> None:
    async def test(checker: GrammarChecker, vocabulary: Vocabulary) -> None:
        asked = [checker.judge(one, vocabulary) for one in (MONSTER, GOOD, 'start: "b"')]
        monster, *good = await asyncio.gather(*asked)
        assert "too complex" in monster.error or "too large" in monster.error
        assert [one.error for one in good] == ["", ""]

    run(test, vocabulary)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_when_idle_is_replaced(
    vocabulary: Vocabulary, sent: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checker_module, "_TIMEOUT_S", 3.0)

    async def test(checker: GrammarChecker, vocabulary: Vocabulary) -> None:
        assert (await checker.judge(GOOD, vocabulary)).error == ""
        assert checker._process is not None
        os.kill(checker._process.pid, sent)
        assert checker._reading is not None
        if sent == signal.SIGKILL:
            await checker._reading
            assert checker._process is None
        # A kept result needs no process.
        assert (await checker.judge(GOOD, vocabulary)).error == ""
        assert "nothing" in (await checker.judge("start: nothing", vocabulary)).error

    run(test, vocabulary)


@pytest.mark.parametrize(
    ("command", "eos", "said"),
    [
        (("false",), 2, "exit status 1"),
        ((sys.executable, "-c", "raise ImportError('no such library')"), 2, "no such library"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), 2, "not ready"),
        (checker_module._COMMAND, 300, "300"),
        (checker_module._COMMAND, -1, "eos_token must be"),
    ],
    ids=["false", "import", "hangs", "eos too large", "eos negative"],
)
def test_a_process_that_does_not_start_is_503_and_says_why(
    vocabulary: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    command: tuple[str, ...],
    eos: int,
    said: str,
) -> None:
    monkeypatch.setattr(checker_module, "_COMMAND", command)
    if said == "not ready":
        monkeypatch.setattr(checker_module, "_START_TIMEOUT_S", 0.5)

    async def test(checker: GrammarChecker, vocabulary: Vocabulary) -> None:
        with pytest.raises(ApiError, match=said) as error:
            await checker.judge(GOOD, replace(vocabulary, eos_token_ids=(eos,)))
        assert error.value.status == 503
        assert "Traceback" not in error.value.message
        [record] = [one for one in caplog.records if one.levelno == logging.ERROR]
        assert "does not start" in record.getMessage()

    run(test, vocabulary)
