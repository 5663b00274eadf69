"""The setting `weights_cache`, and a runner that is assembled from packed weights."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from configs.schema import CacheSection, ModelSection, OctavoConfig
from model import assemble
from model.architectures.read_arch import from_hf_config
from model.cpu.library import load_cpu_library
from model.device import choose_device
from model.weights import load
from model.weights.dummy import DummyWeights
from model.weights.packed_cache import PackedCache
from model.weights.source import ModelSource
from waiting import wait_until

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class _Later:
    """A clock that is far enough behind the writing of the files."""

    @staticmethod
    def time_ns() -> int:
        return time.time_ns() + 10 * 10**9


def test_off_is_no_cache_and_a_size_bounds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OCTAVO_HOME", str(tmp_path))
    assert assemble._weights_cache(ModelSection(weights_cache="off")) is None
    cache = assemble._weights_cache(ModelSection(weights_cache_max_bytes=3 * 2**30))
    assert cache is not None
    assert (cache.folder, cache.max_bytes) == (tmp_path / "weights", 3 * 2**30)
    unbounded = assemble._weights_cache(ModelSection())
    assert unbounded is not None
    assert unbounded.max_bytes is None


def test_a_runner_saves_its_weights_and_the_next_one_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = load_cpu_library()
    if isinstance(library, str):
        pytest.skip(library)
    device = choose_device(ModelSection(device="cpu"))
    device = dataclasses.replace(device, library=library)
    monkeypatch.setattr(assemble, "choose_device", lambda _config: device)
    kept = tmp_path / "weights"
    monkeypatch.setattr(assemble, "_weights_cache", lambda _config: PackedCache(kept, min_bytes=0))
    monkeypatch.setattr(load, "time", _Later)
    weights = DummyWeights(from_hf_config(CONFIG))
    tensors = {name: torch.cat(list(weights.blocks(name))) for name in weights.shapes}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = ModelSource("safetensors", tmp_path, "m")
    config = OctavoConfig(model=ModelSection(quantization="int8", max_model_len=64))
    first = assemble.assemble(source, config)
    wait_until(lambda: list((kept / "known").glob("*")))
    second = assemble.assemble(source, config)
    was_read = [
        any("packed by an earlier start" in note for note in runner.info.notes)
        for runner in (first, second)
    ]
    assert was_read == [False, True]
    assert first.info.weights_bytes == second.info.weights_bytes
    # The system counts mapped weights as free memory: pages must not take their place.
    weights_bytes, page_bytes = first.info.weights_bytes, 2**20
    monkeypatch.setattr(assemble, "free_memory_bytes", lambda: weights_bytes + page_bytes)
    stated = CacheSection(kv_cache_memory=page_bytes + weights_bytes // 2)
    tight = config.model_copy(update={"cache": stated})
    with pytest.raises(ValueError, match="are free for them"):
        assemble.assemble(source, tight)
