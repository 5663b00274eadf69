"""The expected contents of a cache after each call, by exhaustive search."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, takewhile
from sys import maxsize

from cache.allocation import Allocation
from cache.ghosts import Cause, Eviction
from cache.misses import Misses, MissReason
from cache.view import View

Key = tuple[str, tuple[int, ...]]
#: They share bytes, but no two of them in one place are the same token.
VOCABULARY = (3, 259)


def prompt(length: int, turn: int, pattern: int) -> list[int]:
    """Return a beginning that all share and, from `turn` on, one of a few ways to go on."""
    bits = [0 if place < turn else pattern >> (place - turn) % 3 & 1 for place in range(length)]
    return [VOCABULARY[bit] for bit in bits]


@dataclass
class Entry:
    last_used: int = 0
    #: Else a husk, which is there for the sake of its children and leases.
    has_page: bool = True
    #: Whether its last pin ended before it was evicted.
    has_lapsed: bool = False


@dataclass(frozen=True)
class PinnedPath:
    keys: tuple[Key, ...]
    owner: str
    rank: int


@dataclass(eq=False)
class Live:
    namespace: str
    tokens: list[int]
    num_known_tokens: int
    allocation: Allocation
    num_pages: int
    num_computed: int
    num_committed_pages: int
    #: The pages that it reads no more.
    gap: range
    view: View
    #: Pages behind it are of its view alone.
    max_shared_tokens: int
    duplicates: set[int] = field(default_factory=set)

    def key(self, num_tokens: int) -> Key:
        return self.namespace, tuple(self.tokens[:num_tokens])

    def written(self, num_tokens: int) -> Key:
        """Return the name of the keys and values of the last of these tokens."""
        namespace, prefix = self.key(num_tokens)
        is_shared = num_tokens <= self.max_shared_tokens
        return namespace if is_shared else f"{namespace} under {self.view}", prefix

    @property
    def num_private(self) -> int:
        """Pages outside the tree that it still has."""
        dropped = range(max(self.gap.start, self.num_committed_pages), self.gap.stop)
        uncommitted = self.num_pages - self.num_committed_pages
        return uncommitted - len(dropped) + len(self.duplicates)


@dataclass
class Reference:
    """The expected contents of the cache after each call, by exhaustive search."""

    num_pages: int
    page_size: int
    view: View
    chunk_tokens: int
    can_share_heads: bool = True
    cached: dict[Key, Entry] = field(default_factory=dict)
    live: list[Live] = field(default_factory=list)
    pins: list[PinnedPath] = field(default_factory=list)
    now: int = 0
    num_evicted_pages: int = 0
    now_s: float = 0.0
    #: Evicted pages that are not cached again.
    ghosts: dict[Key, Eviction] = field(default_factory=dict)

    def pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def path(self, namespace: str, tokens: list[int], num_pages: int) -> Iterator[Key]:
        for count in range(1, num_pages + 1):
            yield namespace, tuple(tokens[: count * self.page_size])

    def children(self, namespace: str, prefix: list[int]) -> list[Key]:
        end = len(prefix) + self.page_size
        return sorted(
            (owner, other)
            for owner, other in self.cached
            if owner == namespace and len(other) == end and num_shared(other, prefix) == len(prefix)
        )

    def beside(self, namespace: str, prefix: tuple[int, ...], num_tokens: int) -> list[Key]:
        """List the nodes of so many tokens that begin with a prefix, evicted or not."""
        return [
            (owner, other)
            for owner, other in self.cached
            if owner == namespace and len(other) == num_tokens and other[: len(prefix)] == prefix
        ]

    def ahead(self, namespace: str, prefix: tuple[int, ...]) -> list[tuple[int, ...]]:
        """List the tokens of the nodes that go on where a prefix ends."""
        return [
            other
            for owner, other in self.cached
            if owner == namespace and len(other) > len(prefix) and other[: len(prefix)] == prefix
        ]

    def known(self, namespace: str, tokens: list[int]) -> int:
        """Return the tokens of whole pages with a node in the tree, evicted or not."""
        known = 0
        for key in self.path(namespace, tokens, len(tokens) // self.page_size):
            if key not in self.cached:
                break
            known = len(key[1])
        return known

    def source(self, namespace: str, tokens: list[int]) -> Key | None:
        """Return the neighbour, of the two around the place of the rest, that shares more."""
        return self.neighbour(namespace, tokens[:-1]) if self.can_share_heads else None

    def neighbour(self, namespace: str, wanted: list[int]) -> Key | None:
        """Return the same, whether or not a part of a page is reusable."""
        known = self.known(namespace, wanted)
        children = self.children(namespace, wanted[:known])
        place = sum(key < (namespace, tuple(wanted)) for key in children)
        best, most = None, known
        for key in children[max(place - 1, 0) : place + 1]:
            if self.cached[key].has_page and num_shared(key[1], wanted) > most:
                best, most = key, num_shared(key[1], wanted)
        return best

    def max_shared_tokens(self, view: View) -> int:
        """Return how many tokens of a view have keys that do not depend on the view."""
        if view == self.view or view.window is None:
            return maxsize
        return view.sinks + view.window

    def is_readable(self, namespace: str, tokens: list[int], num_tokens: int, view: View) -> bool:
        """Return whether all pages are there that the query at `num_tokens` reads."""
        keys = self.path(namespace, tokens, num_tokens // self.page_size)
        gap = view.unread_pages(num_tokens, self.page_size)
        return all(i in gap or self.cached[key].has_page for i, key in enumerate(keys))

    def reusable(self, namespace: str, tokens: list[int], view: View) -> tuple[int, bool]:
        """Return how many tokens are reusable, and whether evicted pages make them fewer."""
        tokens = tokens[: self.max_shared_tokens(view) + 1]
        known, source = self.known(namespace, tokens[:-1]), self.source(namespace, tokens)
        most = known if source is None else num_shared(source[1], tokens[:-1])
        lengths = [most, *range(known, 0, -self.page_size)]
        readable = (n for n in lengths if self.is_readable(namespace, tokens, n, view))
        found = next(readable, 0)
        return found, found < known

    def num_reusable(self, namespace: str, tokens: list[int], view: View) -> int:
        return self.reusable(namespace, tokens, view)[0]

    def whole(self, num_tokens: int) -> int:
        """Return how many of the first tokens of a prompt can be reused at most."""
        return num_tokens if self.can_share_heads else num_tokens - num_tokens % self.page_size

    def misses(self, namespace: str, tokens: list[int], view: View) -> Misses:
        """Return the reasons, found token by token."""
        rest = _Rest(self, namespace, tokens, view)
        reasons = [rest.reason(place) for place in range(rest.num_reused, len(tokens) - 1)]
        # One for each token but the last: so reused and missed tokens sum up to the prompt.
        parts = tuple((reason, len(list(run))) for reason, run in groupby(reasons))
        diverged_at = None
        if MissReason.DIVERGED in reasons:
            diverged_at = rest.num_reused + reasons.index(MissReason.DIVERGED)
        eviction = rest.eviction() if MissReason.EVICTED in reasons else None
        return Misses(rest.num_reused, parts, diverged_at, eviction)

    def is_in_flight(self, namespace: str, tokens: list[int], view: View) -> bool:
        num_matched = self.num_reusable(namespace, tokens, view) // self.page_size
        num_shared = min(len(tokens), self.max_shared_tokens(view))
        if (num_matched + 1) * self.page_size > num_shared:
            return False
        wanted = namespace, tuple(tokens[: (num_matched + 1) * self.page_size])
        is_there = wanted in self.cached and self.cached[wanted].has_page
        return not is_there and any(
            seq.num_committed_pages == num_matched
            and len(wanted[1]) <= seq.num_known_tokens
            and seq.key(len(wanted[1])) == wanted
            for seq in self.live
        )

    @property
    def leased(self) -> set[Key]:
        return {
            key
            for seq in self.live
            for key in self.path(seq.namespace, seq.tokens, seq.num_committed_pages)
        }

    @property
    def read(self) -> set[Key]:
        return {
            key
            for seq in self.live
            for i, key in enumerate(self.path(seq.namespace, seq.tokens, seq.num_committed_pages))
            if i not in seq.gap
        }

    @property
    def num_cached(self) -> int:
        return sum(entry.has_page for entry in self.cached.values())

    @property
    def num_private(self) -> int:
        return sum(seq.num_private for seq in self.live)

    @property
    def num_free(self) -> int:
        return self.num_pages - self.num_cached - self.num_private

    @property
    def num_available(self) -> int:
        return self.num_pages - self.num_private - len(self.read)

    def num_first_pages(self, num_tokens: int, num_reused: int, view: View) -> int:
        """Return the length of a new block table."""
        if view.window is None:
            return self.pages(num_tokens)
        end = view.start(num_reused) + view.window + self.chunk_tokens
        wanted = self.pages(min(num_tokens, end))
        # The pages that a query reads, wherever it stands in its page.
        if self.num_pages <= self.pages(view.sinks) + self.pages(view.window - 1):
            return wanted
        return min(wanted, self.num_pages + len(view.unread_pages(num_reused, self.page_size)))

    def covering(self, namespace: str, tokens: list[int]) -> tuple[Key, ...]:
        """Return the pages of a prompt, of which the last may begin with the last tokens."""
        goes_on = [*tokens, tokens[-1]]
        found = self.num_reusable(namespace, goes_on, self.view)
        path = tuple(self.path(namespace, tokens, found // self.page_size))
        source = self.source(namespace, goes_on)
        has_head = found == len(tokens) and found % self.page_size and source is not None
        covered = (*path, source) if has_head and source is not None else path
        while covered and not self.cached[covered[-1]].has_page:
            covered = covered[:-1]
        return covered

    def rank(self, key: Key) -> int:
        return max((pin.rank for pin in self.pins if key in pin.keys), default=0)

    def end_pins_of_lost_pages(self) -> None:
        """End the pins whose last page is no more in the cache."""
        for pin in [*self.pins]:
            last = self.cached.get(pin.keys[-1])
            if last is None or not last.has_page:
                self.end(pin, lapses=False)

    def end(self, pin: PinnedPath, *, lapses: bool = True) -> None:
        self.pins.remove(pin)
        for key in pin.keys:
            if key in self.cached:
                self.cached[key].has_lapsed = lapses

    def use(self, *keys: Key) -> None:
        for key in keys:
            self.now += 1
            self.cached[key].last_used = self.now

    def parents(self) -> set[Key]:
        return {(owner, prefix[: -self.page_size]) for owner, prefix in self.cached}

    def make_room(self, num_pages: int, read: set[Key], leased: set[Key]) -> None:
        while self.num_free < num_pages:
            parents = self.parents() - leased
            candidates = [
                key
                for key, entry in self.cached.items()
                if entry.has_page and key not in read | parents
            ]
            self.evict(min(candidates, key=self._place), Cause.ROOM)
            self.num_evicted_pages += 1
            self.end_pins_of_lost_pages()
            self.forget_husks(leased)

    def evict(self, key: Key, cause: Cause) -> None:
        entry = self.cached[key]
        if not entry.has_page:
            return
        if cause is Cause.ROOM and entry.has_lapsed and not self.rank(key):
            cause = Cause.PIN_LAPSED
        entry.has_page = entry.has_lapsed = False
        self.ghosts[key] = Eviction(cause, self.now_s)

    def forget_husks(self, leased: set[Key]) -> None:
        while bare := [
            key
            for key, entry in self.cached.items()
            if not entry.has_page and key not in self.parents() | leased
        ]:
            for key in bare:
                del self.cached[key]

    def _place(self, key: Key) -> tuple[int, int]:
        return self.rank(key), self.cached[key].last_used


def num_shared(a: tuple[int, ...], b: list[int]) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))))


class _Rest:
    """The tokens of a prompt that are not reused."""

    def __init__(self, model: Reference, namespace: str, tokens: list[int], view: View) -> None:
        self.size = model.page_size
        self.model = model
        self.num_reused = model.num_reusable(namespace, tokens, view)
        self.limit = model.max_shared_tokens(view)
        self.first_page = self.num_reused // self.size
        self.is_in_flight = model.is_in_flight(namespace, tokens, view)
        wanted = tokens[:-1][: self.limit]
        self.num_known = model.known(namespace, wanted)
        self.keys = list(model.path(namespace, tokens[: self.limit + 1], len(tokens) // self.size))
        beside = model.neighbour(namespace, wanted)
        self.end_of_head = self.num_known if beside is None else num_shared(beside[1], wanted)
        self.goes_on = bool(model.children(namespace, wanted[: self.num_known]))

    def was_cached(self, page: int) -> bool:
        if page < self.num_known // self.size or (self.is_in_flight and page == self.first_page):
            return True
        is_whole = page < len(self.keys) and len(self.keys[page][1]) == (page + 1) * self.size
        return is_whole and self.keys[page] in self.model.ghosts

    @property
    def num_lost(self) -> int:
        page = self.first_page
        while self.was_cached(page):
            page += 1
        return page * self.size

    def reason(self, place: int) -> MissReason:
        if place >= self.limit:
            return MissReason.VIEW
        if self.is_in_flight and place // self.size == self.first_page:
            return MissReason.IN_FLIGHT
        if place < self.num_lost:
            return MissReason.EVICTED
        if self.num_lost > self.num_known:
            return MissReason.NEVER
        if place < self.end_of_head:
            # Reused, but for a page before it.
            return MissReason.EVICTED if self.model.can_share_heads else MissReason.PAGE
        has_begun = self.end_of_head > 0
        return MissReason.DIVERGED if self.goes_on and has_begun else MissReason.NEVER

    def eviction(self) -> Eviction | None:
        pages = range(self.first_page, self.num_lost // self.size)
        ghosts = (self.model.ghosts.get(self.keys[page]) for page in pages)
        return next(filter(None, ghosts), None)
