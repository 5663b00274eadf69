"""Quantized checkpoints that cannot be read: the message names the tensor and its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import WRITERS, compressed
from safetensors.torch import save_file
from torch import Tensor

from configs.schema import ModelSection
from model.architectures.arch import ConfigKeys
from model.architectures.quantization import read_quantization
from model.implementation import build_decoder
from model.ops import TorchOps
from model.weights.interface import WeightsError
from model.weights.safetensors import SafetensorsWeights
from model.weights.source import ModelSource

Parts = dict[str, Tensor]


def _open(
    folder: Path, parts: Parts, config: dict[str, Any], **others: Tensor
) -> SafetensorsWeights:
    named = {f"m.q_proj.{name}": one for name, one in parts.items()}
    save_file({**named, **others}, folder / "model.safetensors")
    return SafetensorsWeights(
        folder, read_quantization(ConfigKeys({"quantization_config": config}))
    )


def _without(*names: str) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        for name in names:
            del parts[name]

    return change


def _with(name: str, tensor: Tensor) -> Callable[[Parts], None]:
    return lambda parts: parts.update({name: tensor})


FILE = r" in \S+model\.safetensors"


@pytest.mark.parametrize(
    ("fmt", "change", "message"),
    [
        ("awq", _without("scales"), rf"q_proj\.scales is missing; .*{FILE} it should be \[5, 48\]"),
        ("awq", _without("qweight"), rf"q_proj\.qweight is missing beside tensor .*qzeros{FILE}"),
        (
            "awq",
            _with("weight", torch.ones(48, 80)),
            rf"qweight{FILE} is there beside tensor .*weight",
        ),
        (
            "awq",
            _with("scales", torch.ones(4, 48)),
            rf"scales{FILE} has shape \[4, 48\].* \[5, 48\]",
        ),
        (
            "awq",
            _with("scales", torch.ones(5, 48).int()),
            rf"scales{FILE} is of type I32; supported",
        ),
        ("awq", _with("qweight", torch.ones(80, 6)), rf"qweight{FILE} is of type F32, .* I32"),
        ("awq", _with("qweight", torch.ones(80).int()), rf"qweight{FILE} has shape \[80\]"),
        ("awq", _with("qweight", torch.ones(72, 6).int()), r"groups of 16 do not divide its 72"),
        ("awq", _with("weight_scale", torch.ones(1)), r"^$"),
        ("gptq", _without("qzeros"), rf"q_proj\.qzeros is missing; beside .*{FILE}"),
        ("gptq", _with("g_idx", torch.full((80,), 7).int()), rf"qweight{FILE}: g_idx has groups"),
        ("gptq", _with("g_idx", torch.ones(79).int()), rf"g_idx{FILE} has shape \[79\]"),
        ("gptq", _with("qweight", torch.ones(10, 20).int()), rf"{FILE}: the zero points of 20"),
        ("packed", _without("weight_scale"), rf"weight_scale is missing; .*{FILE}"),
        (
            "packed",
            _with("weight_shape", torch.tensor([48, 79])),
            rf"weight_packed{FILE}: weight_shape",
        ),
        ("packed asymmetric", _without("weight_zero_point"), r"weight_zero_point is missing"),
        ("integers", _without("weight_scale"), r"weight_scale or weight_scale_inv is missing"),
        ("integers", _with("weight", torch.ones(48, 80)), rf"weight{FILE} is of type F32, .* I8"),
        (
            "floats",
            _with("weight_scale", torch.ones(24, 2)),
            rf"weight_scale{FILE} has shape \[24, 2\]",
        ),
        (
            "fp8 in blocks",
            _without("weight_scale_inv"),
            r"weight_scale or weight_scale_inv is missing",
        ),
        ("fp8 in blocks", _with("weight_scale_inv", torch.ones(2, 2)), r"should be \[2, 3\]"),
    ],
)
def test_a_fault_names_the_tensor_and_its_file(
    fmt: str, change: Callable[[Parts], None], message: str, tmp_path: Path
) -> None:
    parts = WRITERS[fmt].write(torch.randn(48, 80)).parts
    change(parts)
    if message == "^$":
        # A part of another format: it is reported as not used, like any tensor without a place.
        assert "m.q_proj.weight_scale" in _open(tmp_path, parts, WRITERS[fmt].config).shapes
        return
    with pytest.raises(WeightsError, match=message):
        list(_open(tmp_path, parts, WRITERS[fmt].config).blocks("m.q_proj.weight"))


def test_parts_of_a_module_without_a_format_are_refused(tmp_path: Path) -> None:
    config = {**WRITERS["packed"].config, "ignore": ["re:.*q_proj"]}
    parts = WRITERS["packed"].write(torch.randn(48, 80)).parts
    with pytest.raises(WeightsError, match=rf"m\.q_proj\.weight_\w+{FILE} belongs to a quantized"):
        _open(tmp_path, parts, config)


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    weights = _open(
        tmp_path, WRITERS["awq"].write(torch.randn(48, 80)).parts, WRITERS["awq"].config
    )
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(WeightsError, match=r"model\.safetensors is cut off"):
        list(weights.blocks("m.q_proj.weight"))


def test_codes_beyond_their_bits_are_refused(tmp_path: Path) -> None:
    config = compressed("int-quantized", num_bits=4, strategy="channel")
    parts = {"weight": torch.full((8, 16), 7).to(torch.int8), "weight_scale": torch.ones(8, 1)}
    assert _open(tmp_path, parts, config).integers("m.q_proj.weight") is not None
    parts["weight"][3, 4] = 8
    with pytest.raises(WeightsError, match=rf"weight{FILE}: it has codes of more than 4 bits"):
        _open(tmp_path, parts, config).integers("m.q_proj.weight")


def test_scales_of_activations_are_noted_and_not_used(tmp_path: Path) -> None:
    writer = WRITERS["integers"]
    parts = writer.write(torch.randn(48, 80)).parts | {"input_scale": torch.ones(1)}
    weights = _open(tmp_path, parts, writer.config)
    assert list(weights.shapes) == ["m.q_proj.weight"]
    assert "1 scales of activations are not used" in weights.notes


def test_parts_may_be_in_several_files(tmp_path: Path) -> None:
    written = WRITERS["awq"].write(torch.randn(48, 80))
    placed = {}
    for index, (name, part) in enumerate(written.parts.items()):
        save_file({f"m.q_proj.{name}": part}, tmp_path / f"part-{index}.safetensors")
        placed[f"m.q_proj.{name}"] = f"part-{index}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    config = {"quantization_config": WRITERS["awq"].config}
    weights = SafetensorsWeights(tmp_path, read_quantization(ConfigKeys(config)))
    assert torch.equal(torch.cat(list(weights.blocks("m.q_proj.weight"))), written.values)


def test_two_groups_have_their_own_bits(tmp_path: Path) -> None:
    """A name counts before a pattern, and a pattern before a class."""
    weight = torch.randn(48, 80)
    config = compressed("mixed-precision")
    config["config_groups"] = {
        "all": {**WRITERS["packed"].config["config_groups"]["group_0"], "format": "pack-quantized"},
        "down": {
            **WRITERS["floats"].config["config_groups"]["group_0"],
            "format": "float-quantized",
            "targets": ["re:.*v_proj", "m.o_proj"],
        },
    }
    files: Parts = {}
    expected: Parts = {}
    for module, fmt in (("q_proj", "packed"), ("v_proj", "floats"), ("o_proj", "floats")):
        written = WRITERS[fmt].write(weight)
        files |= {f"m.{module}.{name}": one for name, one in written.parts.items()}
        expected[f"m.{module}.weight"] = written.values
    files["lm_head.weight"] = expected["lm_head.weight"] = weight
    weights = _open(tmp_path, {}, config, **files)
    assert weights.shapes == dict.fromkeys(expected, (48, 80))
    for name, values in expected.items():
        assert torch.equal(torch.cat(list(weights.blocks(name))), values)


def test_a_fault_is_not_handed_to_transformers(
    make_checkpoint: Callable[..., Any],
) -> None:
    """It does not read these files; its refusal would hide the tensor at fault."""
    checkpoint = make_checkpoint("llama")
    text = json.dumps(checkpoint.config() | {"quantization_config": WRITERS["awq"].config})
    (checkpoint.folder / "config.json").write_text(text)
    file = checkpoint.folder / "model.safetensors"
    tensors: Parts = {}
    tensors["model.layers.0.self_attn.q_proj.scales"] = torch.ones(3, 48)
    save_file(tensors, file)
    source = ModelSource("safetensors", checkpoint.folder, "m")
    with pytest.raises(WeightsError, match=r"^tensor model\.layers\.0\.self_attn\.q_proj\.qweight"):
        build_decoder(
            source,
            ModelSection(threads=1),
            dtype=torch.float32,
            device=torch.device("cpu"),
            ops=TorchOps(),
            tiles=None,
        )
