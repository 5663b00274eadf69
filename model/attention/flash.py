"""Attention on CUDA by FlashAttention's paged kernels: whichever of three is installed.

Tests run the bookkeeping on a CPU; docs/performance.md has the status on GPUs. The three calls
follow the kernels' sources and documentation. In order of preference:

- FlashAttention-3 (`flash_attn_interface`, Hopper): any page size that is a multiple of 16;
- FlashAttention-2 (`flash_attn`, Ampere and later): pages of a multiple of 256 tokens;
- the FlashAttention-2 inside torch >= 2.13 (`torch.nn.attention.varlen`): likewise 256.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from model.attention.interface import AttentionBatch, AttentionSpec, BackendOffer, PagedAttention
from model.cuda.ops import why_not_ampere
from model.extras import why_missing
from model.kv.format import FLOAT_FORMATS
from model.kv.pool import KVPool

_MAX_HEAD_DIM = 256
_HOPPER = (9, 0)


class FlashCall(NamedTuple):
    """The arguments of a kernel: causal attention of one layer."""

    #: `[tokens, heads, head_dim]`, as the result.
    q: Tensor
    #: The layer's pages.
    keys: Tensor
    values: Tensor
    #: See `kernel_batch`.
    batch: AttentionBatch
    #: int32 `[rows + 1]`.
    cu_seqlens_k: Tensor
    scale: float
    window: int | None

    @property
    def window_size(self) -> tuple[int, int]:
        """Return the tokens seen before and behind the query's own; -1: no limit."""
        return (-1, -1) if self.window is None else (self.window - 1, 0)


FlashKernel = Callable[[FlashCall], Tensor]


def kernel_batch(batch: AttentionBatch, page_size: int, window: int | None) -> AttentionBatch:
    """Make the block table contiguous and as wide as the longest row: FA3 splits by its width.

    `window` is the widest of the model; None: a layer sees all keys.
    """
    num_pages = -(-batch.max_seq_len // page_size)
    table = batch.block_table[:, :num_pages]
    if window is not None:
        # The kernels load whole tiles of keys and multiply the values behind the window by zero,
        # which keeps NaN. So the entries behind it become the row's own first page in view.
        first_pages = (batch.first_keys(window) // page_size)[:, None]
        pages_at = torch.arange(num_pages, device=table.device).expand(len(table), -1)
        table = table.gather(1, torch.maximum(pages_at, first_pages))
    return replace(batch, block_table=table.contiguous())


class FlashAttention(PagedAttention):
    """See `PagedAttention`; `kernel` does the arithmetic."""

    name = "flash"

    def __init__(self, spec: AttentionSpec, pool: KVPool, kernel: FlashKernel) -> None:
        super().__init__(spec, pool)
        self._kernel = kernel
        self._cu_seqlens_k: Tensor | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend`."""
        super().plan(kernel_batch(batch, self._pool.layout.page_size, self._spec.widest_window))
        self._cu_seqlens_k = torch.zeros_like(batch.query_starts)
        torch.cumsum(batch.seq_lens, 0, out=self._cu_seqlens_k[1:])

    def read(self, layer: int, q: Tensor, sink_q: Tensor | None = None) -> Tensor:
        """See `PagedAttention`. No row has a view of its own: see `BackendOffer.reads_views`."""
        assert sink_q is None, "rows have views of their own"
        assert self._cu_seqlens_k is not None, "attend before plan"
        keys, values, _ = self.pages(layer)
        scale, window = self._spec.scale, self._spec.windows[layer]
        call = FlashCall(q, keys, values, self._batch, self._cu_seqlens_k, scale, window)
        return self._kernel(call).flatten(1)


def offer(spec: AttentionSpec) -> BackendOffer | str:
    """Offer the best kernel installed, or return in one line why none can serve the model here."""
    if reason := spec.beyond_two_planes or _why_not(spec) or spec.beyond_softmax:
        return reason
    is_hopper = torch.cuda.get_device_capability(spec.device) == _HOPPER
    missing = why_missing("flash_attn_interface", "cuda") if is_hopper else ""
    if is_hopper and (module := _installed("flash_attn_interface")):
        return _offer(spec, "FlashAttention-3", 16, 64, partial(_flash_attention_3, module))
    notes = (f"FlashAttention-3 would be faster: {missing}",) if missing else ()
    if module := _installed("flash_attn"):
        kernel = partial(_flash_attention_2, module)
        return _offer(spec, "FlashAttention-2", 256, 256, kernel, notes)
    if module := _torch_with_paging():
        kernel = partial(_torch_varlen, module)
        return _offer(spec, "torch's own FlashAttention-2", 256, 256, kernel, notes)
    missing = missing or "flash_attn is not installed"
    return f"{missing}; nor has torch a FlashAttention with pages"


def _why_not(spec: AttentionSpec) -> str:
    """Return why no kernel can serve this model on this machine, whichever is installed."""
    if spec.device.type != "cuda":
        return f"the model is on {spec.device.type}, not on a CUDA GPU"
    if spec.dtype not in {torch.float16, torch.bfloat16}:
        return f"dtype must be float16 or bfloat16, also of the pages; got {spec.dtype}"
    if spec.head_dim > _MAX_HEAD_DIM or spec.head_dim % 8:
        return f"head_dim must be a multiple of 8 up to {_MAX_HEAD_DIM}, got {spec.head_dim}"
    return why_not_ampere(spec.device)


def _torch_with_paging() -> ModuleType | None:
    module = importlib.import_module("torch.nn.attention.varlen")
    function = getattr(module, "varlen_attn_out", None)
    takes_pages = function and "block_table" in inspect.signature(function).parameters
    return module if takes_pages else None


def _offer(
    spec: AttentionSpec,
    what: str,
    page_multiple: int,
    default_page_size: int,
    kernel: FlashKernel,
    notes: tuple[str, ...] = (),
) -> BackendOffer:
    return BackendOffer(
        name=FlashAttention.name,
        page_multiple=page_multiple,
        default_page_size=default_page_size,
        build=partial(FlashAttention, kernel=kernel),
        # The kernels take one dtype of queries and pages.
        formats=[one for one in FLOAT_FORMATS if one.storage == spec.dtype],
        notes=(f"attention by {what}", *notes),
    )


def _installed(name: str) -> ModuleType | None:
    """Import a package if it is installed; a broken one raises."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _flash_attention_3(module: ModuleType, call: FlashCall) -> Tensor:
    batch = call.batch
    attended: Tensor = module.flash_attn_with_kvcache(
        call.q,
        call.keys,
        call.values,
        cache_seqlens=batch.seq_lens,
        page_table=batch.block_table,
        cu_seqlens_q=batch.query_starts,
        max_seqlen_q=batch.max_query_len,
        softmax_scale=call.scale,
        causal=True,
        window_size=call.window_size,
        # 0: the kernel's own heuristic.
        num_splits=0,
    )
    return attended


def _flash_attention_2(module: ModuleType, call: FlashCall) -> Tensor:
    q, keys, values, batch, *_ = call
    common = {
        "softmax_scale": call.scale,
        "causal": True,
        "window_size": call.window_size,
        "block_table": batch.block_table,
    }
    if batch.max_query_len == 1 and len(q) == len(batch.seq_lens):
        # The only one of its two functions that splits along the keys.
        decoded: Tensor = module.flash_attn_with_kvcache(
            q.unsqueeze(1), keys, values, cache_seqlens=batch.seq_lens, **common
        )
        return decoded.squeeze(1)
    attended: Tensor = module.flash_attn_varlen_func(
        q,
        keys,
        values,
        cu_seqlens_q=batch.query_starts,
        cu_seqlens_k=call.cu_seqlens_k,
        max_seqlen_q=batch.max_query_len,
        max_seqlen_k=batch.max_seq_len,
        **common,
    )
    return attended


def _torch_varlen(module: ModuleType, call: FlashCall) -> Tensor:
    q, batch = call.q, call.batch
    is_decode = batch.max_query_len == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    module.varlen_attn_out(
        out,
        q,
        call.keys,
        call.values,
        batch.query_starts,
        # Must not be None, although seqused_k has the same information.
        call.cu_seqlens_k,
        batch.max_query_len,
        batch.max_seq_len,
        scale=call.scale,
        # A lone last token sees all keys: no mask needed.
        window_size=call.window_size if is_decode else (call.window_size[0], 0),
        enable_gqa=True,
        seqused_k=batch.seq_lens,
        block_table=batch.block_table,
        # Paged with several splits writes wrong or NaN rows (pytorch#194167).
        num_splits=1,
    )
    return out
