"""The arithmetic of choosing a token: pure functions over logits, no state.

Knows nothing of slots or of requests.

Probabilities are whole numbers here. A token's weight is `floor(2**40 * p / p_max)` as int64, and
whole numbers add up to the same sum in any order. So a sum over a row does not depend on the
device's way to split it, on the other rows, or on the row's order. A draw can be repeated bit by
bit. Tokens below `p_max * 2**-40` (1e-12) are never drawn; sums stay below 2**63
for vocabularies up to 2**22.

Of equal logits the lowest token id comes first, everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.splitmix64 import splitmix64

ONE = 2**40


def rng_stream(seed: int) -> int:
    """Return the state at which the seed's SplitMix64 stream starts.

    Mixed, because two raw seeds which differ by the generator's step would be the same stream one
    position apart.
    """
    return splitmix64(seed, 1)


def uniform(stream: int, position: int) -> float:
    """Return the stream's number for a position: in [0, 1), a multiple of 2**-53."""
    return (splitmix64(stream, position + 1) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class TopTokens:
    """The first `count` tokens of each row, largest logit first, ids ascending within a tie."""

    #: `[rows, count]` each.
    values: Tensor
    ids: Tensor
    #: `[rows]`: how many leading ids are certain. Among tokens that tie with its last value `topk`
    #: picks arbitrarily, so these are not.
    num_sure: Tensor


def top_tokens(logits: Tensor, count: int) -> TopTokens:
    """Find the first tokens of each row; a count of the whole vocabulary sorts it all."""
    vocab_size = logits.shape[-1]
    if count >= vocab_size:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return TopTokens(values, ids, torch.full_like(ids[:, 0], vocab_size))
    values, ids = logits.topk(count, dim=-1, sorted=False)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return TopTokens(values, ids.gather(-1, order), (values > values[:, -1:]).sum(-1))


def ranks(logits: Tensor, token_ids: Tensor) -> list[int]:
    """Return how many tokens come before one of each row, of `token_ids` `[rows, 1]`."""
    value = logits.gather(-1, token_ids)
    found = _num_true(logits > value)
    is_equal = logits == value
    # Ties are rare, and comparing ids would double the cost.
    if max(_num_true(is_equal), default=0) > 1:
        place = torch.arange(logits.shape[-1], device=logits.device)
        num_before = _num_true(is_equal.logical_and_(place < token_ids))
        found = [count + more for count, more in zip(found, num_before, strict=True)]
    return found


def _num_true(mask: Tensor) -> list[int]:
    """Count true values by row; on a CPU with numpy, which takes a tenth of torch's time."""
    is_cpu = mask.device.type == "cpu"
    counts = np.count_nonzero(mask.numpy(), axis=-1) if is_cpu else mask.sum(-1)
    return counts.tolist()


def weights(logits: Tensor, peak: Tensor, inverse_temperature: Tensor) -> Tensor:
    """Turn logits `[rows, n]` into whole-number weights; `ONE` where a logit is the peak.

    The other arguments are `[rows, 1]`. Each weight depends on its own logit alone.
    """
    return (logits - peak).mul_(inverse_temperature).exp_().mul_(float(ONE)).to(torch.int64)


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of a group of rows, `[rows, 1]` each, on the device."""

    inverse_temperature: Tensor
    #: min_p as a weight; None where no row of the group has one.
    min_weight: Tensor | None
    #: None where no row of the group limits the count.
    top_k: Tensor | None
    #: float64; infinity for none.
    top_p: Tensor


def _kept(weight: Tensor, filters: Filters) -> Tensor:
    """Apply min-p, in place."""
    if filters.min_weight is None:
        return weight
    return weight.masked_fill_(weight < filters.min_weight, 0)


def _invert(cumulative: Tensor, total: Tensor, u: Tensor) -> Tensor:
    """Return the first index `[rows, 1]` whose cumulative weight exceeds `u * total`.

    Of NaN weights, which convert to arbitrary integers, it is an arbitrary but valid index.
    """
    target = torch.minimum((u * total).to(torch.int64), total - 1)
    return torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)


def draw_plain(logits: Tensor, filters: Filters, u: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a token `[rows]` for rows without top-k and top-p, in the order of token ids.

    The second result `[rows]` is each row's largest logit.
    """
    peak = logits.amax(-1, keepdim=True)
    cumulative = _kept(weights(logits, peak, filters.inverse_temperature), filters).cumsum(-1)
    return _invert(cumulative, cumulative[:, -1:], u).squeeze(-1), peak.squeeze(-1)


def draw_ranked(
    logits: Tensor, filters: Filters, u: Tensor, num_candidates: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token `[rows]` for rows with top-k or top-p, from likeliest to least likely.

    The filters apply in vLLM's order: min-p, top-k, then top-p over the tokens left by these. Each
    keeps a prefix of the sorted row, so `num_candidates` tokens are enough wherever the prefix ends
    among them. The second result `[rows]` is true where they were enough; there, the token is
    exactly that of a full sort. The third `[rows]` is each row's largest logit.
    """
    found = top_tokens(logits, num_candidates)
    peak = found.values[:, :1]
    weight = _kept(weights(found.values, peak, filters.inverse_temperature), filters)
    # Behind a last candidate that min-p drops, or whose weight is 0, all weights are 0.
    is_whole = (weight[:, -1:] == 0) | (num_candidates >= logits.shape[-1])
    if filters.top_k is None:
        every = _kept(weights(logits, peak, filters.inverse_temperature), filters)
        total = every.sum(-1, keepdim=True)
        cumulative = weight.cumsum(-1)
        nucleus = total * filters.top_p
        is_whole |= cumulative[:, -1:] >= nucleus
    else:
        is_whole |= filters.top_k <= weight.shape[-1]
        weight *= torch.arange(weight.shape[-1], device=weight.device) < filters.top_k
        cumulative = weight.cumsum(-1)
        nucleus = cumulative[:, -1:] * filters.top_p
    kept = (weight * (cumulative - weight < nucleus)).sum(-1, keepdim=True)
    index = _invert(cumulative, kept, u)
    is_decided = is_whole & (index < found.num_sure.unsqueeze(-1))
    return found.ids.gather(-1, index).squeeze(-1), is_decided.squeeze(-1), peak.squeeze(-1)


@dataclass(frozen=True, slots=True)
class Penalties:
    """The penalties of a group of rows, `[rows, 1]` each, on the device."""

    #: 1 does nothing, nor does 0 in the others.
    repetition: Tensor
    presence: Tensor
    frequency: Tensor


def penalize(logits: Tensor, counts: Tensor, in_prompt: Tensor, penalties: Penalties) -> Tensor:
    """Return the penalised logits of some tokens `[rows, n]`; `counts` are of the output alone.

    Repetition (arXiv:1909.05858) is over prompt and output. Presence and frequency, OpenAI's, are
    over the output: logit - count * frequency - (count > 0) * presence. In vLLM's order. A token
    that is in neither keeps its logit.
    """
    was_generated = counts > 0
    factor = torch.where(in_prompt | was_generated, penalties.repetition, 1.0)
    scaled = torch.where(logits > 0, logits / factor, logits * factor)
    return scaled - counts * penalties.frequency - was_generated * penalties.presence
