"""What each slot's grammar allows next, computed beside the steps.

A worker takes in a slot's newest token and works out the next mask while the model computes; the
sampler asks for it when it needs it, and waits a moment at most: a grammar that is slow delays its
own request, nobody else's. Free of torch. Knows nothing of logits.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.grammar.grammars import MAX_TURN_S, CompiledGrammar, step_back

if TYPE_CHECKING:
    from llguidance import LLMatcher

_log = logging.getLogger(__name__)

#: How long a step waits for masks, in all.
TIMEOUT_S = 0.001
#: A slot whose mask once took longer is served by the other worker from then on.
_SLOW_S = 0.004
#: More tokens than this to catch up with (at 2 µs each) are for the other worker.
_MAX_REPLAYED_TOKENS = 500


@dataclass(frozen=True, slots=True)
class Turn:
    """What a grammar says of a sequence's next token."""

    #: `[vocab]`: true where a token is not allowed.
    is_banned: NDArray[np.bool_]
    num_allowed: int
    #: Why the request cannot go on, or empty.
    error: str = ""


class _Follower:
    """One sequence's way through its grammar. Used by one worker at a time."""

    def __init__(self, grammar: CompiledGrammar, token_ids: Sequence[int], vocab_size: int) -> None:
        self._grammar = grammar
        self._matcher: LLMatcher | None = None
        self._vocab_size = vocab_size
        self._mask = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        #: Tokens to be taken in; written by the engine's thread while no worker has it.
        self.pending = list(token_ids)
        self.is_slow = len(self.pending) > _MAX_REPLAYED_TOKENS
        #: None while a worker has it.
        self.turn: Turn | None = None

    def go_on(self) -> None:
        """Take in what is pending and work out the turn."""
        try:
            self.turn = self._next_turn()
        except Exception as fault:  # noqa: BLE001 - whatever it is, the other slots are to go on
            _log.exception("a grammar could not be followed")
            nothing = np.ones(self._vocab_size, dtype=np.bool_)
            self.turn = Turn(nothing, 0, f"the grammar failed: {type(fault).__name__}")

    def _next_turn(self) -> Turn:
        began_s = time.thread_time()
        if self._matcher is None:
            self._matcher = self._grammar.matcher()
        matcher, error = self._matcher, ""
        if self.pending:
            matcher.consume_tokens(self.pending)
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        if matcher.is_error():
            error = f"the grammar cannot be followed: {matcher.get_error().partition('<')[0]}"
        taken_s = time.thread_time() - began_s
        self.is_slow = self.is_slow or taken_s > _SLOW_S
        if taken_s > MAX_TURN_S and not error:
            error = f"the grammar is too complex: one token took {taken_s * 1e3:.0f} ms"
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little")[: self._vocab_size]
        is_banned = bits == 0
        return Turn(is_banned, self._vocab_size - int(is_banned.sum()), error.strip())


class _Worker:
    """A thread that lets followers go on, in the order in which they come."""

    def __init__(self, name: str, told: threading.Condition, *, steps_back: bool) -> None:
        self._queue: queue.SimpleQueue[list[_Follower]] = queue.SimpleQueue()
        self._told = told
        self._steps_back = steps_back
        self._thread: threading.Thread | None = None
        self._name = name

    def put(self, followers: list[_Follower]) -> None:
        """Let these go on. Starts the thread if need be."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._queue.put(followers)

    def close(self) -> None:
        """End the thread once all is done."""
        if self._thread is not None:
            self._queue.put([])
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        if self._steps_back:
            step_back()
        while followers := self._queue.get():
            for follower in followers:
                follower.go_on()
                with self._told:
                    self._told.notify()


class Matchers:
    """The grammars in the slots. All methods are for the engine's thread."""

    def __init__(self, vocab_size: int, *, timeout_s: float = TIMEOUT_S) -> None:
        self._vocab_size = vocab_size
        self._timeout_s = timeout_s
        self._slots: dict[int, _Follower] = {}
        self._told = threading.Condition()
        self._quick = _Worker("masks", self._told, steps_back=False)
        self._slow = _Worker("slow masks", self._told, steps_back=True)

    def start(self, slot: int, grammar: CompiledGrammar, output_token_ids: Sequence[int]) -> None:
        """Let a sequence follow a grammar from where its output is by now."""
        follower = _Follower(grammar, output_token_ids, self._vocab_size)
        self._slots[slot] = follower
        self._put([follower])

    def drop(self, slot: int) -> None:
        """Forget the slot: its sequence is another one."""
        self._slots.pop(slot, None)

    def holds(self, slot: int) -> bool:
        """Whether the slot's sequence follows a grammar."""
        return slot in self._slots

    def turns(self, slots: Sequence[int]) -> list[Turn | None]:
        """Return the turn of each slot; None: not known yet, even after the timeout."""
        followers = [self._slots[slot] for slot in slots]
        if any(follower.turn is None for follower in followers):
            with self._told:
                self._told.wait_for(
                    lambda: all(follower.turn is not None for follower in followers),
                    self._timeout_s,
                )
        return [follower.turn for follower in followers]

    def advance(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Take in (slot, token) of slots whose turn it was, and begin their next turns."""
        followers = []
        for slot, token_id in chosen:
            follower = self._slots[slot]
            assert follower.turn is not None, f"slot {slot} moves out of turn"
            follower.turn = None
            follower.pending = [token_id]
            followers.append(follower)
        self._put([follower for follower in followers if not follower.is_slow])
        self._put([follower for follower in followers if follower.is_slow])

    def _put(self, followers: list[_Follower]) -> None:
        if followers:
            (self._slow if followers[0].is_slow else self._quick).put(followers)

    def close(self) -> None:
        """End the workers."""
        self._quick.close()
        self._slow.close()
