"""Pages that are encoded as a whole: a query reads its own page as it is, and codes before it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attention_scenes import CPU, dense, poison
from model.attention.interface import AttentionBatch, AttentionSpec
from model.attention.reference import ReferenceAttention
from model.kv.format import KV_FORMATS, PAGE_FORMATS, KVFormat
from model.kv.pool import KVPool

PAGE_SIZE, LENGTH, HEADS, GROUP, DIM = 8, 45, 2, 3, 16
NUM_PAGES = -(-LENGTH // PAGE_SIZE)


@dataclass
class Text:
    """The queries, keys and values of a sequence."""

    q: Tensor
    k: Tensor
    v: Tensor

    def expected(self, kv_format: KVFormat, window: int | None) -> Tensor:
        """Attend by the definition, page by page, in float64."""
        coding, rows = kv_format.page_coding, list[Tensor]()
        assert coding is not None, "a format of single tokens"
        whole = LENGTH // PAGE_SIZE * PAGE_SIZE
        pages = [one[:whole].unflatten(0, (-1, PAGE_SIZE)) for one in (self.k, self.v)]  # type: ignore[no-untyped-call] # torch's
        keys, values = (one.flatten(0, 1).float() for one in coding.decode(*coding.encode(*pages)))
        for start in range(0, LENGTH, PAGE_SIZE):
            own = slice(start, start + PAGE_SIZE)
            read = torch.cat((keys[:start], self.k[own])), torch.cat((values[:start], self.v[own]))
            rows.append(dense(self.q[own], *read, DIM**-0.5, window))
        return torch.cat(rows).flatten(1)


def make_text(seed: int) -> Text:
    qkv = torch.randn(
        LENGTH, HEADS * (GROUP + 2), DIM, generator=torch.Generator().manual_seed(seed)
    )
    return Text(*qkv.split([HEADS * GROUP, HEADS, HEADS], dim=1))  # type: ignore[no-untyped-call] # torch's


class Sequences:
    """Two sequences over one pool, each in a slot of its own."""

    def __init__(self, kv_format: KVFormat, window: int | None = None) -> None:
        spec = AttentionSpec(
            num_layers=1,
            num_heads=HEADS * GROUP,
            num_kv_heads=HEADS,
            head_dim=DIM,
            scale=DIM**-0.5,
            windows=(window,),
            dtype=torch.float32,
            kv_format=kv_format,
            device=CPU,
        )
        self.pool = KVPool(spec.layout(PAGE_SIZE), 2 * NUM_PAGES, CPU)
        poison(self.pool.pages(0))
        self.backend = ReferenceAttention(spec, self.pool)
        self.table = torch.randperm(2 * NUM_PAGES).int().view(2, NUM_PAGES)

    def step(self, *rows: tuple[int, Text, int, int]) -> list[Tensor]:
        """Attend rows of (slot, text, first token, end)."""
        counts = [end - first for _, _, first, end in rows]
        slots = [slot for slot, *_ in rows]
        self.backend.plan(
            AttentionBatch(
                query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
                seq_lens=torch.tensor([end for *_, end in rows]).int(),
                block_table=self.table[slots],
                positions=torch.cat([torch.arange(first, end) for *_, first, end in rows]),
                # Of no use here: pages are written as a whole.
                kv_slots=torch.zeros(sum(counts), dtype=torch.int64),
                max_query_len=max(counts),
                max_seq_len=max(end for *_, end in rows),
                slots=tuple(slots),
            )
        )
        q, k, v = (
            torch.cat([getattr(text, name)[first:end] for _, text, first, end in rows])
            for name in ("q", "k", "v")
        )
        return list(self.backend.attend(0, q, k, v).split(counts))  # type: ignore[no-untyped-call] # torch's


@pytest.mark.parametrize("kv_format", PAGE_FORMATS, ids=lambda one: one.name)
@pytest.mark.parametrize("window", [None, 1, 11, 30])
@pytest.mark.parametrize("cuts", [(), tuple(range(1, LENGTH)), (8, 16, 40), (3, 7, 9, 30)], ids=len)
def test_every_cut_is_by_the_definition(
    kv_format: KVFormat, window: int | None, cuts: tuple[int, ...]
) -> None:
    text, other = make_text(1), make_text(2)
    sequences = Sequences(kv_format, window)
    found, beside = list[Tensor](), list[Tensor]()
    for first, end in pairwise((0, *cuts, LENGTH)):
        mine, of_other = sequences.step((1, text, first, end), (0, other, first, end))
        found.append(mine)
        beside.append(of_other)
        if window is not None:
            # Pages behind the window may be given back and be another sequence's.
            dropped = sequences.table[1, : max(end - window + 1, 0) // PAGE_SIZE].long()
            for plane in sequences.pool.pages(0).scales:
                plane[dropped] = torch.nan
    for rows, one in ((found, text), (beside, other)):
        expected = one.expected(kv_format, window).float()
        torch.testing.assert_close(torch.cat(rows), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_drafts", [2, 7, 12])
def test_a_rejected_draft_leaves_no_trace(num_drafts: int) -> None:
    """Not even where it filled a page: the page is encoded again."""
    kv_format = KV_FORMATS["kivi4"]
    text, wrong = make_text(1), make_text(3)
    sequences = Sequences(kv_format)
    found = sequences.step((0, text, 0, 20))
    for at in range(20, LENGTH):
        drafted = Text(*(torch.cat((a[: at + 1], b[at + 1 :])) for a, b in _pairs(text, wrong)))
        [rows] = sequences.step((0, drafted, at, min(at + 1 + num_drafts, LENGTH)))
        found.append(rows[:1])
    expected = text.expected(kv_format, None).float()
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-5)


def _pairs(a: Text, b: Text) -> list[tuple[Tensor, Tensor]]:
    return [(a.q, b.q), (a.k, b.k), (a.v, b.v)]


def test_a_sequence_goes_on_behind_pages_of_another() -> None:
    """As after a prefix was found: its slot had another sequence before."""
    kv_format = KV_FORMATS["kivi2"]
    text, other = make_text(1), make_text(2)
    sequences = Sequences(kv_format)
    [found] = sequences.step((0, text, 0, 24))
    sequences.step((1, other, 0, 37))
    sequences.table[1, :3] = sequences.table[0, :3]
    [rest] = sequences.step((1, text, 24, LENGTH))
    expected = text.expected(kv_format, None).float()
    torch.testing.assert_close(torch.cat((found, rest)), expected, rtol=1e-4, atol=1e-5)
