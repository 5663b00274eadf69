"""Tokens that end an answer by the model's text files, beside those of its config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.schema import CacheSection, ModelSection, OctavoConfig
from model import build

_CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 7,
}


@pytest.mark.parametrize(
    ("more", "expected"),
    [((), (7,)), ((9, 7), (7, 9)), ((95, 96, 10_000), (7, 95))],
)
def test_ends_of_the_text_files_are_added_if_the_model_has_them(
    tmp_path: Path, more: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(_CONFIG))
    config = OctavoConfig(
        model=ModelSection(quantization="none", device="cpu", threads=1),
        cache=CacheSection(kv_cache_memory="1MiB"),  # type: ignore[arg-type] # parsed
    )
    source = build.resolve_source(f"dummy:{tmp_path / 'config.json'}")
    assert build.make_runner(source, config, more).info.eos_token_ids == expected
