"""Puts a runner together: decoder, attention backend, pages, sampler. Needs torch.

Everything decided here is said: in `ModelInfo`, or as a note in it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial

import torch

from cache.view import FULL_VIEW, View
from configs.schema import CacheSection, ModelSection, OctavoConfig
from configs.sizes import format_size
from model.architectures.transformer import Decoder, ServedDecoder, Transformer
from model.attention.interface import AttentionBackend, BackendOffer
from model.attention.registry import choose_backend
from model.cpu.decoder import CpuDecoder, why_not
from model.cpu.library import CpuLibrary, load_cpu_library
from model.cpu.ops import CpuOps
from model.cuda import ops as gpu_ops
from model.cuda.assembly import GpuParts, assemble_on_gpu
from model.cuda.ops import GpuOps
from model.implementation import build_decoder
from model.interface import (
    ModelInfo,
    RowSpan,
    SampleSpan,
    SamplingParams,
    SlotStart,
    StepInput,
)
from model.kv.memory_plan import PoolPlan, angles_bytes, free_memory_bytes, plan_pool
from model.kv.pool import KVPool
from model.ops import Ops, TorchOps
from model.runner import TorchRunner
from model.sampling.sampler import Sampler
from model.weights.source import ModelSource

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

#: Below this a table of angles is not worth a line.
_LARGE_TABLE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class _Device:
    device: torch.device
    dtype: torch.dtype
    ops: Ops
    notes: tuple[str, ...] = ()
    #: The library whose products are the fastest here, if any are.
    tiles: CpuLibrary | None = None


def assemble(
    source: ModelSource, config: OctavoConfig, end_token_ids: tuple[int, ...] = ()
) -> TorchRunner:
    """Build the runner that `config` asks for. Raises `ValueError` naming the setting at fault.

    `end_token_ids`: tokens that end an answer besides those that the model's config names.
    """
    torch.set_num_threads(config.model.threads or len(os.sched_getaffinity(0)))
    where = _device(config.model)
    decoder = build_decoder(
        source,
        config.model,
        dtype=where.dtype,
        device=where.device,
        ops=where.ops,
        tiles=where.tiles,
    )
    kv_dtype = _kv_dtype(config.cache, decoder, where.tiles)
    spec = decoder.attention_spec(kv_dtype)
    offer = choose_backend(config.model.attention_backend, spec)
    plan_of = partial(_plan_pool, config, decoder, kv_dtype, offer)
    info_of = partial(_info, source, config, decoder, kv_dtype, offer, where, end_token_ids)
    if where.device.type == "cuda":
        ops = where.ops if isinstance(where.ops, GpuOps) else None
        parts = GpuParts(decoder, offer, info_of, kv_dtype, ops, config)
        runner = assemble_on_gpu(parts, plan_of)
    else:
        plan = plan_of(free_memory_bytes())
        decoder.hold_positions(plan.max_model_len)
        pool = _pool(decoder, plan, kv_dtype)
        runner = _on_cpu(config, decoder, pool, offer.build(spec, pool), info_of(plan), where)
    _warm_up(runner)
    return runner


def _on_cpu(
    config: OctavoConfig,
    decoder: ServedDecoder,
    pool: KVPool,
    attention: AttentionBackend,
    info: ModelInfo,
    where: _Device,
) -> TorchRunner:
    return TorchRunner(
        info=info,
        decoder=_fastest(decoder, attention, where.tiles),
        attention=attention,
        pool=pool,
        sampler=Sampler(
            config.scheduler.max_num_seqs, info.vocab_size, info.eos_token_ids, where.device
        ),
        max_num_seqs=config.scheduler.max_num_seqs,
    )


def _device(config: ModelSection) -> _Device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but torch finds no GPU here")
    device = torch.device(name)
    if name == "cuda":
        dtype = torch.bfloat16 if config.dtype == "auto" else _DTYPES[config.dtype]
        if reason := gpu_ops.why_not():
            note = f"fused operations are not available ({reason}); torch's are slower"
            return _Device(device, dtype, TorchOps(), (note,))
        return _Device(device, dtype, GpuOps())
    dtype = torch.float32 if config.dtype == "auto" else _DTYPES[config.dtype]
    library = load_cpu_library()
    if isinstance(library, str):
        note = f"compiled CPU operations are not available ({library}); torch's are slower"
        return _Device(device, dtype, TorchOps(), (note,))
    tiles = library if library.isa == "amx" else None
    return _Device(device, dtype, CpuOps(library), library.notes, tiles)


def _fastest(
    decoder: ServedDecoder, attention: AttentionBackend, tiles: CpuLibrary | None
) -> Decoder:
    if tiles is None or not isinstance(decoder, Transformer) or why_not(decoder, attention):
        return decoder
    return CpuDecoder(decoder, tiles)


def _kv_dtype(
    config: CacheSection, decoder: ServedDecoder, tiles: CpuLibrary | None
) -> torch.dtype:
    """Say what keys and values are kept in: as exact as the products that make and take them."""
    if config.kv_cache_dtype != "auto":
        return _DTYPES[config.kv_cache_dtype]
    is_rounded = decoder.format != "none"
    if is_rounded and decoder.attention_dtype == torch.float32:
        # Matrix instructions take bfloat16: anything finer would be converted at every step.
        return torch.bfloat16 if tiles else torch.float16
    return decoder.attention_dtype


def _plan_pool(
    config: OctavoConfig,
    decoder: ServedDecoder,
    kv_dtype: torch.dtype,
    offer: BackendOffer,
    free_bytes: int,
) -> PoolPlan:
    arch, stated_bytes = decoder.arch, config.cache.kv_cache_memory
    bytes_per_token = KVPool.bytes_per_token(
        arch.num_layers, arch.num_kv_heads, arch.head_dim, kv_dtype
    )
    table_bytes = angles_bytes(
        decoder.bytes_per_position,
        config.model.max_model_len or arch.max_positions,
        (stated_bytes or free_bytes) // bytes_per_token,
    )
    return plan_pool(
        stated_bytes=stated_bytes,
        free_bytes=max(free_bytes - table_bytes, 0),
        bytes_per_token=bytes_per_token,
        page_size=offer.page_size(config.cache.page_size),
        max_num_seqs=config.scheduler.max_num_seqs,
        stated_max_model_len=config.model.max_model_len,
        model_max_len=arch.max_positions,
        view=_view(decoder, kv_dtype),
        # On a CPU the same memory is the page cache's and the neighbours'.
        takes_all=decoder.device.type == "cuda",
    )


def _view(decoder: ServedDecoder, kv_dtype: torch.dtype) -> View:
    """Return what the whole model reads: without a window if any of its layers has none."""
    windows = decoder.attention_spec(kv_dtype).windows
    bounded = [window for window in windows if window is not None]
    return View(window=max(bounded)) if len(bounded) == len(windows) else FULL_VIEW


def _pool(decoder: ServedDecoder, plan: PoolPlan, kv_dtype: torch.dtype) -> KVPool:
    arch = decoder.arch
    return KVPool(
        num_layers=arch.num_layers,
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        num_kv_heads=arch.num_kv_heads,
        head_dim=arch.head_dim,
        dtype=kv_dtype,
        device=decoder.device,
    )


def _info(
    source: ModelSource,
    config: OctavoConfig,
    decoder: ServedDecoder,
    kv_dtype: torch.dtype,
    offer: BackendOffer,
    where: _Device,
    end_token_ids: tuple[int, ...],
    plan: PoolPlan,
) -> ModelInfo:
    arch = decoder.arch
    unknown = ", ".join(arch.unknown_keys)
    notes = [*source.notes, *decoder.notes, *where.notes, *offer.notes, *plan.notes]
    table_bytes = decoder.bytes_per_position * plan.max_model_len
    if table_bytes >= _LARGE_TABLE_BYTES:
        told = f"the angles of {plan.max_model_len} positions take {format_size(table_bytes)}"
        notes.append(f"{told} beside the pages (--max-model-len)")
    stated = (*arch.eos_token_ids, *end_token_ids)
    ends = {one: 0 <= one < arch.vocab_size for one in stated}
    if outside := [str(one) for one, is_known in ends.items() if not is_known]:
        told = f"stop ids outside the vocabulary of {arch.vocab_size} tokens are left out"
        notes.append(f"{told}: {', '.join(outside)}")
    if unknown:
        notes.append(f"keys of the model's config that were not understood: {unknown}")
    return ModelInfo(
        name=config.model.served_model_name or source.name,
        max_model_len=plan.max_model_len,
        vocab_size=arch.vocab_size,
        eos_token_ids=tuple(one for one, is_known in ends.items() if is_known),
        page_size=plan.page_size,
        num_pages=plan.num_pages,
        kv_bytes_per_token=plan.bytes_per_token,
        weights_bytes=decoder.weights_bytes,
        dtype=str(where.dtype).removeprefix("torch."),
        quantization=decoder.format,
        kv_cache_dtype=str(kv_dtype).removeprefix("torch."),
        device=where.device.type,
        attention_backend=offer.name,
        view=_view(decoder, kv_dtype),
        notes=tuple(notes),
    )


def _warm_up(runner: TorchRunner) -> None:
    """Compute one small prompt: what cannot work fails now, and first uses cost nobody a wait."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    num_tokens = min(2, runner.info.max_model_len)
    runner.launch(
        StepInput(
            token_ids=[0] * num_tokens,
            rows=[RowSpan(0, 0, num_tokens)],
            slots=[0],
            page_ids=[list(range(-(-num_tokens // runner.info.page_size)))],
            samples=[SampleSpan(0, num_tokens - 1, 1)],
            started=[SlotStart(0, params, [0] * num_tokens)],
        )
    ).wait()
