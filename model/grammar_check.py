"""A process that says whether a grammar can be used: `python -m model.grammar_check`.

It forks for each grammar. The child has a deadline and a limit of memory which the system enforces,
since no limit of the library bounds the time of everything; a child that is killed says nothing,
and who asked knows by the clock. Reads frames from stdin: the vocabulary (pickled), then grammars;
writes a line of JSON for each answer. Knows nothing of requests.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
from pathlib import Path
from typing import BinaryIO

from model.grammar import Compiler, GrammarError

#: From the fork on. Real-life schemas take milliseconds.
DEADLINE_S = 0.7
#: Beyond what the process had when it was forked.
_MAX_GROWTH_BYTES = 512 * 2**20
#: Between the engine, which goes first, and what nobody waits for.
_NICENESS = 5
#: Lines of several children are not mixed as long as each fits a pipe's buffer (4096 bytes).
_MAX_ERROR_CHARS = 600
_MAX_WARNINGS, _MAX_WARNING_CHARS = 8, 100


def main() -> None:
    """Serve until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Children are reaped by the system.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    source = sys.stdin.buffer
    frame = _frame(source)
    if frame is None:
        return
    compiler = Compiler(pickle.loads(frame))  # noqa: S301 - from the process that started this one
    _tell({"ready": True})
    while (frame := _frame(source)) is not None:
        if os.fork() == 0:
            _judge(compiler, int.from_bytes(frame[:8], "little"), frame[8:].decode())


def _frame(source: BinaryIO) -> bytes | None:
    """Return the next frame: its length in 8 bytes, then as many. None at the end."""
    head = source.read(8)
    if len(head) < 8:
        return None
    length = int.from_bytes(head, "little")
    body = source.read(length)
    return body if len(body) == length else None


def _judge(compiler: Compiler, number: int, grammar: str) -> None:
    """Answer and exit, or be killed. Runs in the child."""
    signal.setitimer(signal.ITIMER_REAL, DEADLINE_S)
    num_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit_bytes = num_pages * resource.getpagesize() + _MAX_GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    os.nice(_NICENESS)
    warnings: list[str] = []
    error, line = "", 0
    try:
        compiler.try_out(compiler.compile(grammar))
        warnings = [one[:_MAX_WARNING_CHARS] for one in compiler.warnings(grammar)]
    except GrammarError as fault:
        error, line = str(fault)[:_MAX_ERROR_CHARS] or "it cannot be compiled", fault.line
    except BaseException as fault:  # noqa: BLE001 - a child that raised would serve in its parent's place
        error = f"it cannot be compiled ({type(fault).__name__})"
    told = {"error": error, "error_line": line, "warnings": warnings[:_MAX_WARNINGS]}
    _tell({"number": number, **told})
    os._exit(0)


def _tell(answer: dict[str, object]) -> None:
    os.write(1, json.dumps(answer, ensure_ascii=False).encode(errors="replace") + b"\n")


if __name__ == "__main__":
    main()
