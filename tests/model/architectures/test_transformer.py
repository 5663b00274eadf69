from __future__ import annotations

from typing import Any

import pytest
import torch

from model.cpu.library import load_cpu_library
from model.cpu.ops import CpuOps
from model.kv.format import KV_FORMATS
from model.ops import Ops, TorchOps

PROMPT = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(3))

# `transformers` is the reference; every option that changes the arithmetic stands in one of these.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama head_dim": ("llama", {"head_dim": 12, "rms_norm_eps": 1e-2}),
    "llama one kv head": ("llama", {"num_key_value_heads": 1}),
    "mistral window": ("mistral", {"sliding_window": 7}),
    "mistral no window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3 biases and windows": (
        "qwen3",
        {
            "head_dim": 10,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 7,
            "query_pre_attn_scalar": 40,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "pad_token_id": None,
        },
    ),
    "gemma2 without caps": (
        "gemma2",
        {
            "head_dim": 8,
            "attention_bias": True,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2 with biases": ("olmo2", {"attention_bias": True, "head_dim": 16}),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "attention_bias": True,
        },
    ),
}

ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 100.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "beta_fast": 4.0,
        "beta_slow": 0.5,
        "truncate": False,
    },
}


@pytest.fixture(params=["torch", "compiled"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "torch":
        return TorchOps()
    found = load_cpu_library()
    if isinstance(found, str):
        pytest.skip(found)
    return CpuOps(found)


@pytest.mark.parametrize("case", FAMILIES)
def test_logits_are_those_of_transformers(
    case: str, ops: Ops, make_checkpoint: Any, build: Any, session: Any
) -> None:
    family, changes = FAMILIES[case]
    checkpoint = make_checkpoint(family, **changes)
    pieces = session(build(checkpoint.source, ops=ops))
    # A prompt in two chunks, a decode, and the rest.
    ours = torch.cat([pieces.feed(chunk) for chunk in torch.tensor_split(PROMPT, (1, 14, 15))])
    torch.testing.assert_close(ours, checkpoint.logits(PROMPT), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ROPES)
def test_every_rope_is_that_of_transformers(
    case: str, make_checkpoint: Any, build: Any, session: Any
) -> None:
    checkpoint = make_checkpoint("llama", head_dim=16, rope_parameters=dict(ROPES[case]))
    ours = session(build(checkpoint.source)).feed(PROMPT)
    torch.testing.assert_close(ours, checkpoint.logits(PROMPT), atol=1e-4, rtol=1e-4)


def test_a_prompt_in_chunks_gives_the_same_logits(
    make_checkpoint: Any, build: Any, session: Any
) -> None:
    model = build(make_checkpoint("mistral", sliding_window=7).source)
    whole = session(model).feed(PROMPT)
    pieces = session(model)
    chunked = torch.cat([pieces.feed(chunk) for chunk in torch.tensor_split(PROMPT, (1, 14, 39))])
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


def test_a_sharded_checkpoint_is_the_same_model(
    make_checkpoint: Any, build: Any, session: Any
) -> None:
    checkpoint = make_checkpoint("qwen2", shard_size="30KB")
    assert len(list(checkpoint.folder.glob("model-*.safetensors"))) > 2
    ours = session(build(checkpoint.source)).feed(PROMPT)
    torch.testing.assert_close(ours, checkpoint.logits(PROMPT), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("quantization", "tolerance"), [("fp16", 0.003), ("bf16", 0.03), ("int8", 0.06)]
)
def test_a_format_stays_close_to_float32(
    quantization: str, tolerance: float, make_checkpoint: Any, build: Any, session: Any
) -> None:
    checkpoint = make_checkpoint("qwen3", head_dim=16, tie_word_embeddings=True)
    try:
        model = build(checkpoint.source, quantization)
    except ValueError as reason:
        pytest.skip(str(reason))
    exact = checkpoint.logits(PROMPT)
    error = (session(model).feed(PROMPT) - exact).norm() / exact.norm()
    assert error < tolerance


def test_what_attention_needs_is_told(make_checkpoint: Any, build: Any) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    model = build(make_checkpoint("qwen2", **changes).source)
    spec = model.attention_spec(KV_FORMATS["float16"])
    assert (spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (3, 6, 2, 8)
    assert spec.windows == (None, 5, 5)
    assert spec.scale == pytest.approx(8**-0.5)
    assert (spec.dtype, spec.kv_format.name) == (torch.float32, "float16")
    assert model.cos_sin.shape == (64, 8)


@pytest.mark.parametrize("is_tied", [True, False])
def test_plain_weights_take_what_the_checkpoint_has(
    is_tied: bool, make_checkpoint: Any, build: Any
) -> None:
    checkpoint = make_checkpoint("llama", tie_word_embeddings=is_tied)
    state = checkpoint.state()
    if is_tied:
        del state["lm_head.weight"]
    model = build(checkpoint.source)
    assert model.weights_bytes == sum(one.numel() * 4 for one in state.values())
