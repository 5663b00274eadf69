"""Builds a draft model (`model/draft_model.py`) that suits a served model. Needs torch.

Every mismatch of the two is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from configs.schema import ModelSection
from configs.sizes import format_size
from model.architectures.transformer import ServedDecoder
from model.attention.interface import AttentionSpec, BackendOffer
from model.attention.registry import choose_backend
from model.cpu.decoder import fastest_decoder
from model.cpu.library import CpuLibrary
from model.draft_model import DraftModel
from model.interface import ModelInfo
from model.kv.format import KVFormat
from model.kv.memory_plan import PoolPlan
from model.kv.pool import KVPool

#: Formats of the served weights that a draft model takes over. The others are for the exactness of
#: an answer, on which drafts have no effect.
_FAST_FORMATS = {"fp16", "bf16", "int8", "int4"}


def draft_section(section: ModelSection) -> ModelSection:
    """Return the settings of a draft model beside a model with these."""
    quantization = section.quantization if section.quantization in _FAST_FORMATS else "auto"
    changes = {"quantization": quantization, "activation_bits": "auto", "model_impl": "auto"}
    return section.model_copy(update=changes)


@dataclass(frozen=True, slots=True)
class DraftParts:
    """A loaded draft model, before it has pages."""

    name: str
    decoder: ServedDecoder
    spec: AttentionSpec
    offer: BackendOffer

    def described(self, info: ModelInfo) -> ModelInfo:
        """Add it to the description of the served model."""
        weights_bytes, fmt = self.decoder.weights_bytes, self.decoder.format
        note = f"drafts by {self.name}: {format_size(weights_bytes)} of weights, quantization {fmt}"
        return replace(
            info,
            draft_model=self.name,
            why_no_views=info.why_no_views or "the draft model reads all keys",
            weights_bytes=info.weights_bytes + weights_bytes,
            notes=(*info.notes, note),
        )

    def bytes_per_page(self, page_size: int) -> int:
        """Return the bytes that a page takes more. Raises `ValueError` for its size."""
        return self.spec.layout(self.offer.page_size(page_size)).bytes_per_page

    def build(self, plan: PoolPlan, max_num_seqs: int, library: CpuLibrary | None) -> DraftModel:
        """Build it with the pages of `plan`. Raises `ValueError` where sequences can be longer."""
        longest = self.decoder.arch.max_positions
        if longest < plan.max_model_len:
            raise ValueError(
                f"speculation: the draft model {self.name} reads {longest} tokens at most, and "
                f"sequences may have {plan.max_model_len}; set --max-model-len {longest}"
            )
        self.decoder.hold_positions(plan.max_model_len)
        pool = KVPool(self.spec.layout(plan.page_size), plan.num_pages, self.decoder.device)
        attention = self.offer.build(self.spec, pool)
        return DraftModel(
            decoder=fastest_decoder(self.decoder, attention, library),
            attention=attention,
            pool=pool,
            max_num_seqs=max_num_seqs,
            max_model_len=plan.max_model_len,
        )


def draft_parts(
    name: str,
    load: Callable[[], ServedDecoder],
    kv_format_of: Callable[[ServedDecoder], KVFormat],
    attention_backend: str,
    served: ServedDecoder,
    served_spec: AttentionSpec,
) -> DraftParts:
    """Load a draft model for a served one. Raises `ValueError` if it cannot be used."""
    try:
        decoder = load()
    except ValueError as error:
        raise ValueError(f"speculation: the draft model {name}: {error}") from error
    num_tokens, expected = decoder.arch.vocab_size, served.arch.vocab_size
    if num_tokens != expected:
        raise ValueError(
            f"speculation: the draft model {name} has {num_tokens} tokens in its vocabulary, the "
            f"served model {expected}; they must be the same"
        )
    spec = decoder.attention_spec(kv_format_of(decoder))
    spec = replace(spec, max_draft_tokens=served_spec.max_draft_tokens)
    window, kept = spec.widest_window, served_spec.widest_window
    if kept is not None and (window is None or window > kept):
        raise ValueError(
            f"speculation: the draft model {name} reads more than the last {kept} tokens, whose "
            "keys alone are kept for the served model"
        )
    return DraftParts(name, decoder, spec, choose_backend(attention_backend, spec))
