"""Steps into tokens with torch: brings rows to the device, runs the decoder, samples.

Knows nothing of why a row is in a step, of requests or of how pages came to be shared. On CUDA
nothing here waits for the device but `InFlightStep.wait`, once a step, and requests for more than
tokens: see `SampledTokens.settle` and prompt_logprobs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cache.view import FULL_VIEW
from model.architectures.transformer import Decoder, ViewedDecoder
from model.attention.interface import AttentionBackend, QueryCopy
from model.cpu.team import Team
from model.cuda.graphs import DecodeGraphs
from model.draft_model import DraftModel
from model.grammar.grammars import Grammars
from model.interface import (
    Constraint,
    ModelInfo,
    SlotStart,
    StepInput,
    StepOutput,
    TokenLogprobs,
    Vocabulary,
)
from model.key_selection import KeySelections
from model.kv.pool import KVPool
from model.packing import PackedStep, Packer, drawn_rows
from model.sampling.sampled_tokens import SampledTokens, mark
from model.sampling.sampler import Sampler

#: Of a prompt that is scored, the logits of so many tokens are held at once: a chunk's would be
#: gigabytes with a large vocabulary.
SCORED_TOKENS = 64


@dataclass(frozen=True, slots=True)
class _InFlightStep:
    """A step on its way."""

    sampled_tokens: SampledTokens | None
    scores: list[tuple[TokenLogprobs, ...]]
    #: By row.
    guesses: dict[int, list[int]]
    is_over: Callable[[], None]

    @torch.inference_mode()
    def wait(self) -> StepOutput:
        self.is_over()
        output = StepOutput([]) if self.sampled_tokens is None else self.sampled_tokens.finish()
        if not self.scores and not self.guesses:
            return output
        return replace(output, prompt_logprobs=self.scores, guesses=self.guesses)


class TorchRunner:
    """See `ModelRunner`: one decoder, one pool of pages, one attention backend, one sampler."""

    def __init__(  # noqa: PLR0913 - the parts, by keyword
        self,
        *,
        info: ModelInfo,
        decoder: Decoder,
        attention: AttentionBackend,
        pool: KVPool,
        sampler: Sampler,
        max_num_seqs: int,
        windowed_pool: KVPool | None = None,
        graphs: DecodeGraphs | None = None,
        max_steps_in_flight: int = 1,
        team: Team | None = None,
        draft_model: DraftModel | None = None,
        viewed: ViewedDecoder | None = None,
        selections: KeySelections | None = None,
    ) -> None:
        """`windowed_pool`: of the windowed layers, where these have pages of their own.

        `team`: on a CPU, adapts the number of threads to the cores that others leave free.

        `viewed`: the same decoder, where requests may have views of their own; `selections`: with
        it, where they may keep keys by their scores.
        """
        self._info = info
        self._decoder = decoder
        self._attention = attention
        self._pool = pool
        self._sampler = sampler
        self._grammars = Grammars()
        self._device = pool.device
        self._graphs = graphs
        self._max_steps_in_flight = max_steps_in_flight
        self._team = team
        self._draft_model = draft_model
        self._viewed = viewed
        self._selections = selections
        self._windowed_pool = windowed_pool
        num_groups = 1 if windowed_pool is None else 2
        self._packer = Packer(max_num_seqs, info.max_model_len, info.page_size, num_groups)
        #: The samples of the step before, if any.
        self._newest: SampledTokens | None = None

    @property
    def info(self) -> ModelInfo:
        """See `ModelRunner`."""
        return self._info

    @property
    def max_steps_in_flight(self) -> int:
        """See `ModelRunner`: two on a GPU; a CPU computes inside `launch`."""
        return self._max_steps_in_flight

    @torch.inference_mode()
    def launch(self, step: StepInput) -> _InFlightStep:
        """See `ModelRunner`."""
        began_s = time.perf_counter()
        # Taken out first: a step that raises leaves nothing behind for the next to fail by.
        newest, self._newest = self._newest, None
        if newest is not None:
            newest.settle()
        guesses = dict[int, list[int]]()
        if self._draft_model is not None:
            step, guesses = self._draft_model.complete(step)
        self._drop_keys(step)
        packed = self._packer.pack(step)
        for start in step.started:
            self._require_served(start)
            self._sampler.start(start)
        self._pool.take_step(step.page_ids, [one for one in step.moves if not one.is_windowed])
        if self._windowed_pool is not None:
            moves = [one for one in step.moves if one.is_windowed]
            self._windowed_pool.take_step(step.windowed_page_ids, moves)
        copy = self._selections.copy_of(step) if self._selections else None
        hidden, sampled = self._compute(packed, newest, copy)
        if copy is not None and self._selections is not None:
            self._selections.note(step, copy)
        scores = self._score(step, hidden)
        self._newest = self._sample(step, hidden, sampled) if step.sample_rows else None
        if self._team is not None:
            self._team.observe(time.perf_counter() - began_s)
        return _InFlightStep(self._newest, scores, guesses, mark(self._device))

    def _require_served(self, start: SlotStart) -> None:
        if start.view != FULL_VIEW and self._viewed is None:
            message = f"a request cannot have a view of its own: {self._info.why_no_views}"
            raise ValueError(message)
        if self._selections is not None:
            self._selections.start(start.slot, start.selection)
        elif start.selection is not None:
            why = self._info.why_not(is_selection=True)
            message = f"a request cannot keep keys by their scores: {why}"
            raise ValueError(message)

    def _drop_keys(self, step: StepInput) -> None:
        """Let rows drop keys, before anything else is written to the pages of these."""
        for row, num_dropped in step.dropped.items():
            slot = step.slots[row]
            if self._selections is None:
                raise ValueError("rows whose sequences dropped keys cannot be computed")
            if self._selections.has_to_drop(slot, num_dropped):
                pages = torch.from_numpy(self._packer.take_table(slot)).long()
                new_pages = torch.tensor(step.page_ids[row])
                self._selections.drop(slot, pages, new_pages, num_dropped)

    def _compute(
        self, packed: PackedStep, newest: SampledTokens | None, copy: QueryCopy | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the hidden states of all tokens, and which of them are sampled after."""
        padded = self._graphs.pad(packed) if self._graphs is not None else None
        step = (padded or packed).on(self._device)
        if len(packed.pending):
            assert newest is not None, "a token is pending that no step samples"
            tokens = newest.tokens[step.pending_from]
            step.token_ids.index_copy_(0, step.pending, tokens)
        if self._graphs is not None and padded is not None:
            return self._graphs.run(step), step.sampled
        self._attention.plan(step.batch)
        positions, views = step.batch.positions, step.batch.views
        if views is not None or copy is not None:
            assert self._viewed is not None, "see launch"
            hidden = self._viewed.forward(step.token_ids, positions, self._attention, views, copy)
            return hidden, step.sampled
        return self._decoder.forward(step.token_ids, positions, self._attention), step.sampled

    def _sample(self, step: StepInput, hidden: Tensor, sampled: Tensor) -> SampledTokens:
        rows = drawn_rows(step)
        return self._sampler.begin(
            self._decoder.logits(hidden[sampled] if len(sampled) < len(hidden) else hidden),
            rows.slots,
            rows.positions,
            rows.drafts,
        )

    def _score(self, step: StepInput, hidden: Tensor) -> list[tuple[TokenLogprobs, ...]]:
        scores = []
        for span in step.scored:
            first = sum(step.counts[: span.row]) + span.offset
            slot = step.slots[span.row]
            found: list[TokenLogprobs] = []
            for done in range(0, len(span.token_ids), SCORED_TOKENS):
                token_ids = span.token_ids[done : done + SCORED_TOKENS]
                rows = hidden[first + done : first + done + len(token_ids)]
                found += self._sampler.score(self._decoder.logits(rows), slot, token_ids)
            scores.append(tuple(found))
        return scores

    def idle(self) -> bool:
        """See `ModelRunner`."""
        if self._pool.idle() or (self._windowed_pool is not None and self._windowed_pool.idle()):
            return True
        return self._draft_model is not None and self._draft_model.idle()

    @torch.inference_mode()
    def read_page(self, page_id: int) -> memoryview:
        """See `ModelRunner`."""
        return self._pool.read_page(page_id)

    @torch.inference_mode()
    def write_page(self, page_id: int, contents: memoryview) -> None:
        """See `ModelRunner`."""
        self._pool.write_page(page_id, contents)

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """See `ModelRunner`."""
        self._grammars.set_vocabulary(vocabulary)

    def prepare(self, grammar: str) -> Future[Constraint]:
        """See `ModelRunner`."""
        return self._grammars.prepare(grammar)

    def forced_tokens(self, slot: int) -> list[int]:
        """See `ModelRunner`."""
        return self._sampler.forced_tokens(slot)

    def close(self) -> None:
        """See `ModelRunner`. Memory goes with the process."""
        self._grammars.close()
        self._sampler.close()
