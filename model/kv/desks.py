"""The pages that are being filled, in full precision, where whole pages are encoded together.

A desk belongs to a slot and a layer. Knows nothing of codes or of page ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from model.kv.format import KVLayout


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
    behind a border, and so does a newest token that is computed again since its mask was late. The
    pages of all tokens that may come again stay, so `desk_tokens` at most.
    """

    def __init__(self, page_size: int, max_draft_tokens: int) -> None:
        self._page_size = page_size
        self._max_draft_tokens = max_draft_tokens
        self._desks: dict[tuple[int, int], OpenPages] = {}

    def add(self, layer: int, slot: int, first: int, k: Tensor, v: Tensor) -> OpenPages:
        """Add a row's keys and values, which go to the indices from `first` on.

        Returns them behind the tokens that precede them in the page of `first`.
        """
        size, first_page = self._page_size, first // self._page_size
        page, end = first_page, first + len(k)
        if first % size:
            desk = self._desks[layer, slot]
            before = slice(first - desk.first_page * size)
            assert page >= desk.first_page, "the page is on no desk"
            assert len(desk.keys) >= before.stop, "tokens of the page are on no desk"
            k, v = torch.cat((desk.keys[before], k)), torch.cat((desk.values[before], v))
            first_page = desk.first_page
        own = slice((page - first_page) * size, None)
        first_kept = max((end - self._max_draft_tokens) // size, first_page)
        kept = slice((first_kept - first_page) * size, None)
        # Cloned: a view would keep the whole chunk of a prompt.
        self._desks[layer, slot] = OpenPages(first_kept, k[kept].clone(), v[kept].clone())
        return OpenPages(page, k[own], v[own])


def desk_tokens(page_size: int, max_draft_tokens: int) -> int:
    """Return how many tokens are on the desk of a slot at most, between two steps.

    These are a draft that may be rejected, and the tokens before it in the page of its first one.
    """
    return page_size - 1 + max_draft_tokens


def desk_bytes(layout: KVLayout, max_draft_tokens: int) -> int:
    """Return the size of a slot's desks in float32, in all layers; 0 where no page needs them."""
    num_layers = sum(
        len(layers)
        for kv_format, layers in layout.layers_by_format().items()
        if not kv_format.can_share_heads
    )
    elements = 2 * num_layers * layout.num_kv_heads * layout.head_dim
    num_tokens = desk_tokens(layout.page_size, max_draft_tokens)
    return num_tokens * elements * torch.float32.itemsize
