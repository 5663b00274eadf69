"""A process that checks whether grammars can be used: `python -m model.grammar.check`.

It forks for each grammar. The system limits the child's CPU time and memory, since no limit of the
library bounds all its work. A grammar whose child exceeds them is too complex; a child that was
killed otherwise, or waits for a CPU, gives no verdict. Reads frames from stdin: the vocabulary
(pickled), then grammars. Writes a line of JSON for each verdict (number, error, its line, warnings,
the grammar with its schemas translated). Each half second, writes the number of each child that has
used CPU time. Knows nothing of requests.
"""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import resource
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from model.grammar.grammars import Compiler, GrammarError, translated

#: CPU time from the fork on. Real schemas take milliseconds.
MAX_CPU_S = 0.7
#: In addition to the memory of the process when it was forked.
_MAX_GROWTH_BYTES = 512 * 2**20
#: Between the engine's and that of background threads.
_NICENESS = 5
_MAX_ERROR_CHARS = 600
_MAX_WARNINGS, _MAX_WARNING_CHARS = 8, 200
#: Patterns grow: one character of a client's pattern may become a class of thirty.
_MAX_GRAMMAR_CHARS = 2**20
_PROGRESS_S = 0.5
_TOO_COMPLEX = "it is too complex: to understand it takes too long, or too much memory"
#: Signals that end a child at its limits: of time; of memory, or of the stack.
_AT_LIMITS = {signal.SIGPROF, signal.SIGABRT, signal.SIGSEGV}


def main() -> None:
    """Serve until stdin closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source = sys.stdin.buffer
    frame = _frame(source)
    if frame is None:
        return
    compiler = Compiler(pickle.loads(frame))  # noqa: S301 - from the process that started this one
    numbers, used = dict[int, int](), dict[int, list[str]]()
    lock = os.memfd_create("lock")
    signal.signal(signal.SIGCHLD, lambda *_: _reap(numbers, used, lock))
    signal.signal(signal.SIGALRM, lambda *_: _write_progress(numbers, used, lock))
    signal.setitimer(signal.ITIMER_REAL, _PROGRESS_S, _PROGRESS_S)
    _write(lock, "ready")
    # The parent process reads stderr only until here.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    while (frame := _frame(source)) is not None:
        number = int.from_bytes(frame[:8], "little")
        # So that a child is not reaped before it is recorded.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            _judge(compiler, lock, number, frame[8:].decode())
        numbers[pid] = number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _reap(numbers: dict[int, int], used: dict[int, list[str]], lock: int) -> None:
    """Take the exit codes of children, and write the verdict for one that exceeded a limit."""
    while numbers and (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
        pid, status = ended
        number = numbers.pop(pid)
        used.pop(number, None)
        if os.WIFSIGNALED(status):
            # A kill from outside is not the grammar's fault. The parent replaces this process.
            if os.WTERMSIG(status) not in _AT_LIMITS:
                sys.exit(f"the child of grammar {number} was killed")
            _write(lock, number, _TOO_COMPLEX, 0, [], "")


def _write_progress(numbers: dict[int, int], used: dict[int, list[str]], lock: int) -> None:
    """Write the numbers of children that have used CPU time: they are slow, but do not hang."""
    for pid, number in list(numbers.items()):
        # It may be reaped meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
            # Behind the name, which may hold any character: ticks in user and in system mode.
            ticks = stat.rpartition(")")[2].split()[11:13]
            if used.setdefault(number, ticks) != ticks:
                used[number] = ticks
                _write(lock, number)


def _frame(source: BinaryIO) -> bytes | None:
    """Return the next frame: its length in 8 bytes, then as many. None at the end."""
    head = source.read(8)
    if len(head) < 8:
        return None
    length = int.from_bytes(head, "little")
    body = source.read(length)
    return body if len(body) == length else None


def _judge(compiler: Compiler, lock: int, number: int, grammar: str) -> None:
    """Answer and exit, or be killed. Runs in the child."""
    signal.setitimer(signal.ITIMER_PROF, MAX_CPU_S)
    num_pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit_bytes = num_pages * resource.getpagesize() + _MAX_GROWTH_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    os.nice(_NICENESS)
    warnings: list[str] = []
    error, line = "", 0
    try:
        grammar, left_out = translated(grammar)
        if len(grammar) > _MAX_GRAMMAR_CHARS:
            raise GrammarError("it is too complex: its patterns, written out, are too long")  # noqa: TRY301
        compiler.try_out(compiler.compile(grammar))
        all_warnings = [*left_out, *compiler.warnings(grammar)]
        warnings = [one[:_MAX_WARNING_CHARS] for one in all_warnings]
    except GrammarError as fault:
        error, line = str(fault)[:_MAX_ERROR_CHARS] or "it cannot be compiled", fault.line
    except MemoryError:
        error = _TOO_COMPLEX
    except BaseException as fault:  # noqa: BLE001 - a child that raised would serve in its parent's place
        error = f"it cannot be compiled ({type(fault).__name__})"
    # Writing takes as long as the reader does.
    signal.setitimer(signal.ITIMER_PROF, 0)
    _write(lock, number, error, line, warnings[:_MAX_WARNINGS], "" if error else grammar)
    os._exit(0)


def _write(lock: int, *answer: object) -> None:
    """Write a line, one process at a time: lines longer than a pipe's buffer would be mixed."""
    fcntl.lockf(lock, fcntl.LOCK_EX)
    line = json.dumps(answer, ensure_ascii=False).encode(errors="replace") + b"\n"
    while line:
        line = line[os.write(1, line) :]
    fcntl.lockf(lock, fcntl.LOCK_UN)


if __name__ == "__main__":
    main()
