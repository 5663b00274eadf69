"""Log-probabilities of tokens by the raw logits, for `logprobs` and `prompt_logprobs`.

Pure functions over logits, as in `model/sampling/sampling_ops.py`. Knows nothing of requests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.interface import TokenLogprobs
from model.sampling.sampling_ops import ONE, ranks, top_tokens, weights

#: In place of minus infinity, which JSON does not have (OpenAI's value for "very unlikely").
MIN_LOGPROB = -9999.0


def describe(
    logits: Tensor, chosen: Tensor, token_ids: list[int], num_tops: list[int]
) -> list[TokenLogprobs]:
    """Describe one token a row, and the `num_tops` likeliest of each. Waits for the device.

    `chosen` is `token_ids` on the device, `[rows, 1]`.
    """
    value = logits.gather(-1, chosen)
    peak = logits.amax(-1, keepdim=True)
    # By integer weights, so that this too does not depend on the batch.
    total = weights(logits, peak, torch.ones_like(peak)).sum(-1, keepdim=True)
    norm = peak + (total.double() / ONE).log()
    logprobs = _finite(value - norm)
    tops = _tops(logits, norm, max(num_tops))
    return [
        TokenLogprobs(token_id, logprob, rank + 1, top[:count])
        for token_id, (logprob,), rank, top, count in zip(
            token_ids, logprobs, ranks(logits, chosen), tops, num_tops, strict=True
        )
    ]


def _tops(logits: Tensor, norm: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """Return the likeliest tokens of each row with their log-probabilities."""
    if count == 0:
        return [()] * len(logits)
    vocab_size = logits.shape[-1]
    found = top_tokens(logits, 2 * count)
    if int(found.num_sure.min()) < min(count, vocab_size):
        found = top_tokens(logits, vocab_size)
    logprobs = _finite(found.values[:, :count] - norm)
    ids: list[list[int]] = found.ids[:, :count].tolist()
    return [tuple(zip(*pair, strict=True)) for pair in zip(ids, logprobs, strict=True)]


def _finite(logprobs: Tensor) -> list[list[float]]:
    """Copy log-probabilities `[rows, n]` to the host, infinities replaced."""
    values: list[list[float]] = logprobs.nan_to_num(MIN_LOGPROB, 0.0, MIN_LOGPROB).tolist()
    return values
