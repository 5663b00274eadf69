"""Octavo's own code compared with that of `transformers` on the same pages.

SmolLM2-135M's shape with random weights: eight decodes far into their texts, and 512 tokens of
prompts in one step.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Literal

from configs.schema import CacheSection, ModelSection, OctavoConfig
from model import build
from model.interface import SamplingParams, SlotStart, StepInput
from model.runner import TorchRunner

_CONFIG = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
_ROWS = 8
_CHUNK = 64
_PAST = 200
_DECODES = 40

Impl = Literal["octavo", "transformers"]
Dtype = Literal["float32", "bfloat16"]
Quantization = Literal["none", "auto"]
_RUNS: tuple[tuple[Impl, Quantization, Dtype], ...] = (
    ("octavo", "auto", "float32"),
    ("octavo", "none", "float32"),
    ("transformers", "none", "float32"),
    ("transformers", "none", "bfloat16"),
)


def step(runner: TorchRunner, start: int, count: int, *, is_first: bool = False) -> float:
    """Run a step of `count` tokens a row; return its seconds."""
    pages_each = -(-(_PAST + _DECODES) // runner.info.page_size)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    slots = list(range(_ROWS))
    began = time.perf_counter()
    runner.launch(
        StepInput(
            token_ids=[3] * (_ROWS * count),
            positions=[start] * _ROWS,
            counts=[count] * _ROWS,
            slots=slots,
            page_ids=[list(range(row * pages_each, (row + 1) * pages_each)) for row in slots],
            sample_rows=slots,
            started=[SlotStart(slot, params, [1]) for slot in slots] if is_first else [],
        )
    ).wait()
    return time.perf_counter() - began


def main() -> None:
    """Print a line for each."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(_CONFIG))
        source = build.resolve_source(f"dummy:{path}")
        for impl, quantization, dtype in _RUNS:
            model = ModelSection(model_impl=impl, quantization=quantization, dtype=dtype)
            cache = CacheSection(kv_cache_memory=2**29)
            runner = build.make_runner(source, OctavoConfig(model=model, cache=cache))
            step(runner, 0, _CHUNK, is_first=True)
            prefill = min(step(runner, 0, _CHUNK) for _ in range(3))
            decode = statistics.median(step(runner, _PAST + i, 1) for i in range(_DECODES))
            weights = runner.info.quantization if impl == "octavo" else dtype
            print(  # noqa: T201 - a program that prints
                f"{impl:13} {weights:9} {_ROWS} decodes {decode * 1e3:6.1f} ms, "
                f"{_ROWS * _CHUNK} prompt tokens {prefill * 1e3:7.1f} ms"
            )


if __name__ == "__main__":
    main()
