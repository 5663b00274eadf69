"""Faults in the files of a store, injected at random, and the answers of the store afterwards.

A page's contents are a function of its key. So a wrong answer, which is any other contents, shows
without a second store.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from scheduler.tier.folder import StoreError, StoreFolder
from scheduler.tier.record import HEADER_BYTES, PageKey, record_bytes
from scheduler.tier.segment import SegmentWriter
from scheduler.tier.store import Contents, DiskStore

PAGE_TOKENS = 4
PAYLOAD_BYTES = 96
RECORD_BYTES = record_bytes(PAGE_TOKENS, PAYLOAD_BYTES)
OURS = Contents(b"m" * 32, PAGE_TOKENS, PAYLOAD_BYTES)
MAX_BYTES = 64 * RECORD_BYTES
NAMESPACES = ("", "key:salt")
#: First byte and bytes of each field of a record.
FIELDS = {
    "magic": (0, 8),
    "version": (8, 2),
    "flags": (10, 2),
    "page tokens": (12, 2),
    "padding": (14, 2),
    "variant": (16, 32),
    "namespace": (48, 32),
    "parent": (80, 16),
    "chain": (96, 16),
    "time": (112, 8),
    "lifetime": (120, 8),
    "payload size": (128, 8),
    "tokens": (HEADER_BYTES, 4 * PAGE_TOKENS),
    "payload": (HEADER_BYTES + 4 * PAGE_TOKENS, PAYLOAD_BYTES),
    "digest": (RECORD_BYTES - 16, 16),
}


def contents_of(key: PageKey, num_bytes: int = PAYLOAD_BYTES) -> bytes:
    """Return the only right contents of a page."""
    return hashlib.shake_128(key.chain).digest(num_bytes)


def open_store(
    folder: Path,
    contents: Contents = OURS,
    max_bytes: int = MAX_BYTES,
    open_writer: Callable[[Path], SegmentWriter] = SegmentWriter,
) -> DiskStore:
    return DiskStore(StoreFolder(folder), contents, max_bytes, open_writer=open_writer)


def fill(store: DiskStore, num_pages: int, first: int = 0, namespace: str = "") -> list[PageKey]:
    keys = store.keys([first, *range(1, num_pages * PAGE_TOKENS)], namespace)
    for key in keys:
        store.put(key, contents_of(key))
    return keys


def held(store: DiskStore, keys: list[PageKey]) -> list[bool]:
    found = [store.get(key) for key in keys]
    assert all(one in (None, contents_of(key)) for one, key in zip(found, keys, strict=True))
    return [one is not None for one in found]


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "octavo-kv").glob("segment-*.kv"))


class SlowWriter(SegmentWriter):
    """Writes a few bytes at a time, as a full pipe or a signal would."""

    def _write(self, content: memoryview, offset_bytes: int) -> int:
        return super()._write(content[:7], offset_bytes)


class FullDisk(SegmentWriter):
    """Writes a part of each record, then has no space left."""

    def _write(self, content: memoryview, offset_bytes: int) -> int:
        if len(content) > 20:
            return super()._write(content[:20], offset_bytes)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Faults:
    """A store, its pages, and counts of the injected faults and of the answers after them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder, self._random = folder, random.Random(seed)
        self.store = open_store(folder)
        self.injected = Counter[str]()
        self.wrong = self.missed = self.right = 0
        self._kinds: dict[Callable[[], str], int] = {
            self.flip_a_bit: 900,
            self.put_another_record_there: 60,
            self.clear_a_range: 60,
            self.tear_the_end: 4,
            self.write_in_short_pieces: 4,
            self.run_out_of_space: 4,
            self.remove_a_segment: 4,
            self.open_as_another_model: 4,
            self.open_with_another_format: 4,
            self.open_twice: 4,
            self.change_the_secret: 4,
        }
        self._fill()

    def inject(self, num_faults: int) -> None:
        """Inject faults, each followed by reads of the pages that it may have harmed."""
        kinds, weights = list(self._kinds), list(self._kinds.values())
        for kind in self._random.choices(kinds, weights, k=num_faults):
            self.injected[kind()] += 1
            self.store.check()
            self._fill()
        self.store.close()

    def _fill(self) -> None:
        """Store the missing pages, so that faults have something to harm."""
        #: Two namespaces with the same texts.
        self.keys = [
            key for name in NAMESPACES for key in self.store.keys([*range(12 * PAGE_TOKENS)], name)
        ]
        # A segment that makes room for one page may take another away.
        while not all(map(self.store.has, self.keys)):
            for key in self.keys:
                self.store.put(key, contents_of(key))

    def _reopen(self, **how: object) -> None:
        self.store.close()
        self.store = open_store(self._folder, **how)  # type: ignore[arg-type] # for brevity

    def _read(self, keys: list[PageKey]) -> None:
        for key in keys:
            found = self.store.get(key)
            if found is None:
                self.missed += 1
            elif bytes(found) == contents_of(key):
                self.right += 1
            else:
                self.wrong += 1

    def _place(self, key: PageKey) -> tuple[Path, int]:
        place = self.store._places[key.chain]
        return self.store._segments[place.segment].path, place.offset_bytes

    def _harm(self, key: PageKey, content: bytes, first_byte: int) -> None:
        """Write into the file of a page's record, and read it and its neighbours."""
        path, offset_bytes = self._place(key)
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, content, offset_bytes + first_byte)
        finally:
            os.close(descriptor)
        index = self.keys.index(key)
        near = self.keys[max(0, index - 1) : index + 2]
        self._read(near)
        for one in near:
            self.store.put(one, contents_of(one))

    def _record(self, key: PageKey) -> bytes:
        path, offset_bytes = self._place(key)
        return path.read_bytes()[offset_bytes : offset_bytes + RECORD_BYTES]

    # ---- kinds -----------------------------------------------------------------------------------

    def flip_a_bit(self) -> str:
        field = self._random.choice([*FIELDS])
        first, length = FIELDS[field]
        key, byte = self._random.choice(self.keys), first + self._random.randrange(length)
        flipped = self._record(key)[byte] ^ 1 << self._random.randrange(8)
        self._harm(key, bytes([flipped]), byte)
        return f"bit of {field}"

    def put_another_record_there(self) -> str:
        key, other = self._random.sample(self.keys, 2)
        self._harm(key, self._record(other), 0)
        return "another record"

    def clear_a_range(self) -> str:
        first = self._random.randrange(RECORD_BYTES)
        length = self._random.randrange(1, RECORD_BYTES - first + 1)
        self._harm(self._random.choice(self.keys), bytes(length), first)
        return "range of zeros"

    def tear_the_end(self) -> str:
        path, _ = self._place(self._random.choice(self.keys))
        self.store.close()
        os.truncate(path, self._random.randrange(path.stat().st_size))
        self.store = open_store(self._folder)
        self._read(self.keys)
        return "torn tail"

    def write_in_short_pieces(self) -> str:
        self.store.clear()
        self._reopen(open_writer=SlowWriter)
        self._fill()
        self._read(self.keys)
        self._reopen()
        return "short writes"

    def run_out_of_space(self) -> str:
        lacking = self._random.sample(self.keys, 5)
        self.store.forget(lacking)
        self._reopen(open_writer=FullDisk)
        for key in lacking:
            try:
                self.store.put(key, contents_of(key))
            except OSError:
                continue
            self.wrong += 1
        self._read(self.keys)
        self._reopen()
        self._read(self.keys)
        return "no space left"

    def remove_a_segment(self) -> str:
        path, _ = self._place(self._random.choice(self.keys))
        path.unlink()
        self._read(self.keys)
        self._reopen()
        self._read(self.keys)
        return "removed segment"

    def open_as_another_model(self) -> str:
        """Open the folder as another model of the same name would."""
        self._reopen(contents=OURS._replace(variant=b"n" * 32))
        self._read(self.store.keys([*range(12 * PAGE_TOKENS)], ""))
        self._read(self.keys)
        self._reopen()
        self._read(self.keys)
        return "another model"

    def open_with_another_format(self) -> str:
        """Open it for pages of another size: no record is read at a wrong length."""
        self._reopen(contents=OURS._replace(payload_bytes=PAYLOAD_BYTES // 2))
        self._read(self.keys)
        self._reopen()
        self._read(self.keys)
        return "another format"

    def open_twice(self) -> str:
        try:
            open_store(self._folder)
        except StoreError:
            return "two engines"
        self.wrong += 1
        return "two engines"

    def change_the_secret(self) -> str:
        self.store.close()
        (self._folder / "octavo-kv" / "secret").write_bytes(self._random.randbytes(32))
        self.store = open_store(self._folder)
        self._read(self.store.keys([*range(12 * PAGE_TOKENS)], ""))
        self._fill()
        self._read(self.keys)
        return "another secret"
