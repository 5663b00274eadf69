"""The format of keys and values: by default as exact as the operations that write and read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.schema import OctavoConfig
from model import build
from model.cpu.library import load_cpu_library
from model.interface import ModelInfo

_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
#: Of a token in one layer: keys and values of two heads of 16 elements, in bytes.
_FLOAT32, _INT8, _INT4 = 4 * 64, 64 + 4 * 2, 32 + 4 * 4


def _info(
    path: Path, quantization: str, asked: str, *skipped: str, has_window: bool = False
) -> ModelInfo:
    values = _CONFIG if has_window else _CONFIG | {"layer_types": ["full_attention"] * 3}
    (path / "config.json").write_text(json.dumps(values | {"use_sliding_window": has_window}))
    config = OctavoConfig.model_validate(
        {
            "model": {"quantization": quantization, "device": "cpu", "threads": 1},
            "cache": {
                "kv_cache_memory": "1MiB",
                "kv_cache_dtype": asked,
                "kv_cache_dtype_skip_layers": skipped,
            },
        }
    )
    return build.make_runner(build.resolve_source(f"dummy:{path / 'config.json'}"), config).info


def _kept_in(path: Path, quantization: str, asked: str) -> str:
    return _info(path, quantization, asked).kv_cache_dtype


def test_exact_weights_have_exact_keys(tmp_path: Path) -> None:
    assert _kept_in(tmp_path, "none", "auto") == "float32"


def test_matrix_instructions_find_what_they_multiply(tmp_path: Path) -> None:
    library = load_cpu_library()
    if isinstance(library, str) or library.isa != "amx":
        pytest.skip("no matrix instructions here")
    assert _kept_in(tmp_path, "bf16", "auto") == "bfloat16"
    assert _kept_in(tmp_path, "bf16", "float16") == "float16"


@pytest.mark.parametrize(
    ("asked", "layer_bytes"), [("int8", _INT8), ("fp8", _INT8), ("int4", _INT4)]
)
def test_codes_hold_more_tokens_in_the_same_memory(
    tmp_path: Path, asked: str, layer_bytes: int
) -> None:
    info = _info(tmp_path, "none", asked)
    assert (info.kv_cache_dtype, info.kv_bytes_per_token) == (asked, 3 * layer_bytes)
    assert info.num_pages == 2**20 // (info.page_size * 3 * layer_bytes)


@pytest.mark.parametrize(("asked", "layer_bytes"), [("kivi4", 42), ("kivi2", 26)])
def test_pages_that_are_encoded_as_a_whole_are_reused_as_a_whole(
    tmp_path: Path, asked: str, layer_bytes: int
) -> None:
    """Scales of a channel are for 64 tokens; a value has one for its 16 elements."""
    info = _info(tmp_path, "none", asked)
    assert (info.page_size, info.smallest_reusable_prefix_tokens) == (64, 64)
    assert info.kv_bytes_per_token == 3 * layer_bytes
    assert info.attention_backend == "cpu"
    assert not any("slower" in note for note in info.notes)


def test_skipped_layers_keep_the_floats_of_auto(tmp_path: Path) -> None:
    info = _info(tmp_path, "none", "int8", "2", "0")
    assert info.kv_bytes_per_token == _INT8 + 2 * _FLOAT32
    assert "keys and values in float32 in layers 0, 2" in info.notes


def test_layers_with_a_window_are_skipped_by_name(tmp_path: Path) -> None:
    info = _info(tmp_path, "none", "int8", "sliding_window", has_window=True)
    assert info.kv_bytes_per_token == 2 * _INT8 + _FLOAT32
    assert "keys and values in float32 in layers 1" in info.notes
    info = _info(tmp_path, "none", "int8", "sliding_window")
    assert info.kv_bytes_per_token == 3 * _INT8
    assert "no layer has a window: all keys and values are in int8" in info.notes


def test_a_layer_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"skip_layers: the model has 3 layers, from 0 on, got 3"):
        _info(tmp_path, "none", "int8", "3")
