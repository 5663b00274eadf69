"""All unfinished sequences, waiting and running, with their pages and slots.

Knows nothing of steps and budgets, nor of why a sequence moves.
"""

from __future__ import annotations

from bisect import insort
from collections import deque

from cache.allocation import Allocation
from cache.kv_cache import KVCache
from model.interface import PENDING_TOKEN
from scheduler.compaction import compact, num_fixed_pages
from scheduler.messages import FinishReason
from scheduler.queue import WaitingQueue
from scheduler.sequence import Sequence, State


class SequenceTable:
    """Moves sequences, with their pages and slots, between waiting, running and finished."""

    def __init__(self, cache: KVCache, max_num_seqs: int, page_size: int) -> None:
        self._cache = cache
        self._page_size = page_size
        self._max_num_seqs = max_num_seqs
        self.waiting = WaitingQueue()
        #: In order of precedence: the last is the first to be preempted.
        self.running: list[Sequence] = []
        self.requests: dict[int, Sequence] = {}
        self.free_slots = deque(range(max_num_seqs))
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence at the end of its priority."""
        self.requests[sequence.request_id] = sequence
        self.waiting.append(sequence)

    def admit(self, sequence: Sequence, reserve_pages: int) -> Allocation | None:
        """Give a waiting sequence pages and a free slot; None, and nothing changed, without room.

        `reserve_pages`: so many more must be available afterwards.
        """
        tokens, num_fixed = sequence.token_ids, num_fixed_pages(sequence, self._page_size)
        if num_fixed:
            # Behind the prompt, its pages will hold the keys of other tokens.
            tokens = tokens[: sequence.num_prompt]
            reserve_pages += num_fixed - self._cache.bounds.pages(len(tokens))
        allocation = self._cache.admit(
            tokens,
            sequence.request.namespace,
            reserve_pages,
            sequence.max_cached_tokens,
            sequence.own_view,
            sequence.max_stored_tokens,
        )
        if allocation is None:
            return None
        has_all = self._cache.grow(allocation, num_fixed * self._page_size)
        assert has_all, "pages that were reserved are gone"
        num_cached = allocation.num_cached_tokens
        sequence.move(State.RUNNING, f"admitted with {num_cached} cached tokens")
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda running: running.precedence)
        sequence.allocation, sequence.next_page = allocation, None
        sequence.num_computed = sequence.num_completed = num_cached
        sequence.slot = self.free_slots.popleft()
        return allocation

    def grow(self, sequence: Sequence) -> bool:
        """Make room for the next token, at the cost of the sequences of least precedence.

        False where the sequence itself had to be preempted. Sequences that drop keys by their
        scores are spared: they would have to compute all their tokens again. They have all pages
        that they ever need, and room after the compaction that is due.
        """
        assert sequence.allocation is not None, "a running sequence without pages"
        if sequence.is_full:
            return True
        while not self._cache.grow(sequence.allocation, sequence.num_stored + 1):
            victim = next(one for one in reversed(self.running) if one.selection is None)
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def go_on(self, sequence: Sequence) -> bool:
        """Make room for the next token; False where there is none now.

        None is preempted while a step of the sequence is under way. Under a window that step may
        give pages back, and a sequence that preempted itself would lose the step's tokens each
        time. Called before any row of less precedence is planned.
        """
        assert sequence.allocation is not None, "a running sequence without pages"
        if sequence.is_full:
            return False
        if sequence.num_completed < sequence.num_computed:
            has_room = self._cache.grow(sequence.allocation, sequence.num_stored + 1)
            if not has_room:
                sequence.stalled_len_tokens = len(sequence.token_ids)
            return has_room
        return self.grow(sequence)

    def compact_decodes(self) -> None:
        """Let the sequences that lack one token drop keys, where they have to: see `compact`."""
        for sequence in self.running:
            if sequence.selection is not None and (
                len(sequence.token_ids) - sequence.num_computed == 1
            ):
                compact(sequence, self._cache)

    def take_back(self, sequence: Sequence, position: int) -> None:
        """Take back the placeholder of a token that did not come."""
        assert len(sequence.token_ids) == position + 1, "a step counts on a token that did not come"
        if sequence.state is State.WAITING:
            self.waiting.drop_last_token(sequence)
        else:
            del sequence.token_ids[-1]
            sequence.num_computed -= 1

    def chunk(self, sequence: Sequence, budget_tokens: int) -> int:
        """Return how many missing tokens the next step can compute without a preemption.

        If there are any, the next step has to compute them.
        """
        compact(sequence, self._cache)
        allocation, end = sequence.allocation, sequence.num_stored
        assert allocation is not None, "a running sequence without pages"
        num_missing = len(sequence.token_ids) - sequence.num_computed
        count = min(num_missing, budget_tokens, sequence.tokens_to_point())
        if self._cache.grow(allocation, end + count):
            return count
        return len(allocation.shortest_page_ids) * self._page_size - end

    def draft_room(self, sequence: Sequence, num_tokens: int) -> int:
        """Return for how many tokens of a draft there is room, at most `num_tokens`.

        Nothing is preempted for drafts, and a page for each running sequence stays available.
        """
        allocation, end = sequence.allocation, sequence.num_computed
        assert allocation is not None, "a running sequence without pages"
        if not self._cache.can_grow(allocation, end + num_tokens, len(self.running)):
            return len(allocation.shortest_page_ids) * self._page_size - end
        self._cache.grow(allocation, end + num_tokens)
        return num_tokens

    def preempt(self, sequence: Sequence) -> None:
        """Take the pages back; the tree keeps their contents, so resuming costs almost nothing."""
        self.num_preemptions += 1
        self._leave(sequence, State.WAITING, "preempted")
        self.waiting.append_first(sequence)

    def roll_back(self, sequence: Sequence) -> None:
        """Forget all steps under way with a sequence, and let it wait as if preempted before them.

        A sequence that does not trust the cache takes its cached pages with it.
        """
        sequence.num_rollbacks += 1
        sequence.is_drafted = False
        if sequence.state is State.WAITING:
            while sequence.token_ids[-1] == PENDING_TOKEN:
                self.waiting.drop_last_token(sequence)
            return
        while sequence.token_ids[-1] == PENDING_TOKEN:
            del sequence.token_ids[-1]
        self._leave(sequence, State.WAITING, "rolled back")
        self.waiting.append_first(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence and take back its pages and slot."""
        if sequence.state is State.RUNNING:
            self._leave(sequence, State.FINISHED, reason)
        else:
            self.waiting.remove(sequence)
            sequence.move(State.FINISHED, reason)
        sequence.finish_reason = reason
        del self.requests[sequence.request_id]

    def _leave(self, sequence: Sequence, to: State, why: str) -> None:
        assert sequence.allocation is not None, "a running sequence without pages"
        sequence.move(to, why)
        # A step under way may still write to these pages. It does so before all steps planned from
        # now on, so their next owner loses nothing.
        if sequence.trusts_cache:
            self._cache.free(sequence.allocation, sequence.token_ids, sequence.num_completed)
        else:
            self._cache.discard(sequence.allocation)
        sequence.allocation = None
        sequence.num_computed = sequence.num_completed = 0
        sequence.num_dropped = 0
        self.running.remove(sequence)
        self.free_slots.append(sequence.slot)
        sequence.slot = -1

    def check(self) -> None:
        """Assert that each sequence is in one place, with its pages and slot."""
        self.waiting.check()
        running, waiting = self.running, list(self.waiting)
        assert running == sorted(running, key=lambda s: s.precedence), "running is out of order"
        assert all(s.state is State.RUNNING for s in running), "running in name only"
        assert all(s.state is State.WAITING for s in waiting), "waiting in name only"
        assert all(s.allocation is None for s in waiting), "a waiting sequence holds pages"
        assert all(s.num_computed == 0 for s in waiting), "a waiting sequence has computed tokens"
        slots = sorted([*self.free_slots, *(s.slot for s in running)])
        assert slots == list(range(self._max_num_seqs)), "a slot is lost or doubly used"
        live = sorted(s.request_id for s in [*running, *waiting])
        assert live == sorted(self.requests), "a request is neither running nor waiting"
        for sequence in running:
            assert sequence.allocation is not None, "a running sequence without pages"
            held = len(sequence.allocation.shortest_page_ids) * self._page_size
            assert sequence.num_stored <= held, "computed more than its pages hold"
            num_needed = num_fixed_pages(sequence, self._page_size)
            if num_needed:
                assert held <= num_needed * self._page_size, "it holds more than its bound"
            if sequence.num_dropped and sequence.selection is not None:
                most = sequence.selection.max_keys
                assert held < most + self._page_size, "it holds more than its keys need"
            cached = sequence.allocation.num_cached_tokens
            assert cached <= sequence.num_completed, "shared pages would be written again"
            assert sequence.num_completed <= sequence.num_computed, "more came back than was sent"
            assert sequence.num_computed < len(sequence.token_ids), "nothing left to compute"
        cache = self._cache.stats()
        assert running or cache.pages_private == cache.pages_leased == 0, "nothing runs, pages held"
