"""Records of pages in a folder: found by chain, bounded in size, verified at each read.

The index is in memory alone, and made of the headers in the segments at the start. Segments that
were not used for the longest time are removed whole. One thread writes, any number read.
Knows nothing of requests, of the cache or of threads but for its lock.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from configs.sizes import format_size
from scheduler.tier.folder import StoreError, StoreFolder
from scheduler.tier.record import Buffer, PageKey, pack_record, page_keys, payload_of, record_bytes
from scheduler.tier.segment import Found, SegmentReader, SegmentWriter, delete_record

_log = logging.getLogger("octavo.cache")

_SEGMENT_BYTES = 256 * 2**20
#: At least so many segments: the oldest is removed whole.
_MIN_SEGMENTS = 8
_SCANNING_THREADS = 8
_NAME = re.compile(r"segment-(\d{8})\.kv")


class Place(NamedTuple):
    """Where a record is."""

    segment: int
    offset_bytes: int


class StoreStats(NamedTuple):
    """A snapshot of a store. Counters (`*_total`) only grow."""

    num_bytes: int = 0
    num_pages: int = 0
    stored_pages_total: int = 0
    corrupt_pages_total: int = 0
    evicted_pages_total: int = 0


class Contents(NamedTuple):
    """The properties that all pages of a store have in common."""

    variant: bytes
    page_tokens: int
    payload_bytes: int


@dataclass(slots=True)
class _Segment:
    path: Path
    num_bytes: int = 0
    chains: list[bytes] = field(default_factory=list)


class DiskStore:
    """The records of one variant; those of others count for the size alone."""

    def __init__(
        self,
        folder: StoreFolder,
        contents: Contents,
        max_bytes: int,
        clock_ns: Callable[[], int] = time.time_ns,
        open_writer: Callable[[Path], SegmentWriter] = SegmentWriter,
    ) -> None:
        """Read the headers of all records. Raises `StoreError`."""
        self._folder = folder
        self._contents = contents
        self._record_bytes = record_bytes(contents.page_tokens, contents.payload_bytes)
        if max_bytes < _MIN_SEGMENTS * self._record_bytes:
            raise StoreError(
                f"{format_size(max_bytes)} is too small: a page takes "
                f"{format_size(self._record_bytes)}, and there is room for {_MIN_SEGMENTS} at least"
            )
        self._max_bytes = max_bytes
        self._segment_bytes = min(_SEGMENT_BYTES, max_bytes // _MIN_SEGMENTS)
        self._clock_ns = clock_ns
        self._open_writer = open_writer
        self._lock = Lock()
        self._places: dict[bytes, Place] = {}
        #: By number, the least recently used first.
        self._segments: OrderedDict[int, _Segment] = OrderedDict()
        self._num_bytes = 0
        self._last_number = 0
        #: The segment that is being written; None: the next record begins one.
        self._writer: tuple[int, SegmentWriter] | None = None
        self._num_stored = self._num_corrupt = self._num_evicted = 0
        self._scan()

    # ---- queries ---------------------------------------------------------------------------------

    def keys(self, tokens: Sequence[int], namespace: str) -> list[PageKey]:
        """Return the keys of all whole pages of `tokens`."""
        page_tokens, variant = self._contents.page_tokens, self._contents.variant
        return page_keys(tokens, page_tokens, variant, self._folder.digest_of(namespace))

    def has(self, key: PageKey) -> bool:
        """Return whether there is a record of a page. It may be damaged."""
        return key.chain in self._places

    def get(self, key: PageKey) -> memoryview | None:
        """Return the contents of a page; None if there is no sound record.

        One that is damaged is deleted and counted. May be called by any thread.
        """
        with self._lock:
            place = self._places.get(key.chain)
            segment = self._segments.get(place.segment) if place else None
        if place is None or segment is None:
            return None
        try:
            with SegmentReader(segment.path) as reader:
                record = reader.read(self._record_bytes, place.offset_bytes)
        except FileNotFoundError:
            # It was evicted a moment ago, or removed by hand.
            self._forget(key, place)
            return None
        except OSError as error:
            _log.warning("a page cannot be read from %s: %s", segment.path, error.strerror)
            record = memoryview(b"")
        payload = payload_of(record, key, self._contents.variant)
        if payload is None:
            self._delete_corrupt(key, place, segment.path)
        return payload

    @property
    def payload_bytes(self) -> int:
        """The size of a page's contents."""
        return self._contents.payload_bytes

    def stats(self) -> StoreStats:
        """Return a snapshot."""
        return StoreStats(
            self._num_bytes,
            len(self._places),
            self._num_stored,
            self._num_corrupt,
            self._num_evicted,
        )

    # ---- commands --------------------------------------------------------------------------------

    def note_use(self, keys: Iterable[PageKey]) -> None:
        """Make the segments of these pages the most recently used ones, also to the next start."""
        now_ns = self._clock_ns()
        with self._lock:
            places = [self._places[key.chain] for key in keys if key.chain in self._places]
            for number in dict.fromkeys(place.segment for place in places):
                self._segments.move_to_end(number)
                with suppress(OSError):
                    os.utime(self._segments[number].path, ns=(now_ns, now_ns))

    def put(self, key: PageKey, payload: Buffer) -> None:
        """Append the record of a page that is not here. Raises `OSError`: then it is not stored.

        Called by one thread.
        """
        assert len(payload) == self._contents.payload_bytes, "a page of another size"
        if self.has(key):
            return
        written_at_s = self._clock_ns() // 10**9
        pieces = pack_record(key, payload, self._contents.variant, written_at_s)
        number, writer = self._writer_with_room()
        try:
            offset_bytes = writer.append(pieces)
        except OSError:
            # Nothing more is appended to a file in which a write failed.
            self._seal()
            raise
        with self._lock:
            segment = self._segments.get(number)
            # It may have been cleared meanwhile.
            if segment is not None:
                segment.num_bytes += self._record_bytes
                segment.chains.append(key.chain)
                self._num_bytes += self._record_bytes
                self._places[key.chain] = Place(number, offset_bytes)
                self._num_stored += 1

    def forget(self, keys: Iterable[PageKey]) -> None:
        """Delete the records of pages."""
        for key in keys:
            place = self._places.get(key.chain)
            segment = self._segments.get(place.segment) if place else None
            if place is not None and segment is not None:
                self._forget(key, place)
                with suppress(OSError):
                    delete_record(segment.path, place.offset_bytes)

    def clear(self) -> None:
        """Delete all records, those of other variants too."""
        with self._lock:
            while self._segments:
                self._drop_oldest()

    def close(self) -> None:
        """Bring all to the disk and unlock the folder. Called by the thread that writes."""
        self._seal()
        self._folder.close()

    # ---- parts -----------------------------------------------------------------------------------

    def _scan(self) -> None:
        found = sorted(
            (path.stat().st_mtime_ns, int(match[1]), path)
            for path in self._folder.path.iterdir()
            if (match := _NAME.fullmatch(path.name))
        )
        self._last_number = max((number for _, number, _ in found), default=0)
        with ThreadPoolExecutor(_SCANNING_THREADS, "scan") as pool:
            records = list(pool.map(_records_in, (path for _, _, path in found)))
        for (_, number, path), there in zip(found, records, strict=True):
            segment = self._segments[number] = _Segment(path, path.stat().st_size)
            self._num_bytes += segment.num_bytes
            for offset_bytes, header in there:
                is_ours = header.variant == self._contents.variant and not header.flags
                if is_ours and header.num_bytes == self._record_bytes:
                    segment.chains.append(header.chain)
                    self._places[header.chain] = Place(number, offset_bytes)
        self._make_room(0)

    def _writer_with_room(self) -> tuple[int, SegmentWriter]:
        if self._writer is not None:
            number, writer = self._writer
            is_full = writer.num_bytes + self._record_bytes > self._segment_bytes
            if is_full or number not in self._segments:
                self._seal()
        with self._lock:
            if self._writer is None:
                number = self._last_number = self._last_number + 1
                path = self._folder.path / f"segment-{number:08d}.kv"
                self._writer = number, self._open_writer(path)
                self._segments[number] = _Segment(path)
            # Last in the order, so that it makes no room itself.
            self._segments.move_to_end(self._writer[0])
            self._make_room(self._record_bytes)
            return self._writer

    def _seal(self) -> None:
        """End the segment that is being written."""
        if self._writer is not None:
            (number, writer), self._writer = self._writer, None
            with suppress(OSError):
                writer.close()
            if not writer.num_bytes:
                with self._lock:
                    self._segments.pop(number, None)

    def _make_room(self, num_bytes: int) -> None:
        while self._num_bytes + num_bytes > self._max_bytes and self._segments:
            self._num_evicted += self._drop_oldest()

    def _drop_oldest(self) -> int:
        """Remove the segment that was not used for the longest time; return how many pages."""
        number, segment = self._segments.popitem(last=False)
        with suppress(OSError):
            segment.path.unlink()
        self._num_bytes -= segment.num_bytes
        num_pages = 0
        for chain in segment.chains:
            place = self._places.get(chain)
            # It may have been deleted, and stored again elsewhere.
            if place is not None and place.segment == number:
                del self._places[chain]
                num_pages += 1
        return num_pages

    def _forget(self, key: PageKey, place: Place, *, is_corrupt: bool = False) -> None:
        with self._lock:
            # Meanwhile it may have been stored again.
            if self._places.get(key.chain) == place:
                del self._places[key.chain]
                self._num_corrupt += is_corrupt

    def _delete_corrupt(self, key: PageKey, place: Place, path: Path) -> None:
        if not self._num_corrupt:
            _log.warning("a damaged page in %s is deleted; further ones are only counted", path)
        self._forget(key, place, is_corrupt=True)
        with suppress(OSError):
            delete_record(path, place.offset_bytes)

    def check(self) -> None:
        """Assert that index, sizes and the segments agree."""
        with self._lock:
            assert self._num_bytes == sum(one.num_bytes for one in self._segments.values())
            assert self._num_bytes <= self._max_bytes, "the store is too large"
            for chain, place in self._places.items():
                assert chain in self._segments[place.segment].chains, "a page of no segment"


def _records_in(path: Path) -> list[Found]:
    try:
        with SegmentReader(path) as reader:
            return list(reader.records())
    except OSError:
        return []
