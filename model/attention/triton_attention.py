"""Attention on CUDA by kernels of our own: pages of any size, no FlashAttention needed.

Tests run the kernels in Triton's interpreter (`tests/model/attention`) and compile them for sm_80
and sm_90 (`tests/model/cuda/test_kernels_compile.py`); docs/performance.md has the status on GPUs.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from model.attention.interface import (
    FEW_QUERIES,
    AttentionBatch,
    AttentionSpec,
    BackendOffer,
    PagedAttention,
)
from model.cuda.ops import power_of_two, why_not_ampere
from model.extras import why_missing
from model.kv.format import CODED_FORMATS, FLOAT_FORMATS
from model.kv.pool import KVPool

_MAX_HEAD_DIM = 256
#: Keys a program takes at a time.
_TILE = 64
#: Queries of a prompt that a program takes at a time, at most.
_MAX_QUERIES = 128
#: Pairs of a query and a head that a program of a decode takes at a time. `tl.dot` takes no fewer
#: than 16 rows. From 64 on a Hopper multiplies by other instructions: sums have another order.
_MIN_LANES, _MAX_LANES = 16, 32
#: Programs a multiprocessor should have to choose from, so that loads overlap.
_PROGRAMS_EACH = 4
_MAX_SPLITS = 64
#: Heads that a program rotates.
_HEADS_EACH = 8
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
    """See `PagedAttention`.

    A row of at most `FEW_QUERIES` queries goes through the decode kernel, a longer one through that
    of prompts: its number of queries alone decides. With 16-bit dtypes and as many splits, the
    decode kernel gives a query the same bits for any number of queries in its row. The number of
    splits depends on the number of rows and the length of the longest. Between the kernels, and
    between numbers of splits, results differ by rounding.
    """

    name = "triton"

    def __init__(self, spec: AttentionSpec, pool: KVPool) -> None:
        # Not at the top of the file: a machine without triton can still load the registry.
        from model.attention import triton_code_kernels, triton_kernels  # noqa: PLC0415 - see above

        super().__init__(spec, pool)
        self._kernels = triton_kernels
        self._code_kernels = triton_code_kernels
        # The same blocks as in `hadamard`.
        block = spec.head_dim & -spec.head_dim
        #: Constants of the kernels that rotate.
        self._rotation = {
            "HEAD_DIM": spec.head_dim,
            "DIM_BLOCK": power_of_two(spec.head_dim),
            "STAGES": block.bit_length() - 1,
            "FACTOR": block**-0.5,
        }
        self._scratch: tuple[Tensor, Tensor] | None = None
        self._num_splits = self._queries = 1
        is_cuda = spec.device.type == "cuda"
        self._num_processors = (
            torch.cuda.get_device_properties(spec.device).multi_processor_count
            if is_cuda
            else _NUM_INTERPRETED
        )
        # In the interpreter a product of bfloat16 operands is garbage.
        is_wide = not is_cuda or spec.dtype == torch.float32
        self._dot_dtype = torch.float32 if is_wide else spec.dtype
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
        self._queries = min(power_of_two(batch.max_query_len), FEW_QUERIES)
        self._scratch = None
        if self._num_splits > 1:
            shape = rows, self._queries, spec.num_heads, self._num_splits
            partial = torch.empty(*shape, spec.head_dim, device=spec.device)
            self._scratch = partial, torch.empty(shape, device=spec.device)

    def read(self, layer: int, q: Tensor, sink_q: Tensor | None = None) -> Tensor:
        """See `PagedAttention`."""
        batch, spec = self._batch, self._spec
        assert sink_q is not None or not batch.has_sinks, "queries towards sinks are missing"
        coding = self._pool.layout.format_of(layer).coding
        is_rotated = coding is not None and coding.is_rotated
        if is_rotated:
            q, sink_q = self._rotated(q), None if sink_q is None else self._rotated(sink_q)
        out = torch.empty(len(q), spec.num_heads * spec.head_dim, dtype=q.dtype, device=q.device)
        queries = q, q if sink_q is None else sink_q.contiguous()
        has_prompts = batch.max_query_len > FEW_QUERIES
        if has_prompts:
            self._read_prompts(layer, queries, batch, out)
        # Each kernel skips the other's rows: the host does not have the rows' lengths.
        if not has_prompts or len(batch.seq_lens) > 1:
            self._read_decodes(layer, queries, batch, out)
        return self._rotated(out.view_as(q)).flatten(1) if is_rotated else out

    def _rotated(self, x: Tensor) -> Tensor:
        """Return queries that meet the rotated keys of codes, or results turned back.

        `[tokens, heads, head_dim]` as `hadamard` defines it: no vector depends on another.
        """
        tokens, heads, _ = x.shape
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._code_kernels.rotate_kernel[(tokens, -(-heads // _HEADS_EACH))](
            x,
            out,
            x.stride(0),
            x.stride(1),
            NUM_HEADS=heads,
            HEADS_EACH=_HEADS_EACH,
            num_warps=1,
            **self._rotation,
        )
        return out

    def _kind(self, layer: int) -> str:
        """Return the kind of a layer's pages, as the kernels name it."""
        kv_format = self._pool.layout.format_of(layer)
        return kv_format.name if kv_format.coding else "floats"

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """See `PagedAttention`."""
        kind = self._kind(layer)
        if kind == "floats":
            super().store(layer, k, v)
            return
        tokens, heads, _ = k.shape
        self._code_kernels.store_kernel[(tokens, heads, 2)](
            k,
            v,
            self.kv_slots,
            *self._planes(layer),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            KIND=kind,
            num_warps=1,
            # A fused product and sum rounds once where the definition rounds twice.
            enable_fp_fusion=False,
            **self._rotation,
        )

    def _planes(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return keys, values and their scales; placeholders where there are none."""
        keys, values, scales = self.pages(layer)
        if not scales:
            return keys, values, keys, values
        if keys.dtype == torch.float8_e4m3fn:
            keys, values = keys.view(torch.uint8), values.view(torch.uint8)
        return keys, values, scales[0].view(torch.int16), scales[1].view(torch.int16)

    def _shared_arguments(self, layer: int, q: Tensor) -> tuple[object, ...]:
        """Return the arguments from `table_ptr` to `table_stride`, which both kernels take."""
        batch, spec, views = self._batch, self._spec, self._batch.views
        return (
            batch.block_table,
            batch.seq_lens,
            batch.query_starts,
            # Not read where there are no views.
            batch.seq_lens if views is None else views.sinks,
            batch.seq_lens if views is None else views.windows,
            spec.scale * math.log2(math.e),
            spec.windows[layer] or _NO_WINDOW,
            q.stride(0),
            q.stride(1),
            self.pages(layer).keys.stride(1),
            batch.block_table.stride(0),
        )

    def _shared_constants(self, layer: int) -> dict[str, object]:
        """Return the constants of both kernels."""
        spec, kind = self._spec, self._kind(layer)
        # Weights times scales may be too small for float16; codes are exact in bfloat16, too.
        is_narrow = kind != "floats" and self._dot_dtype == torch.float16
        return {
            "GROUP": spec.num_heads // spec.num_kv_heads,
            "HEAD_DIM": spec.head_dim,
            "DIM_BLOCK": power_of_two(spec.head_dim),
            "PAGE_SIZE": self._pool.layout.page_size,
            "TILE": _TILE,
            "KIND": kind,
            "DOT_DTYPE": _triton_dtype(self._dot_dtype),
            "WEIGHT_DTYPE": _triton_dtype(torch.bfloat16 if is_narrow else self._dot_dtype),
            "HAS_VIEWS": self._batch.views is not None,
        }

    def _read_decodes(
        self, layer: int, queries: tuple[Tensor, Tensor], batch: AttentionBatch, out: Tensor
    ) -> None:
        spec, kernels, rows = self._spec, self._kernels, len(batch.seq_lens)
        group = spec.num_heads // spec.num_kv_heads
        lanes = min(max(power_of_two(self._queries * group), _MIN_LANES), _MAX_LANES)
        blocks = -(-self._queries * group // lanes)
        # One split writes no partial results.
        partial, lse = self._scratch or (out, out)
        shape = {"QUERIES": self._queries, "NUM_SPLITS": self._num_splits}
        constants = self._shared_constants(layer)
        kernels.decode_kernel[(rows, spec.num_kv_heads * blocks, self._num_splits)](
            *queries,
            *self._planes(layer),
            out,
            partial,
            lse,
            *self._shared_arguments(layer, queries[0]),
            LANES=lanes,
            num_warps=4,
            num_stages=self._num_stages,
            **shape,
            **constants,
        )
        if self._num_splits > 1:
            grid = rows * self._queries, spec.num_heads
            dims = {name: constants[name] for name in ("HEAD_DIM", "DIM_BLOCK")}
            kernels.combine_kernel[grid](partial, lse, out, batch.query_starts, **shape, **dims)

    def _read_prompts(
        self, layer: int, queries: tuple[Tensor, Tensor], batch: AttentionBatch, out: Tensor
    ) -> None:
        spec = self._spec
        tile = min(max(power_of_two(batch.max_query_len), _MIN_LANES), _MAX_QUERIES)
        grid = -(-batch.max_query_len // tile), spec.num_heads, len(batch.seq_lens)
        self._kernels.prompt_kernel[grid](
            *queries,
            *self._planes(layer),
            out,
            *self._shared_arguments(layer, queries[0]),
            FEW_QUERIES=FEW_QUERIES,
            QUERY_TILE=tile,
            **self._shared_constants(layer),
            num_warps=8 if tile == _MAX_QUERIES else 4,
            num_stages=2,
        )


def offer(spec: AttentionSpec) -> BackendOffer | str:
    """Offer the kernels, or return in one line why they cannot serve the model here."""
    if reason := why_missing("triton", "cuda"):
        return reason
    if reason := spec.beyond_softmax or spec.beyond_two_planes or _why_not_on(spec.device):
        return reason
    if spec.head_dim > _MAX_HEAD_DIM:
        return f"head_dim must be at most {_MAX_HEAD_DIM}, got {spec.head_dim}"
    formats = (*FLOAT_FORMATS, *CODED_FORMATS)
    return BackendOffer(
        TritonAttention.name,
        1,
        16,
        TritonAttention,
        formats=formats,
        reads_mixed_layers=True,
        reads_views=True,
    )


def _why_not_on(device: torch.device) -> str:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the model is on cpu, not on a CUDA GPU"
    return why_not_ampere(device) if device.type == "cuda" else ""


def _triton_dtype(dtype: torch.dtype) -> object:
    import triton.language as tl  # noqa: PLC0415 - not on machines without a GPU

    return getattr(tl, str(dtype).removeprefix("torch."))
