"""The result of looking a prompt up without admitting it."""

from __future__ import annotations

from dataclasses import dataclass

from cache.pending_pages import NextPage


@dataclass(frozen=True, slots=True)
class Match:
    """The reusable beginning of a prompt, and the page after it."""

    #: Leading tokens that need not be computed: at most all but the last.
    num_tokens: int
    #: A live allocation is computing `next_page`. Waiting for its `commit` (or `free`) avoids
    #: computing the page twice.
    in_flight: bool
    #: The first whole page that is not reused. None: the rest is shorter, or the namespace empty.
    next_page: NextPage | None
