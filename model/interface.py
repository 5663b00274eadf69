"""The interface of the scheduler and the model: plain types and two Protocols.

Knows nothing of torch, of pages' contents, of text or of HTTP. Everything here is plain data, so
that `scheduler/` can import it in a process (or a test) that has no torch at all.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from cache.moves import PageMove
from cache.selection import Selection
from cache.view import FULL_VIEW, View
from model.sampling_params import MAX_TOP_LOGPROBS, SamplingParams
from model.stored_pages import PageAccess, StoredPages

#: Parts of this interface that have modules of their own.
__all__ = ["MAX_TOP_LOGPROBS", "SamplingParams"]

#: In `StepInput.token_ids`: "the token which the step in flight before this one samples for this
#: slot". It lets step n+1 be launched before the tokens of step n are known on the host.
PENDING_TOKEN = -1
#: In `StepInput.token_ids`, as drafts: "the token that the draft model guesses in this place". Only
#: others follow one in its row. For runners with `ModelInfo.draft_model`.
GUESSED_TOKEN = -2

#: The most tokens of a sequence whose view is bounded, prompt and answer together.
MAX_BOUNDED_LEN = 2**20


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, before temperature and filters (OpenAI's)."""

    token_id: int
    logprob: float
    #: 1 for the likeliest token of the vocabulary.
    rank: int
    #: (token id, logprob), likeliest first.
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The bytes of every token: grammars are defined over bytes."""

    #: The bytes of all tokens one after another, and where those of each end. Two objects instead
    #: of one for each token: it is sent from process to process.
    packed: bytes
    ends: array[int]
    #: Tokens that are not text, regardless of their bytes.
    special_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]

    def tokens(self) -> Iterator[bytes]:
        """Yield each id's bytes; none for an id without a token."""
        start = 0
        for end in self.ends:
            yield self.packed[start:end]
            start = end


class Constraint(Protocol):
    """A grammar that a runner has made ready. Its contents are private to that runner."""


@dataclass(frozen=True, slots=True)
class SlotStart:
    """A sequence takes a slot: all the runner must remember of it from here on."""

    slot: int
    params: SamplingParams
    #: The prompt, for the repetition penalty.
    prompt_token_ids: Sequence[int]
    #: The tokens generated before (the sequence was preempted, or is resumed), for the penalties.
    output_token_ids: Sequence[int] = ()
    #: The result of `prepare` for `params.grammar`.
    constraint: Constraint | None = None
    #: The request's own; a model's windows are the model's.
    view: View = FULL_VIEW
    #: Where the sequence keeps a fixed number of keys: the way to choose them.
    selection: Selection | None = None


@dataclass(frozen=True, slots=True)
class ScoredSpan:
    """Tokens of a row after each of which the next token is to be scored."""

    row: int
    #: The first of them, counted from the row's own first.
    offset: int
    #: The tokens after each, which stand in the prompt.
    token_ids: list[int]


class RowSpan(NamedTuple):
    """The tokens that one row of a step computes."""

    #: Of the row's first token in the text: for rotation and sampling.
    position: int
    #: Keys of the sequence that are stored before it, which is the index of its own key in the
    #: row's pages. Fewer than `position` where the sequence dropped keys.
    stored: int
    count: int  # type: ignore[assignment] # a tuple's `count` is not used


class SampleSpan(NamedTuple):
    """Draw a token after each of a row's tokens `first .. first + count - 1`.

    The tokens behind the first are drafts: the span ends with the first drawn token that differs
    from the draft in its place. Each token is drawn exactly as it would be without drafts.
    """

    row: int
    first: int
    count: int  # type: ignore[assignment] # a tuple's `count` is not used


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step, row by row.

    The runner first drops keys, then processes `started`, then `moves` in order, then the forward
    pass. A page may be the source of one move and the target of a later one. The forward pass
    writes the rows' keys and values into their pages and reads all keys in view.

    Where a row's `position - stored` has grown since its slot's last step, the runner drops all but
    `stored` of the slot's keys. It chooses them by the `SlotStart.selection` and moves them to the
    front of the row's pages. The block table is then another list. It may have pages of the old
    one, whose other pages belong to others from this step on.

    Rows and samples are columns, which turn into arrays fastest; `rows` and `samples` are views.
    """

    #: Flat, `[sum of the rows' counts]`.
    token_ids: list[int]
    #: `[rows]` each, see `RowSpan`.
    positions: list[int]
    counts: list[int]
    #: `[rows]`, in `range(max_num_seqs)`; a slot belongs to one sequence at a time.
    slots: list[int]
    #: The block table of each row. Append-only while a slot keeps its sequence, and borrowed: the
    #: scheduler goes on appending to these very lists after `launch` has returned. Entries of
    #: pages without a key in view are any valid page: nothing may be read there.
    page_ids: list[list[int]]
    #: The rows that sample, ascending: each after its last token.
    sample_rows: list[int]
    moves: list[PageMove] = field(default_factory=list)
    started: list[SlotStart] = field(default_factory=list)
    scored: list[ScoredSpan] = field(default_factory=list)
    #: By row: how many keys its sequence dropped, which is `position - stored`.
    dropped: dict[int, int] = field(default_factory=dict)
    #: By index in `sample_rows`: spans that are not the row's last token alone.
    spans: dict[int, SampleSpan] = field(default_factory=dict)
    #: With `ModelInfo.windowed` the block table of each row in the pages of the windowed layers, as
    #: `page_ids`; else empty.
    windowed_page_ids: list[list[int]] = field(default_factory=list)

    @property
    def rows(self) -> list[RowSpan]:
        """The spans of all rows."""
        return [
            RowSpan(position, position - self.dropped.get(row, 0), count)
            for row, (position, count) in enumerate(zip(self.positions, self.counts, strict=True))
        ]

    @property
    def samples(self) -> list[SampleSpan]:
        """The spans after whose tokens one is drawn, in ascending order of their rows."""
        return [
            self.spans.get(index) or SampleSpan(row, self.counts[row] - 1, 1)
            for index, row in enumerate(self.sample_rows)
        ]

    @property
    def sample_positions(self) -> list[int]:
        """The position in the text of each span's first drawn token."""
        positions, counts = self.positions, self.counts
        found = [positions[row] + counts[row] for row in self.sample_rows]
        for index, span in self.spans.items():
            found[index] = positions[span.row] + span.first + 1
        return found


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The tokens a step sampled: parallel to `StepInput.samples`."""

    #: The tokens of each span, at least one. Empty where the grammar's mask was not ready in time,
    #: and where the span failed: then its last known token is to be computed again.
    #: A row whose request has `max_tokens` 0 has some token here too.
    token_ids: list[list[int]]
    #: Of the same tokens, empty where the row's request asked for none; the whole list is empty
    #: where no request did.
    logprobs: list[list[TokenLogprobs]] = field(default_factory=list)
    #: By index: why a row's request cannot go on.
    failures: dict[int, str] = field(default_factory=dict)
    #: Indices of spans without a token whose largest logit is NaN or infinite: the model or the
    #: contents of the row's pages are at fault.
    not_finite: list[int] = field(default_factory=list)
    #: Parallel to `StepInput.scored`, an entry a token.
    prompt_logprobs: list[tuple[TokenLogprobs, ...]] = field(default_factory=list)
    #: By row: the guesses of the draft model in the places of `GUESSED_TOKEN`.
    guesses: dict[int, list[int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class WindowedPages:
    """The pages of the windowed layers of a model whose other layers read all keys."""

    num_pages: int
    kv_bytes_per_token: int
    #: The widest of these layers.
    view: View


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Properties of a built model, constant from start to end."""

    name: str
    #: Longest sequence, prompt and output together, in tokens.
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    page_size: int
    #: With `windowed`, of the layers that read all keys.
    num_pages: int
    #: In all layers.
    kv_bytes_per_token: int
    weights_bytes: int
    #: Of the activations, the weights, the keys and values, for display.
    dtype: str
    quantization: str
    kv_cache_dtype: str
    device: str
    attention_backend: str
    #: Reused prefixes are a multiple of it: of pages where a page is encoded as a whole.
    smallest_reusable_prefix_tokens: int = 1
    #: The view of the whole model: windowed only if each layer is.
    view: View = FULL_VIEW
    #: None: all layers have the same pages.
    windowed: WindowedPages | None = None
    #: Tokens that the pages hold, as a multiple of those in 16 bits in the same memory.
    kv_factor: float = 1.0
    #: The name of the draft model; empty where there is none.
    draft_model: str = ""
    #: On a GPU, the uses of its memory: (name, bytes).
    device_bytes: tuple[tuple[str, int], ...] = ()
    #: Decisions an operator should know: "compiled CPU op not available: no g++; using torch".
    notes: tuple[str, ...] = ()
    #: Why no request can have a view of its own; empty where it can.
    why_no_views: str = ""
    #: Why none can keep keys by their scores, where it can have a view.
    why_no_selections: str = ""
    stored_pages: StoredPages | None = None

    def why_not(self, *, is_selection: bool) -> str:
        """Return why no request can have a view, or a selection, of its own; empty where it can."""
        return self.why_no_views or (self.why_no_selections if is_selection else "")

    def max_len(self, view: View) -> int:
        """Return the most tokens of a request of this view, prompt and answer together.

        No query of a bounded view is further from a key than the model's context, so only the
        keys that it reads have to fit.
        """
        view = view.within(self.view)
        max_keys = view.max_keys
        if view == self.view or max_keys is None or max_keys > self.max_model_len:
            return self.max_model_len
        return MAX_BOUNDED_LEN


class InFlightStep(Protocol):
    """A step under way."""

    def wait(self) -> StepOutput:
        """Block until the step is done. Called exactly once."""


class ModelRunner(PageAccess, Protocol):
    """Turns steps into tokens. One step's `launch` may precede the `wait` of the step before."""

    @property
    def info(self) -> ModelInfo:
        """The built model."""

    @property
    def max_steps_in_flight(self) -> int:
        """Steps that may be under way at a time: launched and not yet waited for."""

    def launch(self, step: StepInput) -> InFlightStep:
        """Start computing a step; steps in flight are waited for in the order they were launched.

        Nothing of it is seen by a step launched before, all of it by those after.
        """

    def idle(self) -> bool:
        """Run background work for some milliseconds; return whether more of it is left."""

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Set the tokens' bytes; needed once, before the first grammar."""

    def prepare(self, grammar: str) -> Future[Constraint]:
        """Make a grammar ready in another thread, beside steps. May be done when it is returned.

        The future raises `ValueError` for a grammar that cannot be used.
        """

    def forced_tokens(self, slot: int) -> list[int]:
        """Return the next tokens that the grammar in a slot forces, or none: a guess at a draft."""

    def close(self) -> None:
        """Release all resources. The runner is not used afterwards."""
