"""The formats of keys and values by their names: ours, and the nearest to the names of others."""

from __future__ import annotations

from typing import Literal

KVCacheDtype = Literal[
    "auto", "float32", "float16", "bfloat16", "int8", "fp8", "int4", "kivi4", "kivi2"
]

#: Formats of codes: they round keys and values to 8 bits or less.
CODED_DTYPES = ("int8", "fp8", "int4", "kivi4", "kivi2")

#: In a list of layers: the layers whose queries read a window.
SLIDING_WINDOW = "sliding_window"

_SAME = {"fp8_e4m3": "fp8"}

#: Names of vLLM, SGLang, TensorRT-LLM and llama.cpp.
_NEAREST = {
    "f32": "float32",
    **dict.fromkeys(("f16", "half"), "float16"),
    "bf16": "bfloat16",
    **dict.fromkeys(("fp8_e5m2", "fp8_inc", "fp8_ds_mla", "fp8_per_token_head"), "fp8"),
    **dict.fromkeys(("int8_per_token_head", "q8_0", "q5_0", "q5_1", "turboquant_k8v4"), "int8"),
    **dict.fromkeys(("int4_per_token_head", "q4_0", "q4_1", "iq4_nl"), "int4"),
    "int2_per_token_head": "kivi2",
    **dict.fromkeys(("nvfp4", "mxfp4", "fp4", "fp4_e2m1"), "int4"),
}


def our_kv_cache_dtype(name: object) -> object:
    """Return the name of the same format here; other values as they are.

    Raises `ValueError`, with the nearest format, for a format of others.
    """
    if not isinstance(name, str):
        return name
    nearest = _NEAREST.get(name, "int4" if name.startswith("turboquant_") else None)
    if nearest is not None:
        raise ValueError(f"kv_cache_dtype: {name!r} is not supported; the nearest is {nearest}")
    return _SAME.get(name, name)


def check_skipped_layers(skipped: tuple[str, ...], kv_cache_dtype: str) -> None:
    """Raise `ValueError` where a list of layers without codes has no meaning."""
    for layer in skipped:
        if layer != SLIDING_WINDOW and not (layer.isascii() and layer.isdigit()):
            raise ValueError(
                f"kv_cache_dtype_skip_layers: {layer!r} is neither the index of a layer "
                f"nor {SLIDING_WINDOW}"
            )
    if skipped and kv_cache_dtype not in CODED_DTYPES:
        raise ValueError(
            "kv_cache_dtype_skip_layers needs a kv_cache_dtype of "
            f"{', '.join(CODED_DTYPES)}, got {kv_cache_dtype}"
        )
