"""The families that our own layers compute, by model_type and by GGUF's general.architecture."""

from __future__ import annotations

from model.architectures import (
    deepseek_v2,
    deepseek_v3,
    gemma2,
    granite,
    llama,
    mistral,
    olmo2,
    qwen2,
    qwen3,
)
from model.architectures.arch import ArchSpec, Family, TensorSpec

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "gemma2": gemma2.FAMILY,
    "granite": granite.FAMILY,
    "olmo2": olmo2.FAMILY,
    "deepseek_v2": deepseek_v2.FAMILY,
    "deepseek_v3": deepseek_v3.FAMILY,
}


def declare_tensors(arch: ArchSpec) -> dict[str, TensorSpec]:
    """Return every tensor of a checkpoint by its name in safetensors."""
    vocabulary = (arch.vocab_size, arch.hidden_size)
    found = [
        TensorSpec("model.embed_tokens.weight", "token_embd.weight", vocabulary, "embedding"),
        TensorSpec("model.norm.weight", "output_norm.weight", vocabulary[1:], "final_norm"),
    ]
    if not arch.is_tied:
        found.append(TensorSpec("lm_head.weight", "output.weight", vocabulary, "lm_head"))
    family = FAMILIES[arch.family]
    for index, layer in enumerate(arch.layers):
        found += [one.in_layer(index) for one in family.layer_tensors(arch, layer)]
    return {one.name: one for one in found}
