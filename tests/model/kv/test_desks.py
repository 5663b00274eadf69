"""Desks hold few tokens after any steps, and the memory plan counts them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.schema import OctavoConfig
from model import assemble, build
from model.kv.desks import Desks, desk_tokens
from model.kv.memory_plan import plan_pool

_CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@given(
    page_size=st.integers(1, 9),
    max_draft_tokens=st.integers(1, 12),
    steps=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 12)), min_size=1, max_size=12),
)
def test_a_desk_is_bounded(
    page_size: int, max_draft_tokens: int, steps: list[tuple[int, int]]
) -> None:
    """Of a step some of the last tokens are rejected, as many as a draft may have."""
    desks, first = Desks(page_size, max_draft_tokens), 0
    for count, num_rejected in steps:
        rows = torch.arange(first, first + count)[:, None, None].float()
        found = desks.add(0, 0, first, rows, rows)
        assert found.keys[:, 0, 0].tolist() == list(
            range(first // page_size * page_size, first + count)
        )
        kept = desks._desks[0, 0].keys
        assert len(kept) <= desk_tokens(page_size, max_draft_tokens)
        first += count - min(num_rejected, max_draft_tokens, count - 1)


def _fixed_bytes(path: Path, monkeypatch: pytest.MonkeyPatch, **cache: Any) -> int:
    """Return the bytes beside the pages that a start counts."""
    found: list[int] = []

    def plan(*, fixed_bytes: int, **others: Any) -> Any:
        found.append(fixed_bytes)
        return plan_pool(fixed_bytes=fixed_bytes, **others)

    monkeypatch.setattr(assemble, "plan_pool", plan)
    config = {
        "model": {"quantization": "none", "device": "cpu", "threads": 1},
        "cache": {"kv_cache_memory": "1MiB", **cache},
        "scheduler": {"max_num_seqs": 5, "speculative_tokens": 9},
    }
    source = build.resolve_source(f"dummy:{path}")
    build.make_runner(source, OctavoConfig.model_validate(config)).close()
    [fixed_bytes] = found
    return fixed_bytes


def test_the_memory_plan_counts_desks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_CONFIG))
    plain, *coded = [
        _fixed_bytes(path, monkeypatch, **cache)
        for cache in (
            {"page_size": 16},
            {"page_size": 16, "kv_cache_dtype": "kivi4"},
            {"page_size": 16, "kv_cache_dtype": "kivi2", "kv_cache_dtype_skip_layers": ["1"]},
        )
    ]
    # Keys and values of two heads of 16 elements, in float32.
    token_bytes = 2 * 2 * 16 * 4
    # The table of angles has a row for each token that fits, at most for the model's 64.
    assert [one - plain for one in coded] == [
        5 * (15 + 9) * num_layers * token_bytes for num_layers in (3, 2)
    ]
