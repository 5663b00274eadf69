"""The next token mask of each slot's grammar, computed beside the steps.

A worker advances a slot's matcher by the newest token and computes the next mask while the model
runs. The sampler waits for masks only for a moment, so a slow grammar delays its own request
alone. Free of torch. Knows nothing of logits.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.grammar.grammars import MAX_MASK_S, CompiledGrammar, lower_priority

if TYPE_CHECKING:
    from llguidance import LLMatcher

_log = logging.getLogger(__name__)

#: How long a step waits for all its masks together.
MASK_TIMEOUT_S = 0.001
#: After one mask that took longer, a slot is served by the slow worker.
_SLOW_S = 0.004
#: Of the slow worker, beside the threads that compute tokens: see `lower_priority`.
_SLOW_NICENESS = 10
#: More tokens than this to replay (at 2 µs each) are for the slow worker.
_MAX_REPLAYED_TOKENS = 500


@dataclass(frozen=True, slots=True)
class TokenMask:
    """The tokens that a grammar forbids as a sequence's next one."""

    #: `[vocab]`: true where a token is not allowed.
    is_banned: NDArray[np.bool_]
    num_allowed: int
    #: Why the request cannot go on, or empty.
    error: str = ""


class _SlotMatcher:
    """The place of one sequence in its grammar. Used by one worker at a time."""

    def __init__(self, grammar: CompiledGrammar, token_ids: Sequence[int], vocab_size: int) -> None:
        self._grammar = grammar
        self._matcher: LLMatcher | None = None
        #: The tokens that the matcher has consumed, for a new one in its place.
        self._consumed: list[int] = []
        self._vocab_size = vocab_size
        self._bits = np.zeros(-(-vocab_size // 32), dtype=np.int32)
        #: Tokens not yet consumed; written by the engine's thread while no worker runs this.
        self.pending = list(token_ids)
        self.is_slow = len(self.pending) > _MAX_REPLAYED_TOKENS
        #: None while a worker runs this.
        self.mask: TokenMask | None = None

    def advance(self) -> None:
        """Consume the pending tokens and compute the mask."""
        try:
            self.mask = self._next_mask()
        except Exception as fault:  # noqa: BLE001 - no fault of one slot may stop the others
            _log.exception("a grammar could not be followed")
            everything = np.ones(self._vocab_size, dtype=np.bool_)
            self.mask = TokenMask(everything, 0, f"the grammar failed: {type(fault).__name__}")

    def _next_mask(self) -> TokenMask:
        began_s = time.thread_time()
        if self._matcher is None:
            self._matcher = self._grammar.matcher()
            self._matcher.consume_tokens(self._consumed)
        matcher = self._matcher
        if self.pending:
            matcher.consume_tokens(self.pending)
            self._consumed += self.pending
        return self._mask(matcher, began_s)

    def _mask(self, matcher: LLMatcher, began_s: float) -> TokenMask:
        error = ""
        if not matcher.is_error():
            matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if matcher.is_error():
            error = f"the grammar cannot be followed: {matcher.get_error().partition('<')[0]}"
        taken_s = time.thread_time() - began_s
        self.is_slow = self.is_slow or taken_s > _SLOW_S
        if taken_s > MAX_MASK_S and not error:
            error = f"the grammar is too complex: one token took {taken_s * 1e3:.0f} ms"
        bits = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: self._vocab_size]
        is_banned = bits == 0
        return TokenMask(is_banned, self._vocab_size - int(is_banned.sum()), error.strip())

    def look_ahead(self, draft: Sequence[int], timeout_s: float) -> list[TokenMask]:
        """Return the masks behind the draft's tokens, as far as these are allowed and time lasts.

        The matcher stays where it is.
        """
        matcher, mask, found = self._matcher, self.mask, list[TokenMask]()
        assert mask is not None, "a worker runs this matcher"
        if matcher is None:
            return []
        end_s = time.monotonic() + timeout_s
        try:
            for token_id in draft:
                if mask.is_banned[token_id] or time.monotonic() > end_s:
                    break
                if not matcher.consume_token(token_id):
                    break
                mask = self._mask(matcher, time.thread_time())
                found.append(mask)
                if mask.error:
                    break
            is_back = matcher.rollback(len(found)) and not matcher.is_error()
        except Exception:  # noqa: BLE001 - as in `advance`
            _log.exception("a grammar could not be followed along a draft")
            is_back = False
        if not is_back:
            # A fault behind a draft harms no request: the next mask comes from a new matcher.
            self._matcher = None
        return [mask for mask in found if not mask.error]


class Matchers:
    """The grammars in the slots. All methods are for the engine's thread."""

    def __init__(self, vocab_size: int, *, mask_timeout_s: float = MASK_TIMEOUT_S) -> None:
        self._vocab_size = vocab_size
        self._mask_timeout_s = mask_timeout_s
        self._slots: dict[int, _SlotMatcher] = {}
        self._finished = threading.Condition()
        self._quick = ThreadPoolExecutor(1, "masks")
        self._slow = ThreadPoolExecutor(
            1, "slow masks", initializer=lower_priority, initargs=(_SLOW_NICENESS,)
        )

    def start(self, slot: int, grammar: CompiledGrammar, output_token_ids: Sequence[int]) -> None:
        """Match a sequence against a grammar from the end of its output on."""
        self._slots[slot] = _SlotMatcher(grammar, output_token_ids, self._vocab_size)
        self._submit([self._slots[slot]])

    def drop(self, slot: int) -> None:
        """Remove the slot's matcher, if it has one."""
        self._slots.pop(slot, None)

    def holds(self, slot: int) -> bool:
        """Return whether the slot's sequence has a grammar."""
        return slot in self._slots

    def masks(self, slots: Sequence[int]) -> list[TokenMask | None]:
        """Return the mask of each slot; None: not ready within the timeout."""
        matchers = [self._slots[slot] for slot in slots]
        if any(matcher.mask is None for matcher in matchers):
            with self._finished:
                self._finished.wait_for(
                    lambda: all(matcher.mask is not None for matcher in matchers),
                    self._mask_timeout_s,
                )
        return [matcher.mask for matcher in matchers]

    def forced(self, slot: int) -> list[int]:
        """Return the next token if a slot's grammar leaves no choice of it, else none.

        Longer forced texts are not looked for: the library follows them to their end. The states
        of its lexer are limited for all matchers of a grammar together. Waits for the slot's mask
        until the timeout.
        """
        [mask] = self.masks([slot]) if self.holds(slot) else [None]
        is_forced = mask is not None and not mask.error and mask.num_allowed == 1
        return [int(mask.is_banned.argmin())] if mask and is_forced else []

    def look_ahead(self, slot: int, draft: Sequence[int]) -> list[TokenMask | None]:
        """Return the masks behind each token of a draft; None where they are not to be had.

        That is behind a token that the grammar forbids, past the timeout, and with slow grammars.
        """
        matcher, found = self._slots[slot], list[TokenMask | None]()
        if matcher.mask is not None and not matcher.mask.error and not matcher.is_slow:
            found += matcher.look_ahead(draft, self._mask_timeout_s)
        return [*found, *[None] * (len(draft) - len(found))]

    def advance(self, chosen: Sequence[tuple[int, list[int]]]) -> None:
        """Consume (slot, tokens) of slots with a mask, and start computing their next masks."""
        matchers = []
        for slot, token_ids in chosen:
            matcher = self._slots[slot]
            assert matcher.mask is not None, f"slot {slot} advances without a mask"
            matcher.mask = None
            matcher.pending = token_ids
            matchers.append(matcher)
        self._submit(matchers)

    def _submit(self, matchers: list[_SlotMatcher]) -> None:
        # Sorted before the first is submitted: a worker may find that a matcher is slow.
        quick = [matcher for matcher in matchers if not matcher.is_slow]
        slow = [matcher for matcher in matchers if matcher.is_slow]
        for worker, own in ((self._quick, quick), (self._slow, slow)):
            if own:
                worker.submit(self._run, own)

    def _run(self, matchers: list[_SlotMatcher]) -> None:
        """Advance matchers; runs in a worker."""
        for matcher in matchers:
            matcher.advance()
            with self._finished:
                self._finished.notify()

    def close(self) -> None:
        """End the workers once they are idle."""
        self._quick.shutdown()
        self._slow.shutdown()
