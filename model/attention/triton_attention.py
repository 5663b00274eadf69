"""Attention on CUDA by kernels of our own: pages of any size, no FlashAttention needed.

Tests run the kernels in Triton's interpreter (`tests/model/attention`) and compile them for sm_80
and sm_90 (`tests/model/cuda/test_kernels_compile.py`); docs/performance.md has the status on GPUs.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from model.attention.interface import AttentionBatch, AttentionSpec, BackendOffer, PagedAttention
from model.cuda.ops import power_of_two, why_not_ampere
from model.extras import why_missing
from model.kv.pool import KVPool

_MAX_HEAD_DIM = 256
#: Keys a program takes at a time.
_TILE = 64
#: Queries a program takes at a time, at most. `tl.dot` takes no fewer than 16 rows.
_MAX_QUERIES = 128
_MIN_ROWS = 16
#: Programs a multiprocessor should have to choose from, so that loads overlap.
_PROGRAMS_EACH = 4
_MAX_SPLITS = 64
#: Larger than any sequence, and than any sum of it with one still an int32.
_NO_WINDOW = 2**30
#: Of the multiprocessors where there is no GPU to ask: enough for the interpreter to split.
_NUM_INTERPRETED = 8


def num_splits(num_programs: int, num_processors: int, max_seq_len: int) -> int:
    """Return the number of splits of a row's keys (a power of two) that fills the GPU.

    `num_programs` is the number with one split. The rows' lengths do not enter: a captured graph
    serves all of them.
    """
    wanted = _PROGRAMS_EACH * num_processors // max(num_programs, 1)
    most = min(wanted, _MAX_SPLITS, -(-max_seq_len // _TILE))
    return 1 << max(most, 1).bit_length() - 1


class TritonAttention(PagedAttention):
    """See `PagedAttention`."""

    name = "triton"

    def __init__(self, spec: AttentionSpec, pool: KVPool) -> None:
        # Not at the top of the file: a machine without triton can still load the registry.
        from model.attention import triton_kernels  # noqa: PLC0415 - see above

        super().__init__(spec, pool)
        self._kernels = triton_kernels
        self._scratch: tuple[Tensor, Tensor] | None = None
        self._num_splits = 1
        is_cuda = spec.device.type == "cuda"
        self._num_processors = (
            torch.cuda.get_device_properties(spec.device).multi_processor_count
            if is_cuda
            else _NUM_INTERPRETED
        )
        # In the interpreter a product of bfloat16 operands is garbage.
        is_wide = not is_cuda or spec.dtype == torch.float32
        self._dot_dtype = _triton_dtype(torch.float32 if is_wide else spec.dtype)
        # Keys and values of as many tiles must fit into shared memory at a time.
        row_bytes = power_of_two(spec.head_dim) * (4 if is_wide else 2)
        self._num_stages = 3 if row_bytes <= 256 else 2

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend`."""
        super().plan(batch)
        spec, rows = self._spec, len(batch.seq_lens)
        self._num_splits = num_splits(
            rows * spec.num_kv_heads, self._num_processors, batch.max_seq_len
        )
        self._scratch = None
        if self._num_splits > 1:
            shape = rows, spec.num_heads, self._num_splits
            partial = torch.empty(*shape, spec.head_dim, device=spec.device)
            self._scratch = partial, torch.empty(shape, device=spec.device)

    def read(self, layer: int, q: Tensor) -> Tensor:
        """See `PagedAttention`."""
        batch, spec = self._batch, self._spec
        out = torch.empty(len(q), spec.num_heads * spec.head_dim, dtype=q.dtype, device=q.device)
        if batch.max_query_len > 1:
            self._read_prompts(layer, q, batch, out)
        # Each kernel skips the other's rows: the host does not have the rows' lengths.
        if batch.max_query_len == 1 or len(batch.seq_lens) > 1:
            self._read_decodes(layer, q, batch, out)
        return out

    def _shared_arguments(self, layer: int, q: Tensor, keys: Tensor) -> tuple[object, ...]:
        """Return the arguments from `table_ptr` to `table_stride`, which both kernels take."""
        batch, spec = self._batch, self._spec
        return (
            batch.block_table,
            batch.seq_lens,
            batch.query_starts,
            spec.scale * math.log2(math.e),
            spec.windows[layer] or _NO_WINDOW,
            q.stride(0),
            q.stride(1),
            keys.stride(1),
            batch.block_table.stride(0),
        )

    def _read_decodes(self, layer: int, q: Tensor, batch: AttentionBatch, out: Tensor) -> None:
        spec, kernels, rows = self._spec, self._kernels, len(batch.seq_lens)
        keys, values, _ = self.pages(layer)
        group = spec.num_heads // spec.num_kv_heads
        # One split writes no partial results.
        partial, lse = self._scratch or (out, out)
        shape = {"HEAD_DIM": spec.head_dim, "DIM_BLOCK": power_of_two(spec.head_dim)}
        kernels.decode_kernel[(rows, spec.num_kv_heads, self._num_splits)](
            q,
            keys,
            values,
            out,
            partial,
            lse,
            *self._shared_arguments(layer, q, keys),
            GROUP=group,
            GROUP_BLOCK=max(power_of_two(group), _MIN_ROWS),
            PAGE_SIZE=self._pool.layout.page_size,
            TILE=_TILE,
            NUM_SPLITS=self._num_splits,
            DOT_DTYPE=self._dot_dtype,
            num_warps=4,
            num_stages=self._num_stages,
            **shape,
        )
        if self._num_splits > 1:
            kernels.combine_kernel[(rows, spec.num_heads)](
                partial, lse, out, batch.query_starts, NUM_SPLITS=self._num_splits, **shape
            )

    def _read_prompts(self, layer: int, q: Tensor, batch: AttentionBatch, out: Tensor) -> None:
        spec = self._spec
        keys, values, _ = self.pages(layer)
        tile = min(max(power_of_two(batch.max_query_len), _MIN_ROWS), _MAX_QUERIES)
        grid = -(-batch.max_query_len // tile), spec.num_heads, len(batch.seq_lens)
        self._kernels.prompt_kernel[grid](
            q,
            keys,
            values,
            out,
            *self._shared_arguments(layer, q, keys),
            GROUP=spec.num_heads // spec.num_kv_heads,
            HEAD_DIM=spec.head_dim,
            DIM_BLOCK=power_of_two(spec.head_dim),
            PAGE_SIZE=self._pool.layout.page_size,
            QUERY_TILE=tile,
            TILE=_TILE,
            DOT_DTYPE=self._dot_dtype,
            num_warps=8 if tile == _MAX_QUERIES else 4,
            num_stages=2,
        )


def offer(spec: AttentionSpec) -> BackendOffer | str:
    """Offer the kernels, or return in one line why they cannot serve the model here."""
    if reason := why_missing("triton", "cuda"):
        return reason
    if reason := spec.beyond_softmax or _why_not_on(spec.device):
        return reason
    if spec.head_dim > _MAX_HEAD_DIM:
        return f"head_dim must be at most {_MAX_HEAD_DIM}, got {spec.head_dim}"
    return BackendOffer(TritonAttention.name, 1, 16, TritonAttention)


def _why_not_on(device: torch.device) -> str:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the model is on cpu, not on a CUDA GPU"
    return why_not_ampere(device) if device.type == "cuda" else ""


def _triton_dtype(dtype: torch.dtype) -> object:
    import triton.language as tl  # noqa: PLC0415 - not on machines without a GPU

    return getattr(tl, str(dtype).removeprefix("torch."))
