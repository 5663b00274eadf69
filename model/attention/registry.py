"""The choice of the attention backend: the requested one, or the best that can serve the model.

A fallback is never silent: it becomes a note for the operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from model.attention import cpu, flash, reference, torch_sdpa, triton_attention
from model.attention.interface import AttentionSpec, BackendOffer

#: By name on the command line; each offers itself or returns why it cannot.
BACKENDS: Mapping[str, Callable[[AttentionSpec], BackendOffer | str]] = MappingProxyType(
    {
        "cpu": cpu.offer,
        "flash": flash.offer,
        "triton": triton_attention.offer,
        "torch": torch_sdpa.offer,
        "reference": reference.offer,
    }
)


def choose_backend(name: str, spec: AttentionSpec, *, needs_views: bool = False) -> BackendOffer:
    """Return an offer that can serve `spec`: `offer.page_size()`, then a pool, then `build()`.

    `needs_views`: whether rows have views of their own by default. Then auto leaves out backends
    that read all keys. Raises ValueError, with the reason, if the requested backend cannot.
    """
    if name == "auto":
        return _best(spec, needs_views=needs_views)
    if name not in BACKENDS:
        raise ValueError(f"attention_backend must be auto or one of {', '.join(BACKENDS)}")
    offer = _offer(name, spec, needs_views=needs_views)
    if isinstance(offer, str):
        message = f"attention_backend {name} is not available: {offer}"
        raise ValueError(message)  # noqa: TRY004 - the setting is at fault, not a type
    return offer


def _offer(name: str, spec: AttentionSpec, *, needs_views: bool) -> BackendOffer | str:
    offer = BACKENDS[name](spec)
    if isinstance(offer, str):
        return offer
    if needs_views and not offer.reads_views:
        return "it reads all keys, and kv_policy hides some"
    return offer.why_not(spec) or offer


def _best(spec: AttentionSpec, *, needs_views: bool) -> BackendOffer:
    notes: list[str] = []
    for name in ("flash", "triton") if spec.device.type == "cuda" else ("cpu",):
        offer = _offer(name, spec, needs_views=needs_views)
        if not isinstance(offer, str):
            return dataclasses.replace(offer, notes=(*notes, *offer.notes))
        notes.append(f"attention backend {name} not available: {offer}")
    fallback, cost = torch_sdpa.offer(spec), "several times slower"
    if reason := fallback.why_not(spec):
        notes.append(f"attention backend torch not available: {reason}")
        fallback, cost = reference.offer(spec), "a hundred times slower"
    notes[-1] += f"; using {fallback.name}, {cost}"
    return dataclasses.replace(fallback, notes=(*fallback.notes, *notes))
