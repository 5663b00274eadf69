"""A model that can be computed by hand, for tests of everything around a model. No torch.

Its "keys and values" are what really matters about them: which prefix they belong to. Each place in
a page holds the token written there and a digest of the whole prefix up to it; the next token is a
function of the digest. So a page shared wrongly, freed too early or copied short changes tokens.
Of what a grammar allows, the digest picks one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from model.grammar.grammars import CompiledGrammar, Grammars
from model.grammar.matchers import Matchers
from model.interface import (
    NO_TOKEN,
    PENDING_TOKEN,
    Constraint,
    ModelInfo,
    PageCopy,
    SamplingParams,
    SlotStart,
    StepInput,
    StepOutput,
    TokenLogprobs,
    Vocabulary,
)

FAKE_EOS_TOKEN_ID = 0
_EMPTY = 0xFFFF
#: Stands in pages whose keys and values are not finite.
_NAN_TOKEN_ID = 2**32 - 1


def fake_next_token(token_ids: Sequence[int], vocab_size: int, *, may_end: bool = True) -> int:
    """Return the token a `FakeRunner` gives after these."""
    digest = _EMPTY
    for token_id in token_ids:
        digest = _extend(digest, token_id)
    return _choose(digest, vocab_size, may_end=may_end)


def fake_output(
    prompt: Sequence[int], num_tokens: int, vocab_size: int = 64, *, may_end: bool = False
) -> list[int]:
    """Return the tokens that a `FakeRunner` gives after a prompt: alone, uncached, unchunked."""
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(fake_next_token(token_ids, vocab_size, may_end=may_end))
    return token_ids[len(prompt) :]


def fake_logprobs(prefix: Sequence[int], token_id: int, num_top: int) -> TokenLogprobs:
    """Return what a `FakeRunner` tells of a prompt's token behind a prefix."""
    digest = _EMPTY
    for known in prefix:
        digest = _extend(digest, known)
    return _score(digest, token_id, num_top)


def _score(digest: int, token_id: int, num_top: int) -> TokenLogprobs:
    logprob = -float(_extend(digest, token_id) % 1009)
    return TokenLogprobs(token_id, logprob, 1, tuple((rank, logprob) for rank in range(num_top)))


def _extend(digest: int, token_id: int) -> int:
    return zlib.crc32(token_id.to_bytes(4, "little"), digest)


def _choose(digest: int, vocab_size: int, *, may_end: bool) -> int:
    if may_end and digest % 61 == 0:
        return FAKE_EOS_TOKEN_ID
    return 1 + digest // 61 % (vocab_size - 1)


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
class _FakeFlight:
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
class FakeRunner:
    """See `ModelRunner`. Checks with every step that it reads back the very prefix it is given."""

    vocab_size: int = 64
    max_model_len: int = 256
    page_size: int = 4
    num_pages: int = 64
    #: Steps so far, and tokens computed in them: what was recomputed shows here.
    num_steps: int = 0
    num_tokens: int = 0
    #: See `ModelRunner`.
    max_flights: int = 1
    #: Raise when these steps, counted from 0, are launched, or when they are waited for.
    faulty_steps: frozenset[int] = frozenset()
    faulty_flights: frozenset[int] = frozenset()
    #: By the seed of a request, what is wrong with it.
    faults: Mapping[int, Fault] = field(default_factory=dict)
    #: Read every row back from its first token in every step; off for benchmarks.
    is_strict: bool = True
    #: page * page_size + offset -> the token there, and the digest of the prefix it ends.
    _written: dict[int, tuple[int, int]] = field(default_factory=dict)
    _params: dict[int, SamplingParams] = field(default_factory=dict)
    _has_nan: bool = False
    #: By slot, what the last step sampled.
    _sampled: dict[int, int] = field(default_factory=dict)
    #: Steps that were launched and not waited for.
    _in_flight: list[int] = field(default_factory=list)
    _grammars: Grammars = field(default_factory=Grammars)
    _matchers: Matchers = field(init=False)

    def __post_init__(self) -> None:
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
        )

    def launch(self, step: StepInput) -> _FakeFlight:
        """See `ModelRunner`. Raises RuntimeError in the steps named in `faulty_steps`."""
        number = self.num_steps
        self.num_steps += 1
        assert len(self._in_flight) < self.max_flights, "more flights than there may be"
        if number in self.faulty_steps:
            raise RuntimeError("this step was told to fail")
        for start in step.started:
            self._start(start)
        for copy in step.copies:
            self._copy(copy)
        digests, first = [], 0
        for row, count in enumerate(step.counts):
            token_ids = step.token_ids[first : first + count]
            if token_ids[-1] == PENDING_TOKEN:
                token_ids[-1] = self._sampled[step.slots[row]]
            digests.append(self._write(step, row, token_ids))
            first += count
        faults = self._faults_of(step)
        if FaultKind.LAUNCH in faults.values():
            raise RuntimeError("a row of this step was told to fail")
        assert first == len(step.token_ids), "rows and tokens do not add up"
        self.num_tokens += first
        rows = step.sample_rows
        failures: dict[int, str] = {}
        token_ids = [
            self._sample(step.slots[row], digests[row], index, failures)
            for index, row in enumerate(rows)
        ]
        logprobs = [
            None if self._params[step.slots[row]].logprobs is None else TokenLogprobs(token, 0.0, 1)
            for row, token in zip(rows, token_ids, strict=True)
        ]
        scores = [
            tuple(self._scores(step, span.row, span.offset, span.token_ids)) for span in step.scored
        ]
        self._sampled = {step.slots[row]: t for row, t in zip(rows, token_ids, strict=True)}
        self._in_flight.append(number)
        not_finite = [i for i, row in enumerate(rows) if faults.get(row) is FaultKind.NOT_FINITE]
        for index in not_finite:
            token_ids[index] = NO_TOKEN
        output = StepOutput(
            token_ids, logprobs if any(logprobs) else [], failures, not_finite, scores
        )
        return _FakeFlight(self, number, output, FaultKind.WAIT in faults.values())

    def land(self, number: int) -> None:
        """Note that a flight was waited for; RuntimeError for those in `faulty_flights`."""
        assert self._in_flight[0] == number, "waited for out of order, or twice"
        del self._in_flight[0]
        if number in self.faulty_flights:
            raise RuntimeError("this flight was told to fail")

    def _faults_of(self, step: StepInput) -> dict[int, FaultKind]:
        """Return by row how it fails; one that is not finite leaves that in its page."""
        found = {}
        for row, (slot, start, count) in enumerate(
            zip(step.slots, step.starts, step.counts, strict=True)
        ):
            pages = step.page_ids[row]
            fault = self.faults.get(self._params[slot].seed)
            if fault is not None and start <= fault.position < start + count:
                found[row] = fault.kind
                if fault.kind is FaultKind.NOT_FINITE:
                    self._has_nan = True
                    self._written[self._place(pages, fault.position)] = (_NAN_TOKEN_ID, _EMPTY)
            elif self._has_nan and self._reads_nan(pages, start):
                found[row] = FaultKind.NOT_FINITE
        return found

    def _reads_nan(self, pages: list[int], num_tokens: int) -> bool:
        return any(
            self._written[self._place(pages, position)][0] == _NAN_TOKEN_ID
            for position in range(num_tokens)
        )

    def _scores(
        self, step: StepInput, row: int, offset: int, token_ids: list[int]
    ) -> Iterator[TokenLogprobs]:
        num_top = self._params[step.slots[row]].prompt_logprobs or 0
        for position, token_id in enumerate(token_ids, step.starts[row] + offset):
            _, digest = self._written[self._place(step.page_ids[row], position)]
            yield _score(digest, token_id, num_top)

    def _start(self, start: SlotStart) -> None:
        self._params[start.slot] = start.params
        self._matchers.drop(start.slot)
        if start.constraint is not None:
            assert isinstance(start.constraint, CompiledGrammar), "another runner's grammar"
            self._matchers.start(start.slot, start.constraint, start.output_token_ids)

    def _copy(self, copy: PageCopy) -> None:
        source, target = copy.source * self.page_size, copy.target * self.page_size
        for offset in range(copy.num_tokens):
            self._written[target + offset] = self._written[source + offset]

    def _write(self, step: StepInput, row: int, token_ids: list[int]) -> int:
        start, pages = step.starts[row], step.page_ids[row]
        digest = self._read(pages, start)
        for position, token_id in enumerate(token_ids, start):
            digest = _extend(digest, token_id)
            self._written[self._place(pages, position)] = (token_id, digest)
        return digest

    def _read(self, pages: list[int], num_tokens: int) -> int:
        if num_tokens == 0:
            return _EMPTY
        _, digest = self._written[self._place(pages, num_tokens - 1)]
        if self.is_strict:
            expected = _EMPTY
            for position in range(num_tokens):
                token_id, here = self._written[self._place(pages, position)]
                if token_id == _NAN_TOKEN_ID:
                    break
                expected = _extend(expected, token_id)
                assert here == expected, f"page {pages[position // self.page_size]} was overwritten"
        return digest

    def _place(self, pages: list[int], position: int) -> int:
        return pages[position // self.page_size] * self.page_size + position % self.page_size

    def _sample(self, slot: int, digest: int, index: int, failures: dict[int, str]) -> int:
        if not self._matchers.holds(slot):
            return _choose(digest, self.vocab_size, may_end=not self._params[slot].ignore_eos)
        [mask] = self._matchers.masks([slot])
        if mask is None:
            return NO_TOKEN
        if mask.error:
            failures[index] = mask.error
            return NO_TOKEN
        allowed = np.flatnonzero(~mask.is_banned)
        token_id = int(allowed[digest // 61 % len(allowed)])
        if token_id != FAKE_EOS_TOKEN_ID:
            self._matchers.advance([(slot, token_id)])
        return token_id

    def idle(self) -> bool:
        """See `ModelRunner`. Nothing here gets better by itself."""
        return False

    def learn(self, vocabulary: Vocabulary) -> None:
        """See `ModelRunner`."""
        self._grammars.learn(vocabulary)

    def prepare(self, grammar: str) -> Future[Constraint]:
        """See `ModelRunner`."""
        return self._grammars.prepare(grammar)

    def close(self) -> None:
        """See `ModelRunner`."""
        self._written.clear()
        self._grammars.close()
        self._matchers.close()
