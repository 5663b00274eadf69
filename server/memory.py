"""Child processes and resident memory, from Linux' /proc.

Knows nothing of the processes' work. On a system without /proc everything reads as 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_PROC = Path("/proc")


def resident_bytes(pids: Iterable[int]) -> int:
    """Return the resident memory of processes; pages that several share count in each."""
    return sum(map(_resident_pages, pids)) * os.sysconf("SC_PAGE_SIZE")


def _resident_pages(pid: int) -> int:
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1])
    except OSError:  # it has just ended, or there is no /proc
        return 0


def descendants(pid: int) -> Iterator[int]:
    """Yield the children of a process, each before its own."""
    for children in (_PROC / str(pid) / "task").glob("*/children"):
        try:
            found = [int(child) for child in children.read_text().split()]
        except OSError:  # the thread has just ended
            continue
        for child in found:
            yield child
            yield from descendants(child)
