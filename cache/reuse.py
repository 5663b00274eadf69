"""The cached beginning of a prompt that a sequence can start from, before it is admitted.

Knows nothing of free pages. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from sys import maxsize
from typing import NamedTuple

from cache.misses import Misses, MissReason, find_misses
from cache.pending_pages import NextPage
from cache.radix import Prefix, RadixTree
from cache.view import View


class Reuse(NamedTuple):
    """The longest usable beginning of a prompt."""

    prefix: Prefix
    #: Its tokens, those of a copied head included.
    num_tokens: int
    #: Of the sequence's queries, in these pages.
    view: View
    #: The pages that no query behind it reads.
    gap: range
    #: Tokens that may be reused, and tokens whose pages may be shared.
    limit: int
    max_shared_tokens: int

    @property
    def num_unread(self) -> int:
        """Pages that are to be read and that no sequence reads now."""
        path, gap = self.prefix.path, self.gap
        return sum(not node.readers for node in path[: gap.start] + path[gap.stop :])


class Search:
    """Searches prompts in one tree, in their own views or in that of its layers."""

    def __init__(self, tree: RadixTree, view: View, model_view: View) -> None:
        """`view`: of the layers of these pages. `model_view`: of all layers."""
        self._tree = tree
        self._view = view
        self._model_view = model_view

    def own_view(self, view: View) -> View:
        """Return which of these pages' keys the queries of a request with a view read."""
        if self._view == self._model_view:
            return view.within(self._view)
        return view.narrowed(self._view)

    def reuse(
        self,
        tokens: Sequence[int],
        namespace: str,
        view: View,
        max_cached_tokens: int | None = None,
    ) -> Reuse:
        """Find the longest usable beginning, of at most `max_cached_tokens`. O(tokens reused).

        Raises `ValueError` for no tokens.
        """
        if not tokens:
            raise ValueError("tokens must not be empty")
        page_size, max_shared_tokens = self._tree.page_size, self._max_shared_tokens(view)
        limit = max_shared_tokens
        limit = limit if max_cached_tokens is None else min(limit, max_cached_tokens)
        view = self.own_view(view)
        prefix = self._tree.find(tokens, namespace, min(limit, len(tokens) - 1), view)
        num_tokens = len(prefix.path) * page_size + prefix.num_head_tokens
        gap = view.unread_pages(num_tokens, page_size)
        return Reuse(prefix, num_tokens, view, gap, limit, max_shared_tokens)

    def _max_shared_tokens(self, view: View) -> int:
        """Return up to which length the pages of a sequence are those of any other view, too."""
        view = view.within(self._model_view)
        max_keys = view.max_keys
        return maxsize if max_keys is None or view == self._model_view else max_keys

    def misses(
        self, reuse: Reuse, tokens: Sequence[int], namespace: str, *, is_in_flight: bool
    ) -> Misses:
        """Return why no more was found. `is_in_flight`: the next page is being computed."""
        reason = MissReason.LIMITED if reuse.limit < reuse.max_shared_tokens else MissReason.VIEW
        end = min(reuse.limit, len(tokens) - 1)
        misses = find_misses(
            self._tree, reuse.prefix, tokens, end, namespace, is_in_flight=is_in_flight
        )
        return misses.with_rest(len(tokens) - 1 - end, reason)

    def next_page(self, reuse: Reuse, tokens: Sequence[int]) -> NextPage | None:
        """Return the first whole page behind it, as in `Match`."""
        prefix, page_size = reuse.prefix, self._tree.page_size
        index, end = len(prefix.path), min(len(tokens), reuse.max_shared_tokens)
        if prefix.root is None or (index + 1) * page_size > end:
            return None
        end_node = prefix.path[-1] if prefix.path else prefix.root
        return NextPage(end_node, self._tree.key(tokens, index))
