"""Warm from the disk and cold are the same, token for token and bit for bit, in every format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tier_drive import TierDrive

from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.runner import TorchRunner

_CONFIG = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.5,
}
_CHAT = [number * number % 251 for number in range(150)]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., TorchRunner]:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_CONFIG))

    def make(kv_cache_dtype: str, **model: object) -> TorchRunner:
        config = OctavoConfig(
            model=ModelSection(quantization="none", threads=1, **model),  # type: ignore[arg-type] # parsed
            cache=CacheSection(
                kv_cache_memory=2**20,
                kv_cache_dtype=kv_cache_dtype,  # type: ignore[arg-type] # parsed
                kv_disk_path=tmp_path,
            ),
            scheduler=SchedulerSection(max_num_seqs=4, max_num_batched_tokens=64),
        )
        return build.make_runner(build.resolve_source(f"dummy:{path}"), config)

    return make


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "int8", "fp8", "int4", "kivi4"])
def test_warm_from_the_disk_is_cold(
    make: Callable[..., TorchRunner], tmp_path: Path, kv_cache_dtype: str
) -> None:
    cold = TierDrive(tmp_path, make(kv_cache_dtype), max_bytes=2**22)
    cold.submit(1, _CHAT, max_tokens=20, params={"logprobs": 2, "temperature": 0.8, "seed": 7})
    cold.run()
    cold.close()
    warm = TierDrive(tmp_path, make(kv_cache_dtype), max_bytes=2**22)
    warm.submit(1, _CHAT, max_tokens=20, params={"logprobs": 2, "temperature": 0.8, "seed": 7})
    warm.run()
    page_size = warm.runner.info.page_size
    assert warm.started[1].cached_tokens == 149 // page_size * page_size > 0
    assert warm.outputs == cold.outputs
    assert len(warm.outputs[1]) == 20
    warm.close()


def test_pages_of_another_length_are_not_found(
    make: Callable[..., TorchRunner], tmp_path: Path
) -> None:
    cold = TierDrive(tmp_path, make("auto"), max_bytes=2**22)
    cold.submit(1, _CHAT)
    cold.run()
    cold.close()
    other = TierDrive(tmp_path, make("auto", max_model_len=200), max_bytes=2**22)
    other.submit(1, _CHAT)
    other.run()
    assert other.started[1].cached_tokens == 0
    assert other.outputs == cold.outputs
    other.close()
