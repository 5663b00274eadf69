"""Whether the machine is short of something: then the same may succeed in a while.

Knows nothing of engines or processes.
"""

from __future__ import annotations

import errno

#: No more memory, processes, threads or files.
_ERRNOS = {errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE}
#: Of torch and of Python's threads, whose errors have no type of their own.
_PHRASES = ("allocate memory", "tried to allocate", "out of memory", "can't start new thread")


def is_shortage(fault: BaseException) -> bool:
    """Return whether `fault` is for want of memory, processes, threads or file descriptors."""
    if isinstance(fault, OSError):
        return fault.errno in _ERRNOS
    if isinstance(fault, RuntimeError):
        text = str(fault).lower()
        return any(phrase in text for phrase in _PHRASES)
    return isinstance(fault, MemoryError)
