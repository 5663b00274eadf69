"""DeepSeek's decoders by our own layers: latent attention and mixtures of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import WRITERS
from safetensors.torch import load_file, save_file

from configs.schema import CacheSection, ModelSection, OctavoConfig
from model import build as build_module
from model.architectures.arch import ArchError, BadValueError
from model.architectures.latent_transformer import LatentTransformer
from model.architectures.read_arch import from_gguf_metadata, from_hf_config
from model.cpu.decoder import why_not
from model.cpu.library import CpuLibrary, load_cpu_library
from model.cpu.ops import CpuOps
from model.hf.decoder import load_hf_decoder
from model.implementation import choose_implementation
from model.interface import ModelInfo
from model.kv.format import KV_FORMATS, KVLayout
from model.weights.source import ModelSource

PROMPT = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(3))
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
SIZES = {
    "num_key_value_heads": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
}
GROUPS = {"n_group": 4, "topk_group": 2}
# `transformers` is the reference; every option that changes the arithmetic stands in one of these.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v2 lite": (
        "deepseek_v2",
        {"rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "v2": (
        "deepseek_v2",
        {
            **GROUPS,
            "q_lora_rank": 10,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 3.0,
            # The norms within attention have an epsilon of their own.
            "rms_norm_eps": 1e-2,
            # Of the first layer and of the experts for all tokens.
            "mlp_bias": True,
        },
    ),
    "v3": (
        "deepseek_v3",
        {
            **GROUPS,
            "q_lora_rank": 10,
            "rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5},
        },
    ),
    "v3 of halves": (
        "deepseek_v3",
        {"n_group": 1, "topk_group": 1, "rope_interleave": False, "norm_topk_prob": False},
    ),
}
#: As published.
V2_LITE = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}


@pytest.fixture
def library() -> CpuLibrary:
    found = load_cpu_library()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(
    case: str, make_checkpoint: Any, build: Any, session: Any
) -> None:
    family, changes = CASES[case]
    checkpoint = make_checkpoint(family, **SIZES | changes)
    model = build(checkpoint.source)
    assert isinstance(model, LatentTransformer)
    one = session(model)
    pieces = PROMPT[:11], PROMPT[11:12], PROMPT[12:13], PROMPT[13:]
    found = torch.cat([one.feed(piece) for piece in pieces])
    torch.testing.assert_close(found, checkpoint.logits(PROMPT), rtol=1e-4, atol=1e-4)
    assert not [note for note in model.notes if "read as" in note]
    state = checkpoint.state()
    assert model.weights_bytes == 4 * sum(part.numel() for part in state.values())


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("quantization", ["fp16", "bf16", "int8", "int4"])
def test_weights_in_every_format(
    quantization: str, make_checkpoint: Any, build: Any, session: Any, library: CpuLibrary
) -> None:
    family, changes = CASES["v3"]
    # Few experts, all of them chosen: rounding then changes no choice.
    few = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    checkpoint = make_checkpoint(family, **SIZES | changes | few)
    model = build(checkpoint.source, quantization, CpuOps(library), library)
    assert model.format == quantization
    found, expected = session(model).feed(PROMPT), checkpoint.logits(PROMPT)
    error = float((found - expected).norm() / expected.norm())
    assert 0 < error < {"fp16": 2e-3, "bf16": 2e-2, "int8": 0.1}.get(quantization, 0.4)


def test_a_token_takes_its_latent_vector_and_its_rotated_one(
    make_checkpoint: Any, build: Any
) -> None:
    arch = from_hf_config(V2_LITE)
    assert arch.latent is not None
    assert not arch.notes
    assert not arch.unknown_keys
    ours = KVLayout(
        arch.num_layers,
        arch.num_kv_heads,
        arch.head_dim,
        16,
        KV_FORMATS["bfloat16"],
        arch.latent.rank,
    )
    assert ours.bytes_per_page == 16 * 27 * (512 + 64) * 2
    # As `transformers` computes it: a key and a value for each head, both as wide as the key.
    theirs = KVLayout(27, 16, 128 + 64, 16, KV_FORMATS["bfloat16"])
    assert theirs.bytes_per_page > 10 * ours.bytes_per_page
    # The decoders have these two layouts.
    source = make_checkpoint("deepseek_v2", **SIZES).source
    for decoder, num_elements in (
        (build(source), 32 + 16),
        (load_hf_decoder(source, dtype=torch.float32, device=torch.device("cpu")), 2 * 6 * 28),
    ):
        layout = decoder.attention_spec(KV_FORMATS["bfloat16"]).layout(4)
        assert layout.bytes_per_page == 4 * 3 * num_elements * 2


def test_the_compiled_decoder_refuses_it(make_checkpoint: Any, build: Any) -> None:
    from model.attention.cpu import CpuAttention  # noqa: PLC0415 - only its class is needed

    model = build(make_checkpoint("deepseek_v2", **SIZES).source)
    assert (
        why_not(model, CpuAttention.__new__(CpuAttention))
        == "attention is latent, or layers have experts"
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"attention_bias": True}, "attention_bias: True is not supported"),
        ({"scoring_func": "sigmoid"}, "scoring_func: 'sigmoid' is not supported"),
        ({"topk_method": "noaux_tc"}, "topk_method: 'noaux_tc' is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: 2 is not supported"),
        ({"num_key_value_heads": 4}, "num_key_value_heads must be num_attention_heads 16, got 4"),
        ({"head_dim": 128}, "head_dim: 128 is not supported, only 64"),
        ({"kv_lora_rank": None}, "kv_lora_rank must not be null"),
        ({"kv_lora_rank": 0}, "kv_lora_rank must be at least 1"),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok must be from 1 to 64, got 65"),
        ({"n_shared_experts": 0}, "n_shared_experts must be at least 1"),
        ({"n_group": 7, "topk_method": "group_limited_greedy"}, "n_group must divide 64 experts"),
        (
            {"n_group": 8, "topk_group": 9, "topk_method": "group_limited_greedy"},
            "topk_group must be from 1 to n_group 8, got 9",
        ),
    ],
)
def test_what_is_computed_otherwise_is_refused_and_left_to_transformers(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ArchError, match=reason):
        from_hf_config(V2_LITE | changes)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(V2_LITE | changes))
    chosen, why = choose_implementation(ModelSource("dummy", path, "m"), "auto")
    assert chosen == "transformers"
    assert reason in why


def test_more_experts_than_any_model_has_are_refused() -> None:
    with pytest.raises(BadValueError, match="n_routed_experts must be at most 1024"):
        from_hf_config(V2_LITE | {"n_routed_experts": 10**6})


def test_gguf_files_are_refused_and_not_offered() -> None:
    for name in ("deepseek2", "deepseek_v2"):
        with pytest.raises(ArchError, match=f"'{name}' is not supported, only llama") as raised:
            from_gguf_metadata({"general.architecture": name}, {})
        assert "deepseek" not in str(raised.value).partition("only")[2]


def test_pages_are_floats_or_int8(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    sizes = SIZES | {"n_group": 1, "topk_group": 1}
    path.write_text(json.dumps({"model_type": "deepseek_v3", **TINY, **sizes}))
    source = build_module.resolve_source(f"dummy:{path}")

    def info(kv_cache_dtype: Any, *skipped: str) -> ModelInfo:
        cache = CacheSection(
            kv_cache_memory=2**20,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_dtype_skip_layers=skipped,
        )
        model = ModelSection(quantization="none", threads=1)
        return build_module.make_runner(source, OctavoConfig(model=model, cache=cache)).info

    assert info("auto").kv_bytes_per_token == 3 * (32 + 16) * 4
    rounded = info("int8")
    # Codes, one scale to 32 of them, and 16 bits an element of the rotated part.
    assert rounded.kv_bytes_per_token == 3 * (32 + 2 + 2 * 16)
    assert (rounded.kv_cache_dtype, rounded.attention_backend) == ("int8", "torch")
    assert any("codes of latent vectors" in note for note in rounded.notes)
    assert info("int8", "1").kv_bytes_per_token == 2 * (32 + 2 + 2 * 16) + (32 + 16) * 4
    for name in ("fp8", "int4", "kivi2"):
        with pytest.raises(ValueError, match=f"kv_cache_dtype {name} .* the nearest is int8"):
            info(name)


@pytest.mark.usefixtures("one_thread")
def test_blocks_of_fp8_are_read_as_v3_is_published(
    make_checkpoint: Any, build: Any, session: Any
) -> None:
    family, changes = CASES["v3"]
    checkpoint, writer = make_checkpoint(family, **SIZES | changes), WRITERS["fp8 in blocks"]
    file, config = checkpoint.folder / "model.safetensors", checkpoint.config()
    plain = load_file(file)
    coded: dict[str, torch.Tensor] = {}
    for name, tensor in plain.items():
        if "_proj" in name:
            written = writer.write(tensor)
            plain[name] = written.values
            module = name.removesuffix("weight")
            coded |= {module + part: value for part, value in written.parts.items()}
        else:
            coded[name] = tensor
    found = []
    for tensors, quantization in ((plain, {}), (coded, {"quantization_config": writer.config})):
        save_file(tensors, file, metadata={"format": "pt"})
        (checkpoint.folder / "config.json").write_text(json.dumps(config | quantization))
        found.append(session(build(checkpoint.source)).feed(PROMPT))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
