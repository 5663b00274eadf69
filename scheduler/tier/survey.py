"""The records of a store, read without its lock and without an engine: for its operator.

Changes nothing but in `clear`. Knows nothing of what the pages mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from scheduler.tier.folder import FOLDER_NAME, StoreError, StoreFolder, check_owner
from scheduler.tier.record import Header, is_intact
from scheduler.tier.segment import Found, SegmentReader


@dataclass(frozen=True, slots=True)
class SegmentSurvey:
    """The contents of one segment."""

    name: str
    num_bytes: int
    used_at_s: float
    headers: list[Header]
    #: Bytes behind a torn or damaged header, in which no page is found.
    num_lost_bytes: int
    #: Pages whose digest is wrong; 0 where it was not compared.
    num_damaged: int = 0

    @property
    def pages(self) -> list[Header]:
        """The pages that were not deleted."""
        return [header for header in self.headers if not header.flags]


@dataclass(slots=True)
class Group:
    """The pages of one variant: of one model, computed and stored in one way."""

    page_tokens: int
    num_pages: int = 0
    num_bytes: int = 0
    newest_s: int = 0
    namespaces: set[bytes] = field(default_factory=set)


def survey(parent: Path, *, verify: bool = False) -> Iterator[SegmentSurvey]:
    """Read the headers of the store in a folder, and with `verify` all pages.

    An engine may use it meanwhile. Raises `StoreError`.
    """
    for path in _segments(parent):
        # One that an engine has just evicted is passed over.
        with suppress(FileNotFoundError), SegmentReader(path) as reader:
            status, found = path.stat(), list(reader.records())
            end = found[-1].offset_bytes + found[-1].header.num_bytes if found else 0
            yield SegmentSurvey(
                path.name,
                status.st_size,
                status.st_mtime,
                [one.header for one in found],
                status.st_size - end,
                sum(_is_damaged(reader, one) for one in found) if verify else 0,
            )


def groups(segments: Iterator[SegmentSurvey]) -> dict[bytes, Group]:
    """Return the pages of segments by variant."""
    found = dict[bytes, Group]()
    for header in (header for segment in segments for header in segment.pages):
        group = found.setdefault(header.variant, Group(header.page_tokens))
        group.num_pages += 1
        group.num_bytes += header.num_bytes
        group.newest_s = max(group.newest_s, header.written_at_s)
        group.namespaces.add(header.namespace)
    return found


def clear(parent: Path) -> int:
    """Remove all segments and return their bytes. Raises `StoreError`, beside an engine too."""
    paths, num_bytes = _segments(parent), 0
    folder = StoreFolder(parent)
    for path in paths:
        num_bytes += path.stat().st_size
        path.unlink()
    folder.close()
    return num_bytes


def _segments(parent: Path) -> list[Path]:
    folder = parent / FOLDER_NAME
    if not folder.exists():
        raise StoreError(f"{parent} holds no store: it has no folder {FOLDER_NAME}")
    check_owner(folder)
    return sorted(folder.glob("segment-*.kv"))


def _is_damaged(reader: SegmentReader, found: Found) -> bool:
    record = reader.read(found.header.num_bytes, found.offset_bytes)
    return not found.header.flags and not is_intact(record)
