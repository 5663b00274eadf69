"""Whole models from packed weights: the same as from their files, in every case."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from model.architectures.read_arch import from_hf_config
from model.architectures.transformer import Transformer
from model.cpu.library import CpuLibrary, load_cpu_library
from model.ops import TorchOps
from model.weights import load, packed_cache
from model.weights.dummy import DummyWeights
from model.weights.load import build_transformer
from model.weights.packed_cache import PackedCache
from model.weights.packed_file import PackedError
from model.weights.source import ModelSource
from model.weights.tiled_linear import TiledLinear

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
READ, PACKED_ANEW = "weights packed by an earlier start: ", ": the weights were packed anew"


@pytest.fixture(scope="module")
def library() -> CpuLibrary:
    library = load_cpu_library()
    if isinstance(library, str):
        pytest.skip(library)
    return library


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def checkpoint(folder: Path, **config: Any) -> ModelSource:
    folder.mkdir(exist_ok=True)
    config = {**CONFIG, **config}
    weights = DummyWeights(from_hf_config(config))
    tensors = {name: torch.cat(list(weights.blocks(name))) for name in weights.shapes}
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return ModelSource("safetensors", folder, folder.name)


Load = Callable[..., Transformer]


@pytest.fixture
def start(library: CpuLibrary, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """One start after another, each long after the files were written."""
    monkeypatch.setattr(load, "time", Later)

    def load_once(
        source: ModelSource,
        quantization: str = "bf16",
        *,
        is_cached: bool = True,
        saves: bool = True,
        **more: Any,
    ) -> Transformer:
        cache = PackedCache(folder, min_bytes=0) if is_cached else None
        transformer = build_transformer(
            source,
            quantization=quantization,
            dtype=torch.float32,
            device=torch.device("cpu"),
            ops=TorchOps(),
            progress=False,
            tiles=library,
            cache=cache,
            **more,
        )
        if cache is not None and saves:
            cache.save()
        return transformer

    return load_once


class Later:
    @staticmethod
    def time_ns() -> int:
        return time.time_ns() + 10 * 10**9


def tensors_of(transformer: Transformer) -> Iterator[Tensor]:
    """Yield all weights, in an order that a model alone decides."""
    weights = transformer.weights
    yield weights.final_norm
    yield weights.embedding(torch.arange(96))
    for layer in weights.layers:
        yield from (layer.norms[place] for place in sorted(layer.norms))
        mlp: Any = layer.mlp
        for linear in (layer.qkv, layer.o, mlp.gate_up, mlp.down, weights.lm_head):
            if isinstance(linear, TiledLinear):
                yield from filter(torch.is_tensor, linear.tiles.part.values())
            yield linear(torch.linspace(-1, 1, 3 * 960).view(-1, _width(linear)))


def _width(linear: Any) -> int:
    return int(linear.tiles.num_inputs) if isinstance(linear, TiledLinear) else 48


def assert_same(first: Transformer, second: Transformer) -> None:
    pairs = list(zip(tensors_of(first), tensors_of(second), strict=True))
    assert len(pairs) > 20
    for one, other in pairs:
        assert torch.equal(one, other)
    assert first.weights_bytes == second.weights_bytes


def was_read(transformer: Transformer) -> bool:
    return any(READ in note for note in transformer.notes)


@pytest.mark.parametrize("quantization", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen3", "head_dim": 8},
        # An offset is added to its norms.
        {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 9},
    ],
)
def test_a_second_start_has_the_weights_of_the_first(
    start: Load, tmp_path: Path, config: dict[str, Any], quantization: str
) -> None:
    source = checkpoint(tmp_path / "m", **config)
    plain = start(source, quantization, is_cached=False)
    first, second, third = (start(source, quantization) for _ in range(3))
    assert [was_read(one) for one in (first, second, third)] == [False, True, True]
    for one in (first, second, third):
        assert_same(plain, one)


def test_mapped_weights_are_those_of_the_files(
    start: Load, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def map_all(descriptor: int) -> mmap.mmap:
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)

    monkeypatch.setattr(packed_cache, "map_file", map_all)
    source = checkpoint(tmp_path / "m", attention_bias=True)
    plain = start(source, "int8", is_cached=False)
    start(source, "int8")
    mapped = start(source, "int8")
    assert was_read(mapped)
    # As another process does that needs room.
    next(folder.glob("*.weights")).unlink()
    assert_same(plain, mapped)


def test_a_start_while_another_saves_neither_waits_nor_reads_its_part(
    start: Load, tmp_path: Path, folder: Path
) -> None:
    source = checkpoint(tmp_path / "m")
    plain = start(source)
    (whole,) = folder.glob("*.weights")
    half_written = whole.rename(folder / ".saving-abc")
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        packed_anew = start(source, saves=False)
        assert not was_read(packed_anew)
        assert_same(plain, packed_anew)
    half_written.rename(whole)
    assert was_read(start(source))


def test_formats_and_lengths_do_not_mix(start: Load, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m")
    start(source, "bf16")
    assert not was_read(start(source, "int8"))
    assert was_read(start(source, "bf16"))
    assert was_read(start(source, "int8"))
    # The longest request changes no weight.
    assert was_read(start(source, "int8", max_positions=64))


def test_other_formats_and_dummies_load_as_ever(start: Load, tmp_path: Path, folder: Path) -> None:
    source = checkpoint(tmp_path / "m")
    start(source, "none")
    start(ModelSource("dummy", source.path / "config.json", "dummy"))
    assert not folder.exists()


def test_new_weights_in_the_same_file_are_packed(start: Load, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m")
    start(source)
    path = source.path / "model.safetensors"
    status = path.stat()
    time.sleep(0.02)  # A tick of the clock that stamps files.
    content = bytearray(path.read_bytes())
    content[-3:] = b"\x01\x02\x3d"
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = start(source)
    assert not was_read(changed)
    assert_same(start(source, is_cached=False), changed)


def test_a_copy_of_the_files_needs_no_packing(start: Load, tmp_path: Path) -> None:
    start(checkpoint(tmp_path / "m"))
    assert was_read(start(checkpoint(tmp_path / "copy")))
    assert not was_read(start(checkpoint(tmp_path / "biased", attention_bias=True)))


def test_a_damaged_file_is_a_note_and_packed_again(
    start: Load, tmp_path: Path, folder: Path
) -> None:
    source = checkpoint(tmp_path / "m")
    plain = start(source, is_cached=False)
    start(source)
    (kept,) = folder.glob("*.weights")
    whole = kept.read_bytes()
    # The prefix, the header, the first tensor, the last one; and a file that is cut off.
    for where in (3, 100, len(whole) // 2 // 4096 * 4096, len(whole) - 1, None):
        changed = bytearray(whole)
        if where is None:
            del changed[-5000:]
        else:
            changed[where] ^= 0x40
        kept.write_bytes(changed)
        second = start(source)
        assert_same(plain, second)
        assert any(PACKED_ANEW in note and str(kept) in note for note in second.notes)
        assert kept.read_bytes() == whole
        assert was_read(start(source))


def test_weights_that_are_not_finite_are_noted_each_time(start: Load, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m")
    weights = DummyWeights(from_hf_config(CONFIG))
    tensors = {name: torch.cat(list(weights.blocks(name))) for name in weights.shapes}
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 3] = float("nan")
    save_file(tensors, source.path / "model.safetensors")
    for _ in range(2):
        assert any(f"not finite: {name}" in note for note in start(source).notes)


def test_a_folder_that_cannot_be_written_stops_nothing(
    start: Load, tmp_path: Path, folder: Path
) -> None:
    folder.write_text("a file")
    source = checkpoint(tmp_path / "m")
    with pytest.raises(PackedError, match="cannot be written"):
        start(source)
    assert not was_read(start(source, is_cached=False))
