"""Pages that are encoded as a whole: a query reads its own page as it is, and codes before it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attention_scenes import CPU, dense, planes_of, poison
from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBackend, AttentionBatch, AttentionSpec
from model.attention.reference import ReferenceAttention
from model.cpu.instruction_sets import ISAS
from model.cpu.library import CpuLibrary, load_cpu_library
from model.kv.format import KV_FORMATS, PAGE_FORMATS, KVFormat
from model.kv.pool import KVPool

PAGE_SIZE, LENGTH, HEADS, GROUP, DIM = 8, 45, 2, 3, 16

Build = Callable[[AttentionSpec, KVPool], AttentionBackend]
FORMATS = pytest.mark.parametrize("kv_format", PAGE_FORMATS, ids=lambda one: one.name)


def cpu(isa: str) -> Build:
    def build(spec: AttentionSpec, pool: KVPool) -> AttentionBackend:
        library = load_cpu_library(isa=isa)
        if isinstance(library, str):
            pytest.skip(library)
        return CpuAttention(spec, pool, library)

    return build


BACKENDS: dict[str, Build] = {
    "reference": ReferenceAttention,
    **{f"cpu-{isa}": cpu(isa) for isa in ISAS},
}


@pytest.fixture(params=BACKENDS)
def build(request: pytest.FixtureRequest) -> Build:
    return BACKENDS[request.param]


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

    def __init__(
        self,
        build: Build,
        kv_format: KVFormat,
        window: int | None = None,
        *,
        dim: int = DIM,
        group: int = GROUP,
        page_size: int = PAGE_SIZE,
        length: int = LENGTH,
        dtype: torch.dtype = torch.float32,
        max_draft_tokens: int = 12,
    ) -> None:
        spec = AttentionSpec(
            num_layers=1,
            num_heads=HEADS * group,
            num_kv_heads=HEADS,
            head_dim=dim,
            scale=dim**-0.5,
            windows=(window,),
            dtype=dtype,
            kv_format=kv_format,
            device=CPU,
            max_draft_tokens=max_draft_tokens,
        )
        num_pages = -(-length // page_size)
        self.pool = KVPool(spec.layout(page_size), 2 * num_pages, CPU)
        poison(self.pool.pages(0))
        self.backend = build(spec, self.pool)
        self.table = torch.randperm(2 * num_pages).int().view(2, num_pages)

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

    def check(self, found: list[Tensor], expected: Tensor) -> None:
        """Assert that results are those of the definition."""
        is_rounded = isinstance(self.backend, CpuAttention) and self.backend.is_rounded
        rtol, atol = (2e-2, 2e-2) if is_rounded else (1e-4, 1e-5)
        torch.testing.assert_close(torch.cat(found), expected.float(), rtol=rtol, atol=atol)


@FORMATS
@pytest.mark.parametrize("window", [None, 1, 11, 30])
@pytest.mark.parametrize("cuts", [(), tuple(range(1, LENGTH)), (8, 16, 40), (3, 7, 9, 30)], ids=len)
def test_every_cut_is_by_the_definition(
    build: Build, kv_format: KVFormat, window: int | None, cuts: tuple[int, ...]
) -> None:
    text, other = make_text(1), make_text(2)
    sequences = Sequences(build, kv_format, window)
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
        sequences.check(rows, one.expected(kv_format, window))


@pytest.mark.parametrize("num_drafts", [2, 7, 12])
def test_a_rejected_draft_leaves_no_trace(build: Build, num_drafts: int) -> None:
    """Not even where it filled a page: the page is encoded again."""
    kv_format = KV_FORMATS["kivi4"]
    text, wrong = make_text(1), make_text(3)
    sequences = Sequences(build, kv_format)
    found = sequences.step((0, text, 0, 20))
    for at in range(20, LENGTH):
        drafted = Text(*(torch.cat((a[: at + 1], b[at + 1 :])) for a, b in _pairs(text, wrong)))
        [rows] = sequences.step((0, drafted, at, min(at + 1 + num_drafts, LENGTH)))
        found.append(rows[:1])
    sequences.check(found, text.expected(kv_format, None))


def test_a_token_may_be_computed_again(build: Build) -> None:
    """As after a mask was late: also the last one of a page."""
    kv_format = KV_FORMATS["kivi4"]
    text = make_text(1)
    sequences = Sequences(build, kv_format)
    found = sequences.step((0, text, 0, 6))
    for at in range(6, LENGTH):
        sequences.step((0, text, at, at + 1))
        found += sequences.step((0, text, at, at + 1))
    sequences.check(found, text.expected(kv_format, None))


def _pairs(a: Text, b: Text) -> list[tuple[Tensor, Tensor]]:
    return [(a.q, b.q), (a.k, b.k), (a.v, b.v)]


def test_a_sequence_goes_on_behind_pages_of_another(build: Build) -> None:
    """As after a prefix was found: its slot had another sequence before."""
    kv_format = KV_FORMATS["kivi2"]
    text, other = make_text(1), make_text(2)
    sequences = Sequences(build, kv_format)
    [found] = sequences.step((0, text, 0, 24))
    sequences.step((1, other, 0, 37))
    sequences.table[1, :3] = sequences.table[0, :3]
    [rest] = sequences.step((1, text, 24, LENGTH))
    sequences.check([found, rest], text.expected(kv_format, None))


# ---- the compiled operations ---------------------------------------------------------------------


@pytest.fixture(scope="module", params=ISAS)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    library = load_cpu_library(isa=request.param)
    if isinstance(library, str):
        pytest.skip(library)
    return library


def odd_text(length: int, dim: int, dtype: torch.dtype) -> Text:
    """Return keys and values of all kinds that have a rule of their own, in both directions."""
    generator = torch.Generator().manual_seed(4)
    both = torch.randn(2, length, HEADS, dim, generator=generator)
    both[..., 3] *= 20
    sizes = torch.randint(-20, 20, (length // 4 + 1, 1, 1), generator=generator)
    both *= 10.0 ** sizes.repeat_interleave(4, 0)[:length]
    both[:, 10, 0] = 0.0
    both[:, 20, :, : dim // 2] = -0.0
    both[..., 7] = 0.37
    both[..., 8] = -0.0
    both[..., 9] = torch.arange(length)[:, None] % 16 - 7.5
    both[:, 30, 0, 5], both[:, 31, 1, 6] = torch.nan, torch.inf
    both[:, 40, 0, 1], both[:, 41, 0, 1], both[:, 42, 1] = 3e38, -3e38, -torch.inf
    q = torch.randn(length, HEADS, dim, generator=generator)
    return Text(q.to(dtype), *both.to(dtype))


@FORMATS
@pytest.mark.parametrize(
    ("dim", "page_size", "dtype"),
    [(64, 64, torch.float32), (80, 5, torch.float32), (128, 16, torch.bfloat16)],
    ids=str,
)
def test_codes_and_scales_are_those_of_the_definition(
    library: CpuLibrary, kv_format: KVFormat, dim: int, page_size: int, dtype: torch.dtype
) -> None:
    length = 150
    text, whole = odd_text(length, dim, dtype), length // page_size
    sequences = Sequences(
        partial(CpuAttention, library=library),
        kv_format,
        dim=dim,
        group=1,
        page_size=page_size,
        length=length,
        dtype=dtype,
    )
    pages = sequences.table[:, :whole].long()
    for slot, cuts in enumerate([(), (1, 2, 30, 31, 97)]):
        for first, end in pairwise((0, *cuts, length)):
            sequences.step((slot, text, first, end))
    for table in pages:
        found = [plane[table].clone() for plane in planes_of(sequences.pool.pages(0))]
        sequences.pool.store_pages(0, table, text.k, text.v)
        for plane, wanted in zip(found, planes_of(sequences.pool.pages(0)), strict=True):
            assert torch.equal(plane.view(torch.uint8), wanted[table].view(torch.uint8))


def test_a_step_whose_earlier_tokens_are_not_on_the_desk_is_refused(library: CpuLibrary) -> None:
    sequences = Sequences(partial(CpuAttention, library=library), KV_FORMATS["kivi4"])
    text = make_text(1)
    # The first 40 tokens, and again from 28 on, as after a draft; then from the border of a page.
    for first, end in ((0, 40), (28, 30), (32, 34)):
        sequences.step((0, text, first, end))
    for slot, first in ((0, 19), (0, 35), (1, 25)):
        with pytest.raises(ValueError, match="not on its slot's desk"):
            sequences.step((slot, text, first, first + 2))
