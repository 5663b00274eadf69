"""The pages that are being filled, in full precision, where whole pages are encoded together.

A desk belongs to a slot and a layer. Knows nothing of codes or of page ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from configs.speculation import MAX_DRAFT_TOKENS


class OpenPages(NamedTuple):
    """Keys and values of a sequence from the beginning of a page on."""

    #: Index of the first page in its sequence.
    first_page: int
    #: `[tokens, kv_heads, dim]` each.
    keys: Tensor
    values: Tensor


class Desks:
    """The newest keys and values of each slot, from the beginning of a page on.

    A sequence that comes to a slot begins at the border of a page. Rejected drafts may put it back
    behind a border: the pages of all tokens that may be drafts stay.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._desks: dict[tuple[int, int], OpenPages] = {}

    def add(self, layer: int, slot: int, first: int, k: Tensor, v: Tensor) -> OpenPages:
        """Add a row's keys and values, which go to the indices from `first` on.

        Returns them behind the tokens that precede them in the page of `first`.
        """
        page, num_before = divmod(first, self._page_size)
        end, num_drafts = first + len(k), min(len(k) - 1, MAX_DRAFT_TOKENS)
        if num_before:
            desk = self._desks[layer, slot]
            start = (page - desk.first_page) * self._page_size
            before = slice(start, start + num_before)
            assert page >= desk.first_page, "the page is on no desk"
            assert len(desk.keys[before]) == num_before, "tokens of the page are on no desk"
            k, v = torch.cat((desk.keys[before], k)), torch.cat((desk.values[before], v))
        first_kept = (end - num_drafts) // self._page_size
        rest = slice((first_kept - page) * self._page_size, None)
        # Cloned: a view would keep the whole chunk of a prompt.
        self._desks[layer, slot] = OpenPages(first_kept, k[rest].clone(), v[rest].clone())
        return OpenPages(page, k, v)


def desk_tokens(max_num_seqs: int, max_step_tokens: int, page_size: int) -> int:
    """Return how many tokens are on desks at most: two pages a slot, and the largest step."""
    return 2 * page_size * max_num_seqs + max_step_tokens
