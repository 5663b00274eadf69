"""One request as the scheduler sees it, and the table of states it may pass through.

Knows nothing of pages (an allocation is held for the cache, unread but for its block table) nor of
what tokens mean.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum
from sys import maxsize

from cache.allocation import Allocation
from cache.pending_pages import NextPage
from cache.view import FULL_VIEW, View
from model.interface import PENDING_TOKEN, Constraint, SlotStart
from scheduler.messages import FinishReason, Submit

_HISTORY_MOVES = 8


class State(StrEnum):
    """Where a sequence stands."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


#: All moves there are: admitted, preempted, ended; any other is a bug.
TRANSITIONS: dict[State, frozenset[State]] = {
    State.WAITING: frozenset({State.RUNNING, State.FINISHED}),
    State.RUNNING: frozenset({State.WAITING, State.FINISHED}),
    State.FINISHED: frozenset(),
}


class InvalidTransitionError(Exception):
    """A move that is not in the table; the message holds the sequence's last moves."""


class Sequence:
    """`len(token_ids)` tokens are known, `num_computed` of them have keys and values in pages.

    Prefill, decode, a prefix hit and resumption after preemption are the same: each step computes
    some of `len(token_ids) - num_computed` tokens. A step that reaches the end samples one more.
    Both count from when the step is planned. Until it is over, a `PENDING_TOKEN` stands for the
    sampled token, and only the keys and values of `num_completed` tokens are certain.
    """

    __slots__ = (
        "allocation",
        "arrival",
        "constraint",
        "finish_reason",
        "history",
        "is_drafted",
        "is_started",
        "max_len_tokens",
        "max_stored_tokens",
        "min_len_tokens",
        "next_page",
        "num_completed",
        "num_computed",
        "num_dropped",
        "num_prompt",
        "num_rollbacks",
        "num_scored",
        "num_to_score",
        "own_view",
        "params",
        "request",
        "request_id",
        "selection",
        "slot",
        "stalled_len_tokens",
        "state",
        "stop_ids",
        "token_ids",
        "trusts_cache",
        "view",
    )

    def __init__(
        self,
        submit: Submit,
        *,
        arrival: int,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        constraint: Constraint | None = None,
        model_view: View = FULL_VIEW,
    ) -> None:
        self.request = request = submit.request
        params = request.params
        #: Kept for the runner, which may drop a grammar as soon as it is not referenced.
        self.constraint = constraint
        self.request_id = submit.request_id
        self.token_ids: list[int] = [*request.prompt_token_ids, *submit.output_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.num_computed = 0
        self.num_completed = 0
        #: Of the computed tokens, how many have no stored keys any more.
        self.num_dropped = 0
        #: Results of steps planned before the last rollback are void.
        self.num_rollbacks = 0
        #: Whether it may read cached pages and have its own cached: not after logits that were not
        #: finite, since any of its pages may hold such keys and values.
        self.trusts_cache = True
        #: How many of the prompt's tokens are to be scored, and have been. The logits at token i
        #: score token i + 1, so all up to `num_scored` may come out of the cache.
        self.num_to_score = 0 if params.prompt_logprobs is None else self.num_prompt - 1
        self.num_scored = submit.num_scored
        self.params = params
        #: The keys that its queries read; and the same, if it is not the model's own view.
        self.view = request.view.within(model_view)
        self.own_view = FULL_VIEW if self.view == model_view else self.view
        #: Order of submission: with the priority, the order of precedence.
        self.arrival = arrival
        self.stop_ids = frozenset(params.stop_token_ids) | (
            frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        )
        self.min_len_tokens = self.num_prompt + params.min_tokens
        self.max_len_tokens = min(self.num_prompt + params.max_tokens, max_model_len)
        #: How it chooses the keys to keep; None where it never drops keys by their scores.
        self.selection = request.selection
        if self.selection is not None and not self.selection.is_reached(
            self.num_prompt, self.max_len_tokens
        ):
            self.selection = None
        #: How many of its tokens may stay cached.
        self.max_stored_tokens = maxsize if request.store_up_to is None else request.store_up_to
        if self.selection is not None:
            self.max_stored_tokens = min(self.max_stored_tokens, self.num_prompt)
        self.allocation: Allocation | None = None
        #: While it waits: the first page that it cannot reuse, when it was last looked up.
        self.next_page: NextPage | None = None
        self.slot = -1
        #: With so many tokens, known or pending, it last lacked room for the next one.
        self.stalled_len_tokens = 0
        self.is_started = False
        #: Whether a step under way verifies drafts for it.
        self.is_drafted = False
        self.finish_reason: FinishReason | None = None
        self.state = State.WAITING
        self.history: deque[str] = deque(["submitted"], maxlen=_HISTORY_MOVES)

    @property
    def precedence(self) -> tuple[int, int]:
        """Smaller runs first and is preempted last."""
        return self.request.priority, self.arrival

    @property
    def has_begun(self) -> bool:
        """Whether anything was computed for it, by this engine or for its client by another."""
        has_tokens = len(self.token_ids) > self.num_prompt or self.num_scored > 0
        return self.is_started or has_tokens

    @property
    def max_cached_tokens(self) -> int | None:
        """How many of its tokens may be reused from the cache; None: any number."""
        if not self.trusts_cache:
            return 0
        if self.selection is not None:
            limit = self.selection.max_cached_tokens(self.num_prompt)
            return min(limit, self.num_scored) if self.num_scored < self.num_to_score else limit
        return self.num_scored if self.num_scored < self.num_to_score else None

    @property
    def num_stored(self) -> int:
        """How many keys its pages hold, those of steps under way included."""
        return self.num_computed - self.num_dropped

    @property
    def num_due(self) -> int:
        """How many keys are to be gone when its next token is computed."""
        if self.selection is None:
            return 0
        return self.selection.num_dropped(self.num_computed, self.num_prompt)

    @property
    def is_full(self) -> bool:
        """Whether it has to drop keys before its next token is computed."""
        return self.num_due > self.num_dropped

    def tokens_to_point(self) -> int:
        """Return how many tokens the next step may compute: none crosses a compaction point."""
        if self.selection is None:
            return len(self.token_ids)
        if self.is_full:
            return 0
        return self.selection.next_point(self.num_computed, self.num_prompt) - self.num_computed

    def move(self, to: State, why: str) -> None:
        """Change state. Raises `InvalidTransitionError` for a move the table does not have."""
        if to not in TRANSITIONS[self.state]:
            past = ", ".join(self.history)
            message = f"request {self.request_id}: {self.state} -> {to} ({why}) after: {past}"
            raise InvalidTransitionError(message)
        self.state = to
        self.history.append(why)

    @property
    def awaits_token(self) -> bool:
        """Whether it goes on, if at all, only once its newest token is known.

        With a grammar always, as that token may fail to come, with drafts, as their number is not
        known, and where there is no room for more. Also where keys are to be dropped first, and
        where it missed a step: a step continues the tokens of the one before it alone.
        """
        if self.token_ids[-1] != PENDING_TOKEN:
            return False
        length = len(self.token_ids)
        if length == self.stalled_len_tokens:
            return True
        has_to_wait = self.constraint is not None or self.is_drafted
        return has_to_wait or length >= self.max_len_tokens or self.is_full

    def slot_start(self) -> SlotStart:
        """Return all the runner must store of it."""
        tokens, num_prompt = self.token_ids, self.num_prompt
        return SlotStart(
            self.slot,
            self.params,
            tokens[:num_prompt],
            tokens[num_prompt:],
            self.constraint,
            self.own_view,
            self.selection,
        )

    def land(self, position: int, token_ids: list[int]) -> list[int]:
        """Enter the tokens from `position` on; return those up to the first that ends it."""
        for count, token_id in enumerate(token_ids):
            self.token_ids[position + count : position + count + 1] = [token_id]
            if self.stop_reason(position + count):
                return token_ids[: count + 1]
        return token_ids

    def stop_reason(self, position: int) -> FinishReason | None:
        """Return why the sequence ends with the token at `position`, or None if it goes on."""
        length = position + 1
        if self.token_ids[position] in self.stop_ids and (
            # A grammar may be at its end before min_tokens are had: then the end is all there is.
            length > self.min_len_tokens or self.params.grammar is not None
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if length >= self.max_len_tokens else None
