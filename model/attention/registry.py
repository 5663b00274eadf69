"""Which attention backend serves a model: the one asked for, or the best of those that can.

Falling back is never silent: it comes back as a note for the operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType

from model.attention import cpu, flash, reference, torch_sdpa, triton_attention
from model.attention.interface import AttentionSpec, BackendOffer

#: By name on the command line; each offers itself or says why not.
BACKENDS: Mapping[str, Callable[[AttentionSpec], BackendOffer | str]] = MappingProxyType(
    {
        "cpu": cpu.offer,
        "flash": flash.offer,
        "triton": triton_attention.offer,
        "torch": torch_sdpa.offer,
        "reference": reference.offer,
    }
)


def choose_backend(name: str, spec: AttentionSpec) -> BackendOffer:
    """Return an offer that can serve `spec`: `offer.page_size()`, then a pool, then `build()`.

    ValueError, with the reason, for a backend that is asked for by name and cannot.
    """
    if name == "auto":
        return _best(spec)
    if name not in BACKENDS:
        raise ValueError(f"attention_backend must be auto or one of {', '.join(BACKENDS)}")
    offer = BACKENDS[name](spec)
    if isinstance(offer, str):
        message = f"attention_backend {name} is not available: {offer}"
        raise ValueError(message)  # noqa: TRY004 - the operator's wish cannot be met; no type is wrong
    return offer


def _best(spec: AttentionSpec) -> BackendOffer:
    notes: list[str] = []
    for name in ("flash", "triton") if spec.device.type == "cuda" else ("cpu",):
        offer = BACKENDS[name](spec)
        if not isinstance(offer, str):
            return dataclasses.replace(offer, notes=(*notes, *offer.notes))
        notes.append(f"attention backend {name} not available: {offer}")
    notes[-1] += "; using torch, several times slower"
    fallback = torch_sdpa.offer(spec)
    return dataclasses.replace(fallback, notes=(*fallback.notes, *notes))
