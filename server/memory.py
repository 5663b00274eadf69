"""Resident memory of this process and of its children, from Linux' /proc.

Knows nothing of what the children do. On a system without /proc everything reads as 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ResidentMemory:
    """Pages shared between processes count in each of them."""

    own_bytes: int
    children_bytes: int


def resident_bytes() -> ResidentMemory:
    """Return the resident memory now."""
    pid = os.getpid()
    children = sum(_resident_bytes_of(child) for child in descendants(pid))
    return ResidentMemory(_resident_bytes_of(pid), children)


def _resident_bytes_of(pid: int) -> int:
    try:
        resident_pages = int((_PROC / str(pid) / "statm").read_text().split()[1])
    except OSError:  # it has just ended, or there is no /proc
        return 0
    return resident_pages * os.sysconf("SC_PAGE_SIZE")


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
