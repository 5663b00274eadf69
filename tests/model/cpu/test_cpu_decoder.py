from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.architectures.transformer import Decoder, Transformer
from model.attention.cpu import offer
from model.attention.interface import AttentionBackend, AttentionBatch
from model.attention.reference import ReferenceAttention
from model.cpu.decoder import CpuDecoder, why_not
from model.cpu.library import ISAS, CpuLibrary, load_cpu_library
from model.cpu.ops import CpuOps
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


def _attention(transformer: Transformer) -> AttentionBackend:
    arch = transformer.arch
    pool = KVPool(
        num_layers=arch.num_layers,
        num_pages=NUM_PAGES,
        page_size=PAGE_SIZE,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        dtype=torch.float16,
        device=torch.device("cpu"),
    )
    found = offer(transformer.attention_spec(torch.float16))
    assert not isinstance(found, str), found
    return found.build(transformer.attention_spec(torch.float16), pool)


def _logits(
    decoder: Decoder,
    transformer: Transformer,
    cuts: tuple[int, ...],
    lengths: tuple[int, ...] = LENGTHS,
) -> Tensor:
    """Three sequences side by side, each fed up to the same cuts of its length, in 64ths."""
    attention = _attention(transformer)
    generator = torch.Generator().manual_seed(3)
    tokens = [torch.randint(0, 96, (length,), generator=generator) for length in lengths]
    table = torch.arange(NUM_PAGES, dtype=torch.int32).view(3, -1)
    found: list[list[Tensor]] = [[], [], []]
    bounds = [[length * cut // 64 for cut in (0, *cuts, 64)] for length in lengths]
    for step in range(len(cuts) + 1):
        spans = [(row, at[step], at[step + 1]) for row, at in enumerate(bounds)]
        spans = [span for span in spans if span[1] < span[2]]
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


@pytest.mark.parametrize("quantization", ["bf16", "int8"])
@pytest.mark.parametrize("case", FAMILIES)
def test_it_gives_what_the_transformer_gives_to_the_bit(
    case: str, quantization: str, library: CpuLibrary, make_checkpoint: Any, build: Any
) -> None:
    family, changes = FAMILIES[case]
    source = make_checkpoint(family, **changes).source
    transformer = build(source, quantization, CpuOps(library), library)
    decoder = CpuDecoder(transformer, library)
    for cuts in ((), (20, 21, 60), (2, 30)):
        found = _logits(decoder, transformer, cuts)
        assert torch.equal(found, _logits(transformer, transformer, cuts))
        assert found.isfinite().all()


@pytest.mark.parametrize("quantization", ["bf16", "int8"])
@pytest.mark.parametrize("case", FAMILIES)
def test_with_matrix_instructions_no_cut_changes_a_bit(
    case: str, quantization: str, make_checkpoint: Any, build: Any
) -> None:
    """So that a preempted, resumed or cached sequence goes on as if nothing had been."""
    library = load_cpu_library(isa="amx")
    if isinstance(library, str):
        pytest.skip(library)
    family, changes = FAMILIES[case]
    source = make_checkpoint(family, **{**changes, "max_position_embeddings": 1024}).source
    transformer = build(source, quantization, CpuOps(library), library)
    decoder = CpuDecoder(transformer, library)
    whole = _logits(decoder, transformer, (), LONG)
    for cuts in (tuple(range(1, 64)), (20, 21, 60), (2, 30)):
        assert torch.equal(_logits(decoder, transformer, cuts, LONG), whole)


def test_it_is_close_to_the_model_in_float32(
    library: CpuLibrary, make_checkpoint: Any, build: Any
) -> None:
    source = make_checkpoint("llama", head_dim=16).source
    exact = build(source, "none")
    expected = _logits(exact, exact, (20,))
    for quantization, tolerance in (("bf16", 0.03), ("int8", 0.08)):
        transformer = build(source, quantization, CpuOps(library), library)
        found = _logits(CpuDecoder(transformer, library), transformer, (20,))
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_it_says_what_it_cannot_take(library: CpuLibrary, make_checkpoint: Any, build: Any) -> None:
    source = make_checkpoint("llama", head_dim=16).source
    plain = build(source, "none")
    assert why_not(plain, _attention(plain)) == "weights in none are not in tiles"
    tiled = build(source, "bf16", CpuOps(library), library)
    assert not why_not(tiled, _attention(tiled))
    spec = tiled.attention_spec(torch.float16)
    pool = KVPool(
        num_layers=1,
        num_pages=1,
        page_size=1,
        num_kv_heads=1,
        head_dim=16,
        dtype=torch.float16,
        device=torch.device("cpu"),
    )
    reason = why_not(tiled, ReferenceAttention(spec, pool))
    assert reason == "attention backend reference is not the compiled one"
    odd = build(
        make_checkpoint("qwen2", head_dim=16, intermediate_size=72).source,
        "bf16",
        CpuOps(library),
        library,
    )
    assert why_not(odd, _attention(odd)) == "intermediate_size is no multiple of 16"


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
    assert why_not(tiled, _attention(tiled)).startswith(reason)
    exact = build(source, "none")
    expected = _logits(exact, exact, (20,))
    found = _logits(tiled, tiled, (20,))
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
