"""The pages of one sequence.

Knows nothing of how pages are found, handed out or evicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cache.frontier import Frontier
from cache.lease import Lease
from cache.moves import PageMove


class MissReason(StrEnum):
    """Why no more of a prompt was reused, in a word for the person who asks."""

    #: All was that can be: the last token is always computed, for its logits.
    COMPLETE = "complete"
    #: Nothing with this beginning is cached in this namespace.
    COLD = "cold"
    #: What is cached goes on with other tokens.
    DIVERGED = "diverged"
    #: What is cached ends here: the rest was never cached, or was evicted.
    ENDED = "ended"
    #: All was that may be: the request wants more of it computed.
    LIMITED = "limited"


@dataclass(slots=True, eq=False)
class Allocation:
    """The pages of one sequence, from `admit` to `free`."""

    #: The block table: page i holds the tokens from `i * page_size` on. Append-only. Under a view
    #: the entries of pages that it reads no more are of any page, and a prompt's table may have to
    #: grow before all of it is computed.
    page_ids: list[int]
    #: To be done before the sequence's first step; none or one.
    moves: list[PageMove]
    #: Leading tokens that are there already, copies included.
    num_cached_tokens: int
    miss_reason: MissReason
    #: Here and below the cache's own. What the sequence reads or has entered: `lease.nodes[i]`
    #: holds the same tokens as `page_ids[i]`, and is another page where two computed the same. The
    #: pages in `lease.gap` were dropped.
    lease: Lease
    #: Tokens known when it was admitted: it is foreseeable which pages it will enter.
    num_known_tokens: int
    frontier: Frontier | None = None

    def private_pages(self) -> list[int]:
        """List the pages which no node has: those not committed, and the duplicates."""
        nodes, gap = self.lease.nodes, self.lease.gap
        duplicates = self.duplicates(range(gap.start))
        duplicates += self.duplicates(range(gap.stop, len(nodes)))
        return duplicates + self.page_ids[len(nodes) :]

    def duplicates(self, indices: range) -> list[int]:
        """List those of some committed pages for which the tree has another."""
        part = slice(indices.start, indices.stop)
        pairs = zip(self.page_ids[part], self.lease.nodes[part], strict=False)
        return [page_id for page_id, node in pairs if page_id != node.page_id]
