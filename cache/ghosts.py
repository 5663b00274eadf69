"""A memory of evicted pages: when each was evicted, and why.

Has the pages' names alone, never their tokens. Knows nothing of clocks: the owner sets the time.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

_MAX_PAGES = 65_536


class Cause(StrEnum):
    """The cause of an eviction."""

    #: Another prompt needed the page.
    ROOM = "room"
    #: The same, of a page whose pin lapsed before.
    PIN_LAPSED = "pin_lapsed"
    #: The cache was reset.
    RESET = "reset"
    #: The logits behind the page were not finite, so its contents were not trusted.
    FAULT = "fault"


#: Evictions that a larger pool would have avoided.
FOR_ROOM = frozenset({Cause.ROOM, Cause.PIN_LAPSED})


class Eviction(NamedTuple):
    """The end of a cached page."""

    cause: Cause
    #: On the clock of `Ghosts.now_s`.
    at_s: float


def first_chain(namespace: str) -> int:
    """Return the name of the empty prefix of a namespace."""
    return hash((0, namespace))


def next_chain(chain: int, key: bytes) -> int:
    """Return the name of the page with these tokens behind the page of another name.

    64 bits of a hash that is keyed by process: equal names of different pages do not occur, and
    cannot be made from outside. A wrong one would make an explanation wrong, and no token.
    """
    return hash((chain, key))


class Ghosts:
    """The newest evictions by the pages' names. O(1) each operation, at most 65,536 entries."""

    def __init__(self, max_pages: int = _MAX_PAGES) -> None:
        #: The time of the next evictions.
        self.now_s = 0.0
        self._half_pages = max_pages // 2
        # Two halves: when the newer one is full, it replaces the older one. So no entry has to be
        # found by its age.
        self._newer: dict[int, Eviction] = {}
        self._older: dict[int, Eviction] = {}
        # Pages evicted at one time share one object.
        self._last = Eviction(Cause.ROOM, self.now_s)

    def __len__(self) -> int:
        return len(self._newer) + len(self._older)

    def add(self, chain: int, cause: Cause) -> None:
        """Remember the eviction of the page with this name, in place of an earlier one."""
        if self._last != (cause, self.now_s):
            self._last = Eviction(cause, self.now_s)
        if len(self._newer) >= self._half_pages:
            self._older, self._newer = self._newer, {}
        self._newer[chain] = self._last

    def discard(self, chain: int) -> None:
        """Forget a page, which is cached again."""
        self._newer.pop(chain, None)
        self._older.pop(chain, None)

    def get(self, chain: int) -> Eviction | None:
        """Return the last eviction of a page.

        None: there was none, it was too long ago, or the page is cached again.
        """
        return self._newer.get(chain) or self._older.get(chain)
