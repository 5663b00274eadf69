"""Soft pins: prefixes that are evicted last, in the order of their lifetimes, within a quota.

Knows nothing of the time: `scheduler/pin_deadlines.py` ends the pins that have expired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from cache.node import NO_PAGE, Node
from cache.policy import EvictionQueue

#: Seconds that a pin lasts without use, by the names in requests. Of pinned pages those with the
#: shortest lifetime are evicted first.
LIFETIMES_S: Mapping[str, float] = {
    "5m": 300.0,
    "30m": 1_800.0,
    "1h": 3_600.0,
    "12h": 43_200.0,
    "24h": 86_400.0,
}
#: 0 is the rank of pages without a pin.
RANKS: Mapping[str, int] = {name: rank for rank, name in enumerate(LIFETIMES_S, 1)}


class PinEnd(StrEnum):
    """Why a pin ended. Its pages stay cached, but are evicted like any other."""

    #: It was not used for its lifetime.
    EXPIRED = "expired"
    #: More was pinned than `--cache-pin-share` allows.
    QUOTA = "quota"
    #: Its last page was evicted: nothing else was left to evict.
    EVICTED = "evicted"
    #: An operator took it away, or reset the cache.
    REMOVED = "removed"


class PrefixPin(NamedTuple):
    """The first tokens of a prompt, to be kept for a lifetime (a name in `LIFETIMES_S`)."""

    num_tokens: int
    lifetime: str


class Pin:
    """One pinned path, from a page of the first tokens to `last`. Compared by identity."""

    __slots__ = ("is_live", "last", "lifetime", "owner", "pins")

    def __init__(self, pins: Pins, last: Node, owner: str, lifetime: str) -> None:
        #: All pins of the same pages.
        self.pins = pins
        self.last = last
        #: The pages of one owner count together.
        self.owner = owner
        self.lifetime = lifetime
        self.is_live = True

    @property
    def rank(self) -> int:
        """Pages of a higher rank are evicted later."""
        return RANKS[self.lifetime]

    def nodes(self) -> Iterator[Node]:
        """Yield the pages, last page first."""
        node = self.last
        while node.parent is not None:
            yield node
            node = node.parent


class PinStats(NamedTuple):
    """A snapshot of all pins. Counters (`*_total`) only grow."""

    #: By lifetime, in the order of `LIFETIMES_S`: each page once, under its longest.
    pages: tuple[int, ...] = (0,) * len(LIFETIMES_S)
    #: Pins that ended, in the order of `PinEnd`.
    ended_total: tuple[int, ...] = (0,) * len(PinEnd)


class Pins:
    """All pins on the pages of a tree: at most one of an owner and a lifetime at each page.

    Pinned are at most `max_pages`. Where there would be more, the owner with the most pages loses
    its oldest pins. So no owner can displace the pins of owners with fewer.
    """

    def __init__(self, queue: EvictionQueue, max_pages: int) -> None:
        self._queue = queue
        self._max_pages = max_pages
        #: The pins that end at a page, by owner and rank.
        self._at: dict[Node, dict[tuple[str, int], Pin]] = {}
        #: By owner, those used or set last at the end.
        self._of: dict[str, dict[Pin, None]] = {}
        #: Pins through a page: by rank, and by owner.
        self._counts: dict[Node, list[int]] = {}
        self._pages_of: dict[str, Counter[Node]] = {}
        self._num_pages = [0] * (len(LIFETIMES_S) + 1)
        self._num_ended = dict.fromkeys(PinEnd, 0)
        self._used: list[Pin] = []

    def __iter__(self) -> Iterator[Pin]:
        return (pin for own in self._of.values() for pin in own)

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def stats(self) -> PinStats:
        """Take a snapshot. O(1)."""
        return PinStats(tuple(self._num_pages[1:]), tuple(self._num_ended.values()))

    def add(self, path: Sequence[Node], owner: str, lifetime: str) -> tuple[Pin | None, int]:
        """Pin a path, or use the same pin again; return it, and how many others ended for it.

        None where nothing of it is cached, or where it is longer than all that may be pinned.
        """
        ends = (end for end, node in enumerate(path, 1) if node.page_id != NO_PAGE)
        path = path[: max(ends, default=0)]
        if not path or len(path) > self._max_pages:
            return None, 0
        at = self._at.setdefault(path[-1], {})
        pin = at.get((owner, RANKS[lifetime]))
        if pin is not None:
            self._renew(pin)
            return pin, 0
        pin = at[owner, RANKS[lifetime]] = Pin(self, path[-1], owner, lifetime)
        self._of.setdefault(owner, {})[pin] = None
        self._count(pin, +1)
        num_ended = 0
        while len(self._counts) > self._max_pages:
            largest = max(self._pages_of, key=lambda name: len(self._pages_of[name]))
            self.end(next(iter(self._of[largest])), PinEnd.QUOTA)
            num_ended += 1
        return (pin, num_ended) if pin.is_live else (None, num_ended - 1)

    def end(self, pin: Pin, why: PinEnd) -> None:
        """End a pin. Its pages keep their place in the order of use."""
        assert pin.is_live, "a pin ends twice"
        pin.is_live = False
        self._num_ended[why] += 1
        self._count(pin, -1)
        for node in pin.nodes():
            node.has_lapsed = why is not PinEnd.EVICTED
        at, own = self._at[pin.last], self._of[pin.owner]
        del at[pin.owner, pin.rank], own[pin]
        if not at:
            del self._at[pin.last]
        if not own:
            del self._of[pin.owner]

    def end_at(self, node: Node, why: PinEnd) -> int:
        """End all pins whose last page a node is; return how many."""
        pins = [*self._at.get(node, {}).values()]
        for pin in pins:
            self.end(pin, why)
        return len(pins)

    def end_all(self, why: PinEnd) -> None:
        """End every pin."""
        for pin in list(self):
            self.end(pin, why)

    def note_used(self, path: Sequence[Node]) -> None:
        """Note that the pages of a path are read: the pins that end there last longer."""
        for node in path:
            for pin in self._at.get(node, {}).values() if node.pin_rank else ():
                self._renew(pin)
                self._used.append(pin)

    def take_used(self) -> list[Pin]:
        """Return the pins used since the last call, some of which may have ended."""
        used, self._used = self._used, []
        return used

    def _renew(self, pin: Pin) -> None:
        own = self._of[pin.owner]
        del own[pin]
        own[pin] = None

    def _count(self, pin: Pin, difference: int) -> None:
        pages = self._pages_of.setdefault(pin.owner, Counter())
        for node in pin.nodes():
            counts = self._counts.setdefault(node, [0] * (len(LIFETIMES_S) + 1))
            counts[pin.rank] += difference
            rank = max((rank for rank, count in enumerate(counts) if count), default=0)
            pages[node] += difference
            if not pages[node]:
                del pages[node]
            if not rank:
                del self._counts[node]
            if rank != node.pin_rank:
                self._num_pages[node.pin_rank] -= 1
                self._num_pages[rank] += 1
                node.pin_rank = rank
                if node.ticket:
                    self._queue.push(node)
        if not pages:
            del self._pages_of[pin.owner]

    def check(self) -> None:
        """Assert that counts, ranks and places are those of the pins. O(pinned pages)."""
        counts: dict[Node, Counter[int]] = {}
        pages_of: dict[str, Counter[Node]] = {}
        for pin in self:
            assert self._at[pin.last][pin.owner, pin.rank] is pin, "a pin is not at its page"
            for node in pin.nodes():
                counts.setdefault(node, Counter())[pin.rank] += 1
                pages_of.setdefault(pin.owner, Counter())[node] += 1
        kept = {node: Counter(dict(enumerate(own))) for node, own in self._counts.items()}
        assert kept == counts, "pins differ from the counts"
        assert pages_of == self._pages_of, "the pages of owners differ from their pins"
        assert all(node.pin_rank == max(own) for node, own in counts.items()), "a rank is wrong"
        assert len(counts) <= self._max_pages, "more is pinned than may be"
        ranks = Counter(node.pin_rank for node in counts)
        numbers = [ranks[rank] for rank in RANKS.values()]
        assert numbers == self._num_pages[1:], "pinned pages differ from their number"
        assert sum(map(len, self._at.values())) == len(self), "a pin is lost"
