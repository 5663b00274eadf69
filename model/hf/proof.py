"""Proof, at each start, that a model of `transformers` computes on pages what it computes alone.

Hundreds of architectures go through the same door, and a new version of the library may move
something behind it: a model that keeps something between tokens outside attention, that counts
positions itself or wants what attention did not give it comes out with other numbers here, instead
of with bad answers later. Costs three passes over a dozen tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from model.architectures.arch import ArchError
from model.attention.interface import AttentionBatch
from model.attention.reference import ReferenceAttention
from model.kv.format import float_format
from model.kv.pool import KVPool

if TYPE_CHECKING:
    from model.hf.decoder import HfDecoder

_PAGE_SIZE = 4
_PAGES_EACH = 2
#: The first comes in two steps, the second beside the first of them.
_LENGTHS = (7, 5)
_STEPS: tuple[tuple[tuple[int, int, int], ...], ...] = (
    # (sequence, from, to)
    ((0, 0, 3), (1, 0, 5)),
    ((0, 3, 7),),
)
#: Largest relative error of one position's logits. What has nothing to do with each other is 1.4
#: apart. Rounding alone gave 1e-5 in float32 and up to 0.4 in bfloat16, over 70 architectures with
#: random weights, which are far worse than trained ones.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_16_BITS = 0.6


class Proof:
    """Two short texts and their logits, by the model as `transformers` made it."""

    def __init__(self, model: Any, vocab_size: int) -> None:  # noqa: ANN401 - transformers' class
        """Run it; its attention must be the library's own still."""
        generator = torch.Generator().manual_seed(0)
        self._texts = [
            torch.randint(vocab_size, (length,), generator=generator).to(model.device)
            for length in _LENGTHS
        ]
        self._expected = [
            model(input_ids=text.unsqueeze(0), use_cache=False).logits.squeeze(0).float()
            for text in self._texts
        ]

    def check(self, decoder: HfDecoder) -> None:
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
    """Say where rows' tokens lie: each text has pages of its own, one after another."""
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
