"""Reads `quantization_config` of a config.json: AWQ, GPTQ, compressed-tensors and fp8.

A variant that would need other arithmetic or another order of bits is an error that names its key
and the supported values. Keys that only describe how a checkpoint was made are not read. Free of
torch; `model/weights/checkpoints/` reads the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import cast

from model.architectures.arch import ArchError, BadValueError, ConfigKeys
from model.formats.json_file import shown
from model.formats.quantization import Layout, MatrixFormat, ModuleGroup, Quantization

_KEY = "quantization_config"
#: All modules: the names of the tensors show which of them are quantized.
_EVERYWHERE = ("re:",)
_EXACT_ACTIVATIONS = "activations are not rounded to 8 bits, as quantization_config would have it"
_EXACT_PAGES = "kv_cache_scheme of quantization_config is not used: see --kv-cache-dtype"
_SUPPORTED = "awq, gptq, compressed-tensors or fp8"

#: The supported method that is closest to an unsupported one.
_NEAREST = {
    **dict.fromkeys(("fbgemm_fp8", "modelopt", "quark"), "fp8"),
    **dict.fromkeys(("bitsandbytes", "hqq", "quanto", "eetq", "torchao"), "gptq"),
    **dict.fromkeys(("aqlm", "vptq", "higgs", "spqr", "auto-round"), "awq"),
    **dict.fromkeys(("nvfp4", "fp_quant"), "compressed-tensors"),
}


def read_quantization(keys: ConfigKeys) -> Quantization | None:
    """Read `quantization_config`; None: the weights are plain.

    Raises `BadValueError`, or `ArchError` where `transformers` reads the method.
    """
    values = keys.get(_KEY)
    if values is None:
        return None
    if not isinstance(values, dict):
        raise BadValueError(f"{_KEY} must be an object, got {shown(values)}")
    method = values.get("quant_method")
    if method == "mxfp4":
        raise ArchError(f"{_KEY}: quant_method 'mxfp4' is not supported, only {_SUPPORTED}")
    if not isinstance(method, str) or method not in _READERS:
        nearest = _NEAREST.get(method) if isinstance(method, str) else None
        raise BadValueError(
            f"{_KEY}: quant_method {shown(method)} is not supported, only {_SUPPORTED}"
            + (f" (the closest is {nearest})" if nearest else "")
        )
    try:
        return _READERS[method](ConfigKeys(values))
    except ArchError as error:
        raise BadValueError(f"{_KEY}: {error}") from error


def _awq(keys: ConfigKeys) -> Quantization:
    """Read AutoAWQ's keys, in its older names too (`w_bit`, `q_group_size`)."""
    version = keys.get("version") or keys.get("format") or "gemm"
    if str(version).lower() != "gemm":
        raise ArchError(f"version {shown(version)} is not supported, only gemm")
    if keys.get("backend") == "llm-awq":
        raise ArchError("backend 'llm-awq' is not supported, only autoawq")
    if not keys.flag("zero_point", default=True):
        raise ArchError("zero_point must be true")
    bits = _bits(keys, "w_bit" if "w_bit" in keys else "bits", 4)
    group = _group_size(keys, "q_group_size" if "q_group_size" in keys else "group_size")
    return _uniform("awq", MatrixFormat("awq", bits, (1, group), is_symmetric=False))


def _gptq(keys: ConfigKeys) -> Quantization:
    """Read the keys of AutoGPTQ and GPTQModel."""
    names: dict[str, Layout] = {"gptq": "gptq", "gptq_v2": "gptq_v2"}
    name = keys.get("checkpoint_format") or keys.get("format") or "gptq"
    if keys.flag("is_marlin_format"):
        name = "marlin"
    layout = names.get(name) if isinstance(name, str) else None
    if layout is None:
        only = ", ".join(names)
        raise ArchError(f"checkpoint_format {shown(name)} is not supported, only {only}")
    keys.refuse_unless("pack_dtype", "int32", "torch.int32")
    keys.refuse_unless("rotation")
    # Modules with their own bits; a name behind "-:" is one that is not quantized.
    dynamic = keys.get("dynamic") or {}
    if not isinstance(dynamic, dict) or any(not one.startswith("-:") for one in dynamic):
        raise ArchError(f"dynamic: {shown(dynamic)} is not supported, only one format for all")
    bits = _bits(keys, "bits", 4, 8)
    return _uniform(
        "gptq",
        MatrixFormat(
            layout,
            bits,
            (1, _group_size(keys, "group_size")),
            is_symmetric=keys.flag("sym", default=True),
        ),
    )


def _fp8(keys: ConfigKeys) -> Quantization:
    """Read the keys of DeepSeek's blocks, and of scales for whole tensors."""
    keys.refuse_unless("fmt", "e4m3", "float8_e4m3fn")
    keys.refuse_unless("activation_scheme", "dynamic", "static")
    block = _block(keys, "weight_block_size") if keys.get("weight_block_size") else (None, None)
    found = _uniform("fp8", MatrixFormat("floats", 8, block))
    return Quantization(found.method, found.groups, notes=(_EXACT_ACTIVATIONS,))


def _uniform(method: str, fmt: MatrixFormat) -> Quantization:
    return Quantization(method, (ModuleGroup(_EVERYWHERE, fmt),))


# ---- compressed-tensors --------------------------------------------------------------------------


def _compressed(keys: ConfigKeys) -> Quantization:
    """Read the groups of compressed-tensors: each has targets, weights and activations."""
    sparsity = keys.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, dict) and sparsity.get("format") == "dense"):
        raise ArchError(f"sparsity_config: {shown(sparsity)} is not supported, only format dense")
    if transforms := keys.get("transform_config"):
        raise ArchError(f"transform_config: {shown(transforms)} is not supported, only none")
    groups = keys.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ArchError(f"config_groups must be an object of groups, got {shown(groups)}")
    notes = [_EXACT_PAGES] if keys.get("kv_cache_scheme") else []
    found: dict[str, MatrixFormat | None] = {}
    for name, values in groups.items():
        if not isinstance(values, dict):
            raise ArchError(f"config_groups: {name} must be an object, got {shown(values)}")
        group = ConfigKeys(values)
        try:
            fmt = _weights(group, keys)
            # Of two groups with the same target the later one counts.
            found |= dict.fromkeys(_targets(group, "targets"), fmt)
        except ArchError as error:
            raise ArchError(f"config_groups: {name}: {error}") from error
        if group.get("input_activations") and _EXACT_ACTIVATIONS not in notes:
            notes.append(_EXACT_ACTIVATIONS)
    return Quantization(
        "compressed-tensors",
        tuple(ModuleGroup((target,), fmt) for target, fmt in found.items()),
        _targets(keys, "ignore"),
        tuple(notes),
    )


#: Of a group's format, the layouts by the type of its codes.
_FORMATS: dict[str, dict[str, Layout]] = {
    "pack-quantized": {"int": "packed"},
    "int-quantized": {"int": "integers"},
    "float-quantized": {"float": "floats"},
    "naive-quantized": {"int": "integers", "float": "floats"},
}


def _weights(group: ConfigKeys, keys: ConfigKeys) -> MatrixFormat | None:
    values = group.get("weights")
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ArchError(f"weights must be an object, got {shown(values)}")
    weights = ConfigKeys(values)
    name, kind = group.get("format") or keys.get("format"), weights.get("type") or "int"
    if not isinstance(name, str) or name not in _FORMATS:
        raise ArchError(f"format {shown(name)} is not supported, only {', '.join(_FORMATS)}")
    layout = _FORMATS[name].get(kind) if isinstance(kind, str) else None
    if layout is None:
        raise ArchError(f"type {shown(kind)} is not supported with format {name!r}")
    if weights.get("dynamic"):
        raise ArchError("dynamic must be false for weights")
    return MatrixFormat(
        layout,
        _bits(weights, "num_bits", *((8,) if layout == "floats" else (4, 8))),
        _strategy(weights),
        is_symmetric=weights.flag("symmetric", default=True),
    )


def _strategy(weights: ConfigKeys) -> tuple[int | None, int | None]:
    """Return the outputs and the inputs that share a scale."""
    group = _group_size(weights, "group_size")
    strategy = weights.get("strategy")
    if strategy is None:
        strategy = "group" if group else "channel" if weights.get("group_size") else "tensor"
    match strategy:
        case "tensor":
            return None, None
        case "channel":
            return 1, None
        case "group" if group:
            return 1, group
        case "block":
            return _block(weights, "block_structure")
        case _:
            raise ArchError(
                f"strategy {shown(strategy)} with group_size {shown(weights.get('group_size'))} is "
                "not supported, only tensor, channel, group or block"
            )


# ---- values --------------------------------------------------------------------------------------


def _bits(keys: ConfigKeys, key: str, *supported: int) -> int:
    bits = keys.count(key, 8 if key == "num_bits" else None)
    if bits not in supported:
        only = " or ".join(map(str, supported))
        raise ArchError(f"{key}: {bits} is not supported, only {only}")
    return bits


def _group_size(keys: ConfigKeys, key: str) -> int | None:
    """Return the inputs of a group; None, which is -1 in the file: all inputs."""
    size = keys.count(key, -1)
    if size != -1 and size < 1:
        raise ArchError(f"{key} must be -1 or above 0, got {size}")
    return None if size == -1 else size


def _block(keys: ConfigKeys, key: str) -> tuple[int, int]:
    found = keys.get(key)
    is_pair = isinstance(found, list) and [type(one) for one in found] == [int, int]
    if not is_pair or min(cast("list[int]", found)) < 1:
        raise ArchError(f"{key} must be two numbers above 0, got {shown(found)}")
    outputs, inputs = cast("list[int]", found)
    return outputs, inputs


def _targets(keys: ConfigKeys, key: str) -> tuple[str, ...]:
    found = keys.get(key) or []
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ArchError(f"{key} must be a list of names, got {shown(found)}")
    for one in found:
        try:
            re.compile(one.removeprefix("re:") if one.startswith("re:") else "")
        except re.error as error:
            raise ArchError(f"{key}: {shown(one)} is no pattern: {error}") from error
    return tuple(cast("list[str]", found))


_READERS: dict[str, Callable[[ConfigKeys], Quantization]] = {
    "awq": _awq,
    "gptq": _gptq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
}
