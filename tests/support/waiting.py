"""The time limit of tests: no event takes longer, even on a slow machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

#: Never reached by a passing test, so it is not a statement about speed.
TIMEOUT_S = 600.0
_PAUSE_S = 0.02


def wait_until(is_so: Callable[[], object], log: Iterable[str] = ()) -> None:
    """Wait for `is_so` to become true; the assertion shows `log` if it does not."""
    end_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < end_s, "".join(log) or "it does not happen"
        time.sleep(_PAUSE_S)
