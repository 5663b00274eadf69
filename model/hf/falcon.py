"""Falcon's attention through the attention interface, which is younger than that model.

Projections, layout of heads and rotation stay those of `transformers`. Without this, the layers
compute attention themselves, without pages.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from model.architectures.arch import ArchError


def open_attention(model: Any) -> None:  # noqa: ANN401 - transformers' classes
    """Route a Falcon's attention through the registered function; leave other models unchanged."""
    for module in model.modules():
        if isinstance(module, FalconAttention):
            module.forward = MethodType(_forward, module)


def _forward(
    attention: Any,  # noqa: ANN401 - as above
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    *,
    position_embeddings: tuple[Tensor, Tensor],
    **_others: object,
) -> tuple[Tensor, None]:
    """Replace `FalconAttention.forward`."""
    if alibi is not None:
        raise ArchError("its scores depend on distances (alibi), which pages know nothing of")
    heads = attention._split_heads(attention.query_key_value(hidden_states))  # noqa: SLF001 - how a version lays out its heads is its own business
    query, key, value = (one.transpose(1, 2) for one in heads)
    query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if attention.new_decoder_architecture:
        # Split off once for each query; pages need them once for each group.
        repeats = attention.num_heads // attention.num_kv_heads
        key, value = key[:, ::repeats], value[:, ::repeats]
    attend = AttentionInterface()[attention.config._attn_implementation]  # noqa: SLF001 - as its own code does
    attended, _ = attend(
        attention, query, key, value, attention_mask, scaling=attention.inv_norm_factor
    )
    return attention.dense(attended.flatten(2)), None
