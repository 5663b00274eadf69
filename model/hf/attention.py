"""The attention of a model of `transformers`, as that library lets others compute it.

Every attention layer calls the function registered under the name in its config, and every mask is
made by the function registered for that name. Two names are ours: under `ASKING` a model tells
what it wants of attention, mask included, and under `PAGED` it makes no masks and is served.
Whoever runs the model sits in an `AttenderSlot` that each of its modules has, for not all layers
hand on to their attention what they are called with. Knows nothing of pages, of files or of any
architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from model.architectures.arch import ArchError

#: Said before weights are read where that can be known.
NOT_OPEN = "does not let others compute its attention (transformers' attention interface)"
ASKING, PAGED = "octavo-asking", "octavo"

#: Is the key seen by the query: (batch, head, query's position, key's position) to bool.
MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """What one layer hands over. A view of its tensors; k and v have fewer heads than q."""

    #: `[tokens, heads, head_dim]` each; that of v may differ.
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None
    #: `[heads]`.
    sinks: Tensor | None
    #: What else the layer said, but for nothings.
    others: dict[str, object]


class Attender(Protocol):
    """Goes through the layers of one pass, in their order."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Return `[tokens, heads, head_dim of v]`."""


class AttenderSlot:
    """The attender of the pass that a model is in, if it is in one of ours."""

    def __init__(self, model: nn.Module) -> None:
        """Make the slot known to every module of `model`."""
        self._attender: Attender | None = None
        for module in model.modules():
            module.octavo = self  # type: ignore[assignment] # torch knows of tensors and modules

    @contextmanager
    def filled(self, attender: Attender) -> Iterator[None]:
        """Have `attender` attend until the end of the context."""
        self._attender = attender
        try:
            yield
        finally:
            self._attender = None

    def attend(self, call: AttentionCall) -> Tensor:
        """See `Attender`."""
        if self._attender is None:
            raise ArchError("it attends where only logits are computed")
        return self._attender.attend(call)


def register() -> None:
    """Make the two names known to `transformers`; more than once does no harm."""
    for name in (ASKING, PAGED):
        AttentionInterface.register(name, _attention)
    # Not for PAGED: a name that is unknown here gets no masks at all.
    AttentionMaskInterface.register(ASKING, _mask)


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
    """Have the names and shapes of `transformers`: `[1, heads, tokens, head_dim]`."""
    slot = getattr(module, "octavo", None)
    if not isinstance(slot, AttenderSlot):
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
    """A mask that remembers by which rule it was to be made; what is computed of it does not."""

    rule: MaskRule


def _mask(
    *, q_length: int, kv_length: int, mask_function: MaskRule, **_others: object
) -> _RuledMask:
    mask = torch.ones(1, 1, q_length, kv_length, dtype=torch.bool).as_subclass(_RuledMask)
    mask.rule = mask_function
    return mask


@dataclass(frozen=True, slots=True)
class LayerWish:
    """What one layer wants of attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    softcap: float | None
    #: float32 `[heads]`.
    sinks: Tensor | None
    #: How many tokens back a query sees, itself included; None: all.
    window: int | None


#: Said by layers beside what is read above, and without a say here: windows and causality are in
#: the mask, which is what the library's own attention goes by.
_INERT = frozenset(
    """dropout sliding_window position_ids use_cache output_attentions output_hidden_states
    output_router_logits return_dict cache_position is_causal logits_to_keep""".split()  # noqa: SIM905 - reads best as one text
)


#: Configs may name millions of positions.
_KEYS_AT_ONCE = 2**16


class Inquirer:
    """See `Attender`: writes down what each layer wants and attends to nothing."""

    def __init__(self, num_positions: int) -> None:
        self.wishes: list[LayerWish] = []
        self._num_positions = num_positions
        #: Layers share masks, and a rule is long to try out.
        self._windows: dict[int, tuple[Tensor, int | None]] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        """See `Attender`; `ArchError` where a layer wants what no page-wise attention does."""
        if unknown := sorted(call.others.keys() - _INERT):
            raise ArchError(f"its attention wants {unknown[0]!r}, which pages know nothing of")
        sinks = None if call.sinks is None else call.sinks.detach().float().flatten()
        self.wishes.append(
            LayerWish(
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
    """Find how far back a rule sees. `ArchError` where it is not "the last so many tokens".

    Tried for queries at both ends and in between: what looks like a window from one place (a
    chunk, a prefix that sees all of itself) does not from the others.
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
    """Yield the positions of keys, and whether a query sees them; in blocks, for there are many."""
    zero = torch.zeros((), dtype=torch.int64)
    for start in range(0, num_positions, _KEYS_AT_ONCE):
        key = torch.arange(start, min(start + _KEYS_AT_ONCE, num_positions))
        yield key, torch.as_tensor(rule(zero, zero, torch.tensor(at), key)).expand(len(key))


@dataclass(frozen=True, slots=True)
class CommonWish:
    """What fits every layer: pages are alike in all of them, and a backend has one scale."""

    num_heads: int
    #: The most that a layer has; where it has fewer, each is kept several times.
    num_kv_heads: int
    #: The widest key or value of all; others are filled up with zeros.
    head_dim: int
    scale: float
    softcap: float | None
    sinks: tuple[Tensor, ...] | None


def common_wish(wishes: Sequence[LayerWish], num_layers: int) -> CommonWish:
    """Find what fits every layer; `ArchError` where nothing does."""
    if not wishes:
        raise ArchError(f"it {NOT_OPEN}")
    if len(wishes) % num_layers:
        raise ArchError(f"it attends {len(wishes)} times in {num_layers} layers")
    first = wishes[0]
    num_kv_heads = max(wish.num_kv_heads for wish in wishes)
    for name in ("num_heads", "softcap"):
        if found := {getattr(wish, name) for wish in wishes} - {getattr(first, name)}:
            message = f"its layers differ in {name}: {getattr(first, name)} and {found.pop()}"
            raise ArchError(message)
    if any(num_kv_heads % wish.num_kv_heads for wish in wishes):
        raise ArchError("its layers differ in key/value heads, and not by a whole factor")
    return CommonWish(
        num_heads=first.num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=max(max(wish.head_dim, wish.v_head_dim) for wish in wishes),
        scale=first.scale,
        softcap=first.softcap,
        sinks=_sinks(wishes),
    )


def _sinks(wishes: Sequence[LayerWish]) -> tuple[Tensor, ...] | None:
    """Return every layer's sinks; None where no layer has any."""
    found = next((wish.sinks for wish in wishes if wish.sinks is not None), None)
    if found is None:
        return None
    # A score that takes no share of the softmax.
    none = torch.full_like(found, -torch.inf)
    return tuple(none if wish.sinks is None else wish.sinks for wish in wishes)
