"""Responses that are kept: bounded in number, in bytes and in age, apart for each owner.

A conversation is a chain of turns. Each turn has its own items and points at the turn before it,
so a chain of n turns holds each item once:

    stored response ──> turn ──parent──> turn ──parent──> turn
    stored response ──────────────────────┘

A turn lives as long as a stored response or a later turn needs it, so what a response goes on from
may be forgotten or deleted without harm. Pure bookkeeping: no clock, no I/O. Knows nothing of what
the bytes say; they are JSON.
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
    """The items of one response: what it was asked, and what it said."""

    #: What it went on from.
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
    #: Stored responses and living turns that need it; the store's.
    num_holders: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        parent = self.parent
        self.chain_bytes = self.own_bytes + (parent.chain_bytes if parent else 0)
        self.chain_turns = 1 + (parent.chain_turns if parent else 0)
        self.chain_items = self.num_items + (parent.chain_items if parent else 0)

    @property
    def own_bytes(self) -> int:
        """What it costs to keep it."""
        return len(self.input_json) + len(self.output_json) + _TURN_BYTES

    def chain(self) -> list[Turn]:
        """Return the turns of the conversation, the first one first."""
        return list(self._back())[::-1]

    def _back(self) -> Iterator[Turn]:
        turn: Turn | None = self
        while turn is not None:
            yield turn
            turn = turn.parent


@dataclass(slots=True, eq=False)
class Stored:
    """A response that can be asked for."""

    response_id: str
    #: A JSON object: the response without its output.
    shell_json: bytes = field(repr=False)
    turn: Turn
    used_at_s: float

    @property
    def own_bytes(self) -> int:
        """What it costs to keep it, its turn apart."""
        return len(self.shell_json) + _STORED_BYTES

    def body(self) -> bytes:
        """Return the whole response."""
        return self.shell_json[:-1] + b',"output":' + self.turn.output_json + b"}"


@dataclass(frozen=True, slots=True)
class StoreStats:
    """One moment of it."""

    num_responses: int
    #: Those of the responses, and those that only a later one needs.
    num_turns: int
    num_bytes: int
    num_owners: int
    #: Forgotten for want of room, or for being unused too long.
    num_evicted: int
    num_expired: int


class _Shelf:
    """What one owner has, least recently used first."""

    def __init__(self) -> None:
        self.stored: OrderedDict[str, Stored] = OrderedDict()
        self.num_turns = 0
        self.num_bytes = 0

    def add(self, stored: Stored) -> None:
        self.stored[stored.response_id] = stored
        self.num_bytes += stored.own_bytes
        turn: Turn | None = stored.turn
        while turn is not None:
            turn.num_holders += 1
            if turn.num_holders > 1:
                return
            self.num_turns += 1
            self.num_bytes += turn.own_bytes
            turn = turn.parent

    def remove(self, response_id: str) -> None:
        stored = self.stored.pop(response_id)
        self.num_bytes -= stored.own_bytes
        turn: Turn | None = stored.turn
        while turn is not None:
            turn.num_holders -= 1
            if turn.num_holders:
                return
            self.num_turns -= 1
            self.num_bytes -= turn.own_bytes
            turn = turn.parent

    def oldest(self) -> Stored:
        return next(iter(self.stored.values()))


class ResponseStore:
    """Keeps responses until there is no room, or nobody has asked for them for too long.

    Where room is needed, it is the owner of most who gives up what was used least recently: nobody
    loses a conversation to somebody else's flood.
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
        """Whether it never keeps anything."""
        return self._max_count == 0

    def put(
        self, owner: str, response_id: str, shell_json: bytes, turn: Turn, now_s: float
    ) -> bool:
        """Keep a response; return False, and change nothing, if it alone would be too much."""
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
        """Return what `owner` stored under this id, and count it as used; None: there is none."""
        self.expire(now_s)
        shelf = self._shelves.get(owner)
        stored = shelf.stored.get(response_id) if shelf else None
        if shelf is None or stored is None:
            return None
        stored.used_at_s = now_s
        shelf.stored.move_to_end(response_id)
        return stored

    def forget(self, owner: str, response_id: str, now_s: float) -> bool:
        """Delete it; return whether it was there. What goes on from it keeps what it needs."""
        if self.recall(owner, response_id, now_s) is None:
            return False
        self._remove(owner, response_id)
        return True

    def expire(self, now_s: float) -> None:
        """Forget what was not used for too long."""
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
        """Assert that the bounds hold, and that what is counted is what is there."""
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
    """Return each turn that is needed, and how often."""
    holders: dict[Turn, int] = {}
    for stored in shelf.stored.values():
        turn: Turn | None = stored.turn
        while turn is not None:
            holders[turn] = holders.get(turn, 0) + 1
            if holders[turn] > 1:
                break
            turn = turn.parent
    return holders
