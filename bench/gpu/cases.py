"""The case that is proved and measured on a GPU, and the small one that rehearses it on a CPU.

In a rehearsal every line of the scripts is run, with figures that mean nothing: torch's code stands
in for FlashAttention's, Triton's and CUDA graphs'.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from model.cuda.graphs import Record, record_on_cuda

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    copy_bytes: int
    #: Of square matrices.
    matrix_rows: int
    #: For the attention of decodes, of drafts, and of decodes from codes: rows, keys of each; of a
    #: prompt: tokens, a step's most too.
    decodes: tuple[tuple[int, int], ...]
    drafts: tuple[tuple[int, int], ...]
    coded: tuple[tuple[int, int], ...]
    prompt_tokens: int
    #: Through the engine: prompts' lengths; rows that decode, each after so many tokens; steps.
    prompts: tuple[int, ...]
    rows: tuple[int, ...]
    context: int
    num_steps: int
    #: Sequences side by side, through another library.
    peer_rows: tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """The model, the sizes and the device of a measurement."""

    device: torch.device
    dtype: torch.dtype
    #: Of attention, and the sizes of pages that they are proved with.
    backends: tuple[str, ...]
    pages: tuple[int, ...]
    #: A config as of `transformers`.
    path: Path
    sizes: Sizes

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return the model's config."""
        config: dict[str, Any] = json.loads(self.path.read_text())
        return config

    @property
    def heads(self) -> tuple[int, int, int]:
        """Return the numbers of query heads and of KV heads, and their width."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        return heads, kv_heads, self.config["hidden_size"] // heads

    @property
    def layers(self) -> int:
        """Return the number of layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def layer_weights(self) -> int:
        """Return the parameters of all layers' matrix products."""
        heads, kv_heads, head_dim = self.heads
        hidden, inner = self.config["hidden_size"], self.config["intermediate_size"]
        attention = hidden * head_dim * 2 * (heads + kv_heads)
        return self.layers * int(attention + 3 * hidden * inner)

    @property
    def head_weights(self) -> int:
        """Return the parameters of the product that gives the logits."""
        return int(self.config["hidden_size"] * self.config["vocab_size"])

    @property
    def kv_token_bytes(self) -> int:
        """Return the bytes of a token's key and value, in one layer."""
        _, kv_heads, head_dim = self.heads
        return 2 * kv_heads * head_dim * self.dtype.itemsize

    def record(self) -> Record:
        """Return the recorder of computations, where the device has one."""
        return record_on_cuda(self.device) if self.device.type == "cuda" else lambda one: one


ON_GPU = Case(
    torch.device("cuda"),
    torch.bfloat16,
    ("flash", "triton"),
    (16, 64, 256),
    HERE / "llama-3.1-8b.json",
    Sizes(
        copy_bytes=2**31,
        matrix_rows=8192,
        decodes=((1, 1024), (1, 8192), (8, 1024), (64, 1024), (64, 4096), (256, 1024)),
        drafts=((1, 8192), (8, 1024), (32, 1024)),
        coded=((1, 8192), (64, 1024), (64, 4096)),
        prompt_tokens=8192,
        prompts=(1024, 8191),
        rows=(1, 8, 64, 256),
        context=1024,
        num_steps=100,
        peer_rows=(1, 64),
    ),
)
REHEARSAL = Case(
    torch.device("cpu"),
    torch.float32,
    ("torch",),
    (16,),
    HERE / "tiny.json",
    Sizes(
        copy_bytes=2**22,
        matrix_rows=256,
        decodes=((1, 64), (4, 64)),
        drafts=((2, 64),),
        coded=((2, 64),),
        prompt_tokens=128,
        prompts=(32, 100),
        rows=(1, 4),
        context=32,
        num_steps=10,
        peer_rows=(1, 4),
    ),
)


def seconds(device: torch.device, compute: Callable[[], object], *, repeats: int = 20) -> float:
    """Return the seconds of one run: the median of several, after three to warm up."""
    for _ in range(3):
        compute()
    return statistics.median(_once_s(device, compute) for _ in range(repeats))


def _once_s(device: torch.device, compute: Callable[[], object]) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        compute()
        return time.perf_counter() - began_s
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call] # torch's
    begin.record()
    compute()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end) / 1e3)


@dataclass
class Limits:
    """The measured limits of this device."""

    case: Case

    @cached_property
    def copy_bytes_per_s(self) -> float:
        """Return the bytes read and written a second."""
        device = self.case.device
        source = torch.empty(self.case.sizes.copy_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / seconds(device, lambda: target.copy_(source))

    @cached_property
    def flops(self) -> float:
        """Return the operations a second of a square product of random numbers."""
        rows, device, dtype = self.case.sizes.matrix_rows, self.case.device, self.case.dtype
        a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
        return 2.0 * rows**3 / seconds(device, lambda: a @ b)


def case_of(device: str) -> Case:
    """Return the case of `cuda` or, to rehearse it, of `cpu`; exit if there is no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here")
    return ON_GPU if device == "cuda" else REHEARSAL
