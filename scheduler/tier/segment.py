"""A file of records, one after another: appending, reading, and finding the records.

Records are never changed but for the flag that deletes one, and never moved. Knows nothing of which
records are of use.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from scheduler.tier.record import (
    DELETED,
    FLAGS_OFFSET,
    HEADER_BYTES,
    Buffer,
    Header,
    is_whole_header,
    read_header,
)

#: A link may lead anywhere, and a pipe would block.
_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MAX_PAGE_TOKENS = 1024


class Found(NamedTuple):
    """A record in a segment."""

    offset_bytes: int
    header: Header


class SegmentWriter:
    """A new segment, written by one thread."""

    def __init__(self, path: Path) -> None:
        """Create the file. Raises `OSError`."""
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _SAFE, 0o600)
        #: The end of the last whole record.
        self.num_bytes = 0

    def append(self, pieces: tuple[Buffer, ...]) -> int:
        """Write a record and return its offset. Raises `OSError`; then the file is as before."""
        start = end = self.num_bytes
        try:
            for piece in pieces:
                rest = memoryview(piece)
                while rest:
                    written = self._write(rest, end)
                    rest, end = rest[written:], end + written
        except OSError:
            os.ftruncate(self._descriptor, start)
            raise
        self.num_bytes = end
        return start

    def _write(self, content: memoryview, offset_bytes: int) -> int:
        return os.pwrite(self._descriptor, content, offset_bytes)

    def close(self) -> None:
        """Bring all to the disk and close the file; without a record, remove it."""
        try:
            if self.num_bytes:
                os.fdatasync(self._descriptor)
            else:
                self.path.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)


class SegmentReader:
    """A segment that is open for reading."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises `OSError`."""
        self._descriptor = os.open(path, os.O_RDONLY | _SAFE)

    def read(self, num_bytes: int, offset_bytes: int) -> memoryview:
        """Return these bytes, fewer at the end of the file. Raises `OSError`."""
        content = memoryview(bytearray(num_bytes))
        end = 0
        while end < num_bytes:
            num_read = os.preadv(self._descriptor, [content[end:]], offset_bytes + end)
            if not num_read:
                break
            end += num_read
        return content[:end]

    def records(self) -> Iterator[Found]:
        """Yield the records up to the first that is torn or has a damaged header.

        Reads headers alone, so payloads may be damaged. Raises `OSError`.
        """
        size_bytes, offset_bytes = os.fstat(self._descriptor).st_size, 0
        while offset_bytes < size_bytes:
            head = self.read(HEADER_BYTES + 4 * _MAX_PAGE_TOKENS, offset_bytes)
            header = read_header(head)
            if header is None or not is_whole_header(head, header):
                return
            end = offset_bytes + header.num_bytes
            if end > size_bytes:
                return
            yield Found(offset_bytes, header)
            offset_bytes = end

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def delete_record(path: Path, offset_bytes: int) -> None:
    """Mark a record as deleted, in place. Raises `OSError`."""
    descriptor = os.open(path, os.O_WRONLY | _SAFE)
    try:
        os.pwrite(descriptor, DELETED.to_bytes(2, "little"), offset_bytes + FLAGS_OFFSET)
    finally:
        os.close(descriptor)
