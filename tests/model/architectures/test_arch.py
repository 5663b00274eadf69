from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.architectures.arch import ArchError, ArchSpec, RopeSpec
from model.architectures.read_arch import from_gguf_metadata, from_hf_config, read_arch
from model.architectures.registry import declare_tensors
from model.formats import FormatError
from model.weights.source import ModelSource

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 4,
    "llama.context_length": 8192,
    "llama.embedding_length": 576,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 100000.0,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.eos_token_id": 2,
}
SHAPES = {"token_embd.weight": (49152, 576)}


def _config(**changes: Any) -> ArchSpec:
    return from_hf_config({**CONFIG, **changes})


def _shapes(**changes: Any) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in declare_tensors(_config(**changes)).items()}


def _metadata(**changes: Any) -> ArchSpec:
    return from_gguf_metadata({**METADATA, **changes}, SHAPES)


def test_config_and_metadata_tell_the_same() -> None:
    spec = _config(dtype="float16")
    assert _metadata() == spec
    assert spec.head_dim == 64
    assert spec.rope == RopeSpec(theta=100000, rotary_dim=64, original_max_positions=8192)
    assert spec.windows == (None,) * 4
    assert spec.eos_token_ids == (2,)


def test_the_shapes_of_all_tensors_follow() -> None:
    shapes = _shapes(attention_bias=True)
    assert shapes["model.layers.3.self_attn.k_proj.weight"] == (192, 576)
    assert shapes["model.layers.3.self_attn.o_proj.bias"] == (576,)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (576, 1536)
    assert "lm_head.weight" not in shapes
    assert "lm_head.weight" in _shapes(tie_word_embeddings=False)


def test_the_generation_config_knows_the_ends_better() -> None:
    assert from_hf_config(CONFIG, {"eos_token_id": [7, 8]}).eos_token_ids == (7, 8)
    assert from_hf_config({**CONFIG, "eos_token_id": None}, {}).eos_token_ids == ()
    found = _metadata(**{"tokenizer.ggml.eot_token_id": 9, "tokenizer.ggml.eom_token_id": 2})
    assert found.eos_token_ids == (2, 9)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral"}, (4096,) * 4),
        ({"model_type": "mistral", "sliding_window": None}, (None,) * 4),
        ({"model_type": "qwen2", "sliding_window": 8}, (None,) * 4),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 3,
            },
            (None, None, None, 8),
        ),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_windows_layer_by_layer(changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert _config(**changes).windows == windows


def test_both_spellings_of_rope() -> None:
    numbers = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    numbers["original_max_position_embeddings"] = 8192
    old = _config(rope_theta=5e5, rope_scaling={"type": "llama3", **numbers})
    new = _config(
        rope_theta=None, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **numbers}
    )
    assert old == new
    assert old.rope.variant == "llama3"
    assert (old.rope.theta, old.rope.factor, old.rope.original_max_positions) == (5e5, 32, 8192)


def test_gguf_rope_scaling() -> None:
    changes = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    changes["llama.rope.scaling.original_context_length"] = 2048
    rope = _metadata(**changes).rope
    assert (rope.variant, rope.factor, rope.original_max_positions) == ("yarn", 4.0, 2048)
    assert _metadata(**{"llama.rope.scaling.factor": 2.0}).rope.variant == "linear"


@pytest.mark.parametrize(("num_layers", "scale"), [(26, 256**-0.5), (46, 144**-0.5)])
def test_gemma2s_file_leaves_the_scale_of_the_largest_model_to_its_reader(
    num_layers: int, scale: float
) -> None:
    metadata = {
        key.replace("llama.", "gemma2."): value
        for key, value in METADATA.items()
        if "rope" not in key
    }
    metadata |= {
        "general.architecture": "gemma2",
        "gemma2.block_count": num_layers,
        "gemma2.embedding_length": 4608,
        "gemma2.attention.head_count": 32,
        "gemma2.attention.head_count_kv": 16,
        "gemma2.attention.key_length": 256,
        "gemma2.attention.sliding_window": 4096,
        "gemma2.final_logit_softcapping": 0.0,
    }
    arch = from_gguf_metadata(metadata, SHAPES)
    assert arch.layers[0].scale == pytest.approx(scale)
    assert arch.windows[:3] == (4096, None, 4096)
    assert (arch.layers[0].softcap, arch.logits_softcap) == (50.0, None)


def test_what_nobody_knows_is_kept_to_be_told() -> None:
    spec = _config(shiny_option=3, use_cache=True, empty_option=None, off_option=False)
    assert spec.unknown_keys == ("shiny_option",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported, only llama, mistral"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, only \"silu\""),
        ({"quantization_config": {"bits": 4}}, "quantization_config: .* is not supported"),
        ({"num_local_experts": 8}, "num_local_experts: 8 is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved: True is not supported"),
        ({"logits_scaling": 2.0}, "logits_scaling: 2.0 is not supported"),
        ({"torch_dtype": "float8"}, "dtype 'float8' is not supported, only float32"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "big"}, "hidden_size must be a number, got 'big'"),
        ({"vocab_size": 1.5}, "vocab_size must be a whole number, got 1.5"),
        ({"num_hidden_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"num_key_value_heads": 4}, "num_kv_heads must divide num_heads 9, got 4"),
        ({"head_dim": 63}, "head_dim must be even, got 63"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported, only 1.0"),
        ({"model_type": "mistral", "layer_types": None}, "layer_types is not supported with"),
        ({"per_layer_config": {}}, "per_layer_config: {} is not supported, only nothing"),
        ({"rope_theta": 0}, "rope_parameters: numbers must be above 0"),
        ({"eos_token_id": "x"}, "eos_token_id must be a number or a list of them"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported, only"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "x": 1}}, "rope_parameters: 'x' is not"),
        ({"rope_scaling": 3}, "rope_scaling must be an object"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be at least 1"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"]}, "layer_types must list 4"),
        ({"model_type": "qwen3", "layer_types": ["ring"] * 4}, "layer_types: 'ring' is not"),
    ],
)
def test_a_config_we_cannot_serve_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchError, match=message):
        _config(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "mamba"}, "general.architecture 'mamba' is not supported"),
        ({"llama.expert_count": 8}, "llama.expert_count: 8 is not supported, only 0"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is not supported"),
        ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' is not"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count must be 64"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length: 32 is not"),
    ],
)
def test_metadata_we_cannot_serve_is_refused_by_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchError, match=message):
        _metadata(**changes)


def test_a_folder_and_a_dummy_are_read_from_their_json(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    assert read_arch(ModelSource("dummy", path, "d")) == from_hf_config(CONFIG)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5]}')
    assert read_arch(ModelSource("safetensors", tmp_path, "f")).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object")]
)
def test_a_broken_config_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(FormatError, match=f"config.json {message}"):
        read_arch(ModelSource("dummy", path, "d"))
