"""Stored responses, separate for each owner, and bounded in number, in bytes and in age.

A conversation is a chain of turns. Each turn has its own items and points at the turn before it,
so a chain of n turns holds each item once:

    stored response ──> turn ──parent──> turn ──parent──> turn
    stored response ──────────────────────┘

The store keeps a turn while a stored response or a later turn refers to it, so clients may delete
the response before. Pure bookkeeping: no clock, no I/O. Knows nothing of the JSON in the bytes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

#: Of the objects around the bytes.
_TURN_BYTES = 512
_STORED_BYTES = 512


@dataclass(slots=True, eq=False)
class Turn:
    """The items of one response: its input and its output."""

    #: The turn before.
    parent: Turn | None = field(repr=False)
    #: Two JSON arrays.
    input_json: bytes = field(repr=False)
    output_json: bytes = field(repr=False)
    #: In both.
    num_items: int
    #: With all turns before it.
    chain_bytes: int = field(init=False)
    chain_turns: int = field(init=False)
    chain_items: int = field(init=False)
    #: Stored responses and turns that refer to it; the store counts them.
    num_holders: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        parent = self.parent
        self.chain_bytes = self.own_bytes + (parent.chain_bytes if parent else 0)
        self.chain_turns = 1 + (parent.chain_turns if parent else 0)
        self.chain_items = self.num_items + (parent.chain_items if parent else 0)

    @property
    def own_bytes(self) -> int:
        """Size in the store."""
        return len(self.input_json) + len(self.output_json) + _TURN_BYTES

    def chain(self) -> list[Turn]:
        """Return the turns of the conversation, the first one first."""
        return list(self.back())[::-1]

    def back(self) -> Iterator[Turn]:
        """Iterate over the turns, this one first."""
        turn: Turn | None = self
        while turn is not None:
            yield turn
            turn = turn.parent


@dataclass(slots=True, eq=False)
class Stored:
    """A stored response."""

    response_id: str
    #: A JSON object: the response without its output.
    shell_json: bytes = field(repr=False)
    turn: Turn
    used_at_s: float

    @property
    def own_bytes(self) -> int:
        """Size in the store without its turn."""
        return len(self.shell_json) + _STORED_BYTES

    def body(self) -> bytes:
        """Return the whole response."""
        return self.shell_json[:-1] + b',"output":' + self.turn.output_json + b"}"


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A snapshot of the store."""

    num_responses: int
    #: Including the turns to which only later turns refer.
    num_turns: int
    num_bytes: int
    num_owners: int
    #: Removed for lack of room, or after too long without use.
    num_evicted: int
    num_expired: int


class _Shelf:
    """The responses of one owner, least recently used first."""

    def __init__(self) -> None:
        self.stored: OrderedDict[str, Stored] = OrderedDict()
        self.num_turns = 0
        self.num_bytes = 0

    def add(self, stored: Stored) -> None:
        self.stored[stored.response_id] = stored
        self.num_bytes += stored.own_bytes
        for turn in stored.turn.back():
            turn.num_holders += 1
            if turn.num_holders > 1:
                return
            self.num_turns += 1
            self.num_bytes += turn.own_bytes

    def remove(self, response_id: str) -> None:
        stored = self.stored.pop(response_id)
        self.num_bytes -= stored.own_bytes
        for turn in stored.turn.back():
            turn.num_holders -= 1
            if turn.num_holders:
                return
            self.num_turns -= 1
            self.num_bytes -= turn.own_bytes

    def oldest(self) -> Stored:
        return next(iter(self.stored.values()))


class ResponseStore:
    """Stores responses until they expire or the store is full.

    A full store evicts from the largest owner, least recently used first. So one owner's flood
    does not evict the conversations of the others.
    """

    def __init__(self, *, max_count: int, max_bytes: int, ttl_s: float) -> None:
        """`max_count`: of turns; 0 keeps nothing."""
        self._max_count = max_count
        self._max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._shelves: dict[str, _Shelf] = {}
        self._num_evicted = 0
        self._num_expired = 0

    @property
    def is_off(self) -> bool:
        """Whether it never stores a response."""
        return self._max_count == 0

    def put(
        self, owner: str, response_id: str, shell_json: bytes, turn: Turn, now_s: float
    ) -> bool:
        """Store a response; return False, and change nothing, if it alone is too large."""
        self.expire(now_s)
        stored = Stored(response_id, shell_json, turn, now_s)
        is_too_large = stored.own_bytes + turn.chain_bytes > self._max_bytes
        if is_too_large or turn.chain_turns > self._max_count:
            return False
        shelf = self._shelves.setdefault(owner, _Shelf())
        assert response_id not in shelf.stored, "an id was given twice"
        shelf.add(stored)
        self._make_room(stored)
        return True

    def recall(self, owner: str, response_id: str, now_s: float) -> Stored | None:
        """Return the owner's response with this id, or None, and count it as used."""
        self.expire(now_s)
        shelf = self._shelves.get(owner)
        stored = shelf.stored.get(response_id) if shelf else None
        if shelf is None or stored is None:
            return None
        stored.used_at_s = now_s
        shelf.stored.move_to_end(response_id)
        return stored

    def forget(self, owner: str, response_id: str, now_s: float) -> bool:
        """Delete a response; return whether it was there. Later turns keep its items."""
        if self.recall(owner, response_id, now_s) is None:
            return False
        self._remove(owner, response_id)
        return True

    def expire(self, now_s: float) -> None:
        """Remove the responses without use for the time to live."""
        for owner, shelf in list(self._shelves.items()):
            while shelf.stored and (oldest := shelf.oldest()).used_at_s + self._ttl_s <= now_s:
                self._remove(owner, oldest.response_id)
                self._num_expired += 1

    def stats(self) -> StoreStats:
        """Return a snapshot."""
        shelves = self._shelves.values()
        return StoreStats(
            num_responses=sum(len(shelf.stored) for shelf in shelves),
            num_turns=sum(shelf.num_turns for shelf in shelves),
            num_bytes=sum(shelf.num_bytes for shelf in shelves),
            num_owners=len(self._shelves),
            num_evicted=self._num_evicted,
            num_expired=self._num_expired,
        )

    def check(self) -> None:
        """Assert that the bounds hold, and that the counts are right."""
        stats = self.stats()
        assert stats.num_turns <= self._max_count, "too many are kept"
        assert stats.num_bytes <= self._max_bytes, "too much is kept"
        holders: dict[Turn, int] = {}
        for shelf in self._shelves.values():
            assert shelf.stored, "an empty shelf is kept"
            used = [stored.used_at_s for stored in shelf.stored.values()]
            assert used == sorted(used), "the least recently used is not the first"
            living = _living(shelf)
            own_bytes = sum(stored.own_bytes for stored in shelf.stored.values())
            assert shelf.num_turns == len(living), "turns are miscounted"
            turn_bytes = sum(turn.own_bytes for turn in living)
            assert shelf.num_bytes == own_bytes + turn_bytes, "bytes are miscounted"
            assert holders.keys().isdisjoint(living), "two owners share a turn"
            holders |= living
        assert all(turn.num_holders == count for turn, count in holders.items()), "a hold is lost"

    def _make_room(self, newest: Stored) -> None:
        while True:
            stats = self.stats()
            is_over_count = stats.num_turns > self._max_count
            if not is_over_count and stats.num_bytes <= self._max_bytes:
                return
            others = [of for of in self._shelves.items() if of[1].oldest() is not newest]
            owner, shelf = max(
                others, key=lambda of: of[1].num_turns if is_over_count else of[1].num_bytes
            )
            self._remove(owner, shelf.oldest().response_id)
            self._num_evicted += 1

    def _remove(self, owner: str, response_id: str) -> None:
        shelf = self._shelves[owner]
        shelf.remove(response_id)
        if not shelf.stored:
            del self._shelves[owner]


def _living(shelf: _Shelf) -> dict[Turn, int]:
    """Return the turns in use, and how many responses and turns refer to each."""
    holders: dict[Turn, int] = {}
    for stored in shelf.stored.values():
        for turn in stored.turn.back():
            holders[turn] = holders.get(turn, 0) + 1
            if holders[turn] > 1:
                break
    return holders
