"""Steps into tokens with torch: packs rows into tensors, runs the decoder, samples.

Knows nothing of why a row is in a step, of requests or of how pages came to be shared.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model.attention.interface import AttentionBackend, AttentionBatch
from model.grammar import Grammars
from model.interface import (
    Constraint,
    ModelInfo,
    StepInput,
    StepOutput,
    TokenLogprobs,
    Vocabulary,
)
from model.kv_pool import KVPool
from model.sampler import Sampler
from model.transformer import Decoder

#: Of a prompt that is scored, the logits of so many tokens are held at once: a chunk's would be
#: gigabytes with a large vocabulary.
SCORED_TOKENS = 64


@dataclass(frozen=True, slots=True)
class _Landed:
    """A flight that was over when it was launched: a CPU computes while it is asked to."""

    output: StepOutput

    def wait(self) -> StepOutput:
        return self.output


class BlockTables:
    """Every slot's block table as one array, so that a step copies only what is new in it."""

    def __init__(self, max_num_seqs: int, max_pages: int) -> None:
        self._pages = np.zeros((max_num_seqs, max_pages), dtype=np.int32)
        self._num_pages = [0] * max_num_seqs

    def forget(self, slot: int) -> None:
        """Let the slot begin anew: another sequence has it now."""
        self._num_pages[slot] = 0

    def gather(self, slots: list[int], page_ids: list[list[int]], width: int) -> np.ndarray:
        """Return `[rows, width]` page ids; past a row's end stand ids of earlier sequences."""
        for slot, pages in zip(slots, page_ids, strict=True):
            known = self._num_pages[slot]
            if known != len(pages):
                self._pages[slot, known : len(pages)] = pages[known:]
                self._num_pages[slot] = len(pages)
        table: np.ndarray = self._pages[np.asarray(slots), :width]
        return table


class TorchRunner:
    """See `ModelRunner`: one decoder, one pool of pages, one attention backend, one sampler."""

    def __init__(
        self,
        *,
        info: ModelInfo,
        decoder: Decoder,
        attention: AttentionBackend,
        pool: KVPool,
        sampler: Sampler,
        max_num_seqs: int,
        device: torch.device,
    ) -> None:
        self._info = info
        self._decoder = decoder
        self._attention = attention
        self._pool = pool
        self._sampler = sampler
        self._grammars = Grammars()
        self._device = device
        max_pages = -(-info.max_model_len // info.page_size)
        self._tables = BlockTables(max_num_seqs, max_pages)

    @property
    def info(self) -> ModelInfo:
        """See `ModelRunner`."""
        return self._info

    @torch.inference_mode()
    def launch(self, step: StepInput) -> _Landed:
        """See `ModelRunner`."""
        for start in step.started:
            self._tables.forget(start.slot)
            self._sampler.start(start)
        if step.copies:
            self._pool.copy_pages(step.copies)
        batch = self._pack(step)
        self._attention.plan(batch)
        token_ids = torch.tensor(step.token_ids, dtype=torch.int64).to(self._device)
        hidden = self._decoder.forward(token_ids, batch.positions, self._attention)
        scores = self._score(step, hidden)
        output = self._sample(step, batch, hidden) if step.sample_rows else StepOutput([])
        return _Landed(replace(output, prompt_logprobs=scores) if scores else output)

    def _pack(self, step: StepInput) -> AttentionBatch:
        starts = np.asarray(step.starts, dtype=np.int64)
        counts = np.asarray(step.counts, dtype=np.int64)
        page_size = self._info.page_size
        ends = starts + counts
        query_starts = np.zeros(len(counts) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_starts[1:])
        rows = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(query_starts[-1]) - query_starts[rows] + starts[rows]
        max_seq_len = int(ends.max())
        table = self._tables.gather(step.slots, step.page_ids, -(-max_seq_len // page_size))
        kv_slots = table[rows, positions // page_size].astype(np.int64) * page_size
        kv_slots += positions % page_size
        return AttentionBatch(
            query_starts=self._tensor(query_starts),
            seq_lens=self._tensor(ends.astype(np.int32)),
            block_table=self._tensor(table),
            positions=self._tensor(positions),
            kv_slots=self._tensor(kv_slots),
            max_query_len=int(counts.max()),
            max_seq_len=max_seq_len,
        )

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _sample(self, step: StepInput, batch: AttentionBatch, hidden: Tensor) -> StepOutput:
        rows = step.sample_rows
        if len(rows) < hidden.shape[0]:
            last = batch.query_starts[1:].to(torch.int64) - 1
            hidden = hidden[last[torch.tensor(rows, device=self._device)]]
        return self._sampler.sample(
            self._decoder.logits(hidden),
            [step.slots[row] for row in rows],
            [step.starts[row] + step.counts[row] for row in rows],
        )

    def _score(self, step: StepInput, hidden: Tensor) -> list[tuple[TokenLogprobs, ...]]:
        scores = []
        for span in step.scored:
            first, slot = sum(step.counts[: span.row]) + span.offset, step.slots[span.row]
            found: list[TokenLogprobs] = []
            for done in range(0, len(span.token_ids), SCORED_TOKENS):
                token_ids = span.token_ids[done : done + SCORED_TOKENS]
                rows = hidden[first + done : first + done + len(token_ids)]
                found += self._sampler.score(self._decoder.logits(rows), slot, token_ids)
            scores.append(tuple(found))
        return scores

    def learn(self, vocabulary: Vocabulary) -> None:
        """See `ModelRunner`."""
        self._grammars.learn(vocabulary)

    def prepare(self, grammar: str) -> Future[Constraint]:
        """See `ModelRunner`."""
        return self._grammars.prepare(grammar)

    def close(self) -> None:
        """See `ModelRunner`. Memory goes with the process."""
        self._grammars.close()
        self._sampler.close()
