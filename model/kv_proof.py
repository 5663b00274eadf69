"""Proof, at each start, that a lossy format of keys and values keeps the quality of the model.

A format that serves most models can ruin one of them: a few large channels of its keys are enough.
So the model scores a built-in text on pages of its own exactness and on pages of the format. That
costs two passes over the text. Knows nothing of tokenizers: the text comes as tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.architectures.transformer import Decoder
from model.attention.interface import AttentionBatch, AttentionSpec, BackendOffer
from model.kv.pool import KVPool

#: Logits of so many tokens are held at once: those of a whole text would be a gigabyte.
_LOGITS_ROWS = 64


class PagedText:
    """A text on pages of its own, computed in one or many steps."""

    def __init__(
        self, decoder: Decoder, spec: AttentionSpec, offer: BackendOffer, max_tokens: int
    ) -> None:
        layout = spec.layout(offer.default_page_size)
        num_pages = -(-max_tokens // layout.page_size)
        self._decoder = decoder
        self._device = spec.device
        self._attention = offer.build(spec, KVPool(layout, num_pages, spec.device))
        self._block_table = torch.arange(num_pages, dtype=torch.int32, device=spec.device)[None]
        self.num_tokens = 0

    def append(self, token_ids: Sequence[int]) -> Tensor:
        """Compute the next tokens in one step; return their hidden states `[tokens, hidden]`."""
        count, end = len(token_ids), self.num_tokens + len(token_ids)
        positions = torch.arange(self.num_tokens, end, device=self._device)
        self._attention.plan(
            AttentionBatch(
                query_starts=torch.tensor([0, count], dtype=torch.int32, device=self._device),
                seq_lens=torch.tensor([end], dtype=torch.int32, device=self._device),
                block_table=self._block_table,
                positions=positions,
                kv_slots=positions,
                max_query_len=count,
                max_seq_len=end,
                slots=(0,),
            )
        )
        self.num_tokens = end
        ids = torch.tensor(token_ids, device=self._device)
        return self._decoder.forward(ids, positions, self._attention)

    def rewind(self, num_tokens: int) -> None:
        """Drop all but the first tokens."""
        assert 0 <= num_tokens <= self.num_tokens, "only computed tokens are kept"
        self.num_tokens = num_tokens


class Divergence:
    """How far the distributions of next tokens are from the expected ones, over many tokens."""

    def __init__(self, decoder: Decoder) -> None:
        """Use `decoder` for the logits of both."""
        self._decoder = decoder
        self.num_tokens = 0
        self._expected_loss = 0.0
        self._loss = 0.0
        self._kl = 0.0
        self._num_same = 0

    def add(self, expected: Tensor, found: Tensor, next_ids: Sequence[int]) -> None:
        """Compare hidden states `[tokens, hidden]`; `next_ids` are the tokens that follow them."""
        for first in range(0, len(next_ids), _LOGITS_ROWS):
            rows = slice(first, min(first + _LOGITS_ROWS, len(next_ids)))
            exact = self._decoder.logits(expected[rows]).log_softmax(-1)
            kept = self._decoder.logits(found[rows]).log_softmax(-1)
            chosen = torch.tensor(next_ids[rows], device=exact.device)[:, None]
            self._expected_loss -= float(exact.gather(1, chosen).sum())
            self._loss -= float(kept.gather(1, chosen).sum())
            self._kl += float((exact.exp() * (exact - kept)).sum())
            self._num_same += int((exact.argmax(-1) == kept.argmax(-1)).sum())
        self.num_tokens += len(next_ids)

    @property
    def expected_perplexity(self) -> float:
        """Return the perplexity of the expected distributions."""
        return _perplexity(self._expected_loss, self.num_tokens)

    @property
    def perplexity(self) -> float:
        """Return the perplexity of the compared distributions."""
        return _perplexity(self._loss, self.num_tokens)

    @property
    def rise(self) -> float:
        """Return the share by which the perplexity is above the expected one."""
        return self.perplexity / self.expected_perplexity - 1

    @property
    def kl(self) -> float:
        """Return the mean Kullback-Leibler divergence from the expected distributions, in nats."""
        return self._kl / self.num_tokens

    @property
    def same_share(self) -> float:
        """Return how often both have the same likeliest token, 0 to 1."""
        return self._num_same / self.num_tokens


def _perplexity(loss: float, num_tokens: int) -> float:
    mean = loss / num_tokens
    # Beyond that a float overflows.
    return math.exp(mean) if mean < 700 else math.inf


@torch.inference_mode()
def prove_kv_format(
    decoder: Decoder,
    full: tuple[AttentionSpec, BackendOffer],
    chosen: tuple[AttentionSpec, BackendOffer],
    token_ids: Sequence[int],
    max_rise: float,
) -> str:
    """Return a note on the quality of `chosen` pages beside `full` ones, over a text.

    `max_rise`: the largest share by which the perplexity may rise. Raises `ValueError` beyond it.
    """
    expected, found = (
        PagedText(decoder, spec, offer, len(token_ids)).append(token_ids)
        for spec, offer in (full, chosen)
    )
    divergence = Divergence(decoder)
    divergence.add(expected, found, token_ids[1:])
    name, full_name = chosen[0].kv_format.name, full[0].kv_format.name
    figures = (
        f"perplexity {divergence.perplexity:.4g} over {divergence.num_tokens} built-in tokens, "
        f"with {full_name} {divergence.expected_perplexity:.4g} ({divergence.rise:+.2%}); "
        f"KL divergence {divergence.kl:.1e}"
    )
    # Not "rise > max_rise": NaN must not pass.
    if not divergence.rise <= max_rise:
        raise ValueError(
            f"kv_cache_dtype: {name} costs this model too much: {figures}; the perplexity may rise "
            f"by {max_rise:.4g} of itself (--kv-quality-bound). int8 is the most exact of the "
            "small formats"
        )
    return f"keys and values in {name}: {figures}"
