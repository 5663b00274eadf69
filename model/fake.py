"""A model that can be computed by hand, for tests of everything around a model. No torch.

Its "keys and values" identify the prefix they belong to. Each place in a page holds the token
written there and a digest of the prefix up to it; the next token is a function of the digest. So a
page shared wrongly, freed too early or copied short changes tokens. Under a view a digest also
depends on the oldest key in view behind the sinks. The digest picks one of the tokens that a
grammar allows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from cache.view import FULL_VIEW, View
from model.fake_answers import (
    FAKE_EOS_TOKEN_ID,
    choose,
    fake_logprobs,
    fake_next_token,
    fake_output,
    score,
)
from model.fake_pages import (
    EMPTY,
    NAN_TOKEN_ID,
    Entry,
    FakePageAccess,
    FakePages,
    FakeSlot,
    Rule,
    digest_of,
    digests_of,
)
from model.grammar.grammars import CompiledGrammar, Grammars
from model.grammar.matchers import Matchers
from model.interface import (
    GUESSED_TOKEN,
    PENDING_TOKEN,
    Constraint,
    ModelInfo,
    RowSpan,
    SampleSpan,
    SlotStart,
    StepInput,
    StepOutput,
    TokenLogprobs,
    Vocabulary,
    WindowedPages,
)
from model.stored_pages import StoredPages

__all__ = [
    "FAKE_EOS_TOKEN_ID",
    "FakeRunner",
    "Fault",
    "FaultKind",
    "fake_logprobs",
    "fake_next_token",
    "fake_output",
]


class FaultKind(StrEnum):
    """How a row fails."""

    LAUNCH = "launch"
    WAIT = "wait"
    NOT_FINITE = "not finite"


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that fails whenever it computes the token at `position`."""

    kind: FaultKind
    position: int


@dataclass(slots=True)
class _FakeInFlightStep:
    runner: FakeRunner
    number: int
    output: StepOutput
    has_fault: bool

    def wait(self) -> StepOutput:
        self.runner.land(self.number)
        if self.has_fault:
            raise RuntimeError("a row of this step was told to fail")
        return self.output


@dataclass(slots=True)
class FakeRunner(FakePageAccess):
    """See `ModelRunner`. Checks with every step that it reads back the very prefix it is given."""

    vocab_size: int = 64
    max_model_len: int = 256
    page_size: int = 4
    num_pages: int = 64
    #: Of the model: a request's own view takes its place.
    view: View = FULL_VIEW
    #: See `ModelInfo`. Keys are in both groups of pages.
    windowed: WindowedPages | None = None
    smallest_reusable_prefix_tokens: int = 1
    #: Steps so far, and tokens computed in them, recomputed ones included.
    num_steps: int = 0
    num_tokens: int = 0
    #: See `ModelRunner`.
    max_steps_in_flight: int = 1
    #: Raise when these steps, counted from 0, are launched; the second: when they are waited for.
    faulty_steps: frozenset[int] = frozenset()
    faulty_waits: frozenset[int] = frozenset()
    #: By the seed of a request, what is wrong with it.
    faults: Mapping[int, Fault] = field(default_factory=dict)
    #: Read back all that is in a row's view in every step; off for benchmarks.
    is_strict: bool = True
    #: 0: there is no draft model; n: it guesses right, but at positions that are multiples of n.
    guess_period: int = 0
    _slots: dict[int, FakeSlot] = field(default_factory=dict)
    _has_nan: bool = False
    #: By slot, the token that the last step sampled.
    _sampled: dict[int, int] = field(default_factory=dict)
    #: Steps that were launched and not waited for.
    _in_flight: list[int] = field(default_factory=list)
    _grammars: Grammars = field(default_factory=Grammars)
    _matchers: Matchers = field(init=False)
    pages: FakePages = field(init=False)
    windowed_pages: FakePages = field(init=False)

    def __post_init__(self) -> None:
        self.pages = FakePages(self.page_size)
        self.windowed_pages = FakePages(self.page_size)
        self._matchers = Matchers(self.vocab_size)

    @property
    def info(self) -> ModelInfo:
        """See `ModelRunner`."""
        return ModelInfo(
            name="fake",
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=(FAKE_EOS_TOKEN_ID,),
            page_size=self.page_size,
            num_pages=self.num_pages,
            kv_bytes_per_token=4,
            weights_bytes=0,
            dtype="int",
            quantization="none",
            kv_cache_dtype="int",
            device="none",
            attention_backend="fake",
            smallest_reusable_prefix_tokens=self.smallest_reusable_prefix_tokens,
            view=self.view,
            windowed=self.windowed,
            draft_model="fake" if self.guess_period else "",
            stored_pages=StoredPages(8 * self.page_size, "fa" * 32),
        )

    def launch(self, step: StepInput) -> _FakeInFlightStep:
        """See `ModelRunner`. Raises RuntimeError in the steps named in `faulty_steps`."""
        number = self.num_steps
        self.num_steps += 1
        assert len(self._in_flight) < self.max_steps_in_flight, "more steps in flight than allowed"
        if number in self.faulty_steps:
            raise RuntimeError("this step was told to fail")
        self._prepare_pages(step)
        token_ids, digests, first = list[list[int]](), list[list[int]](), 0
        guesses = dict[int, list[int]]()
        for row, span in enumerate(step.rows):
            tokens = step.token_ids[first : first + span.count]
            if tokens[-1] == PENDING_TOKEN:
                tokens[-1] = self._sampled[step.slots[row]]
            token_ids.append(tokens)
            slot, num_guesses = self._slots[step.slots[row]], tokens.count(GUESSED_TOKEN)
            digests.append(self._compute(slot, span, tokens, step.page_ids[row]))
            if num_guesses:
                guesses[row] = tokens[-num_guesses:]
            first += span.count
        view = self.windowed.view if self.windowed else FULL_VIEW
        self.windowed_pages.take_step(step, self._slots, self.pages, view, is_strict=self.is_strict)
        faults = self._faults_of(step)
        if FaultKind.LAUNCH in faults.values():
            raise RuntimeError("a row of this step was told to fail")
        assert first == len(step.token_ids), "rows and tokens do not add up"
        self.num_tokens += first
        failures: dict[int, str] = {}
        drawn: list[list[int]] = []
        for index, sample in enumerate(step.samples):
            row = sample.row
            tokens, why = self._draw(step.slots[row], sample, token_ids[row], digests[row])
            drawn.append(tokens)
            if why:
                failures[index] = why
        self._sampled = {
            step.slots[sample.row]: tokens[-1]
            for sample, tokens in zip(step.samples, drawn, strict=True)
            if tokens
        }
        self._in_flight.append(number)
        output = replace(self._output(step, drawn, failures, faults), guesses=guesses)
        return _FakeInFlightStep(self, number, output, FaultKind.WAIT in faults.values())

    def _output(
        self,
        step: StepInput,
        drawn: list[list[int]],
        failures: dict[int, str],
        faults: dict[int, FaultKind],
    ) -> StepOutput:
        samples = list(enumerate(step.samples))
        not_finite = [i for i, span in samples if faults.get(span.row) is FaultKind.NOT_FINITE]
        for index in not_finite:
            drawn[index] = []
        wants = [self._slots[step.slots[span.row]].params.logprobs for _, span in samples]
        logprobs = [
            [] if wanted is None else [TokenLogprobs(token_id, 0.0, 1) for token_id in tokens]
            for wanted, tokens in zip(wants, drawn, strict=True)
        ]
        scores = [
            tuple(self._scores(step, span.row, span.offset, span.token_ids)) for span in step.scored
        ]
        return StepOutput(drawn, logprobs if any(logprobs) else [], failures, not_finite, scores)

    def land(self, number: int) -> None:
        """Note that a step in flight was waited for; RuntimeError for those in `faulty_waits`."""
        assert self._in_flight[0] == number, "waited for out of order, or twice"
        del self._in_flight[0]
        if number in self.faulty_waits:
            raise RuntimeError("this step was configured to fail")

    def _faults_of(self, step: StepInput) -> dict[int, FaultKind]:
        """Return by row how it fails; one that is not finite leaves that in its page."""
        found = {}
        for row, span in enumerate(step.rows):
            slot, pages = self._slots[step.slots[row]], step.page_ids[row]
            fault = self.faults.get(slot.params.seed)
            if fault is not None and 0 <= fault.position - span.position < span.count:
                found[row] = fault.kind
                if fault.kind is FaultKind.NOT_FINITE:
                    self._has_nan = True
                    self.pages.write(pages, slot.index(fault.position), (NAN_TOKEN_ID, EMPTY))
            elif self._has_nan and any(
                self.pages.read(pages, slot.index(position))[0] == NAN_TOKEN_ID
                for position in slot.in_view(span.position)
            ):
                found[row] = FaultKind.NOT_FINITE
        return found

    def _scores(
        self, step: StepInput, row: int, offset: int, token_ids: list[int]
    ) -> Iterator[TokenLogprobs]:
        slot, span = self._slots[step.slots[row]], step.rows[row]
        for index, token_id in enumerate(token_ids, span.stored + offset):
            _, digest = self.pages.read(step.page_ids[row], index)
            yield score(digest, token_id, slot.params.prompt_logprobs or 0)

    def _start(self, start: SlotStart) -> None:
        view, known = self.view if start.view == FULL_VIEW else start.view, list[Entry]()
        if self.is_strict:
            token_ids = [*start.prompt_token_ids, *start.output_token_ids]
            rule = Rule(view, start.selection, len(start.prompt_token_ids))
            known += zip(token_ids, digests_of(token_ids, rule), strict=True)
        self._slots[start.slot] = FakeSlot(start.params, view, known)
        self._matchers.drop(start.slot)
        if start.constraint is not None:
            assert isinstance(start.constraint, CompiledGrammar), "another runner's grammar"
            self._matchers.start(start.slot, start.constraint, start.output_token_ids)

    def _prepare_pages(self, step: StepInput) -> None:
        for row in step.dropped:
            slot, span = self._slots[step.slots[row]], step.rows[row]
            if span.position - span.stored > slot.num_dropped:
                self.pages.compact(slot, span, step.page_ids[row])
        for start in step.started:
            self._start(start)
        for move in step.moves:
            (self.windowed_pages if move.is_windowed else self.pages).move(move)

    def _compute(
        self, slot: FakeSlot, span: RowSpan, token_ids: list[int], pages: list[int]
    ) -> list[int]:
        """Write a row's keys and return their digests; fill in the guesses of the draft model."""
        slot.page_ids, slot.num_stored = pages, span.stored + span.count
        if self.is_strict:
            for position in slot.in_view(span.position):
                found = self.pages.read(pages, slot.index(position))
                if found[0] == NAN_TOKEN_ID:
                    break
                here = pages[slot.index(position) // self.page_size]
                assert found == slot.known[position], f"page {here} was overwritten"
        digests = list[int]()
        for position, token_id in enumerate(token_ids, span.position):
            if token_id == GUESSED_TOKEN:
                token_ids[position - span.position] = self._guess(digests[-1], position)
            known = token_ids[position - span.position]
            digest = digest_of(
                position,
                known,
                slot.view,
                lambda seen: self.pages.read(pages, slot.index(seen))[1],
                slot.num_dropped,
            )
            self.pages.write(pages, slot.index(position), (known, digest))
            if self.is_strict:
                slot.know(position, known, digest)
            digests.append(digest)
        return digests

    def _guess(self, digest: int, position: int) -> int:
        assert self.guess_period, "a guess without a draft model"
        right = choose(digest, self.vocab_size, may_end=False)
        return right if position % self.guess_period else 1 + right % (self.vocab_size - 1)

    def _draw(
        self, slot: int, span: SampleSpan, token_ids: list[int], digests: list[int]
    ) -> tuple[list[int], str]:
        """Return the tokens of a span, and why its request cannot go on."""
        drawn: list[int] = []
        for offset in range(span.first, span.first + span.count):
            found = self._sample(slot, digests[offset])
            if not isinstance(found, int):
                return drawn, "" if drawn else found or ""
            drawn.append(found)
            if offset + 1 == len(token_ids) or found != token_ids[offset + 1]:
                break
        return drawn, ""

    def _sample(self, slot: int, digest: int) -> int | str | None:
        """Return a token, why there can be none, or None where it is not known in time."""
        if not self._matchers.holds(slot):
            may_end = not self._slots[slot].params.ignore_eos
            return choose(digest, self.vocab_size, may_end=may_end)
        [mask] = self._matchers.masks([slot])
        if mask is None:
            return None
        if mask.error:
            return mask.error
        allowed = np.flatnonzero(~mask.is_banned)
        token_id = int(allowed[digest // 61 % len(allowed)])
        if token_id != FAKE_EOS_TOKEN_ID:
            self._matchers.advance([(slot, [token_id])])
        return token_id

    def idle(self) -> bool:
        """See `ModelRunner`. Nothing here gets better by itself."""
        return False

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """See `ModelRunner`."""
        self._grammars.set_vocabulary(vocabulary)

    def prepare(self, grammar: str) -> Future[Constraint]:
        """See `ModelRunner`."""
        return self._grammars.prepare(grammar)

    def forced_tokens(self, slot: int) -> list[int]:
        """See `ModelRunner`."""
        return self._matchers.forced(slot)

    def close(self) -> None:
        """See `ModelRunner`."""
        self.pages.clear()
        self.windowed_pages.clear()
        self._grammars.close()
        self._matchers.close()
