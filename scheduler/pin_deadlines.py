"""The pins of requests: set when a prompt is computed, renewed by use, ended when they expire.

Is given the time, and has no clock. Knows nothing of steps.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import product

from cache.kv_cache import KVCache
from cache.pins import LIFETIMES_S, Pin, PinEnd
from scheduler.messages import GenerateRequest, Pinned, PinPrefix, StepResult, UnpinPrefix

#: Entries of pins that have ended are dropped when they are most of more than so many.
_MIN_ENTRIES = 64


class PinDeadlines:
    """Pins the prompts of one cache until their deadlines."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        #: Requests with pins whose prompts are not computed yet.
        self._waiting: dict[int, GenerateRequest] = {}
        #: Of each pin in the heap, when it ends if it is not used again. The heap has one entry a
        #: pin, with this time or an earlier one; the ticket is unique.
        self._deadlines_s: dict[Pin, float] = {}
        self._heap: list[tuple[float, int, Pin]] = []
        self._last_ticket = 0

    def expect(self, request_id: int, request: GenerateRequest) -> None:
        """Note a request, whose pins are set when its prompt is computed."""
        if request.pins:
            self._waiting[request_id] = request

    def forget(self, request_id: int) -> None:
        """Drop a request that ended before that."""
        self._waiting.pop(request_id, None)

    def advance(self, now_s: float) -> None:
        """Renew the pins used since the last call, and end the expired ones."""
        for group in self._cache.groups:
            for pin in group.pins.take_used():
                self._extend(pin, now_s)
        while self._heap and self._heap[0][0] <= now_s:
            _, _, pin = heappop(self._heap)
            deadline_s = self._deadlines_s.pop(pin)
            if pin.is_live and deadline_s > now_s:
                self._push(pin, deadline_s)
            elif pin.is_live:
                pin.pins.end(pin, PinEnd.EXPIRED)

    def land(self, result: StepResult, now_s: float) -> None:
        """Set the pins of the prompts that a step completed, and report them in its result."""
        if not self._waiting:
            return
        ended = [request_id for request_id, _ in result.finished]
        for request_id in dict.fromkeys([*result.request_ids, *ended]):
            if request := self._waiting.pop(request_id, None):
                result.pinned.append(self._pin_prompt(request_id, request, now_s))
        for request_id, _ in result.failed:
            self.forget(request_id)

    def answer(self, command: PinPrefix | UnpinPrefix, now_s: float) -> int:
        """Run an operator's command; return the number of pinned pages, or of ended pins."""
        num_changed = 0
        for group in self._cache.groups:
            path = group.covering(command.token_ids, command.namespace)
            if isinstance(command, UnpinPrefix):
                num_changed += sum(group.pins.end_at(node, PinEnd.REMOVED) for node in path)
                continue
            pin, _ = group.pins.add(path, command.owner, command.lifetime)
            if pin is not None:
                self._extend(pin, now_s)
                num_changed += len(path)
        return num_changed

    def _pin_prompt(self, request_id: int, request: GenerateRequest, now_s: float) -> Pinned:
        num_refused = num_displaced = 0
        for (num_tokens, lifetime), group in product(request.pins, self._cache.groups):
            tokens = request.prompt_token_ids[:num_tokens]
            path = group.covering(tokens, request.namespace)
            pin, num_ended = group.pins.add(path, request.owner, lifetime)
            num_displaced += num_ended
            if pin is not None:
                self._extend(pin, now_s)
            elif path:
                num_refused += 1
        return Pinned(request_id, num_refused, num_displaced)

    def _extend(self, pin: Pin, now_s: float) -> None:
        if not pin.is_live:
            return
        deadline_s = now_s + LIFETIMES_S[pin.lifetime]
        if pin in self._deadlines_s:
            self._deadlines_s[pin] = deadline_s
        else:
            self._push(pin, deadline_s)

    @property
    def _num_pins(self) -> int:
        return sum(len(group.pins) for group in self._cache.groups)

    def _push(self, pin: Pin, deadline_s: float) -> None:
        if len(self._heap) > max(_MIN_ENTRIES, 2 * self._num_pins):
            self._deadlines_s = {pin: at for pin, at in self._deadlines_s.items() if pin.is_live}
            self._heap = [entry for entry in self._heap if entry[2].is_live]
            heapify(self._heap)
        self._last_ticket += 1
        self._deadlines_s[pin] = deadline_s
        heappush(self._heap, (deadline_s, self._last_ticket, pin))

    def check(self) -> None:
        """Assert that each pin has one entry, at its deadline or earlier."""
        entries = {pin: deadline_s for deadline_s, _, pin in self._heap}
        assert len(entries) == len(self._heap), "a pin has two entries"
        assert entries.keys() == self._deadlines_s.keys(), "an entry without a deadline"
        assert all(at <= self._deadlines_s[pin] for pin, at in entries.items()), "an entry is late"
        pins = [pin for group in self._cache.groups for pin in group.pins]
        assert all(pin in entries for pin in pins), "a pin has no deadline"
