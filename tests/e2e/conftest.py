"""What several files compare the daemon with: the same model, read and computed by transformers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def transformers_model(smollm2_file: Path) -> Any:
    """The default model by transformers' own GGUF reader and decoder, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own deprecations are not ours to mend.
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds, and only here

        return AutoModelForCausalLM.from_pretrained(
            smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
        ).eval()
