"""How long tests wait: only what never happens takes longer, on however slow a machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

#: Never reached by what works, so it is no statement about speed.
TIMEOUT_S = 600.0
_PAUSE_S = 0.02


def wait_until(is_so: Callable[[], object], log: Iterable[str] = ()) -> None:
    """Wait for `is_so` to become true; what `log` holds is shown if it does not."""
    end_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < end_s, "".join(log) or "it does not happen"
        time.sleep(_PAUSE_S)
