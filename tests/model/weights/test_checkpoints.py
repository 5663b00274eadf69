"""Quantized checkpoints: the values of each format, and the logits of whole models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_checkpoints import AWQ_ORDER, WRITERS, Writer
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.architectures.arch import ConfigKeys
from model.architectures.quantization import read_quantization
from model.implementation import choose_implementation
from model.weights.interface import QuantizedRows
from model.weights.safetensors import SafetensorsWeights
from model.weights.source import ModelSource

pytestmark = pytest.mark.usefixtures("one_thread")

WRITER = pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
TOKENS = torch.tensor([5, 17, 90, 3, 3, 41, 60, 8])


def _open(folder: Path, parts: dict[str, Tensor], config: dict[str, Any]) -> SafetensorsWeights:
    save_file(
        {f"m.q_proj.{name}": one for name, one in parts.items()}, folder / "model.safetensors"
    )
    return SafetensorsWeights(
        folder, read_quantization(ConfigKeys({"quantization_config": config}))
    )


def _matrix(outputs: int, inputs: int) -> Tensor:
    found = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    # A group above zero has the zero point 0, from which GPTQ's first version borrows.
    found[: outputs // 2, :16] = found[: outputs // 2, :16].abs() + 0.1
    return found


def _values(weights: SafetensorsWeights) -> Tensor:
    return torch.cat(list(weights.blocks("m.q_proj.weight")))


@WRITER
@pytest.mark.parametrize("shape", [(48, 80), (1600, 64)])
def test_values_are_those_that_were_written(
    writer: Writer, shape: tuple[int, int], tmp_path: Path
) -> None:
    written = writer.write(_matrix(*shape))
    weights = _open(tmp_path, written.parts, writer.config)
    assert weights.shapes == {"m.q_proj.weight": shape}
    assert "m.q_proj." in weights.describe("m.q_proj.weight")
    torch.testing.assert_close(_values(weights), written.values, rtol=1e-6, atol=0)


def _integers(weights: SafetensorsWeights) -> QuantizedRows | None:
    rows = weights.integers("m.q_proj.weight")
    return None if rows is None else next(rows)


@pytest.mark.parametrize("name", WRITERS)
def test_integers_have_the_values_of_blocks(name: str, tmp_path: Path) -> None:
    writer = WRITERS[name]
    written = writer.write(_matrix(48, 80))
    found = _integers(_open(tmp_path, written.parts, writer.config))
    has_none = name.startswith(("floats", "fp8")) or name in {"gptq desc_act", "packed sorted"}
    assert (found is None) == has_none
    if found is not None:
        torch.testing.assert_close(_widened(found), written.values, rtol=1e-5, atol=1e-6)


def _widened(found: QuantizedRows) -> Tensor:
    """Return the values of the integers, one by one."""
    outputs, inputs = found.codes.shape
    low = 0 if found.codes.dtype == torch.uint8 else -(2 ** (found.bits - 1))
    assert low <= int(found.codes.min())
    assert int(found.codes.max()) <= low + 2**found.bits - 1
    each = inputs // found.scales.shape[1]
    assert each * found.scales.shape[1] == inputs
    values = torch.empty(outputs, inputs)
    for output in range(outputs):
        for place in range(inputs):
            group = place // each
            value = found.scales[output, group] * found.codes[output, place]
            if found.minimums is not None:
                value = value + found.minimums[output, group]
            values[output, place] = value
    return values


def test_symmetric_integers_have_no_minimums(tmp_path: Path) -> None:
    for name, has_minimums in (("gptq", False), ("packed", False), ("awq", True)):
        folder = tmp_path / name
        folder.mkdir()
        writer = WRITERS[name]
        parts = writer.write(_matrix(48, 80)).parts
        found = _integers(_open(folder, parts, writer.config))
        assert found is not None
        assert (found.minimums is not None) == has_minimums


@pytest.mark.parametrize(
    ("fmt", "own_bits"),
    [
        ("awq", "4 bits (awq)"),
        ("integers", "8 bits (integers)"),
        ("floats", ""),
        ("gptq", "4 bits (gptq)"),
        ("gptq desc_act", ""),
    ],
)
def test_the_bits_of_most_values_are_named(fmt: str, own_bits: str, tmp_path: Path) -> None:
    parts = WRITERS[fmt].write(_matrix(48, 80)).parts
    weights = _open(tmp_path, parts, WRITERS[fmt].config)
    assert weights.own_bits == own_bits
    is_sorted = "1 matrices have sorted inputs (desc_act): widened" in weights.notes
    assert is_sorted == (fmt == "gptq desc_act")


# ---- any bits, by the formula of each value ------------------------------------------------------


def _words(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def _bits(words: Tensor, row: int, word: int, place: int, bits: int) -> int:
    return (int(words[row, word]) >> (place * bits)) % (1 << bits)


def test_any_words_of_awq(tmp_path: Path) -> None:
    outputs, inputs, group = 32, 48, 16
    parts = {
        "qweight": _words(inputs, outputs // 8),
        "qzeros": _words(inputs // group, outputs // 8),
        "scales": torch.rand(inputs // group, outputs).half(),
    }
    found = _values(_open(tmp_path, parts, WRITERS["awq"].config))
    for output in range(outputs):
        word, place = output // 8, AWQ_ORDER.index(output % 8)
        for one in range(inputs):
            code = _bits(parts["qweight"], one, word, place, 4)
            zero = _bits(parts["qzeros"], one // group, word, place, 4)
            scale = float(parts["scales"][one // group, output])
            assert float(found[output, one]) == pytest.approx((code - zero) * scale, rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_any_words_of_gptq(bits: int, tmp_path: Path) -> None:
    outputs, inputs, group, each = 32, 48, 16, 32 // bits
    parts = {
        "qweight": _words(inputs // each, outputs),
        "qzeros": _words(inputs // group, outputs // each),
        "scales": torch.rand(inputs // group, outputs).half(),
        "g_idx": torch.randint(0, inputs // group, (inputs,)).int(),
    }
    config = {**WRITERS["gptq v2 asymmetric"].config, "bits": bits}
    found = _values(_open(tmp_path, parts, config))
    for output in range(outputs):
        for one in range(inputs):
            of = int(parts["g_idx"][one])
            code = _bits(parts["qweight"], one // each, output, one % each, bits)
            zero = _bits(parts["qzeros"], of, output // each, output % each, bits)
            scale = float(parts["scales"][of, output])
            assert float(found[output, one]) == pytest.approx((code - zero) * scale, rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_any_words_of_packed(bits: int, tmp_path: Path) -> None:
    # Twenty outputs do not fill their words of zero points.
    outputs, inputs, group, each = 20, 48, 16, 32 // bits
    parts = {
        "weight_packed": _words(outputs, inputs // each),
        "weight_zero_point": _words(-(-outputs // each), inputs // group),
        "weight_scale": torch.rand(outputs, inputs // group).bfloat16(),
    }
    config = WRITERS["packed asymmetric"].config
    config = json.loads(json.dumps(config).replace('"num_bits": 4', f'"num_bits": {bits}'))
    found = _values(_open(tmp_path, parts, config))
    for output in range(outputs):
        for one in range(inputs):
            code = _bits(parts["weight_packed"], output, one // each, one % each, bits)
            zero = _bits(
                parts["weight_zero_point"], output // each, one // group, output % each, bits
            )
            scale = float(parts["weight_scale"][output, one // group])
            assert float(found[output, one]) == pytest.approx((code - zero) * scale, rel=1e-6)


# ---- whole models --------------------------------------------------------------------------------


def _quantize(
    checkpoint: Any, writer: Writer, config: dict[str, Any], *, with_head: bool = False
) -> None:
    """Write the products of a checkpoint in a format; its model gets the written values."""
    file = checkpoint.folder / "model.safetensors"
    tensors, changed = load_file(file), {}
    for name in [one for one in tensors if one.endswith("_proj.weight") or with_head]:
        if tensors[name].dim() != 2:
            continue
        written = writer.write(tensors.pop(name).float())
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{part}": one for part, one in written.parts.items()}
        changed[name] = written.values
    save_file(tensors, file, metadata={"format": "pt"})
    text = json.dumps(checkpoint.config() | {"quantization_config": config})
    (checkpoint.folder / "config.json").write_text(text)
    checkpoint.load_state(changed)


@WRITER
def test_logits_are_those_of_the_written_values(
    writer: Writer, make_checkpoint: Callable[..., Any], build: Any, session: Any
) -> None:
    checkpoint = make_checkpoint("llama", tie_word_embeddings=False)
    _quantize(checkpoint, writer, writer.config)
    assert choose_implementation(checkpoint.source, "auto") == ("octavo", "")
    found = session(build(checkpoint.source)).feed(TOKENS)
    torch.testing.assert_close(found, checkpoint.logits(TOKENS), rtol=1e-4, atol=1e-4)


def test_a_dummy_of_a_quantized_config_is_plain(build: Any, tmp_path: Path) -> None:
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    path = tmp_path / "config.json"
    config = {"model_type": "llama", **sizes, "quantization_config": WRITERS["awq"].config}
    path.write_text(json.dumps(config))
    found = build(ModelSource("dummy", path, "dummy"))
    assert "random weights are plain, and not quantized" in found.notes


def test_a_tied_head_and_embedding_may_be_quantized(
    make_checkpoint: Callable[..., Any], build: Any, session: Any
) -> None:
    """Some trainers save the head alone; then it is the embedding, too."""
    checkpoint = make_checkpoint("llama", tie_word_embeddings=True)
    writer = WRITERS["fp8 in blocks"]
    _quantize(checkpoint, writer, writer.config, with_head=True)
    file = checkpoint.folder / "model.safetensors"
    tensors = load_file(file)
    for part in ("weight", "weight_scale_inv"):
        tensors[f"lm_head.{part}"] = tensors.pop(f"model.embed_tokens.{part}")
    save_file(tensors, file, metadata={"format": "pt"})
    found = session(build(checkpoint.source)).feed(TOKENS)
    torch.testing.assert_close(found, checkpoint.logits(TOKENS), rtol=1e-4, atol=1e-4)
