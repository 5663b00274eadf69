"""Why the rest of a prompt is not reused: one reason for each of its tokens but the last.

Knows nothing of how prefixes are found, nor of allocations. Reads one namespace alone, so a reason
never depends on the prompts of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from cache.ghosts import Eviction, first_chain, next_chain
from cache.radix import Prefix, RadixTree


class MissReason(StrEnum):
    """Why a token of a prompt is not reused."""

    #: Of no token: all is reused but the last token, which is always computed for its logits.
    COMPLETE = "complete"
    #: No page with it was cached behind the same beginning, as far back as ghosts go.
    NEVER = "never"
    #: Its page was cached, and evicted.
    EVICTED = "evicted"
    #: The cached pages go on with another token, here or before it.
    DIVERGED = "diverged"
    #: Behind the tokens that all views share, keys depend on the view of the request.
    VIEW = "view"
    #: The cached page has it, but pages of this format are reused as a whole.
    PAGE = "page"
    #: A running sequence is computing its page.
    IN_FLIGHT = "in_flight"
    #: The request limits the reuse.
    LIMITED = "limited"


@dataclass(frozen=True, slots=True)
class Misses:
    """The tokens of a prompt that are reused, and the reasons of the others but the last."""

    num_reused_tokens: int
    #: (reason, number of tokens), none of them 0, in the order of the tokens.
    parts: tuple[tuple[MissReason, int], ...] = ()
    #: The first token that differs from the cached pages.
    diverged_at: int | None = None
    #: Of the first evicted page.
    eviction: Eviction | None = None

    @property
    def reason(self) -> MissReason:
        """The reason of the first token that is not reused."""
        return self.parts[0][0] if self.parts else MissReason.COMPLETE

    def num_tokens(self, reason: MissReason) -> int:
        """Return the number of tokens with a reason."""
        return sum(count for why, count in self.parts if why is reason)

    def with_rest(self, num_tokens: int, reason: MissReason) -> Misses:
        """Return the misses of a prompt that goes on with so many tokens of one reason."""
        if not num_tokens:
            return self
        return replace(self, parts=(*self.parts, (reason, num_tokens)))


class _Parts:
    """The missed tokens before `end`, cut into parts from the first one on."""

    def __init__(self, start: int, end: int) -> None:
        self.at = start
        self.end = end
        self.found: list[tuple[MissReason, int]] = []

    def up_to(self, position: int, reason: MissReason) -> bool:
        """Give the next tokens before a position a reason; return whether there are any."""
        count = min(position, self.end) - self.at
        if count > 0:
            self.found.append((reason, count))
            self.at += count
        return count > 0


def find_misses(
    tree: RadixTree,
    prefix: Prefix,
    tokens: Sequence[int],
    end: int,
    namespace: str,
    *,
    is_in_flight: bool,
) -> Misses:
    """Find the reasons of the tokens before `end`, after a search and before anything changes.

    `is_in_flight`: whether a running sequence is computing the first page that is not reused.
    O(evicted pages).
    """
    size, num_known = tree.page_size, len(prefix.known)
    num_reused = len(prefix.path) * size + prefix.num_head_tokens
    parts = _Parts(num_reused, end)
    if is_in_flight:
        parts.up_to((len(prefix.path) + 1) * size, MissReason.IN_FLIGHT)
    num_pages, eviction = _lost(
        tree, prefix, tokens, (end + 1) // size, namespace, is_in_flight=is_in_flight
    )
    # Pages that were not evicted are of no use behind one that was.
    num_heads = prefix.num_known_head_tokens if num_pages == num_known else 0
    if not parts.up_to(num_pages * size + num_heads, MissReason.EVICTED):
        eviction = None
    diverged_at = None
    last = prefix.known[-1] if prefix.known else prefix.root
    if num_pages == num_known and last is not None:
        head = tokens[num_known * size : min((num_known + 1) * size, end)]
        parts.up_to(num_known * size + tree.num_floor_tokens(last, head), MissReason.PAGE)
        if last.children and parts.at:
            diverged_at = parts.at
    reason = MissReason.NEVER if diverged_at is None else MissReason.DIVERGED
    if not parts.up_to(end, reason):
        diverged_at = None
    return Misses(num_reused, tuple(parts.found), diverged_at, eviction)


def _lost(
    tree: RadixTree,
    prefix: Prefix,
    tokens: Sequence[int],
    num_whole_pages: int,
    namespace: str,
    *,
    is_in_flight: bool,
) -> tuple[int, Eviction | None]:
    """Return how many pages were cached at some time, from the first one on.

    Also the eviction of the first of them that is not reusable.
    """
    known, first = prefix.known, len(prefix.path)
    eviction = tree.ghosts.get(known[first].chain) if first < len(known) else None
    chain = known[-1].chain if known else first_chain(namespace)
    for index in range(len(known), num_whole_pages):
        chain = next_chain(chain, tree.key(tokens, index))
        ghost = tree.ghosts.get(chain)
        # A page that is being computed may never have been cached before.
        if ghost is None and not (is_in_flight and index == first):
            return index, eviction
        eviction = eviction or ghost
    return max(len(known), num_whole_pages), eviction
