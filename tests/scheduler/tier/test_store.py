"""Records in a folder: found, bounded, and kept over a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_faults import (
    MAX_BYTES,
    OURS,
    PAGE_TOKENS,
    PAYLOAD_BYTES,
    RECORD_BYTES,
    contents_of,
    fill,
    held,
    open_store,
    segments,
)

from scheduler.tier.folder import StoreError, StoreFolder
from scheduler.tier.record import Buffer
from scheduler.tier.segment import SegmentWriter
from scheduler.tier.store import DiskStore

#: Pages of a full store, and of a segment.
MAX_PAGES = MAX_BYTES // RECORD_BYTES
SEGMENT_PAGES = MAX_PAGES // 8


# ---- finding -------------------------------------------------------------------------------------


def test_a_page_is_found_by_all_tokens_up_to_its_end(store: DiskStore) -> None:
    keys = fill(store, 3)
    assert held(store, keys) == [True] * 3
    other = store.keys([7, *range(1, 3 * PAGE_TOKENS)], "")
    assert [key.tokens for key in other[1:]] == [key.tokens for key in keys[1:]]
    assert held(store, other) == [False] * 3
    assert store.stats()[:3] == (3 * RECORD_BYTES, 3, 3)


def test_a_rest_of_a_page_has_no_key(store: DiskStore) -> None:
    assert len(store.keys([1] * (3 * PAGE_TOKENS - 1), "")) == 2
    assert store.keys([1], "") == []


def test_another_namespace_finds_nothing_and_leaves_no_trace(
    store: DiskStore, tmp_path: Path
) -> None:
    fill(store, 2, namespace="pepper")
    assert held(store, store.keys([*range(2 * PAGE_TOKENS)], "")) == [False] * 2
    for path in (tmp_path / "octavo-kv").iterdir():
        assert b"pepper" not in path.read_bytes()


def test_a_page_is_stored_once(store: DiskStore) -> None:
    fill(store, 2)
    fill(store, 2)
    assert store.stats().stored_pages_total == 2


def test_a_forgotten_page_is_gone_and_may_come_back(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 3)
    store.forget(keys[:2])
    store.forget(keys[:1])
    assert held(store, keys) == [False, False, True]
    store.put(keys[0], contents_of(keys[0]))
    store.close()
    store = open_store(tmp_path)
    assert held(store, keys) == [True, False, True]
    store.close()


def test_all_are_cleared_while_one_is_written(store: DiskStore, tmp_path: Path) -> None:
    keys = fill(store, 3)
    store.clear()
    assert (held(store, keys), segments(tmp_path)) == ([False] * 3, [])
    assert store.stats().num_bytes == 0
    assert held(store, fill(store, 3)) == [True] * 3


def test_a_record_that_is_cleared_while_it_is_written_is_not_found(tmp_path: Path) -> None:
    opened = list[DiskStore]()

    class ClearedMeanwhile(SegmentWriter):
        def append(self, pieces: tuple[Buffer, ...]) -> int:
            opened[0].clear()
            return super().append(pieces)

    opened.append(open_store(tmp_path, open_writer=ClearedMeanwhile))
    assert held(opened[0], fill(opened[0], 2)) == [False, False]
    opened[0].check()
    opened[0].close()
    assert segments(tmp_path) == []


def test_a_page_that_was_stored_again_is_not_forgotten_with_its_first_record(
    store: DiskStore,
) -> None:
    [key] = fill(store, 1)
    first = store._places[key.chain]
    store.forget([key])
    store.put(key, contents_of(key))
    store._forget(key, first)
    assert held(store, [key]) == [True]


# ---- restarts ------------------------------------------------------------------------------------


def test_pages_outlast_the_store(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 2 * SEGMENT_PAGES + 1)
    store.close()
    store = open_store(tmp_path)
    assert all(held(store, keys))
    assert store.stats().num_pages == len(keys)
    # It begins a segment of its own.
    more = fill(store, 1, first=9)
    store.check()
    assert held(store, more) == [True]
    assert len(segments(tmp_path)) == 4
    store.close()


def test_an_unused_store_leaves_no_segment(tmp_path: Path) -> None:
    for _ in range(2):
        open_store(tmp_path).close()
    assert segments(tmp_path) == []


def test_other_models_and_formats_find_nothing_and_count(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 3)
    store.close()
    for other in (
        OURS._replace(variant=b"n" * 32),
        OURS._replace(payload_bytes=PAYLOAD_BYTES + 1),
    ):
        store = open_store(tmp_path, other)
        assert held(store, keys) == [False] * 3
        assert store.keys([*range(12)], "")[0].chain == keys[0].chain or other.variant != OURS[0]
        assert store.stats()[:2] == (3 * RECORD_BYTES, 0)
        store.close()
    store = open_store(tmp_path)
    assert held(store, keys) == [True] * 3
    store.close()


def test_another_secret_makes_all_foreign(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 2)
    store.close()
    (tmp_path / "octavo-kv" / "secret").write_bytes(b"short")
    store = open_store(tmp_path)
    assert store.keys([*range(2 * PAGE_TOKENS)], "")[0].namespace != keys[0].namespace
    assert held(store, store.keys([*range(2 * PAGE_TOKENS)], "")) == [False] * 2
    store.close()


# ---- size ----------------------------------------------------------------------------------------


def test_the_segment_that_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    now_ns = [10**18]
    store = DiskStore(StoreFolder(tmp_path), OURS, MAX_BYTES, clock_ns=lambda: now_ns[0])
    keys = fill(store, MAX_PAGES)
    store.note_use([keys[0], keys[1], store.keys([5] * PAGE_TOKENS, "")[0]])
    fill(store, 1, first=9)
    first, second = keys[:SEGMENT_PAGES], keys[SEGMENT_PAGES : 2 * SEGMENT_PAGES]
    assert held(store, first) == [True] * SEGMENT_PAGES
    assert held(store, second) == [False] * SEGMENT_PAGES
    assert store.stats().evicted_pages_total == SEGMENT_PAGES
    store.check()
    assert store.stats().num_bytes <= MAX_BYTES
    store.close()


def test_the_order_of_use_outlasts_the_store(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 4 * SEGMENT_PAGES)
    store.close()
    now_ns = [10**18]
    store = DiskStore(StoreFolder(tmp_path), OURS, MAX_BYTES, clock_ns=lambda: now_ns[0])
    for index in (2, 0, 3, 1):
        now_ns[0] += 1
        store.note_use([keys[index * SEGMENT_PAGES]])
    store.close()
    store = open_store(tmp_path, max_bytes=MAX_BYTES // 2 - RECORD_BYTES)
    assert held(store, keys[::SEGMENT_PAGES]) == [True, True, False, True]
    store.close()


def test_the_segment_being_written_never_makes_room(store: DiskStore) -> None:
    keys = fill(store, MAX_PAGES - SEGMENT_PAGES + 1)
    for turn in range(3 * MAX_PAGES):
        others = [key for key in keys if store.has(key)][:-1]
        store.note_use(others)
        keys += fill(store, 1, first=1000 + turn)
        assert held(store, keys[-1:]) == [True]


def test_room_for_a_few_pages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is too small: a page takes 264 B"):
        open_store(tmp_path, max_bytes=8 * RECORD_BYTES - 1)
