"""Builds a runner: decoder, attention backend, pages, sampler. Needs torch.

Every decision made here is in `ModelInfo`, or a note in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from configs.kv_cache import SLIDING_WINDOW
from configs.schema import CacheSection, ModelSection, OctavoConfig
from configs.sizes import format_size
from model.architectures.transformer import ServedDecoder, Transformer
from model.attention.groups import build_parts
from model.attention.interface import AttentionSpec, BackendOffer
from model.attention.registry import choose_backend
from model.cpu.decoder import CpuDecoder, fastest_decoder
from model.cpu.library import CpuLibrary
from model.cpu.team import Team
from model.cuda.assembly import GpuParts, assemble_on_gpu
from model.cuda.ops import GpuOps
from model.device import Device, choose_device, choose_threads
from model.draft_assembly import DraftParts, draft_parts, draft_section
from model.group_plan import group_note, group_sizes, windowed_pages
from model.implementation import build_decoder
from model.interface import (
    GUESSED_TOKEN,
    ModelInfo,
    SampleSpan,
    SamplingParams,
    SlotStart,
    StepInput,
)
from model.key_selection import KeySelections, why_not
from model.kv.desks import desk_bytes
from model.kv.format import FLOAT_FORMATS, KV_FORMATS, KVFormat, float_format
from model.kv.memory_plan import PoolPlan, angles_bytes, free_memory_bytes, plan_pool
from model.kv_proof import prove_kv_format
from model.page_digest import model_files, require_storable, stored_pages
from model.runner import TorchRunner
from model.sampling.sampler import Sampler
from model.served_policy import require_served
from model.weights.packed_cache import PackedCache
from model.weights.source import ModelSource, octavo_home

#: Below this a table of angles is not worth a line.
_LARGE_TABLE_BYTES = 64 * 2**20


def assemble(
    source: ModelSource,
    config: OctavoConfig,
    end_token_ids: tuple[int, ...] = (),
    proof_token_ids: tuple[int, ...] = (),
    draft_source: ModelSource | None = None,
) -> TorchRunner:
    """Build the runner of `config`. Raises `ValueError` naming the setting at fault.

    `end_token_ids`: tokens that end an answer, in addition to the model's config.
    `proof_token_ids`: a text that proves a lossy format of keys and values; none: no proof.
    `draft_source`: of the draft model, if there is one.
    """
    threads = choose_threads(config.model)
    torch.set_num_threads(threads.number)
    where = choose_device(config.model)
    cache = _weights_cache(config.model)
    where = replace(where, notes=(*where.notes, *threads.notes))
    free_bytes = free_memory_bytes()
    files = model_files(source) if config.cache.kv_disk_path is not None else None
    decoder = build_decoder(
        source,
        config.model,
        dtype=where.dtype,
        device=where.device,
        ops=where.ops,
        tiles=where.library,
        coded=where.coded,
        cache=cache,
    )
    spec = _attention_spec(config.cache, decoder, where.library)
    spec = replace(spec, max_draft_tokens=config.scheduler.drafting.max_tokens)
    if files is not None:
        require_storable(
            where.device.type,
            has_windows=any(spec.windows),
            has_draft_model=draft_source is not None,
        )
    offer = choose_backend(
        config.model.attention_backend, spec, needs_views=config.cache.policy.type != "full"
    )
    if spec.kv_format not in FLOAT_FORMATS and proof_token_ids:
        note = _prove(config, decoder, where.library, (spec, offer), proof_token_ids)
        where = replace(where, notes=(*where.notes, note))
    draft = None
    if draft_source is not None:
        draft = _draft_parts(draft_source, config, where, decoder, spec)
    plan_of = partial(_plan_pool, config, decoder, spec, offer, draft=draft)
    info_of = partial(_info, source, config, decoder, spec, offer, where, end_token_ids)
    if where.device.type == "cuda":
        ops = where.ops if isinstance(where.ops, GpuOps) else None
        parts = GpuParts(decoder, offer, info_of, spec, ops, config)
        runner = assemble_on_gpu(parts, plan_of)
    else:
        # Weights that are mapped from a file count as free memory, since the system may drop them.
        weights_bytes = decoder.weights_bytes + (draft.decoder.weights_bytes if draft else 0)
        free_bytes = min(free_memory_bytes(), max(free_bytes - weights_bytes, 0))
        plan = plan_of(free_bytes)
        decoder.hold_positions(plan.max_model_len)
        info = info_of(plan)
        num_windowed = info.windowed.num_pages if info.windowed else None
        sizes = plan.page_size, plan.num_pages, num_windowed
        attention, pool, windowed_pool = build_parts(offer, spec, *sizes, where.device)
        info = draft.described(info) if draft else info
        if files is not None:
            isa = where.library.isa if where.library else ""
            stored = stored_pages(files, config, info, pool.layout, isa)
            info = replace(info, stored_pages=stored)
        max_num_seqs = config.scheduler.max_num_seqs
        fastest = fastest_decoder(decoder, attention, where.library)
        viewed = fastest if isinstance(fastest, Transformer | CpuDecoder) else None
        runner = TorchRunner(
            info=info,
            decoder=fastest,
            attention=attention,
            pool=pool,
            windowed_pool=windowed_pool,
            sampler=Sampler(max_num_seqs, info.vocab_size, info.eos_token_ids, where.device),
            max_num_seqs=max_num_seqs,
            # Float32 products by oneDNN depend on the number of threads in their last bits.
            team=Team(threads.number) if threads.may_shrink and decoder.format != "none" else None,
            draft_model=draft.build(plan, max_num_seqs, where.library) if draft else None,
            viewed=None if info.why_no_views else viewed,
            selections=None if info.why_not(is_selection=True) else KeySelections(spec, pool),
        )
    require_served(config.cache.policy, runner.info)
    _warm_up(runner)
    if cache is not None:
        cache.save_in_background()
    return runner


def _draft_parts(
    source: ModelSource,
    config: OctavoConfig,
    where: Device,
    served: ServedDecoder,
    served_spec: AttentionSpec,
) -> DraftParts:
    """Load the draft model, in the same arithmetic as the served one."""
    if where.device.type == "cuda":
        raise ValueError(
            "speculation: a draft model is computed on a CPU alone, and not with device cuda; "
            "use auto, suffix or ngram there"
        )
    cache = _weights_cache(config.model)
    load = partial(
        build_decoder,
        source,
        draft_section(config.model),
        dtype=where.dtype,
        device=where.device,
        ops=where.ops,
        tiles=where.library,
        cache=cache,
    )
    kv_format_of = partial(_kv_format, config.cache, library=where.library)
    backend = config.model.attention_backend
    parts = draft_parts(source.name, load, kv_format_of, backend, served, served_spec)
    if cache is not None:
        cache.save_in_background()
    return parts


def _weights_cache(config: ModelSection) -> PackedCache | None:
    if config.weights_cache == "off":
        return None
    return PackedCache(octavo_home() / "weights", max_bytes=config.weights_cache_max_bytes)


def _attention_spec(
    config: CacheSection, decoder: ServedDecoder, library: CpuLibrary | None
) -> AttentionSpec:
    """Return the model's attention with the formats of its pages."""
    exact = _exact_format(decoder, library)
    spec = decoder.attention_spec(_kv_format(config, decoder, library))
    skipped: set[int] = set()
    for layer in config.kv_cache_dtype_skip_layers:
        if layer == SLIDING_WINDOW:
            skipped |= {index for index, window in enumerate(spec.windows) if window}
        elif int(layer) < spec.num_layers:
            skipped.add(int(layer))
        else:
            raise ValueError(
                f"kv_cache_dtype_skip_layers: the model has {spec.num_layers} layers, "
                f"from 0 on, got {layer}"
            )
    return replace(spec, other_formats=dict.fromkeys(sorted(skipped), exact))


def _kv_format(
    config: CacheSection, decoder: ServedDecoder, library: CpuLibrary | None
) -> KVFormat:
    """Return the format of the pages but for those of skipped layers."""
    name = config.kv_cache_dtype
    return _exact_format(decoder, library) if name == "auto" else KV_FORMATS[name]


def _exact_format(decoder: ServedDecoder, library: CpuLibrary | None) -> KVFormat:
    """Return the format that is as exact as the products before and after the pages."""
    is_rounded = decoder.format != "none"
    if is_rounded and decoder.attention_dtype == torch.float32:
        # Anything finer would be converted at every step.
        return KV_FORMATS["bfloat16" if library and library.multiplies_bfloat16 else "float16"]
    return float_format(decoder.attention_dtype)


def _prove(
    config: OctavoConfig,
    decoder: ServedDecoder,
    library: CpuLibrary | None,
    chosen: tuple[AttentionSpec, BackendOffer],
    token_ids: Sequence[int],
) -> str:
    """Return a note on the quality of lossy pages. Raises `ValueError` if it is below the bound."""
    longest = min(config.model.max_model_len or len(token_ids), decoder.arch.max_positions)
    # The tokenizer may have more tokens than the model has rows.
    known = [one % decoder.arch.vocab_size for one in token_ids[:longest]]
    decoder.hold_positions(len(known))
    exact = decoder.attention_spec(_exact_format(decoder, library))
    full = exact, choose_backend("auto", exact)
    note = prove_kv_format(decoder, full, chosen, known, config.cache.kv_quality_bound)
    if decoder.device.type == "cuda":
        # The memory of the proof is free again, also to the measurement that follows.
        torch.cuda.empty_cache()
    return note


def _plan_pool(
    config: OctavoConfig,
    decoder: ServedDecoder,
    spec: AttentionSpec,
    offer: BackendOffer,
    free_bytes: int,
    draft: DraftParts | None = None,
) -> PoolPlan:
    arch, stated_bytes = decoder.arch, config.cache.kv_cache_memory
    layout = spec.layout(offer.page_size(config.cache.page_size))
    longest = config.model.max_model_len or arch.max_positions
    # The angles of a draft model are few beside the pages, its positions those of the served model.
    draft_bytes = draft.bytes_per_page(layout.page_size) if draft else 0
    groups = group_sizes(config, spec, layout.page_size, longest, draft_bytes)
    table_bytes = angles_bytes(
        decoder.bytes_per_position,
        longest,
        (stated_bytes or free_bytes)
        * layout.page_size
        // (groups.full_bytes if groups else layout.bytes_per_page),
    )
    slot_bytes = desk_bytes(layout, spec.max_draft_tokens)
    if draft is not None:
        slot_bytes += desk_bytes(draft.spec.layout(layout.page_size), spec.max_draft_tokens)
    return plan_pool(
        stated_bytes=stated_bytes,
        free_bytes=free_bytes,
        fixed_bytes=table_bytes + slot_bytes * config.scheduler.max_num_seqs,
        bytes_per_page=layout.bytes_per_page + draft_bytes,
        page_size=layout.page_size,
        max_num_seqs=config.scheduler.max_num_seqs,
        stated_max_model_len=config.model.max_model_len,
        model_max_len=arch.max_positions,
        view=spec.view,
        # On a CPU the page cache and other programs need the same memory.
        takes_all=decoder.device.type == "cuda",
        groups=groups,
    )


def _kv_factor(spec: AttentionSpec, plan: PoolPlan) -> float:
    """Return how many tokens fit, as a multiple of those in 16 bits."""
    plain = replace(spec, kv_format=KV_FORMATS["bfloat16"], other_formats={}).layout(plan.page_size)
    return plain.bytes_per_page / plan.bytes_per_page if plan.bytes_per_page else 1.0


def _info(
    source: ModelSource,
    config: OctavoConfig,
    decoder: ServedDecoder,
    spec: AttentionSpec,
    offer: BackendOffer,
    where: Device,
    end_token_ids: tuple[int, ...],
    plan: PoolPlan,
) -> ModelInfo:
    arch = decoder.arch
    notes = [*source.notes, *decoder.notes, *where.notes, *offer.notes, *plan.notes]
    table_bytes = decoder.bytes_per_position * plan.max_model_len
    if table_bytes >= _LARGE_TABLE_BYTES:
        notes.append(
            f"the angles of {plan.max_model_len} positions take {format_size(table_bytes)} "
            "beside the pages (--max-model-len)"
        )
    stop_ids = dict.fromkeys((*arch.eos_token_ids, *end_token_ids))
    if outside := [one for one in stop_ids if not 0 <= one < arch.vocab_size]:
        notes.append(
            f"stop ids outside the vocabulary of {arch.vocab_size} tokens are left out: "
            f"{', '.join(map(str, outside))}"
        )
    if spec.other_formats:
        layers = ", ".join(map(str, spec.other_formats))
        kept = next(iter(spec.other_formats.values())).name
        notes.append(f"keys and values in {kept} in layers {layers}")
    elif config.cache.kv_cache_dtype_skip_layers:
        notes.append(f"no layer has a window: all keys and values are in {spec.kv_format.name}")
    if note := group_note(spec, plan):
        notes.append(note)
    if unknown := ", ".join(arch.unknown_keys):
        notes.append(f"keys of the model's config that were not understood: {unknown}")
    return ModelInfo(
        name=config.model.served_model_name or source.name,
        max_model_len=plan.max_model_len,
        vocab_size=arch.vocab_size,
        eos_token_ids=tuple(one for one in stop_ids if one not in outside),
        page_size=plan.page_size,
        num_pages=plan.num_pages,
        kv_bytes_per_token=plan.bytes_per_page // plan.page_size,
        weights_bytes=decoder.weights_bytes,
        dtype=str(where.dtype).removeprefix("torch."),
        quantization=decoder.format,
        kv_cache_dtype=spec.kv_format.name,
        device=where.device.type,
        attention_backend=offer.name,
        smallest_reusable_prefix_tokens=1 if spec.kv_format.can_share_heads else plan.page_size,
        view=spec.view,
        windowed=windowed_pages(plan),
        kv_factor=_kv_factor(spec, plan),
        notes=tuple(notes),
        why_no_views=_why_no_views(decoder, spec, offer),
        why_no_selections=why_not(spec),
    )


def _why_no_views(decoder: ServedDecoder, spec: AttentionSpec, offer: BackendOffer) -> str:
    """Return why requests cannot have views of their own; empty where they can."""
    if not offer.reads_views:
        hint = " (--attention-backend triton reads views)" if offer.name == "flash" else ""
        return f"attention backend {offer.name} reads all keys{hint}"
    if not spec.kv_format.can_share_heads:
        return f"pages in {spec.kv_format.name} are read as a whole"
    return "" if isinstance(decoder, Transformer) else "the model is computed by transformers"


def _warm_up(runner: TorchRunner) -> None:
    """Compute one small prompt, so that faults show now and the first request is not delayed."""
    params = SamplingParams(max_tokens=1, temperature=0.0)
    num_tokens = min(2, runner.info.max_model_len)
    has_guess = bool(runner.info.draft_model)
    tables = [list(range(-(-num_tokens // runner.info.page_size)))]
    runner.launch(
        StepInput(
            token_ids=[0, GUESSED_TOKEN] if has_guess else [0] * num_tokens,
            positions=[0],
            counts=[num_tokens],
            slots=[0],
            page_ids=tables,
            windowed_page_ids=tables if runner.info.windowed else [],
            sample_rows=[0],
            started=[SlotStart(0, params, [0] * num_tokens)],
            spans={0: SampleSpan(0, 0, num_tokens)} if has_guess else {},
        )
    ).wait()
