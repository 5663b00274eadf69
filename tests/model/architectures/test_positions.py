"""How far positions go: tables of angles as long as was planned, and angles that depend on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.schema import CacheSection, ModelSection, OctavoConfig
from model.architectures.transformer import Transformer
from model.assemble import _plan_pool, assemble
from model.attention.registry import choose_backend
from model.hf.decoder import load_hf_decoder
from model.kv.format import KV_FORMATS
from model.kv.memory_plan import MemoryPlanError, angles_bytes
from model.ops import TorchOps
from model.weights.load import build_transformer
from model.weights.source import ModelSource

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}
TEXT = torch.arange(64) * 7 % 90 + 3


def load(source: ModelSource, wanted: int | None) -> Transformer:
    return build_transformer(
        source,
        quantization="none",
        dtype=torch.float32,
        device=torch.device("cpu"),
        ops=TorchOps(),
        progress=False,
        max_positions=wanted,
    )


@pytest.mark.parametrize("length", [9, 16, 17, 40, 64])
def test_dynamic_rope_is_that_of_the_longest_text(
    length: int, make_checkpoint: Callable[..., Any], session: Any
) -> None:
    """As `transformers` computes a text of that length at once, whatever chunks it comes in."""
    checkpoint = make_checkpoint("llama", rope_parameters=DYNAMIC, max_position_embeddings=16)
    model = load(checkpoint.source, length)
    model.hold_positions(length)
    one = session(model)
    found = torch.cat([one.feed(TEXT[:5]), one.feed(TEXT[5:length])])
    torch.testing.assert_close(found, checkpoint.logits(TEXT[:length]), rtol=1e-4, atol=1e-4)


def config_of(**model: Any) -> OctavoConfig:
    return OctavoConfig(
        model=ModelSection(threads=1, quantization="none", **model),
        cache=CacheSection(kv_cache_memory=2**20),
    )


def test_dynamic_rope_ends_where_angles_change_unless_more_is_asked_for(
    make_checkpoint: Callable[..., Any],
) -> None:
    source = make_checkpoint("llama", rope_parameters=DYNAMIC, max_position_embeddings=16).source
    short = assemble(source, config_of()).info
    assert short.max_model_len == 16
    assert any("--max-model-len up to 64" in note for note in short.notes)
    long = assemble(source, config_of(max_model_len=40)).info
    assert long.max_model_len == 40
    assert any("angles are those for texts of 40 tokens" in note for note in long.notes)
    with pytest.raises(MemoryPlanError, match="65 is over the model's own 64"):
        assemble(source, config_of(max_model_len=65))


def test_dynamic_rope_of_a_family_of_transformers_ends_there(
    make_checkpoint: Callable[..., Any], session: Any
) -> None:
    checkpoint = make_checkpoint(
        "olmo2", rope_parameters=DYNAMIC, max_position_embeddings=16, pad_token_id=0
    )
    decoder = load_hf_decoder(
        checkpoint.source, dtype=torch.float32, device=torch.device("cpu"), max_positions=40
    )
    assert decoder.arch.max_positions == 16
    assert "limited to 16 tokens" in decoder.notes[1]
    found = session(decoder).feed(TEXT[:16])
    torch.testing.assert_close(found, checkpoint.logits(TEXT[:16]), rtol=1e-4, atol=1e-4)


def dummy(tmp_path: Path, **changes: Any) -> ModelSource:
    path = tmp_path / "config.json"
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    path.write_text(json.dumps({"model_type": "llama", **sizes, **heads, **changes}))
    return ModelSource("dummy", path, "m")


def test_the_table_of_angles_is_as_long_as_was_planned(tmp_path: Path) -> None:
    """All of the config's positions would take 2 GiB for 4 million positions of 128 dimensions."""
    runner = assemble(dummy(tmp_path, max_position_embeddings=2**22), config_of())
    assert runner.info.max_model_len < 2**14
    # Compiled layers wrap the transformer, which holds the table.
    transformer = getattr(runner._decoder, "_transformer", runner._decoder)
    assert isinstance(transformer, Transformer)
    assert transformer.cos_sin.shape == (runner.info.max_model_len, 16)


def test_the_table_of_angles_is_in_the_plan(tmp_path: Path) -> None:
    source = dummy(tmp_path, max_position_embeddings=2**40)
    with pytest.raises(ValueError, match="max_position_embeddings must be at most"):
        assemble(source, config_of())
    # A row for each position of the longest request, which is as long as there is room at most.
    assert angles_bytes(512, 8192, 10**9) == 512 * 8192
    assert angles_bytes(512, 2**22, 1000) == 512 * 1000
    config = OctavoConfig(
        model=ModelSection(threads=1, quantization="none", max_model_len=2**20),
        cache=CacheSection(kv_cache_memory=2**28),
    )
    source = dummy(tmp_path, max_position_embeddings=2**22)
    decoder = load(source, 2**20)
    spec = decoder.attention_spec(KV_FORMATS["float32"])
    offer = choose_backend("auto", spec)
    plan = partial(_plan_pool, config, decoder, spec, offer)
    assert plan(2**28 + 2**26).max_model_len == 2**20
    with pytest.raises(MemoryPlanError, match="lower --kv-cache-memory by 1 B"):
        plan(2**28 + 2**26 - 1)
    info = assemble(source, config).info
    assert any("the angles of 1048576 positions take 64 MiB" in note for note in info.notes)
