"""Maps files whose pages the system keeps in huge pages.

Weights are streamed at every step, and a mapping in pages of 4 KiB costs up to a third of the
bandwidth. Whether it has huge ones depends on the file system, on the version of the kernel and on
the page cache's state; the kernel reports it. Knows nothing of the contents of files.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path

_HUGE_PAGE_BYTES = 2 * 2**20
#: Places that are touched to find out, spread over the file; and the huge pages needed of them.
_NUM_SAMPLES, _NUM_HUGE = 16, 12
_SMAPS = Path("/proc/self/smaps")


def map_file(descriptor: int) -> mmap.mmap | None:
    """Map a file if most of it would be in huge pages; otherwise return None.

    Writes to the mapping stay in this process. Raises `OSError`.
    """
    size_bytes = os.fstat(descriptor).st_size
    if size_bytes < _NUM_SAMPLES * _HUGE_PAGE_BYTES:
        return None
    mapping = mmap.mmap(descriptor, size_bytes, access=mmap.ACCESS_COPY)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # The rest of the file then comes into the page cache in whole huge pages, too.
        with suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    if num_huge_pages(mapping) >= _NUM_HUGE:
        return mapping
    mapping.close()
    return None


def num_huge_pages(mapping: mmap.mmap) -> int:
    """Touch a few places of a mapping, and return how many are in huge pages."""
    step = len(mapping) // _NUM_SAMPLES
    for start in range(0, _NUM_SAMPLES * step, step):
        mapping[start]
    with suppress(OSError):
        return _huge_bytes(_address_of(mapping), _SMAPS.read_text()) // _HUGE_PAGE_BYTES
    return 0


def _address_of(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _huge_bytes(address: int, smaps: str) -> int:
    """Return the bytes in huge pages of the mapping at an address."""
    is_found = False
    for line in smaps.splitlines():
        key, *values = line.split()
        if not key.endswith(":"):
            # The first line of a mapping: START-END, in hexadecimal.
            is_found = int(key.split("-")[0], 16) == address
        elif is_found and key == "FilePmdMapped:":
            return int(values[0]) * 1024
    return 0
