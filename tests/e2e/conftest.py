"""Models that several files start or compare with, besides the default model."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


@pytest.fixture(scope="session")
def transformers_model(smollm2_file: Path) -> Any:
    """The default model by transformers' own GGUF reader and decoder, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations are not ours to mend.
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds, and only here

        return AutoModelForCausalLM.from_pretrained(
            smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
        ).eval()


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny model with random weights: it computes a token in no time."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(_TINY))
    return path


@pytest.fixture(scope="session")
def tiny_flags(tiny_config: Path) -> tuple[str, ...]:
    """The flags of a daemon that serves it."""
    return f"dummy:{tiny_config}", "--kv-cache-memory", "64MiB"


@pytest.fixture(scope="session")
def start_tiny(start_daemon: Callable[..., Any], tiny_flags: tuple[str, ...]) -> Callable[..., Any]:
    """Start such a daemon with further flags."""
    return lambda *flags: start_daemon(*tiny_flags, *flags)
