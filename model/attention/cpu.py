"""Attention on a CPU by the compiled operations, which read the pages in place.

Decode is split along its keys as in flash-decoding (arXiv:2311.01282), prefill along its queries;
both are in model/cpu/csrc, with one arithmetic. A token's result depends neither on the step that
computes it, the tokens and rows beside it, nor on the number of threads.
"""

from __future__ import annotations

import ctypes
import weakref
from functools import partial

import torch
from torch import Tensor

from model.attention.interface import AttentionBatch, AttentionSpec, BackendOffer
from model.cpu.library import (
    DTYPE_CODES,
    PAGE_CODES,
    WHOLE_PAGE_CODES,
    CpuLibrary,
    load_cpu_library,
    strided,
)
from model.kv.desks import desk_tokens
from model.kv.format import FLOAT_FORMATS, KV_FORMATS, KVFormat, LayerPages
from model.kv.pool import KVPool

#: Floats in a vector of the widest instruction set.
_HEAD_DIM_MULTIPLE = 16
_MAX_HEAD_DIM = 1024
_NO_WINDOW = 2**31 - 1
_CODES = (torch.int8, torch.float8_e4m3fn, torch.uint8)
#: Dtypes of pages whose products round their operands, by instruction set.
_ROUNDED = {
    "amx": (torch.float16, torch.bfloat16, *_CODES),
    "avx512_bf16": (torch.bfloat16, *_CODES),
    "avx512_vnni": (torch.int8, torch.uint8),
    "neon_bf16": (torch.bfloat16,),
}


class CpuAttention:
    """See `AttentionBackend`. Steps are checked as far as memory safety requires."""

    name = "cpu"

    def __init__(self, spec: AttentionSpec, pool: KVPool, library: CpuLibrary) -> None:
        self._spec = spec
        self._pool = pool
        #: Queries and weights enter their products as bfloat16, or as words of 15 bits.
        self.is_rounded = _operands(pool.layout.format) in _ROUNDED.get(library.isa, ())
        self._functions = library.functions
        self._attend = library.functions.octavo_attention_attend
        self._width = spec.num_heads * spec.head_dim
        self._dtype_code = DTYPE_CODES[spec.dtype]
        #: For the compiled decoder, whose attention is part of its own call.
        self.session = self._new_session(library)
        self._batch: AttentionBatch | None = None
        self._slots: Tensor | None = None
        weakref.finalize(self, library.functions.octavo_attention_free, self.session)

    def _new_session(self, library: CpuLibrary) -> int:
        spec, pool, layout = self._spec, self._pool, self._pool.layout
        pages = [pool.pages(layer) for layer in range(spec.num_layers)]
        numbers = ctypes.c_int32 * spec.num_layers
        planes = [address for one in pages for address in _addresses(one)]
        session: int = library.functions.octavo_attention_new(
            library.kernels,
            (ctypes.c_int64 * len(planes))(*planes),
            numbers(*(page_code(layout.format_of(layer)) for layer in range(spec.num_layers))),
            numbers(*(window or _NO_WINDOW for window in spec.windows)),
            spec.num_layers,
            pool.num_pages,
            layout.page_size,
            spec.num_kv_heads,
            spec.num_heads // spec.num_kv_heads,
            spec.head_dim,
            spec.scale,
            desk_tokens(layout.page_size, spec.max_draft_tokens),
        )
        return session

    def plan(self, batch: AttentionBatch) -> None:
        """See `AttentionBackend`; ValueError where a page or slot lies outside the pool.

        The same where tokens of a row's page are not on the desk of its slot.
        """
        table, num_rows = batch.block_table, batch.seq_lens.shape[0]
        slots = torch.tensor(batch.slots, dtype=torch.int32)
        for tensor in (batch.query_starts, batch.seq_lens, batch.kv_slots):
            if not tensor.is_contiguous():
                raise ValueError("the batch's tensors must be contiguous")
        if table.stride(1) != 1:
            raise ValueError("block_table's rows must be contiguous")
        reason: bytes | None = self._functions.octavo_attention_plan(
            self.session,
            batch.query_starts.data_ptr(),
            batch.seq_lens.data_ptr(),
            table.data_ptr(),
            table.stride(0),
            batch.kv_slots.data_ptr(),
            num_rows,
            batch.kv_slots.shape[0],
            torch.get_num_threads(),
            None if batch.views is None else batch.views.sinks.data_ptr(),
            None if batch.views is None else batch.views.windows.data_ptr(),
            slots.data_ptr() if len(slots) == num_rows else None,
        )
        if reason is not None:
            raise ValueError(reason.decode())
        # The library reads the tensors in place.
        self._batch, self._slots = batch, slots

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, sink_q: Tensor | None = None
    ) -> Tensor:
        """See `AttentionBackend`."""
        tokens = q.shape[0]
        assert self._batch is not None, "attend before plan"
        assert sink_q is not None or not self._batch.has_sinks, "queries towards sinks are missing"
        assert tokens == len(self._batch.kv_slots), "other tokens than were planned"
        assert q.dtype == k.dtype == v.dtype == self._spec.dtype, "not the dtype of the spec"
        if self._spec.latent_dim:
            # One plane: whole keys are stored and read as values, too.
            v = k
        out = torch.empty((tokens, self._width), dtype=q.dtype)
        self._attend(
            self.session,
            layer,
            self._dtype_code,
            *strided(q),
            *strided(k),
            *strided(v),
            out.data_ptr(),
            *((None, 0, 0) if sink_q is None else strided(sink_q)),
        )
        if self._spec.latent_dim:
            heads = out.view(tokens, self._spec.num_heads, -1)
            return heads[..., : self._spec.latent_dim].flatten(1)
        return out


def page_code(kv_format: KVFormat) -> int:
    """Return the `DType` of csrc/kernels.h that stands for pages of a format."""
    if kv_format.page_coding is not None:
        return WHOLE_PAGE_CODES[kv_format.page_coding.bits]
    return PAGE_CODES[kv_format.storage]


def _operands(kv_format: KVFormat) -> torch.dtype:
    """Return the dtype of the elements that enter products."""
    return kv_format.storage if kv_format.page_coding is None else torch.bfloat16


def _addresses(pages: LayerPages) -> list[int]:
    """Return the addresses of a layer's planes; 0 for scales where there are none."""
    scales = [one.data_ptr() for one in pages.scales] or [0, 0]
    return [pages.keys.data_ptr(), pages.values.data_ptr(), *scales]


def offer(spec: AttentionSpec) -> BackendOffer | str:
    """Offer this backend, or return in one line why it cannot serve the model here."""
    if spec.device.type != "cpu":
        return f"the model is on {spec.device.type}, not on the CPU"
    if reason := spec.beyond_softmax or _why_not_codes(spec):
        return reason
    if spec.head_dim % _HEAD_DIM_MULTIPLE or spec.head_dim > _MAX_HEAD_DIM:
        return (
            f"head_dim must be a multiple of {_HEAD_DIM_MULTIPLE} up to {_MAX_HEAD_DIM}, "
            f"got {spec.head_dim}"
        )
    if spec.dtype not in DTYPE_CODES:
        return f"{spec.dtype} is not among float32, float16 and bfloat16"
    library = load_cpu_library()
    if isinstance(library, str):
        return library
    return BackendOffer(
        name="cpu",
        page_multiple=1,
        default_page_size=spec.kv_format.default_page_tokens,
        build=partial(CpuAttention, library=library),
        formats=tuple(KV_FORMATS.values()),
        reads_mixed_layers=True,
        reads_views=True,
    )


def _why_not_codes(spec: AttentionSpec) -> str:
    is_coded = spec.latent_dim and spec.kv_format not in FLOAT_FORMATS
    return "codes of latent vectors are read by torch alone" if is_coded else ""
