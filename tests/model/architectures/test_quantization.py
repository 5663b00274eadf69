"""`quantization_config` of config.json: the formats that are read, and the refused variants."""

from __future__ import annotations

from typing import Any

import pytest

from model.architectures.arch import ArchError, BadValueError, ConfigKeys
from model.architectures.quantization import read_quantization
from model.formats.quantization import MatrixFormat, Quantization


def _read(**config: Any) -> Quantization:
    found = read_quantization(ConfigKeys({"quantization_config": config}))
    assert found is not None
    return found


def _group(fmt: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, **weights}}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": {"g": group}}


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
BY_GROUP: dict[str, Any] = {"strategy": "group", "group_size": 128}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AWQ, MatrixFormat("awq", 4, (1, 128), is_symmetric=False)),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64},
            MatrixFormat("awq", 4, (1, 64), is_symmetric=False),
        ),
        (GPTQ, MatrixFormat("gptq", 4, (1, 128))),
        ({**GPTQ, "bits": 8, "group_size": -1}, MatrixFormat("gptq", 8, (1, None))),
        ({**GPTQ, "checkpoint_format": "gptq_v2"}, MatrixFormat("gptq_v2", 4, (1, 128))),
        ({**GPTQ, "dynamic": {"-:.*down": {}}}, MatrixFormat("gptq", 4, (1, 128))),
        ({"quant_method": "fp8"}, MatrixFormat("floats", 8, (None, None))),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128]},
            MatrixFormat("floats", 8, (128, 128)),
        ),
        (_group(**BY_GROUP), MatrixFormat("packed", 4, (1, 128))),
        (_group(group_size=128), MatrixFormat("packed", 4, (1, 128))),
        (_group(group_size=-1), MatrixFormat("packed", 4, (1, None))),
        (
            _group(symmetric=False, strategy="channel"),
            MatrixFormat("packed", 4, (1, None), is_symmetric=False),
        ),
        (_group("int-quantized", num_bits=8), MatrixFormat("integers", 8, (None, None))),
        (
            _group("naive-quantized", num_bits=8, type="float", strategy="channel"),
            MatrixFormat("floats", 8, (1, None)),
        ),
    ],
)
def test_the_format_of_a_product(config: dict[str, Any], expected: MatrixFormat) -> None:
    assert _read(**config).format_of("model.layers.0.self_attn.q_proj") == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "quant_method None is not supported, only awq, gptq, compressed-tensors or fp8"),
        ({"quant_method": "bitsandbytes"}, r"'bitsandbytes' is not .*the closest is gptq\)"),
        ({"quant_method": "hqq"}, r"'hqq' is not .*the closest is gptq\)"),
        ({"quant_method": "quanto"}, r"'quanto' is not .*the closest is gptq\)"),
        ({"quant_method": "modelopt"}, r"'modelopt' is not .*the closest is fp8\)"),
        ({"quant_method": ["awq"]}, r"quant_method \['awq'\] is not supported"),
        ({**AWQ, "bits": 3}, "bits: 3 is not supported, only 4"),
        ({**AWQ, "version": "gemv"}, "version 'gemv' is not supported, only gemm"),
        ({**AWQ, "version": "exllama"}, "version 'exllama' is not supported, only gemm"),
        ({**AWQ, "version": "marlin"}, "version 'marlin' is not supported, only gemm"),
        ({**AWQ, "zero_point": False}, "zero_point must be true"),
        ({**AWQ, "group_size": 0}, "group_size must be -1 or above 0, got 0"),
        ({**GPTQ, "bits": 2}, "bits: 2 is not supported, only 4 or 8"),
        ({**GPTQ, "bits": None}, "bits is missing"),
        ({**GPTQ, "bits": "four"}, "bits must be a number, got 'four'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "'marlin' is not supported, only gptq, gptq_v2"),
        ({**GPTQ, "is_marlin_format": True}, "'marlin' is not supported, only gptq, gptq_v2"),
        ({**GPTQ, "dynamic": {"+:.*": {"bits": 8}}}, "dynamic: .* only one format for all"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt: 'e5m2' is not supported"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be two numb"),
        (_group(num_bits=3, **BY_GROUP), "config_groups: g: num_bits: 3 is not .* only 4 or 8"),
        (
            _group("nvfp4-pack-quantized"),
            "g: format 'nvfp4-pack-quantized' is not .*pack-quantized",
        ),
        (_group("marlin-24"), "g: format 'marlin-24' is not supported, only pack-quantized"),
        (_group(type="float"), "g: type 'float' is not supported with format 'pack-quantized'"),
        (
            _group(strategy="tensor_group", group_size=16),
            "strategy 'tensor_group' with group_size 16",
        ),
        (_group(dynamic=True), "g: dynamic must be false for weights"),
        ({**_group(), "config_groups": {}}, "config_groups must be an object of groups"),
        ({**_group(), "config_groups": {"g": ["Linear"]}}, "config_groups: g must be an object"),
        (
            {**_group(), "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config: .* only",
        ),
        ({**_group(), "transform_config": {"a": 1}}, "transform_config: .* only none"),
        ({**_group(), "ignore": ["re:("]}, "ignore: 're:.' is no pattern"),
        ({**_group(), "ignore": "lm_head"}, "ignore must be a list of names"),
    ],
)
def test_a_variant_without_support_is_refused_by_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(BadValueError, match=f"^quantization_config: .*{message}"):
        _read(**config)


def test_what_transformers_reads_is_left_to_it() -> None:
    with pytest.raises(ArchError) as caught:
        _read(quant_method="mxfp4")
    assert not isinstance(caught.value, BadValueError)


def test_ignored_modules_have_no_format() -> None:
    config = {**_group(), "ignore": ["lm_head", "re:.*layers.0.*"]}
    found = _read(**config)
    assert found.format_of("lm_head") is None
    assert found.format_of("model.layers.0.mlp.up_proj") is None
    assert found.format_of("model.layers.1.mlp.up_proj") is not None
    # Its class is another than that of the products.
    assert found.format_of("model.embed_tokens") is None


def test_exact_activations_and_pages_are_noted() -> None:
    config = _group()
    config["config_groups"]["g"]["input_activations"] = {"num_bits": 8}
    notes = _read(**config, kv_cache_scheme={"num_bits": 8}).notes
    assert ["activations" in one for one in notes] == [False, True]
    assert "kv_cache_scheme" in notes[0]
    assert _read(**_group()).notes == ()
