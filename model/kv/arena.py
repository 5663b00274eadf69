"""Memory in huge pages: what a step reads all of, or all over, would miss the TLB always.

Knows nothing of what is kept in it. Where the system has no such pages it is plain memory.
"""

from __future__ import annotations

import ctypes
import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 * 2**20
#: Asked of the system at a time; what is not used of it is never touched.
_CHUNK_BYTES = 16 * _HUGE_PAGE_BYTES
_ALIGNMENT_BYTES = 64
_MADV_HUGEPAGE = 14


@dataclass(frozen=True, slots=True)
class ArenaStats:
    """What was taken, in bytes."""

    taken_bytes: int
    reserved_bytes: int


class Arena:
    """Hands out tensors that live as long as anything of theirs does; several threads may ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._taken_bytes = self._reserved_bytes = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor on the CPU."""
        num_bytes = math.prod(shape) * dtype.itemsize
        room = -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        with self._lock:
            if room > self._chunk.numel():
                self._chunk = _huge(max(room, _CHUNK_BYTES))
                self._reserved_bytes += self._chunk.numel()
            taken, self._chunk = self._chunk[:num_bytes], self._chunk[room:]
            self._taken_bytes += room
        return taken.view(dtype).view(shape)

    def stats(self) -> ArenaStats:
        """Return a snapshot."""
        return ArenaStats(self._taken_bytes, self._reserved_bytes)

    def check(self) -> None:
        """Assert that no more was handed out than there is."""
        assert self._taken_bytes <= self._reserved_bytes, "more was taken than is reserved"


def _huge(num_bytes: int) -> Tensor:
    """Return that many bytes, on the boundary of a huge page, in such pages if they can be had."""
    memory = torch.empty(num_bytes + _HUGE_PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE_BYTES
    aligned = memory[start : start + num_bytes]
    libc = ctypes.CDLL(None)
    if hasattr(libc, "madvise"):
        address, length = ctypes.c_void_p(aligned.data_ptr()), ctypes.c_size_t(num_bytes)
        # Advice: a system that does not take it has plain pages here.
        libc.madvise(address, length, _MADV_HUGEPAGE)
    return aligned
