"""The decoder's way on CUDA, on tensors that have a device, a dtype and a shape but no memory.

`python bench/gpu/dtypes.py`: needs FlashAttention-3 and a torch built for CUDA, but no GPU.
torch refuses the same calls as a GPU: operands on two devices or of two dtypes, arguments that a
kernel does not take. Triton's operations have torch's in their place.
"""

# ruff: noqa: T201 - printing is its only purpose

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cases import REHEARSAL

from model import build
from model.architectures.transformer import Transformer
from model.attention import flash
from model.attention.interface import AttentionBatch
from model.cuda.decoder import GpuDecoder
from model.cuda.ops import GpuOps, SinkQueries
from model.kv.format import float_format
from model.kv.pool import KVPool
from model.ops import TorchOps
from model.weights import load

CUDA, PAGE_SIZE = torch.device("cuda"), 64


class InThisThread(Executor):
    """An executor that runs calls at once, since such tensors belong to one thread."""

    def __init__(self, *_args: object) -> None:
        super().__init__()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See `Executor`."""
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class FusedOps(TorchOps):
    """Triton's operations by torch's, which refuse other dtypes."""

    def rope_and_store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        pages: tuple[Tensor, Tensor, Tensor],
        sinks: SinkQueries | None = None,
    ) -> None:
        """See `GpuOps`."""
        assert sinks is None, "FlashAttention reads all keys"
        self.apply_rope(q, k, positions, cos_sin)
        for cache, new in zip(pages[:2], (k, v), strict=True):
            cache.flatten(0, 1).index_copy_(0, pages[2], new)


def attention_on(transformer: Transformer, dtype: torch.dtype) -> flash.FlashAttention:
    """Return FlashAttention-3 over a few pages."""
    module = importlib.import_module("flash_attn_interface")

    # Without memory the number of splits cannot be left to the kernel.
    def in_two_splits(*args: Any, **kwargs: Any) -> Any:
        return module.flash_attn_with_kvcache(*args, **(kwargs | {"num_splits": 2}))

    named = cast("ModuleType", SimpleNamespace(flash_attn_with_kvcache=in_two_splits))
    spec = transformer.attention_spec(float_format(dtype))
    pool = KVPool(spec.layout(PAGE_SIZE), 9, CUDA)
    return flash.FlashAttention(spec, pool, partial(flash._flash_attention_3, named))


def check(dtype: torch.dtype, counts: tuple[int, ...]) -> None:
    """Load the model, compute a step of rows of so many tokens, plain and fused."""
    transformer = load.build_transformer(
        build.resolve_source(f"dummy:{REHEARSAL.path}"),
        quantization="auto",
        dtype=dtype,
        device=CUDA,
        ops=TorchOps(),
        progress=False,
    )
    attention = attention_on(transformer, dtype)
    rows = len(counts)
    numbers = torch.zeros(3, sum(counts), dtype=torch.int64, device=CUDA)
    token_ids, positions, kv_slots = numbers
    batch = AttentionBatch(
        query_starts=torch.zeros(rows + 1, dtype=torch.int32, device=CUDA),
        seq_lens=torch.ones(rows, dtype=torch.int32, device=CUDA),
        block_table=torch.zeros(rows, 4, dtype=torch.int32, device=CUDA),
        positions=positions,
        kv_slots=kv_slots,
        max_query_len=max(counts),
        max_seq_len=200,
    )
    for decoder in (transformer, GpuDecoder(transformer, cast("GpuOps", FusedOps()))):
        attention.plan(batch)
        logits = decoder.logits(decoder.forward(token_ids, positions, attention))
        wanted = ("cuda", torch.float32, (sum(counts), transformer.arch.vocab_size))
        if (logits.device.type, logits.dtype, logits.shape) != wanted:
            raise AssertionError(f"{logits.dtype} {tuple(logits.shape)} on {logits.device}")


def main() -> None:
    """Check decodes and prompts beside decodes, in both dtypes."""
    is_built = torch.version.cuda is not None
    if not (is_built and importlib.util.find_spec("flash_attn_interface")):
        print("skipped: needs a torch built for CUDA, and FlashAttention-3")
        return
    load.ThreadPoolExecutor = InThisThread  # type: ignore[attr-defined,assignment] # an executor too
    for dtype, counts in product((torch.bfloat16, torch.float16), ((1, 1, 1), (5, 1, 7))):
        with FakeTensorMode(), torch.inference_mode():
            check(dtype, counts)
        print(f"ok      {dtype}, rows of {counts} tokens", flush=True)


if __name__ == "__main__":
    main()
