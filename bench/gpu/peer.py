"""The same weights' shape and load through `transformers`' continuous batching.

`python bench/gpu/peer.py`: a line of figures for one sequence and for many. `--device cpu`
rehearses it without a GPU: see `cases.py`.
"""

# ruff: noqa: T201 - printing is its only purpose

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cases import Case, case_of


def model_of(case: Case) -> Any:
    """Return the model with random weights, made where they are used."""
    with torch.device(case.device):
        return transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(**case.config),
            dtype=case.dtype,
            attn_implementation="sdpa",
        ).eval()


def memory_of(case: Case) -> Any:
    """Return the number of blocks for keys and values; on a GPU the peer decides."""
    if case.device.type == "cuda":
        return None
    return transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)


def tokens_per_s(model: Any, case: Case, rows: int) -> float:
    """Generate side by side; RuntimeError where it did not, which the library only logs."""
    num_tokens, rng = case.sizes.num_steps, random.Random(rows)
    vocabulary = range(case.config["vocab_size"])
    prompts = [rng.choices(vocabulary, k=case.sizes.context) for _ in range(rows)]
    generation = transformers.GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    began_s = time.perf_counter()
    found = model.generate_batch(
        inputs=prompts,
        generation_config=generation,
        continuous_batching_config=memory_of(case),
    )
    taken_s = time.perf_counter() - began_s
    lengths = [len(one.generated_tokens) for one in found.values() if one.error is None]
    if lengths != [num_tokens] * rows:
        raise RuntimeError(f"{rows} x {num_tokens} tokens were asked for, {lengths} came")
    return rows * num_tokens / taken_s


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    case = case_of(parser.parse_args().device)
    model = model_of(case)
    for rows in case.sizes.peer_rows:
        figure = tokens_per_s(model, case, rows)
        load = f"{rows} x ({case.sizes.context} + {case.sizes.num_steps})"
        print(f"transformers {transformers.__version__}, {load}: {figure:.4g} tokens/s", flush=True)


if __name__ == "__main__":
    main()
