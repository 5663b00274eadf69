"""Attention on CUDA by FlashAttention's paged kernels: whichever of three is installed.

NEVER RUN YET, for lack of a GPU. The bookkeeping is tested on a CPU; the three calls follow the
kernels' sources and documentation. In order of preference:

- FlashAttention-3 (`flash_attn_interface`, Hopper): any page size that is a multiple of 16;
- FlashAttention-2 (`flash_attn`, Ampere and later): pages of a multiple of 256 tokens;
- the FlashAttention-2 inside torch >= 2.13 (`torch.nn.attention.varlen`): likewise 256.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from model.attention.interface import AttentionBatch, AttentionSpec, BackendOffer, PagedAttention
from model.cuda.ops import why_not_ampere
from model.extras import why_missing
from model.kv.format import KV_FORMATS
from model.kv.pool import KVPool

_MAX_HEAD_DIM = 256
_HOPPER = (9, 0)


@dataclass(frozen=True, slots=True)
class FlashBatch:
    """A step in the form of the kernels: int32 throughout."""

    #: `[rows + 1]` each.
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    #: `[rows]`.
    seq_lens: Tensor
    #: `[rows, pages of the longest row]`, contiguous: FA3 decides from its width how to split.
    block_table: Tensor
    max_query_len: int
    max_seq_len: int


def flash_batch(batch: AttentionBatch, page_size: int, window: int | None) -> FlashBatch:
    """Convert a step. `window` is the widest of the model; None: a layer sees all keys."""
    cu_seqlens_k = torch.zeros_like(batch.query_starts)
    torch.cumsum(batch.seq_lens, 0, out=cu_seqlens_k[1:])
    num_pages = -(-batch.max_seq_len // page_size)
    table = batch.block_table[:, :num_pages]
    if window is not None:
        # The kernels load whole tiles of keys and multiply the values behind the window by zero,
        # which keeps NaN. So the entries behind it become the row's own first page in view.
        first_pages = (batch.first_keys(window) // page_size)[:, None]
        pages_at = torch.arange(num_pages, device=table.device).expand(len(table), -1)
        table = table.gather(1, torch.maximum(pages_at, first_pages))
    return FlashBatch(
        cu_seqlens_q=batch.query_starts,
        cu_seqlens_k=cu_seqlens_k,
        seq_lens=batch.seq_lens,
        block_table=table.contiguous(),
        max_query_len=batch.max_query_len,
        max_seq_len=batch.max_seq_len,
    )


#: (q `[tokens, heads, head_dim]`, keys, values (a layer's pages), step, scale, window or None)
#: to `[tokens, heads, head_dim]`, causal.
FlashKernel = Callable[[Tensor, Tensor, Tensor, FlashBatch, float, int | None], Tensor]


class FlashAttention(PagedAttention):
    """See `PagedAttention`; `kernel` does the arithmetic."""

    name = "flash"

    def __init__(self, spec: AttentionSpec, pool: KVPool, kernel: FlashKernel) -> None:
        super().__init__(spec, pool)
        self._kernel = kernel
        self._flash_batch: FlashBatch | None = None

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend`."""
        super().plan(batch)
        page_size = self._pool.layout.page_size
        self._flash_batch = flash_batch(batch, page_size, self._spec.widest_window)

    def read(self, layer: int, q: Tensor) -> Tensor:
        """See `PagedAttention`."""
        assert self._flash_batch is not None, "attend before plan"
        keys, values, _ = self.pages(layer)
        spec = self._spec
        return self._kernel(
            q, keys, values, self._flash_batch, spec.scale, spec.windows[layer]
        ).flatten(1)


def offer(spec: AttentionSpec) -> BackendOffer | str:
    """Offer the best kernel installed, or return in one line why none can serve the model here."""
    if reason := _why_not(spec) or spec.beyond_softmax:
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
        formats=[one for one in KV_FORMATS.values() if one.storage == spec.dtype],
        notes=(f"attention by {what}", *notes),
    )


def _installed(name: str) -> ModuleType | None:
    """Import a package if it is installed; a broken one raises."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _left_window(window: int | None) -> int:
    """Return the tokens before the query's own, as the kernels count them; -1: all."""
    return -1 if window is None else window - 1


def _flash_attention_3(
    module: ModuleType,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: FlashBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    attended: Tensor = module.flash_attn_with_kvcache(
        q,
        keys,
        values,
        cache_seqlens=batch.seq_lens,
        page_table=batch.block_table,
        cu_seqlens_q=batch.cu_seqlens_q,
        max_seqlen_q=batch.max_query_len,
        softmax_scale=scale,
        causal=True,
        window_size=(_left_window(window), -1 if window is None else 0),
        # 0: the kernel's own heuristic.
        num_splits=0,
    )
    return attended


def _flash_attention_2(
    module: ModuleType,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: FlashBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    window_size = (_left_window(window), -1 if window is None else 0)
    if batch.max_query_len == 1 and len(q) == len(batch.seq_lens):
        # The only one of its two functions that splits along the keys.
        decoded: Tensor = module.flash_attn_with_kvcache(
            q.unsqueeze(1),
            keys,
            values,
            cache_seqlens=batch.seq_lens,
            block_table=batch.block_table,
            softmax_scale=scale,
            causal=True,
            window_size=window_size,
        )
        return decoded.squeeze(1)
    attended: Tensor = module.flash_attn_varlen_func(
        q,
        keys,
        values,
        cu_seqlens_q=batch.cu_seqlens_q,
        cu_seqlens_k=batch.cu_seqlens_k,
        max_seqlen_q=batch.max_query_len,
        max_seqlen_k=batch.max_seq_len,
        softmax_scale=scale,
        causal=True,
        window_size=window_size,
        block_table=batch.block_table,
    )
    return attended


def _torch_varlen(
    module: ModuleType,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: FlashBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    is_decode = batch.max_query_len == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    module.varlen_attn_out(
        out,
        q,
        keys,
        values,
        batch.cu_seqlens_q,
        # Must not be None, although seqused_k has the same information.
        batch.cu_seqlens_k,
        batch.max_query_len,
        batch.max_seq_len,
        scale=scale,
        # A lone last token sees all keys: no mask needed.
        window_size=(-1, -1) if is_decode and window is None else (_left_window(window), 0),
        enable_gqa=True,
        seqused_k=batch.seq_lens,
        block_table=batch.block_table,
        # Paged with several splits writes wrong or NaN rows (pytorch#194167).
        num_splits=1,
    )
    return out
