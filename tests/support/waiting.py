"""The time limit of tests: no event takes longer, even on a slow machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

#: Never reached by a passing test, so it is not a statement about speed.
TIMEOUT_S = 600.0
#: The shortest and the longest pause between two calls. Between them a pause is a fraction of the
#: time so far: in a long wait, frequent calls would take a core from the awaited work.
_PAUSE_S, _LONGEST_PAUSE_S, _PAUSE_PART = 0.02, 0.2, 0.05


def wait_until(is_so: Callable[[], object], log: Iterable[str] = ()) -> None:
    """Wait for `is_so` to become true; the assertion shows `log` if it does not."""
    start_s = time.monotonic()
    while not is_so():
        waited_s = time.monotonic() - start_s
        assert waited_s < TIMEOUT_S, "".join(log) or "it does not happen"
        time.sleep(min(max(_PAUSE_S, waited_s * _PAUSE_PART), _LONGEST_PAUSE_S))
