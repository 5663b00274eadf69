"""A process that says whether a grammar can be used: `python -m model.grammar_check`.

It forks for each grammar. The child has limits of processor time and of memory which the system
enforces, since no limit of the library bounds the time of everything; of a child that they end, the
parent says that its grammar is too complex. Who is ended otherwise, or waits for a processor, is
not judged. Reads frames from stdin: the vocabulary (pickled), then grammars; writes a line of JSON
for each answer (number, error, its line, warnings, the grammar with its schemas translated), and
for each half second in which a child came on (its number). Knows nothing of requests.
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

#: Of a processor, from the fork on. Real-life schemas take milliseconds.
MAX_CPU_S = 0.7
#: Beyond what the process had when it was forked.
_MAX_GROWTH_BYTES = 512 * 2**20
#: Between the engine, which goes first, and what nobody waits for.
_NICENESS = 5
_MAX_ERROR_CHARS = 600
_MAX_WARNINGS, _MAX_WARNING_CHARS = 8, 200
#: Patterns grow: what is one character to a client may be a class of thirty.
_MAX_GRAMMAR_CHARS = 2**20
_PROGRESS_S = 0.5
_TOO_COMPLEX = "it is too complex: to understand it takes too long, or too much memory"
#: What ends a child at its limits: of time; of memory, or of the stack.
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
    turn = os.memfd_create("turn")
    signal.signal(signal.SIGCHLD, lambda *_: _reap(numbers, used, turn))
    signal.signal(signal.SIGALRM, lambda *_: _tell_progress(numbers, used, turn))
    signal.setitimer(signal.ITIMER_REAL, _PROGRESS_S, _PROGRESS_S)
    _tell(turn, "ready")
    # Who started this reads it until here.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    while (frame := _frame(source)) is not None:
        number = int.from_bytes(frame[:8], "little")
        # Lest a child be reaped before it is noted.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        pid = os.fork()
        if pid == 0:
            _judge(compiler, turn, number, frame[8:].decode())
        numbers[pid] = number
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})


def _reap(numbers: dict[int, int], used: dict[int, list[str]], turn: int) -> None:
    """Take in the children that ended, and answer for those that could not."""
    while numbers and (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
        pid, status = ended
        number = numbers.pop(pid)
        used.pop(number, None)
        if os.WIFSIGNALED(status):
            # Of another's kill the grammar is innocent. This process goes too, and is replaced.
            if os.WTERMSIG(status) not in _AT_LIMITS:
                sys.exit(f"the child of grammar {number} was killed")
            _tell(turn, number, _TOO_COMPLEX, 0, [], "")


def _tell_progress(numbers: dict[int, int], used: dict[int, list[str]], turn: int) -> None:
    """Say of which children a processor has done something: they are slow, but do not hang."""
    for pid, number in list(numbers.items()):
        # It may be reaped meanwhile.
        with suppress(FileNotFoundError, ProcessLookupError):
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
            # Behind the name, which may hold anything: the ticks in user's and in system's code.
            ticks = stat.rpartition(")")[2].split()[11:13]
            if used.setdefault(number, ticks) != ticks:
                used[number] = ticks
                _tell(turn, number)


def _frame(source: BinaryIO) -> bytes | None:
    """Return the next frame: its length in 8 bytes, then as many. None at the end."""
    head = source.read(8)
    if len(head) < 8:
        return None
    length = int.from_bytes(head, "little")
    body = source.read(length)
    return body if len(body) == length else None


def _judge(compiler: Compiler, turn: int, number: int, grammar: str) -> None:
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
        told = [*left_out, *compiler.warnings(grammar)]
        warnings = [one[:_MAX_WARNING_CHARS] for one in told]
    except GrammarError as fault:
        error, line = str(fault)[:_MAX_ERROR_CHARS] or "it cannot be compiled", fault.line
    except MemoryError:
        error = _TOO_COMPLEX
    except BaseException as fault:  # noqa: BLE001 - a child that raised would serve in its parent's place
        error = f"it cannot be compiled ({type(fault).__name__})"
    # What comes now takes as long as its reader.
    signal.setitimer(signal.ITIMER_PROF, 0)
    _tell(turn, number, error, line, warnings[:_MAX_WARNINGS], "" if error else grammar)
    os._exit(0)


def _tell(turn: int, *answer: object) -> None:
    """Write an answer, one process at a time: more than a pipe takes at once would be mixed."""
    fcntl.lockf(turn, fcntl.LOCK_EX)
    line = json.dumps(answer, ensure_ascii=False).encode(errors="replace") + b"\n"
    while line:
        line = line[os.write(1, line) :]
    fcntl.lockf(turn, fcntl.LOCK_UN)


if __name__ == "__main__":
    main()
