"""Allocates from huge pages, to avoid TLB misses on memory that every step reads.

Knows nothing of the contents. Where the system has no huge pages it is plain memory.
"""

from __future__ import annotations

import ctypes
import math
import threading

import torch
from torch import Tensor

_HUGE_PAGE_BYTES = 2 * 2**20
#: Requested from the system at a time; the unused rest is never touched.
_CHUNK_BYTES = 16 * _HUGE_PAGE_BYTES
_ALIGNMENT_BYTES = 64
_MADV_HUGEPAGE = 14


class Arena:
    """An allocator of tensors, for any number of threads. A chunk is freed with its last tensor."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self.taken_bytes = self._reserved_bytes = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor on the CPU."""
        num_bytes = math.prod(shape) * dtype.itemsize
        room = -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        with self._lock:
            if room > self._chunk.numel():
                self._chunk = _huge(max(room, _CHUNK_BYTES))
                self._reserved_bytes += self._chunk.numel()
            taken, self._chunk = self._chunk[:num_bytes], self._chunk[room:]
            self.taken_bytes += room
        return taken.view(dtype).view(shape)

    def check(self) -> None:
        """Assert that the allocations fit the reserved memory."""
        assert self.taken_bytes <= self._reserved_bytes, "more was taken than is reserved"


def _huge(num_bytes: int) -> Tensor:
    """Return that many bytes, aligned to huge pages, and in such pages if the system has them."""
    memory = torch.empty(num_bytes + _HUGE_PAGE_BYTES, dtype=torch.uint8)
    start = -memory.data_ptr() % _HUGE_PAGE_BYTES
    aligned = memory[start : start + num_bytes]
    libc = ctypes.CDLL(None)
    if hasattr(libc, "madvise"):
        address, length = ctypes.c_void_p(aligned.data_ptr()), ctypes.c_size_t(num_bytes)
        # Advice: a system may ignore it and use plain pages.
        libc.madvise(address, length, _MADV_HUGEPAGE)
    return aligned
