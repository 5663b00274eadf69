"""The CUDA backend's bookkeeping; `test_contract.py` runs the rest on a dense kernel."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn_out

from model.attention import flash
from model.attention.interface import AttentionBatch, AttentionSpec
from model.kv.format import KV_FORMATS

SPEC = AttentionSpec(
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    scale=0.125,
    windows=(None,),
    dtype=torch.bfloat16,
    kv_format=KV_FORMATS["bfloat16"],
    device=torch.device("cuda"),
)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BATCH = AttentionBatch(
    query_starts=int32(0, 1, 4),
    seq_lens=int32(40, 3),
    block_table=torch.arange(20, dtype=torch.int32).view(2, 10),
    positions=torch.tensor([39, 0, 1, 2]),
    kv_slots=torch.tensor([39, 160, 161, 162]),
    max_query_len=3,
    max_seq_len=40,
)


def test_the_kernels_get_a_table_no_wider_than_need_be() -> None:
    table = flash.kernel_batch(BATCH, 16, None).block_table
    assert table.tolist() == [[0, 1, 2], [10, 11, 12]]
    assert (table.dtype, table.is_contiguous()) == (torch.int32, True)


@pytest.mark.parametrize(
    ("window", "table"),
    [
        (8, [[2, 2, 2], [10, 11, 12]]),
        (9, [[1, 1, 2], [10, 11, 12]]),
        (24, [[1, 1, 2], [10, 11, 12]]),
        (25, [[0, 1, 2], [10, 11, 12]]),
    ],
)
def test_the_entries_behind_the_window_are_the_first_page_in_view(
    window: int, table: list[list[int]]
) -> None:
    """Kernels load whole tiles, and zero times the NaN in a page of another sequence is NaN."""
    found = flash.kernel_batch(BATCH, 16, window).block_table
    assert found.tolist() == table
    assert (found.dtype, found.is_contiguous()) == (torch.int32, True)


def test_pages_must_be_of_the_queries_dtype() -> None:
    offer = flash._offer(SPEC, "kernel", 16, 64, lambda call: call.q)
    assert not offer.why_not(SPEC)
    mixed = replace(SPEC, kv_format=KV_FORMATS["float16"])
    assert offer.why_not(mixed) == "pages must be in bfloat16, got float16"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": torch.device("cpu")}, "on cpu"),
        ({"dtype": torch.float32}, "float16 or bfloat16"),
        ({"head_dim": 512}, "head_dim must be a multiple of 8 up to 256"),
    ],
)
def test_it_says_what_it_cannot_serve(change: dict[str, Any], reason: str) -> None:
    assert reason in str(flash.offer(replace(SPEC, **change)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_there_is_no_gpu() -> None:
    assert flash.offer(SPEC) == "torch sees no CUDA GPU"


@pytest.mark.parametrize(
    ("window", "max_query_len", "window_size"),
    [(None, 1, (-1, -1)), (None, 3, (-1, 0)), (8, 1, (7, 0)), (8, 3, (7, 0))],
)
def test_this_torch_takes_the_arguments_it_is_given(
    window: int | None, max_query_len: int, window_size: tuple[int, int]
) -> None:
    given: dict[str, Any] = {}
    signature = inspect.signature(varlen_attn_out)

    def take(*args: object, **kwargs: object) -> None:
        given.update(signature.bind(*args, **kwargs).arguments)

    q, pages = torch.zeros(4, 4, 64), torch.zeros(20, 16, 2, 64)
    batch = flash.kernel_batch(replace(BATCH, max_query_len=max_query_len), 16, window)
    module: Any = SimpleNamespace(varlen_attn_out=take)
    call = flash.FlashCall(q, pages, pages, batch, int32(0, 40, 43), 0.125, window)
    flash._torch_varlen(module, call)
    assert given["window_size"] == window_size
    assert given["num_splits"] == 1
    assert given["cu_seq_k"] is not None
