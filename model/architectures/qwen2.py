"""Qwen2: Llama with biases on q, k and v, and windows in the later layers if asked for."""

from __future__ import annotations

from model.architectures import arch_gguf, arch_hf
from model.architectures.arch import ArchSpec, BiasedPart, ConfigKeys, Family
from model.architectures.tensors import layer_tensors


def _read_hf(keys: ConfigKeys) -> ArchSpec:
    biases: frozenset[BiasedPart] = frozenset({"qkv"})
    arch = arch_hf.read_dense(keys, max_positions=32768, num_kv_heads=32, biases=biases)
    return arch.with_layers(arch.layers[0], read_hf_windows(keys, arch.num_layers))


def read_hf_windows(keys: ConfigKeys, num_layers: int) -> tuple[int | None, ...]:
    """Read each layer's window from config.json."""
    window, first = arch_hf.window_size(keys), keys.count("max_window_layers", 28)
    if not keys.flag("use_sliding_window"):
        window = None
    default = [window if layer >= first else None for layer in range(num_layers)]
    return arch_hf.windows_by_type(keys, window, default)


FAMILY = Family(_read_hf, arch_gguf.read_windowed, layer_tensors)
