"""Adapts the C library's allocator while weights are loaded. Knows nothing of weights."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
#: Tiles are kept in an arena, so temporaries of slabs may use the same memory again and again:
#: new pages take a third of the time of packing.
LARGE_BYTES, LARGE_BESIDE_TILES_BYTES = 2**17, 2**24


@contextmanager
def without_holes(large_bytes: int) -> Iterator[None]:
    """Make malloc take large blocks from the system one by one, and return them one by one.

    Otherwise kept weights reuse the memory of freed temporaries, and the next temporary needs new
    memory: half as much again as the weights, measured. Afterwards malloc has the limits that it
    adapts to by itself. Another malloc than glibc's is left alone.
    """
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(_M_MMAP_THRESHOLD, large_bytes)
    libc.mallopt(_M_TRIM_THRESHOLD, 16 * large_bytes)
    try:
        yield
    finally:
        libc.malloc_trim(0)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
