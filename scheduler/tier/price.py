"""Whether reading pages is faster than computing their tokens: both are measured, none is assumed.

Knows nothing of pages' contents, and has no clock.
"""

from __future__ import annotations

#: Weight of the newest load in each running mean.
_NEWEST = 0.2
#: Loads that did not pay in a row, after which one is tried: the disk may have become faster.
_MAX_REFUSED = 64
#: Until computing was timed, and never less than this: a load gets so much time.
_MIN_DEADLINE_S = 0.25
_FIRST_DEADLINE_S = 5.0


class LoadPrice:
    """Estimates a load of n pages as `latency_s + n * page_s`."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        #: The running means; None: no load was timed.
        self.latency_s: float | None = None
        self.page_s: float | None = None
        self._num_refused = 0

    def pays(self, num_pages: int, token_s: float | None) -> bool:
        """Return whether to load pages whose tokens take `token_s` each to compute (None: unknown).

        A time that was not measured is taken to be short, so that it is measured.
        """
        if token_s is None or self.latency_s is None or self.page_s is None:
            return True
        load_s = self.latency_s + num_pages * self.page_s
        if load_s < num_pages * self._page_tokens * token_s or self._num_refused >= _MAX_REFUSED:
            self._num_refused = 0
            return True
        self._num_refused += 1
        return False

    def deadline_s(self, num_pages: int, token_s: float | None) -> float:
        """Return how long a load may take: as long as computing, from where waiting is felt on."""
        if token_s is None:
            return _FIRST_DEADLINE_S
        return max(_MIN_DEADLINE_S, num_pages * self._page_tokens * token_s)

    def observe(self, first_s: float, total_s: float, num_first: int, num_pages: int) -> None:
        """Update the estimates from a load of `num_pages`, of which the first came after `first_s`.

        `num_first`: pages that came together first.
        """
        num_more = num_pages - num_first
        page_s = (total_s - first_s) / num_more if num_more else self.page_s
        if page_s is None:
            page_s = total_s / num_pages
        self.page_s = _mean(self.page_s, page_s)
        self.latency_s = _mean(self.latency_s, max(0.0, first_s - num_first * page_s))


def _mean(mean: float | None, newest: float) -> float:
    return newest if mean is None else mean + _NEWEST * (newest - mean)
