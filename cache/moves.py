"""Where a page lies, and moves of pages between such places.

Knows nothing of what a page holds or why it moves. Imports nothing of ours: `model/` reads this
module too.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple


class Tier(IntEnum):
    """A kind of memory that holds pages."""

    DEVICE = 0
    HOST = 1
    DISK = 2


class PageRef(NamedTuple):
    """A page of one tier. Each tier numbers its pages from 0."""

    tier: Tier
    page_id: int


@dataclass(frozen=True, slots=True)
class PageMove:
    """Copy the keys and values of a page's first `num_tokens` tokens into another page."""

    source: PageRef
    target: PageRef
    num_tokens: int
    #: Whether both are pages of the windowed layers, where these have pages of their own.
    is_windowed: bool = False


def head_copy(source: int, target: int, num_tokens: int) -> list[PageMove]:
    """Return the move of a page's head on the device, none where the pages are the same.

    Then the source was evicted a moment ago and handed out again in the very place.
    """
    if source == target:
        return []
    return [PageMove(PageRef(Tier.DEVICE, source), PageRef(Tier.DEVICE, target), num_tokens)]
