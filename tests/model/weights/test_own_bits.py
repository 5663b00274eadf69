"""Products computed from the integers of a GGUF file, against the values that these stand for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from model.cpu.library import CpuLibrary, load_cpu_library
from model.weights.ggml_blocks import BLOCK_TYPES
from model.weights.gguf_file import read_gguf
from model.weights.source import ModelSource

PROMPT = torch.randint(0, 96, (24,), generator=torch.Generator().manual_seed(3))
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)


@pytest.fixture
def library() -> CpuLibrary:
    found = load_cpu_library()
    if isinstance(found, str):
        pytest.skip(found)
    return found


#: Rows of 256 values, so that the K types' blocks fit.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def _random_blocks(shape: tuple[int, ...], type_name: str, seed: int) -> np.ndarray:
    """Return blocks of any bytes but for their halves: the `gguf` package writes no K types.

    Values have a mean of zero and a standard deviation of about 0.05.
    """
    kind, is_k = BLOCK_TYPES[type_name], type_name.endswith("K")
    values = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0]
    generator = np.random.default_rng(seed)
    raw = generator.integers(0, 256, (shape[0], shape[1] // values, kind.block_bytes), np.uint8)
    # K types have a scale of six or eight bits for each group, too.
    scale = 0.05 * 12**0.5 / 2**kind.bits / ({6: 74, 4: 32, 5: 32}[kind.bits] if is_k else 1)
    halves = {208 if type_name == "Q6_K" else 0: scale}
    if kind.has_minimums:
        halves[2] = scale * (2**kind.bits - 1) / 2 * (1 if is_k else -1)
    for at, half in halves.items():
        raw[..., at : at + 2] = np.array([half], np.float16).view(np.uint8)
    return raw.reshape(shape[0], -1)


def _write_blocks(checkpoint: Any, path: Path, types: Callable[[str], str]) -> ModelSource:
    """Write a model of random blocks, of the type that `types` gives to the name of a matrix."""
    config = checkpoint.config()
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["hidden_size"] // config["num_attention_heads"],
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", config["rms_norm_eps"])
    writer.add_token_list(["token"] * config["vocab_size"])
    for seed, (name, tensor) in enumerate(checkpoint.state().items()):
        theirs = NAMES.get_name(name, try_suffixes=(".weight",))
        assert theirs, name
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if tensor.dim() == 1 or types(name) == "F32":
            writer.add_tensor(theirs, tensor.numpy())
            continue
        raw = _random_blocks(tuple(tensor.shape), types(name), seed)
        writer.add_tensor(theirs, raw, raw_dtype=gguf.GGMLQuantizationType[types(name)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelSource("gguf", path, path.stem)


def _mixed(name: str) -> str:
    """Mix types as llama.cpp does in Q4_K_M: one product has parts of two types."""
    return "Q6_K" if "v_proj" in name or "down" in name or "embed" in name else "Q4_K"


@pytest.mark.parametrize("types", [*BLOCK_TYPES, "mixed"])
def test_own_bits_give_the_logits_of_the_values(
    types: str,
    library: CpuLibrary,
    make_checkpoint: Any,
    build: Any,
    session: Any,
    tmp_path: Path,
) -> None:
    type_of = _mixed if types == "mixed" else lambda _name: types
    source = _write_blocks(make_checkpoint("llama", **WIDE), tmp_path / "m.gguf", type_of)
    exact = session(build(source)).feed(PROMPT)
    own = build(source, "own", tiles=library)
    assert own.format == "own"
    auto = build(source, "auto", tiles=library).notes
    named = "Q4_K and Q6_K" if types == "mixed" else types
    assert any(f"(the file's {named})" in note or ", own " in note for note in auto)
    error = (session(own).feed(PROMPT) - exact).norm() / exact.norm()
    # Rows are rounded to bfloat16 where the CPU multiplies it, and to integers of 15 bits.
    assert error < 2e-2
    num_values = sum(one.numel() for one in make_checkpoint("llama", **WIDE).state().values())
    bits = {"mixed": 6}.get(types) or BLOCK_TYPES[types].bits
    assert own.weights.num_bytes < num_values * (bits + 2.5) / 8


def test_an_embedding_of_its_own_stays_in_its_bits(
    library: CpuLibrary, make_checkpoint: Any, build: Any, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", **{**WIDE, "tie_word_embeddings": False})
    source = _write_blocks(checkpoint, tmp_path / "m.gguf", lambda _name: "Q4_0")
    own, exact = build(source, "own", tiles=library), build(source)
    assert torch.equal(own.weights.embedding(PROMPT), exact.weights.embedding(PROMPT))
    num_values = sum(one.numel() for one in checkpoint.state().values())
    assert own.weights.num_bytes < num_values * 5.5 / 8


def test_matrices_that_are_not_in_integers_are_widened_and_named(
    library: CpuLibrary, make_checkpoint: Any, build: Any, session: Any, tmp_path: Path
) -> None:
    def type_of(name: str) -> str:
        return "F32" if "layers.1.self_attn.v_proj" in name else "Q4_0"

    source = _write_blocks(make_checkpoint("llama", **WIDE), tmp_path / "m.gguf", type_of)
    own = build(source, "own", tiles=library)
    note = next(note for note in own.notes if "bf16" in note)
    assert re.match(r"3 tensors are widened to bf16, among them tensor blk.1.attn_k.weight", note)
    exact = session(build(source)).feed(PROMPT)
    error = (session(own).feed(PROMPT) - exact).norm() / exact.norm()
    assert error < 2e-2


@pytest.mark.parametrize("integers", ["nothing", "o_proj"])
def test_a_file_of_mostly_floats_has_no_own_bits(
    integers: str, library: CpuLibrary, make_checkpoint: Any, build: Any, tmp_path: Path
) -> None:
    def type_of(name: str) -> str:
        return "Q8_0" if integers in name else "F32"

    source = _write_blocks(make_checkpoint("llama", **WIDE), tmp_path / "m.gguf", type_of)
    assert build(source, "auto", tiles=library).format != "own"
    with pytest.raises(ValueError, match="quantization own is for files of integers"):
        build(source, "own", tiles=library)


def test_blocks_that_are_not_finite_are_named(
    library: CpuLibrary, make_checkpoint: Any, build: Any, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", **WIDE)
    source = _write_blocks(checkpoint, tmp_path / "m.gguf", lambda _name: "Q4_K")
    tensor = read_gguf(source.path).tensors["blk.1.attn_v.weight"]
    # The first half of the third block, a scale, becomes NaN.
    spoiled = bytearray(source.path.read_bytes())
    at = tensor.offset_bytes + 2 * 144
    spoiled[at : at + 2] = np.float16("nan").tobytes()
    source.path.write_bytes(spoiled)
    name = "model.layers.1.self_attn.v_proj.weight"
    for quantization in ("own", "none"):
        notes = build(source, quantization, tiles=library).notes
        assert f"weights that are not finite: {name}" in notes
