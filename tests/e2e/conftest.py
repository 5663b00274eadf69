"""What several files compare the daemon with: the same model, read and computed by transformers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of random weights that computes a token in no time, as `octavo serve` takes it."""
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    config = {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
    }
    path.write_text(json.dumps(config))
    return f"dummy:{path}"


@pytest.fixture(scope="session")
def transformers_model(smollm2_file: Path) -> Any:
    """The default model by transformers' own GGUF reader and decoder, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations are not ours to mend.
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds, and only here

        return AutoModelForCausalLM.from_pretrained(
            smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
        ).eval()
