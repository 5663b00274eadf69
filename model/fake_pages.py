"""The pages of a model that can be computed by hand (`model/fake.py`): tokens and digests.

Knows nothing of steps but the span of a row, nor of how tokens are drawn. No torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from struct import Struct

from cache.moves import PageMove, PageRef, Tier
from cache.view import View
from model.interface import RowSpan, SamplingParams

#: The token at a place, and the digest of the prefix it ends.
Entry = tuple[int, int]

EMPTY = 0xFFFF
_ENTRY = Struct("<II")
#: Stands in pages whose keys and values are not finite.
NAN_TOKEN_ID = 2**32 - 1


def digests_of(token_ids: Sequence[int], view: View) -> list[int]:
    """Return the digests of a text's tokens."""
    digests: list[int] = []
    for position, token_id in enumerate(token_ids):
        digests.append(digest_of(position, token_id, view, digests.__getitem__))
    return digests


def digest_of(
    position: int,
    token_id: int,
    view: View,
    digest_at: Callable[[int], int],
    num_dropped: int = 0,
) -> int:
    """Return the digest at `position`, read from those in view. Behind the sinks, keys may lack."""
    first = max(view.start(position), view.sinks + num_dropped)
    if first <= view.sinks:
        return extend(digest_at(position - 1) if position else EMPTY, token_id)
    newest = position - 1 if first < position else view.sinks - 1
    digest = extend(digest_at(newest) if newest >= 0 else EMPTY, token_id)
    return extend(digest, digest_at(first) if first < position else EMPTY)


def extend(digest: int, number: int) -> int:
    """Return the digest of a number behind a prefix with this digest."""
    return zlib.crc32(number.to_bytes(4, "little"), digest)


@dataclass(slots=True)
class FakeSlot:
    """State of the sequence in a slot."""

    params: SamplingParams
    view: View
    #: By position, the token and the digest that its pages have to hold; kept if `is_strict`.
    known: list[Entry]
    #: Where its keys are, as of its last row.
    page_ids: list[int] = field(default_factory=list)
    num_stored: int = 0
    num_dropped: int = 0

    def index(self, position: int) -> int:
        """Return the storage index of the key at `position`: keys behind the sinks are dropped."""
        return position if position < self.view.sinks else position - self.num_dropped

    def know(self, position: int, token_id: int, digest: int) -> None:
        """Note the token at `position`; entries behind a different token are void."""
        if self.known[position : position + 1] != [(token_id, digest)]:
            self.known[position:] = [(token_id, digest)]

    def in_view(self, position: int, view: View | None = None) -> Iterator[int]:
        """Yield the positions before `position` that a query there reads, in its view or `view`."""
        view = view or self.view
        sinks = min(view.sinks, position)
        yield from range(sinks)
        yield from range(max(view.start(position), sinks + self.num_dropped), position)


class FakePages:
    """Entries by page and offset. Reading fails at a place that holds none."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages: dict[PageRef, dict[int, Entry]] = {}

    def read(self, page_ids: list[int], index: int) -> Entry:
        """Return the entry of a row's key, by its storage index."""
        page, offset = self._place(page_ids, index)
        held = self._pages.get(page, {})
        assert offset in held, f"key {index} of {page_ids} is not stored any more"
        return held[offset]

    def write(self, page_ids: list[int], index: int, entry: Entry) -> None:
        """Store the entry of a row's key."""
        page, offset = self._place(page_ids, index)
        self._pages.setdefault(page, {})[offset] = entry

    def move(self, move: PageMove) -> None:
        """Copy the head of a page."""
        source, target = self._pages[move.source], self._pages.setdefault(move.target, {})
        target |= {offset: source[offset] for offset in range(move.num_tokens)}

    def compact(self, slot: FakeSlot, span: RowSpan, pages: list[int]) -> None:
        """Keep the sinks and the newest keys, at the front of the row's pages."""
        num_kept, end = span.stored - slot.view.sinks, slot.num_stored
        kept = [*range(slot.view.sinks), *range(end - num_kept, end)]
        entries = [self.read(slot.page_ids, index) for index in kept]
        for index, entry in enumerate(entries):
            self.write(pages, index, entry)
        slot.num_dropped = span.position - span.stored

    def check(self, page_ids: list[int], slot: FakeSlot, position: int, view: View) -> None:
        """Assert that the keys are there which the query at `position` reads in such layers."""
        for seen in slot.in_view(position, slot.view.within(view)):
            assert self.read(page_ids, seen) == slot.known[seen], "a page was overwritten"

    def copy_row(
        self, page_ids: list[int], source: FakePages, source_page_ids: list[int], span: RowSpan
    ) -> None:
        """Store the entries of a row's tokens, as they are in other pages."""
        for index in range(span.position, span.position + span.count):
            self.write(page_ids, index, source.read(source_page_ids, index))

    def contents(self, page_id: int) -> bytes:
        """Return the entries of a whole page as bytes."""
        held = self._pages[PageRef(Tier.DEVICE, page_id)]
        return b"".join(_ENTRY.pack(*held[offset]) for offset in range(self._page_size))

    def fill(self, page_id: int, contents: memoryview) -> None:
        """Replace the entries of a page by a result of `contents`."""
        self._pages[PageRef(Tier.DEVICE, page_id)] = dict(enumerate(_ENTRY.iter_unpack(contents)))

    def forget(self, page_ids: Iterable[int]) -> None:
        """Forget the contents of pages, so that reading them fails."""
        for page_id in page_ids:
            self._pages.pop(PageRef(Tier.DEVICE, page_id), None)

    def clear(self) -> None:
        """Forget all pages."""
        self._pages.clear()

    def _place(self, page_ids: list[int], index: int) -> tuple[PageRef, int]:
        page_index, offset = divmod(index, self._page_size)
        return PageRef(Tier.DEVICE, page_ids[page_index]), offset


class FakePageAccess:
    """See `PageAccess`."""

    __slots__ = ()
    pages: FakePages

    def read_page(self, page_id: int) -> bytes:
        """See `PageAccess`."""
        return self.pages.contents(page_id)

    def write_page(self, page_id: int, contents: memoryview) -> None:
        """See `PageAccess`."""
        self.pages.fill(page_id, contents)
