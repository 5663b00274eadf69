"""The writing thread keeps up or drops, and never holds up its caller."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_faults import MAX_BYTES, OURS, PAGE_TOKENS, FullDisk, contents_of

from scheduler.tier.folder import StoreFolder
from scheduler.tier.record import Buffer, PageKey
from scheduler.tier.segment import SegmentWriter
from scheduler.tier.store import DiskStore
from scheduler.tier.threads import Readers, Run, Writer
from waiting import TIMEOUT_S


class Store(DiskStore):
    """A store whose writes wait while its gate is closed."""

    def __init__(self, folder: Path) -> None:
        self.is_full = False
        super().__init__(StoreFolder(folder), OURS, MAX_BYTES, open_writer=self._open)
        self.gate = threading.Event()
        self.is_writing = threading.Semaphore(0)

    def _open(self, path: Path) -> SegmentWriter:
        return FullDisk(path) if self.is_full else SegmentWriter(path)

    def put(self, key: PageKey, payload: Buffer) -> None:
        self.is_writing.release()
        assert self.gate.wait(TIMEOUT_S)
        super().put(key, payload)


class Case:
    """A store, its writer with room for two pages, five pages, and the time."""

    def __init__(self, folder: Path) -> None:
        self.now_s = 0.0
        self.store = Store(folder)
        self.writer = Writer(self.store, 2, lambda: self.now_s)
        self.keys = self.store.keys([*range(5 * PAGE_TOKENS)], "")

    def put(self, index: int, timeout_s: float = 0.0) -> bool:
        key = self.keys[index]
        return self.writer.put(key, contents_of(key), timeout_s)

    def flush(self) -> list[bool]:
        """Wait for the queue, and return which pages are stored."""
        self.store.gate.set()
        done = threading.Event()
        self.writer._tasks.put(done.set)
        assert done.wait(TIMEOUT_S)
        return [self.store.get(key) is not None for key in self.keys]


@pytest.fixture
def case(tmp_path: Path) -> Iterator[Case]:
    made = Case(tmp_path)
    yield made
    made.store.gate.set()
    made.writer.close()


def test_a_full_queue_takes_no_page(case: Case) -> None:
    assert case.put(0)
    assert case.store.is_writing.acquire(timeout=TIMEOUT_S)
    assert case.put(1)
    assert case.put(2)
    assert not case.put(3)
    assert not case.put(3, timeout_s=0.001)
    assert case.flush() == [True, True, True, False, False]
    assert case.put(3)
    assert case.writer.num_dropped == 0


def test_after_a_failed_write_there_is_a_pause(case: Case) -> None:
    case.store.is_full = True
    case.store.gate.set()
    assert case.put(0)
    assert case.flush() == [False] * 5
    case.store.is_full = False
    assert case.put(1)
    case.now_s = 29.0
    assert case.flush() == [False] * 5
    assert case.writer.num_dropped == 2
    case.now_s = 30.0
    assert case.put(2)
    assert case.flush() == [False, False, True, False, False]


def test_queued_pages_are_forgotten_and_cleared(case: Case) -> None:
    case.put(0)
    assert case.store.is_writing.acquire(timeout=TIMEOUT_S)
    case.put(1)
    case.writer.forget(case.keys[:1])
    assert case.flush() == [False, True, False, False, False]
    case.store.gate.clear()
    case.put(2)
    case.writer.clear()
    case.put(3)
    assert case.flush() == [False, False, False, True, False]


def test_what_is_queued_at_the_end_is_stored(case: Case, tmp_path: Path) -> None:
    case.store.gate.set()
    case.put(0)
    case.writer.close()
    store = Store(tmp_path)
    assert bytes(store.get(case.keys[0]) or b"") == contents_of(case.keys[0])
    case.writer = Writer(store, 2, lambda: 0.0)
    case.store = store


def test_a_run_ends_before_the_first_missing_page(case: Case) -> None:
    for index in (0, 1, 3):
        case.put(index)
        case.flush()
    done = threading.Event()
    readers = Readers(case.store)
    run = Run(case.keys, done.set)
    readers.read(run)
    assert done.wait(TIMEOUT_S)
    assert [*map(bytes, run.pages or [])] == [contents_of(key) for key in case.keys[:2]]
    readers.close()


def test_a_dropped_run_is_not_read(case: Case) -> None:
    called = list[int]()
    done = threading.Event()
    readers = Readers(case.store, num_threads=1)
    dropped = Run(case.keys, lambda: called.append(1))
    dropped.is_dropped = True
    readers.read(dropped)
    readers.read(Run([], done.set))
    assert done.wait(TIMEOUT_S)
    assert (dropped.pages, called) == ([], [])
    readers.close()
