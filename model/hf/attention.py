"""The attention of a model of `transformers`, through that library's attention interface.

Every attention layer calls the function registered under the name in its config, and every mask is
made by the function registered for that name. Two names are ours: under `PROBING` each layer's
requirements are recorded, mask included; under `PAGED` a model makes no masks and is served. Each
module holds an `AttentionSlot` with the function that attends, since not all layers pass their
arguments on to their attention. Knows nothing of files or of any architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from model.architectures.arch import ArchError
from model.attention.interface import AttentionSpec
from model.kv.format import float_format

#: Found before weights are read where the class shows it.
NOT_OPEN = "does not let others compute its attention (transformers' attention interface)"
PROBING, PAGED = "octavo-probing", "octavo"

#: Whether a query reads a key: (batch, head, query's position, key's position) to bool.
MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """The arguments of one layer: views of its tensors; k and v may have fewer heads than q."""

    #: `[tokens, heads, head_dim]` each; that of v may differ.
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None
    #: `[heads]`.
    sinks: Tensor | None
    #: Other arguments that are not None.
    others: dict[str, object]


#: Attends for the next layer of a pass: returns `[tokens, heads, head_dim of v]`.
AttentionFn = Callable[[AttentionCall], Tensor]


class AttentionSlot:
    """Holds the function that attends in the current pass through a model."""

    def __init__(self, model: nn.Module) -> None:
        """Store the slot in every module of `model`."""
        self._attend: AttentionFn | None = None
        for module in model.modules():
            module.octavo = self  # type: ignore[assignment] # torch expects tensors and modules

    @contextmanager
    def filled(self, attend: AttentionFn) -> Iterator[None]:
        """Attend by `attend` within the context."""
        self._attend = attend
        try:
            yield
        finally:
            self._attend = None

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionFn`."""
        if self._attend is None:
            raise ArchError("it attends where only logits are computed")
        return self._attend(call)


def register() -> None:
    """Register both names with `transformers`; idempotent."""
    for name in (PROBING, PAGED):
        AttentionInterface.register(name, _attention)
    # Not for PAGED: a name that is not registered here gets no masks at all.
    AttentionMaskInterface.register(PROBING, _mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend with the names and shapes of `transformers`: `[1, heads, tokens, head_dim]`."""
    slot = getattr(module, "octavo", None)
    if not isinstance(slot, AttentionSlot):
        raise ArchError("it does not say which of its modules attends")
    call = AttentionCall(
        q=_flat(query),
        k=_flat(key),
        v=_flat(value),
        mask=attention_mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=softcap,
        sinks=s_aux,
        others={name: one for name, one in others.items() if one is not None},
    )
    return slot.attend(call).unsqueeze(0), None


def _flat(heads: Tensor) -> Tensor:
    flat = heads.squeeze(0).transpose(0, 1)
    return flat if flat.stride(-1) == 1 else flat.contiguous()


class _RuledMask(Tensor):
    """A mask that keeps its rule; tensors computed from it have none."""

    rule: MaskRule


def _mask(
    *, q_length: int, kv_length: int, mask_function: MaskRule, **_others: object
) -> _RuledMask:
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool).as_subclass(_RuledMask)
    mask.rule = mask_function
    return mask


@dataclass(frozen=True, slots=True)
class LayerRequirements:
    """The attention that one layer requires."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    softcap: float | None
    #: float32 `[heads]`.
    sinks: Tensor | None
    #: Number of tokens that a query reads, its own included; None: all.
    window: int | None


#: Arguments without effect here: the mask holds windows and causality, as in the library's own
#: attention.
_INERT = frozenset(
    """dropout sliding_window position_ids use_cache output_attentions output_hidden_states
    output_router_logits return_dict cache_position is_causal logits_to_keep""".split()  # noqa: SIM905 - reads best as one text
)


#: Configs may name millions of positions.
_KEYS_AT_ONCE = 2**16


class Probe:
    """Records each layer's requirements; attends to nothing."""

    def __init__(self, num_positions: int) -> None:
        self.layers: list[LayerRequirements] = []
        self._num_positions = num_positions
        #: By id of a mask: layers share masks, and a rule takes long to try.
        self._windows: dict[int, tuple[Tensor, int | None]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """See `AttentionFn`; `ArchError` where attention over pages cannot serve a layer."""
        if unknown := sorted(call.others.keys() - _INERT):
            raise ArchError(f"its attention wants {unknown[0]!r}, which pages know nothing of")
        sinks = None if call.sinks is None else call.sinks.detach().float().flatten()
        self.layers.append(
            LayerRequirements(
                num_heads=call.q.shape[1],
                num_kv_heads=call.k.shape[1],
                head_dim=call.q.shape[2],
                v_head_dim=call.v.shape[2],
                scale=call.scale,
                softcap=call.softcap,
                sinks=sinks,
                window=self._window(call.mask),
            )
        )
        return call.v.new_zeros(*call.q.shape[:2], call.v.shape[2])

    def _window(self, mask: Tensor | None) -> int | None:
        if not isinstance(mask, _RuledMask) or not hasattr(mask, "rule"):
            raise ArchError("it makes attention masks of its own, which pages know nothing of")
        if id(mask) not in self._windows:
            self._windows[id(mask)] = mask, window_of(mask.rule, self._num_positions)
        return self._windows[id(mask)][1]


def window_of(rule: MaskRule, num_positions: int) -> int | None:
    """Find a rule's window; None: all. `ArchError` where it is not "the last so many tokens".

    Tries queries at both ends and in between: a chunk, or a prefix that reads all of itself, looks
    like a window from one position, and not from others.
    """
    last = num_positions - 1
    reach = num_positions
    for at in sorted({0, 1, last // 3, last // 2, last - 1, last}, reverse=True):
        if at == last:
            reach = sum(int(seen.sum()) for _, seen in _seen(rule, at, num_positions))
        for key, seen in _seen(rule, at, num_positions):
            if not reach or not torch.equal(seen, (key <= at) & (key > at - reach)):
                raise ArchError("its attention is neither causal nor a sliding window")
    return None if reach == num_positions else reach


def _seen(rule: MaskRule, at: int, num_positions: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of key positions, and whether a query reads each."""
    zero = torch.zeros((), dtype=torch.int64)
    for start in range(0, num_positions, _KEYS_AT_ONCE):
        key = torch.arange(start, min(start + _KEYS_AT_ONCE, num_positions))
        yield key, torch.as_tensor(rule(zero, zero, torch.tensor(at), key)).expand(len(key))


def common_spec(
    layers: Sequence[LayerRequirements], num_layers: int, dtype: torch.dtype, device: torch.device
) -> AttentionSpec:
    """Find a spec that fits every layer, with pages of `dtype`; `ArchError` where none does.

    All layers have pages of one shape, and a backend has one scale. Layers with fewer KV heads
    repeat theirs; keys and values narrower than the widest are padded with zeros.
    """
    if not layers:
        raise ArchError(f"it {NOT_OPEN}")
    if len(layers) % num_layers:
        raise ArchError(f"it attends {len(layers)} times in {num_layers} layers")
    first = layers[0]
    num_kv_heads = max(layer.num_kv_heads for layer in layers)
    for name in ("num_heads", "softcap"):
        if found := {getattr(layer, name) for layer in layers} - {getattr(first, name)}:
            message = f"its layers differ in {name}: {getattr(first, name)} and {found.pop()}"
            raise ArchError(message)
    if any(num_kv_heads % layer.num_kv_heads for layer in layers):
        raise ArchError("its layers differ in key/value heads, and not by a whole factor")
    return AttentionSpec(
        num_layers=len(layers),
        num_heads=first.num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=max(max(layer.head_dim, layer.v_head_dim) for layer in layers),
        scale=first.scale,
        windows=tuple(layer.window for layer in layers),
        dtype=dtype,
        kv_format=float_format(dtype),
        device=device,
        softcap=first.softcap,
        sinks=_sinks(layers),
    )


def _sinks(layers: Sequence[LayerRequirements]) -> tuple[Tensor, ...] | None:
    """Return every layer's sinks; None where no layer has any."""
    found = next((layer.sinks for layer in layers if layer.sinks is not None), None)
    if found is None:
        return None
    # A score without weight in the softmax.
    none = torch.full_like(found, -torch.inf)
    return tuple(none if layer.sinks is None else layer.sinks for layer in layers)
