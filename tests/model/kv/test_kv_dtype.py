"""The default dtype of keys and values: as exact as the operations that write and read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest

from configs.schema import CacheSection, ModelSection, OctavoConfig
from model import build
from model.cpu.library import load_cpu_library

_CONFIG = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _kept_in(
    path: Path, quantization: Literal["none", "bf16"], asked: Literal["auto", "float16"]
) -> str:
    (path / "config.json").write_text(json.dumps(_CONFIG))
    config = OctavoConfig(
        model=ModelSection(quantization=quantization, device="cpu", threads=1),
        cache=CacheSection(kv_cache_memory="1MiB", kv_cache_dtype=asked),  # type: ignore[arg-type] # parsed
    )
    source = build.resolve_source(f"dummy:{path / 'config.json'}")
    return build.make_runner(source, config).info.kv_cache_dtype


def test_exact_weights_have_exact_keys(tmp_path: Path) -> None:
    assert _kept_in(tmp_path, "none", "auto") == "float32"


def test_matrix_instructions_find_what_they_multiply(tmp_path: Path) -> None:
    library = load_cpu_library()
    if isinstance(library, str) or library.isa != "amx":
        pytest.skip("no matrix instructions here")
    assert _kept_in(tmp_path, "bf16", "auto") == "bfloat16"
    assert _kept_in(tmp_path, "bf16", "float16") == "float16"
