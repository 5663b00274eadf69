"""Stop ids outside the vocabulary: left out and reported, in whichever file they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.schema import CacheSection, ModelSection, OctavoConfig
from model.assemble import assemble
from model.interface import ModelInfo
from model.weights.source import ModelSource

#: The models below have 96 tokens.
CASES = [
    ([96, 95], (95,), "96"),
    ([3, -1, 3], (3,), "-1"),
    (-1, (), "-1"),
    (2**40, (), "1099511627776"),
    ([7, 9], (7, 9), ""),
    (None, (), ""),
]


def _info(source: ModelSource, implementation: Any = "auto") -> ModelInfo:
    model = ModelSection(threads=1, model_impl=implementation)
    return assemble(
        source, OctavoConfig(model=model, cache=CacheSection(kv_cache_memory=2**20))
    ).info


def _check(info: ModelInfo, kept: tuple[int, ...], left_out: str) -> None:
    assert info.eos_token_ids == kept
    told = [note for note in info.notes if "stop ids" in note]
    assert bool(told) == bool(left_out)
    assert all(note.endswith(f"left out: {left_out}") for note in told)


@pytest.mark.parametrize(("eos", "kept", "left_out"), CASES)
@pytest.mark.parametrize("implementation", ["octavo", "transformers"])
def test_in_the_config(
    tmp_path: Path, implementation: str, eos: Any, kept: tuple[int, ...], left_out: str
) -> None:
    path = tmp_path / "config.json"
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": eos}
    path.write_text(json.dumps({"model_type": "llama", **sizes, **ids}))
    _check(_info(ModelSource("dummy", path, "llama"), implementation), kept, left_out)


@pytest.mark.parametrize(("eos", "kept", "left_out"), CASES[:3])
@pytest.mark.parametrize("implementation", ["octavo", "transformers"])
def test_in_the_generation_config(
    make_checkpoint: Any, implementation: str, eos: Any, kept: tuple[int, ...], left_out: str
) -> None:
    checkpoint = make_checkpoint("llama", eos_token_id=None, hidden_size=48)
    stated = {"eos_token_id": eos, "transformers_version": "4"}
    (checkpoint.folder / "generation_config.json").write_text(json.dumps(stated))
    _check(_info(checkpoint.source, implementation), kept, left_out)
