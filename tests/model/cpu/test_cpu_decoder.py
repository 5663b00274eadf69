from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures.transformer import Decoder, Transformer
from model.attention.cpu import CpuAttention
from model.attention.interface import AttentionBatch
from model.attention.reference import ReferenceAttention
from model.cpu.decoder import CpuDecoder, why_not
from model.cpu.instruction_sets import ISAS
from model.cpu.library import CpuLibrary, load_cpu_library
from model.cpu.ops import CpuOps
from model.kv.format import CODED_FORMATS, KV_FORMATS
from model.kv.pool import KVPool

PAGE_SIZE, NUM_PAGES = 4, 600
LENGTHS = (37, 9, 21)
#: Some cut falls on a single token, and more than one chunk of 256 keys is seen.
LONG = (600, 64, 300)

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "llama tied, with biases": (
        "llama",
        {"head_dim": 16, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "mistral window": ("mistral", {"head_dim": 16, "sliding_window": 7}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "granite without a factor on updates": (
        "granite",
        {
            "head_dim": 16,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.0,
        },
    ),
}


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> CpuLibrary:
    found = load_cpu_library(isa=request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def _pool(transformer: Transformer, kv_format: str = "float16") -> KVPool:
    layout = transformer.attention_spec(KV_FORMATS[kv_format]).layout(PAGE_SIZE)
    return KVPool(layout, NUM_PAGES, torch.device("cpu"))


def _attention(transformer: Transformer, pool: KVPool, library: CpuLibrary) -> CpuAttention:
    return CpuAttention(transformer.attention_spec(pool.layout.format), pool, library)


def _poison_behind_window(pool: KVPool, table: Tensor, row: int, start: int, window: int) -> None:
    """Make keys out of view of queries from `start` on NaN, and replace their pages with NaN."""
    at = torch.arange(max(start - window + 1, 0))
    slots = table[row, at // PAGE_SIZE].long() * PAGE_SIZE + at % PAGE_SIZE
    for layer in range(pool.layout.num_layers):
        for plane in pool.pages(layer)[:2]:
            plane.flatten(0, 1)[slots] = torch.nan
            plane[-1] = torch.nan
    table[row, : len(at) // PAGE_SIZE] = NUM_PAGES - 1


def _logits(
    decoder: Decoder,
    transformer: Transformer,
    library: CpuLibrary,
    cuts: tuple[int, ...],
    lengths: tuple[int, ...] = LENGTHS,
    poisoned_window: int | None = None,
    kv_format: str = "float16",
) -> Tensor:
    """Compute three sequences side by side, each up to the same cuts of its length, in 64ths."""
    pool = _pool(transformer, kv_format)
    attention = _attention(transformer, pool, library)
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 96, (length,), generator=generator) for length in lengths]
    table = torch.arange(NUM_PAGES, dtype=torch.int32).view(3, -1)
    found: list[list[Tensor]] = [[], [], []]
    bounds = [[length * cut // 64 for cut in (0, *cuts, 64)] for length in lengths]
    for step in range(len(cuts) + 1):
        spans = [(row, at[step], at[step + 1]) for row, at in enumerate(bounds)]
        spans = [span for span in spans if span[1] < span[2]]
        if poisoned_window:
            for row, start, _ in spans:
                _poison_behind_window(pool, table, row, start, poisoned_window)
        positions = torch.cat([torch.arange(start, end) for _, start, end in spans])
        rows = torch.cat([torch.full((end - start,), row) for row, start, end in spans])
        counts = [end - start for _, start, end in spans]
        batch = AttentionBatch(
            query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
            seq_lens=torch.tensor([end for _, _, end in spans], dtype=torch.int32),
            block_table=table[[row for row, _, _ in spans]],
            positions=positions,
            kv_slots=table[rows, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE,
            max_query_len=max(counts),
            max_seq_len=max(end for _, _, end in spans),
        )
        attention.plan(batch)
        token_ids = torch.cat([tokens[row][start:end] for row, start, end in spans])
        with torch.inference_mode():
            logits = decoder.logits(decoder.forward(token_ids, positions, attention))
        for (row, _, _), own in zip(spans, torch.split(logits, counts), strict=True):
            found[row].append(own)
    return torch.cat([torch.cat(own) for own in found])


@pytest.mark.parametrize("quantization", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("case", FAMILIES)
def test_it_gives_what_the_transformer_gives_to_the_bit(
    case: str, quantization: str, library: CpuLibrary, make_checkpoint: Any, build: Any
) -> None:
    family, changes = FAMILIES[case]
    source = make_checkpoint(family, **changes).source
    transformer = build(source, quantization, CpuOps(library), library)
    decoder = CpuDecoder(transformer, library)
    for cuts in ((), (20, 21, 60), (2, 30)):
        found = _logits(decoder, transformer, library, cuts)
        assert torch.equal(found, _logits(transformer, transformer, library, cuts))
        assert found.isfinite().all()


@pytest.mark.parametrize("kv_format", [one.name for one in CODED_FORMATS])
def test_pages_of_codes(
    kv_format: str, library: CpuLibrary, make_checkpoint: Any, build: Any
) -> None:
    source = make_checkpoint("qwen3", head_dim=32).source
    transformer = build(source, "bf16", CpuOps(library), library)
    decoder = CpuDecoder(transformer, library)
    whole = _logits(decoder, transformer, library, (), kv_format=kv_format)
    assert whole.isfinite().all()
    for cuts in ((20, 21, 60), (2, 30)):
        for one in (decoder, transformer):
            found = _logits(one, transformer, library, cuts, kv_format=kv_format)
            assert torch.equal(found, whole)


def test_it_reads_no_key_behind_the_window(
    library: CpuLibrary, make_checkpoint: Any, build: Any
) -> None:
    """Prefill chunks and decodes: the pages there may be another sequence's, and hold NaN."""
    family, changes = FAMILIES["mistral window"]
    source = make_checkpoint(family, **{**changes, "max_position_embeddings": 1024}).source
    transformer = build(source, "bf16", CpuOps(library), library)
    for decoder in (CpuDecoder(transformer, library), transformer):
        for cuts in ((20, 21, 22, 60), (2, 30)):
            whole = _logits(decoder, transformer, library, cuts, LONG)
            found = _logits(decoder, transformer, library, cuts, LONG, changes["sliding_window"])
            assert torch.equal(found, whole)
            assert found.isfinite().all()


@pytest.mark.parametrize("quantization", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("case", FAMILIES)
def test_no_cut_changes_a_bit(
    case: str, quantization: str, library: CpuLibrary, make_checkpoint: Any, build: Any
) -> None:
    """So that a preempted, resumed or cached sequence goes on as if nothing had been."""
    family, changes = FAMILIES[case]
    source = make_checkpoint(family, **{**changes, "max_position_embeddings": 1024}).source
    transformer = build(source, quantization, CpuOps(library), library)
    decoder = CpuDecoder(transformer, library)
    whole = _logits(decoder, transformer, library, (), LONG)
    for cuts in (tuple(range(1, 64)), (20, 21, 60), (2, 30)):
        assert torch.equal(_logits(decoder, transformer, library, cuts, LONG), whole)


def test_it_is_close_to_the_model_in_float32(
    library: CpuLibrary, make_checkpoint: Any, build: Any
) -> None:
    source = make_checkpoint("llama", head_dim=16).source
    exact = build(source, "none")
    expected = _logits(exact, exact, library, (20,))
    for quantization, tolerance in (("bf16", 0.03), ("int8", 0.08)):
        transformer = build(source, quantization, CpuOps(library), library)
        found = _logits(CpuDecoder(transformer, library), transformer, library, (20,))
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_it_says_what_it_cannot_take(library: CpuLibrary, make_checkpoint: Any, build: Any) -> None:
    source = make_checkpoint("llama", head_dim=16).source
    plain = build(source, "none")
    reason = why_not(plain, _attention(plain, _pool(plain), library))
    assert reason == "weights in none are not in tiles"
    tiled = build(source, "bf16", CpuOps(library), library)
    pool = _pool(tiled)
    assert not why_not(tiled, _attention(tiled, pool, library))
    spec = tiled.attention_spec(pool.layout.format)
    reason = why_not(tiled, ReferenceAttention(spec, pool))
    assert reason == "attention backend reference is not the compiled one"
    odd = build(
        make_checkpoint("qwen2", head_dim=16, intermediate_size=72).source,
        "bf16",
        CpuOps(library),
        library,
    )
    reason = why_not(odd, _attention(odd, _pool(odd), library))
    assert reason == "intermediate_size is no multiple of 16"


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {"attn_logit_softcapping": None}, "norms are not those before attention"),
        ("olmo2", {}, "norms are not those before attention and MLP"),
        (
            "granite",
            {"residual_multiplier": 0.5, "attention_multiplier": 0.2},
            "residual updates have a factor",
        ),
    ],
)
def test_layers_of_another_shape_are_left_to_torch(
    family: str,
    changes: dict[str, Any],
    reason: str,
    library: CpuLibrary,
    make_checkpoint: Any,
    build: Any,
) -> None:
    source = make_checkpoint(family, head_dim=16, **changes).source
    tiled = build(source, "bf16", CpuOps(library), library)
    assert why_not(tiled, _attention(tiled, _pool(tiled), library)).startswith(reason)
    exact = build(source, "none")
    expected = _logits(exact, exact, library, (20,))
    found = _logits(tiled, tiled, library, (20,))
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
