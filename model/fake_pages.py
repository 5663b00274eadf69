"""The pages of a model that can be computed by hand (`model/fake.py`): tokens and digests.

Knows nothing of steps but the span of a row, nor of how tokens are drawn. No torch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from struct import Struct

from cache.moves import PageMove, PageRef, Tier
from cache.selection import Selection
from cache.view import View
from model.interface import RowSpan, SamplingParams, StepInput

#: The token at a place, and the digest of the prefix it ends.
Entry = tuple[int, int]

EMPTY = 0xFFFF
_ENTRY = Struct("<II")
#: Stands in pages whose keys and values are not finite.
NAN_TOKEN_ID = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Rule:
    """The keys that a sequence reads: a view, and a selection with the length of its prompt."""

    view: View
    selection: Selection | None = None
    num_prompt: int = 0

    def num_dropped(self, position: int) -> int:
        """Return how many keys are gone when the token at `position` is computed."""
        if self.selection is None:
            return 0
        return self.selection.num_dropped(position, self.num_prompt)


def digests_of(token_ids: Sequence[int], rule: Rule) -> list[int]:
    """Return the digests of a text's tokens."""
    digests: list[int] = []
    for position, token_id in enumerate(token_ids):
        num_dropped = rule.num_dropped(position)
        digest = digest_of(position, token_id, rule.view, digests.__getitem__, num_dropped)
        digests.append(digest)
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

    def take_step(
        self,
        step: StepInput,
        slots: Mapping[int, FakeSlot],
        source: FakePages,
        view: View,
        *,
        is_strict: bool,
    ) -> None:
        """Store the keys of a step in windowed layers, too, as they are in the other pages.

        `is_strict`: first read all that the rows' queries read in layers of this view.
        """
        for span, slot_id, page_ids, table in zip(
            step.rows, step.slots, step.page_ids, step.windowed_page_ids, strict=False
        ):
            slot = slots[slot_id]
            seen = slot.in_view(span.position, slot.view.within(view)) if is_strict else ()
            for index in seen:
                assert self.read(table, index) == slot.known[index], "a page was overwritten"
            for index in range(span.position, span.position + span.count):
                self.write(table, index, source.read(page_ids, index))

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
