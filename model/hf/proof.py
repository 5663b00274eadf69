"""Proof, at each start, that a model of `transformers` has the same logits on pages as alone.

Hundreds of architectures are served by the same code, and a new version of the library may break
it. A model that keeps state outside attention, counts positions itself or needs more from its
attention differs here, instead of giving bad answers later. Costs three passes over a dozen tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from model.architectures.arch import ArchError
from model.architectures.transformer import ServedDecoder
from model.attention.interface import AttentionBatch
from model.attention.reference import ReferenceAttention
from model.kv.format import float_format
from model.kv.pool import KVPool

_PAGE_SIZE = 4
_PAGES_EACH = 2
#: The first text takes two steps, the second is computed beside the first of these.
_LENGTHS = (7, 5)
_STEPS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    # (sequence, from, to)
    ((0, 0, 3), (1, 0, 5)),
    ((0, 3, 7),),
)
#: Largest relative error of one position's logits. Unrelated logits differ by 1.4. Rounding alone
#: gave 1e-5 in float32 and up to 0.4 in bfloat16, over 70 architectures with random weights, where
#: it is far larger than with trained ones.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.6


class Proof:
    """Two short texts and their logits, by the model as `transformers` made it."""

    def __init__(self, model: Any, vocab_size: int) -> None:  # noqa: ANN401 - transformers' class
        """Run the model, whose attention must still be the library's own."""
        generator = torch.Generator().manual_seed(0)
        self._texts = [
            torch.randint(vocab_size, (length,), generator=generator).to(model.device)
            for length in _LENGTHS
        ]
        self._expected = [
            model(input_ids=text.unsqueeze(0), use_cache=False).logits.squeeze(0).float()
            for text in self._texts
        ]

    def check(self, decoder: ServedDecoder) -> None:
        """Compute the same on pages, in chunks and side by side. `ArchError` where it differs."""
        dtype = decoder.attention_dtype
        spec = decoder.attention_spec(float_format(dtype))
        pool = KVPool(spec.layout(_PAGE_SIZE), _PAGES_EACH * len(_LENGTHS), decoder.device)
        attention = ReferenceAttention(spec, pool)
        tolerance = _TOLERANCE.get(dtype, _TOLERANCE_16_BITS)
        for rows in _STEPS:
            batch = _batch(rows, decoder.device)
            attention.plan(batch)
            token_ids = torch.cat([self._texts[text][start:end] for text, start, end in rows])
            found = decoder.logits(decoder.forward(token_ids, batch.positions, attention))
            wanted = torch.cat([self._expected[text][start:end] for text, start, end in rows])
            error = ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max()
            # Not "error > tolerance": NaN must not pass.
            if not error <= tolerance:
                raise ArchError(
                    f"it computes something else on pages than alone (logits differ by "
                    f"{float(error):.2g} of their size)"
                )


def _batch(rows: Sequence[tuple[int, int, int]], device: torch.device) -> AttentionBatch:
    """Place the tokens of (text, from, to): each text has its own pages, one after another."""
    positions = torch.cat([torch.arange(start, end) for _, start, end in rows])
    counts = [end - start for _, start, end in rows]
    table = torch.arange(_PAGES_EACH * len(_LENGTHS), dtype=torch.int32).view(-1, _PAGES_EACH)
    texts = [text for text, _, _ in rows]
    offsets = torch.repeat_interleave(torch.tensor(texts), torch.tensor(counts))
    return AttentionBatch(
        query_starts=torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device),
        seq_lens=torch.tensor([end for _, _, end in rows], dtype=torch.int32).to(device),
        block_table=table[texts].to(device),
        positions=positions.to(device),
        kv_slots=(offsets * _PAGES_EACH * _PAGE_SIZE + positions).to(device),
        max_query_len=max(counts),
        max_seq_len=max(end for _, _, end in rows),
    )
