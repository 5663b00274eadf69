from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from configs.schema import CacheSection, ModelSection, OctavoConfig
from model.architectures.read_arch import from_gguf
from model.assemble import assemble
from model.formats import FormatError
from model.weights.gguf import GgufWeights
from model.weights.gguf_file import read_gguf
from model.weights.interface import WeightsError
from model.weights.source import ModelSource, resolve

PROMPT = torch.randint(0, 96, (24,), generator=torch.Generator().manual_seed(3))
#: Rows of 64 and 96 values, so that the 32 values of a block fit.
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
#: By family: our config's keys and llama.cpp's, for the keys that its converter adds to sizes.
MORE_KEYS: dict[str, dict[str, str]] = {
    "gemma2": {
        "sliding_window": "attention.sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "granite": {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    },
}


def _gguf_name(family: str, name: str) -> str:
    """Translate by the `gguf` package's own table, which llama.cpp's converter uses."""
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, 3)
    found: str | None = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found, name
    return found


def _permute(rows: Tensor, num_heads: int) -> Tensor:
    """Apply llama.cpp's `LlamaModel.permute` of its convert_hf_to_gguf.py."""
    rest = rows.shape[1:]
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rest)
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _write(
    checkpoint: Any,
    path: Path,
    type_name: str = "F32",
    eos_token_id: int = 5,
    most_tensors: int = 0,
    **more: Tensor,
) -> ModelSource:
    """Convert a checkpoint as llama.cpp does; one-dimensional tensors stay float32."""
    config = checkpoint.config()
    family, num_heads = config["model_type"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, family, split_max_tensors=most_tensors)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_key_length(config.get("head_dim", 16))
    writer.add_token_list(["token"] * config["vocab_size"])
    writer.add_eos_token_id(eos_token_id)
    for key, theirs in MORE_KEYS.get(family, {}).items():
        add = writer.add_uint32 if isinstance(config[key], int) else writer.add_float32
        add(f"{family}.{theirs}", config[key])
    kind = gguf.GGMLQuantizationType[type_name]
    for name, tensor in checkpoint.state().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        rows = tensor
        if family == "gemma2" and name.endswith("norm.weight"):
            rows = rows + 1
        if family in {"llama", "granite"} and ("q_proj" in name or "k_proj" in name):
            rows = _permute(rows, num_heads if "q_proj" in name else config["num_key_value_heads"])
        if rows.dim() == 1:
            writer.add_tensor(_gguf_name(family, name), rows.numpy())
        else:
            quantized = gguf.quantize(rows.numpy(), kind)
            writer.add_tensor(_gguf_name(family, name), quantized, raw_dtype=kind)
    for name, tensor in more.items():
        writer.add_tensor(name.replace("__", "."), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelSource("gguf", path, path.stem)


@pytest.mark.parametrize(
    ("type_name", "tolerance"),
    [("F32", 1e-5), ("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 5e-2), ("Q4_1", 0.6), ("Q4_0", 0.8)],
)
def test_logits_are_those_of_the_checkpoint(
    type_name: str,
    tolerance: float,
    make_checkpoint: Any,
    build: Any,
    session: Any,
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint("llama", **SIZES)
    source = _write(checkpoint, tmp_path / "m.gguf", type_name)
    exact = checkpoint.logits(PROMPT)
    error = (session(build(source)).feed(PROMPT) - exact).norm() / exact.norm()
    assert error < tolerance


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
        (
            "gemma2",
            {
                "head_dim": 16,
                "query_pre_attn_scalar": 16,
                "sliding_window": 7,
                "attn_logit_softcapping": 2.0,
                "final_logit_softcapping": 3.0,
            },
        ),
        ("olmo2", {}),
        (
            "granite",
            {
                "embedding_multiplier": 3.0,
                "logits_scaling": 2.0,
                "residual_multiplier": 0.4,
                "attention_multiplier": 0.2,
            },
        ),
    ],
)
def test_every_family_finds_its_tensors(
    family: str,
    changes: dict[str, Any],
    make_checkpoint: Any,
    build: Any,
    session: Any,
    tmp_path: Path,
) -> None:
    checkpoint = make_checkpoint(family, **SIZES, **changes)
    model = build(_write(checkpoint, tmp_path / "m.gguf"))
    assert model.arch.eos_token_ids == (5,)
    ours = session(model).feed(PROMPT)
    torch.testing.assert_close(ours, checkpoint.logits(PROMPT), atol=1e-4, rtol=1e-4)


def test_a_split_model_is_one(
    make_checkpoint: Any, build: Any, session: Any, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", **SIZES)
    _write(checkpoint, tmp_path / "m.gguf", most_tensors=9)
    parts = sorted(path.name for path in tmp_path.glob("*.gguf"))
    count = len(parts)
    assert parts == [f"m-0000{i + 1}-of-0000{count}.gguf" for i in range(count)]
    assert count > 2
    given = resolve(str(tmp_path / parts[1]), home=tmp_path, progress=False)
    ours = session(build(given)).feed(PROMPT)
    torch.testing.assert_close(ours, checkpoint.logits(PROMPT), atol=1e-4, rtol=1e-4)
    _cut(tmp_path / parts[2], (tmp_path / parts[2]).stat().st_size - 64)
    with pytest.raises(FormatError, match=f"{parts[2]} is cut off: tensor"):
        read_gguf(given.path)
    (tmp_path / parts[2]).unlink()
    with pytest.raises(FormatError, match=f"{parts[2]} is missing"):
        read_gguf(given.path)
    alone = given.path.rename(tmp_path / "alone.gguf")
    with pytest.raises(FormatError, match=f"is one of {count} parts: they lie in one folder"):
        read_gguf(alone)


@pytest.mark.parametrize("eos_token_id", [96, 2**32 - 1])
def test_a_stop_id_that_is_no_token_is_left_out(
    make_checkpoint: Any, tmp_path: Path, eos_token_id: int
) -> None:
    checkpoint = make_checkpoint("llama", **SIZES)
    source = _write(checkpoint, tmp_path / "m.gguf", eos_token_id=eos_token_id)
    memory = CacheSection(kv_cache_memory=2**20)
    info = assemble(source, OctavoConfig(model=ModelSection(threads=1), cache=memory)).info
    assert info.eos_token_ids == ()
    assert any(str(eos_token_id) in note for note in info.notes)


def test_llama3s_rope_comes_as_a_tensor(
    make_checkpoint: Any, build: Any, session: Any, tmp_path: Path
) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    checkpoint = make_checkpoint("llama", **SIZES, rope_parameters=rope)
    # llama.cpp's LlamaModel.generate_extra_tensors, with a head of 16 dimensions.
    frequencies = 100.0 ** -(torch.arange(0, 16, 2) / 16)
    turns = 16 * frequencies / (2 * torch.pi)
    smooth = (turns - 1) / (4 - 1)
    factors = torch.where(
        turns < 1, 8.0, torch.where(turns > 4, 1.0, 1 / ((1 - smooth) / 8 + smooth))
    )
    source = _write(checkpoint, tmp_path / "m.gguf", rope_freqs__weight=factors)
    ours = session(build(source)).feed(PROMPT)
    torch.testing.assert_close(ours, checkpoint.logits(PROMPT), atol=1e-4, rtol=1e-4)


def _write_raw(path: Path, tensors: dict[str, tuple[np.ndarray, str]], **values: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in values.items():
        writer.add_uint32(key, value)
    for name, (data, type_name) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("type_name", ["Q4_K", "Q5_K", "Q6_K", "Q5_0", "Q5_1", "Q3_K", "IQ4_XS"])
def test_blocks_are_decoded_in_many_pieces_as_in_one(
    type_name: str, make_checkpoint: Any, tmp_path: Path
) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    values, size_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (700, 512 // values, size_bytes), np.uint8)
    # Random bytes make some scales NaN; half floats' exponents are kept small.
    blocks &= 0b10111011
    raw = blocks.reshape(700, -1)
    whole = make_checkpoint("llama", **SIZES)
    arch = from_gguf(read_gguf(_write(whole, tmp_path / "a.gguf").path))
    path = _write_raw(tmp_path / "b.gguf", {"blk.0.ffn_up.weight": (raw, type_name)})
    weights = GgufWeights(read_gguf(path), arch)
    name = "model.layers.0.mlp.up_proj.weight"
    found = list(weights.blocks(name))
    assert len(found) > 1
    assert weights.shapes[name] == (700, 512)
    expected = gguf.dequantize(raw, kind)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(torch.cat(found).numpy(), expected)


def test_the_directory_is_that_of_the_gguf_package(make_checkpoint: Any, tmp_path: Path) -> None:
    path = _write(make_checkpoint("llama", **SIZES), tmp_path / "m.gguf", "Q8_0").path
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    assert [(t.name, t.offset_bytes, t.num_bytes) for t in ours.tensors.values()] == [
        (t.name, t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    for key, value in ours.metadata.items():
        field = theirs.get_field(key)
        assert (list(value) if isinstance(value, tuple) else value) == field.contents(), key


def _cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


def _overwrite(offset: int, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        found = bytearray(path.read_bytes())
        found[offset : offset + len(data)] = data
        path.write_bytes(found)

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: _cut(path, 0), "is empty"),
        (lambda path: _cut(path, 100), "is cut off or damaged: its header should have"),
        (lambda path: _cut(path, path.stat().st_size - 64), r"cut off: tensor \S+ of shape \["),
        (_overwrite(0, b"GGML"), "is not a GGUF file"),
        (_overwrite(4, b"\x09"), "has GGUF version 9"),
        (_overwrite(8, b"\xff" * 8), "cut off or damaged: its header should have 1844674407370955"),
        (_overwrite(24, b"\xff" * 8), "cut off or damaged: its header should have a string of 18"),
    ],
)
def test_a_damaged_file_is_named(
    damage: Callable[[Path], None], message: str, make_checkpoint: Any, tmp_path: Path
) -> None:
    path = _write(make_checkpoint("llama", **SIZES), tmp_path / "m.gguf").path
    damage(path)
    with pytest.raises(FormatError, match=f"m.gguf.*({message})"):
        read_gguf(path)


def test_a_missing_and_a_misshaped_tensor_are_named_as_in_the_file(
    make_checkpoint: Any, build: Any, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint("llama", **SIZES)
    state = checkpoint.state()
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoint.state = lambda: {key: one for key, one in state.items() if key != name}
    with pytest.raises(WeightsError, match=r"blk.1.ffn_down.weight in \S+m.gguf is missing; it s"):
        build(_write(checkpoint, tmp_path / "m.gguf"))
    checkpoint.state = lambda: {**state, name: state[name][:32]}
    expected = (
        r"blk.1.ffn_down.weight \(F32\) in \S+ has shape \[32, 96\], the config .* \[64, 96\]"
    )
    with pytest.raises(WeightsError, match=expected):
        build(_write(checkpoint, tmp_path / "n.gguf"))
