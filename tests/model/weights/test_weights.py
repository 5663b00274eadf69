from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.architectures.read_arch import from_hf_config
from model.formats import FormatError
from model.weights.dummy import DummyWeights
from model.weights.interface import BLOCK_VALUES, WeightsError, read_into, row_blocks
from model.weights.safetensors import SafetensorsWeights
from model.weights.source import ModelSource

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
NORM = "model.layers.1.input_layernorm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def _tensors(**config: Any) -> dict[str, Tensor]:
    weights = DummyWeights(from_hf_config({**CONFIG, **config}))
    return {name: torch.cat(list(weights.blocks(name))) for name in weights.shapes}


def _save(folder: Path, tensors: dict[str, Tensor], **config: Any) -> ModelSource:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    save_file(tensors, folder / "model.safetensors")
    return ModelSource("safetensors", folder, folder.name)


def test_blocks_cover_all_rows_once() -> None:
    for shape, multiple in (((5000, 700), 64), ((3, 2 * BLOCK_VALUES), 1), ((10,), 1), ((), 1)):
        rows: list[int] = []
        for start, count in row_blocks(shape, multiple):
            assert start % multiple == 0
            rows += range(start, start + count)
        assert rows == list(range(shape[0] if shape else 1))
    assert max(count for _, count in row_blocks((5000, 700))) * 700 <= BLOCK_VALUES


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_come_as_they_were_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    big = torch.randn(600, 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    _save(tmp_path / "m", {"big": big, "flat": big[0].clone()})
    weights = SafetensorsWeights(tmp_path / "m")
    assert weights.shapes == {"big": (600, 500), "flat": (500,)}
    blocks = list(weights.blocks("big"))
    assert len(blocks) > 1
    assert torch.equal(torch.cat(blocks), big)
    target = torch.empty(500)
    read_into(weights, "flat", target)
    assert torch.equal(target, big[0].float())


def test_a_dummy_is_the_same_every_time_and_no_two_tensors_are() -> None:
    first, second = _tensors(), _tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(
        first["model.layers.0.mlp.up_proj.weight"], first["model.layers.0.mlp.gate_proj.weight"]
    )
    assert first[DOWN].std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(first[NORM], torch.ones(48))


def test_a_dummy_is_served_as_the_checkpoint_it_stands_for(
    build: Any, session: Any, tmp_path: Path
) -> None:
    source = _save(tmp_path / "m", _tensors())
    dummy = ModelSource("dummy", tmp_path / "m" / "config.json", "dummy")
    prompt = torch.arange(9)
    assert torch.equal(session(build(dummy)).feed(prompt), session(build(source)).feed(prompt))


def _drop(tensors: dict[str, Tensor]) -> None:
    del tensors[DOWN]


def _turn(tensors: dict[str, Tensor]) -> None:
    tensors[DOWN] = tensors[DOWN].T.contiguous()


def _to_integers(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = tensors[NORM].to(torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"1.mlp.down_proj.weight in \S+ is missing; it should be \[48, 80\]"),
        (_turn, r"\S+safetensors has shape \[80, 48\], the config asks for \[48, 80\]"),
        (_to_integers, r"1.input_layernorm.weight in \S+safetensors is of type I8; supported"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file_and_shapes(
    change: Callable[[dict[str, Tensor]], None], message: str, build: Any, tmp_path: Path
) -> None:
    tensors = _tensors()
    change(tensors)
    source = _save(tmp_path / "m", tensors)
    with pytest.raises(WeightsError, match="tensor model.layers.*" + message):
        build(source)


def _cut(path: Path, num_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:num_bytes])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: _cut(path, 0), "is cut off, or no safetensors file"),
        (lambda path: _cut(path, 50), "is cut off, or no safetensors file"),
        (
            lambda path: _cut(path, path.stat().st_size - 1),
            r"is cut off: tensor \S+ of shape \[\d.*\] ends at byte \d+, the file at \d+",
        ),
        (lambda path: path.write_bytes(b"\4" + b"\0" * 7 + b"oops"), "is damaged: its header"),
        (lambda path: path.write_bytes(b"\2" + b"\0" * 7 + b"[]"), "is damaged: its header"),
        (lambda path: path.write_bytes(b"\x08" + b"\0" * 7 + b'{"a":{}}'), "is damaged"),
    ],
)
def test_a_damaged_file_is_named(
    damage: Callable[[Path], None], message: str, build: Any, tmp_path: Path
) -> None:
    source = _save(tmp_path / "m", _tensors())
    damage(tmp_path / "m" / "model.safetensors")
    with pytest.raises(FormatError, match=f"model.safetensors {message}"):
        build(source)


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    _save(tmp_path / "m", {"a": torch.zeros(1000)})
    weights = SafetensorsWeights(tmp_path / "m")
    _cut(tmp_path / "m" / "model.safetensors", 500)
    with pytest.raises(WeightsError, match=r"model\.safetensors is cut off"):
        list(weights.blocks("a"))


def test_a_missing_shard_is_named(tmp_path: Path, build: Any) -> None:
    source = _save(tmp_path / "m", _tensors())
    index = tmp_path / "m" / "model.safetensors.index.json"
    whole = tmp_path / "m" / "model.safetensors"
    placed = dict.fromkeys(load_file(whole), "model-1.safetensors") | {DOWN: "model-2.safetensors"}
    whole.rename(tmp_path / "m" / "model-1.safetensors")
    index.write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(WeightsError, match=r"model-2.safetensors is missing, but .*index.json"):
        build(source)
    index.write_text("{}")
    with pytest.raises(FormatError, match=r"index.json is damaged"):
        build(source)


# ---- memory --------------------------------------------------------------------------------------

BIG: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}

#: Prints weights, and by how much memory rose at its highest, in bytes. A first, tiny load
#: brings in the libraries; the mark of the highest is then set back (proc_pid_clear_refs(5)).
MEASURE = """
import sys
from pathlib import Path

import torch

from model.weights.load import build_transformer
from model.ops import TorchOps
from model.weights.source import ModelSource


def memory_bytes(field):
    status = Path("/proc/self/status").read_text()
    return int(status.split(field + ":")[1].split()[0]) * 1024


def load(folder):
    return build_transformer(
        ModelSource("safetensors", Path(folder), "m"),
        quantization=sys.argv[1],
        dtype=torch.float32,
        device=torch.device("cpu"),
        ops=TorchOps(),
        progress=False,
    )


load(sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")
before = memory_bytes("VmRSS")
model = load(sys.argv[3])
print(model.weights_bytes, memory_bytes("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    tensors = {name: one.to(torch.bfloat16) for name, one in _tensors(**BIG).items()}
    return _save(folder, tensors, **BIG).path


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("quantization", ["none", "fp16", "bf16", "int8"])
def test_loading_takes_little_more_than_the_weights(
    quantization: str, big_folder: Path, tmp_path: Path
) -> None:
    tiny = _save(tmp_path / "tiny", _tensors()).path
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, quantization, str(tiny), str(big_folder)],
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "does not run here" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    weights_bytes, peak_bytes = map(int, done.stdout.split())
    assert 0.9 * weights_bytes < peak_bytes < 1.3 * weights_bytes
