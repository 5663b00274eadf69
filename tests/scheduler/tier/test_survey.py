"""A store is read beside its engine, and without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from store_faults import OURS, PAGE_TOKENS, RECORD_BYTES, contents_of, open_store

from scheduler.tier.folder import StoreError
from scheduler.tier.survey import clear, groups, survey


def test_segments_and_groups_are_counted(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = store.keys([*range(3 * PAGE_TOKENS)], "")
    for key in keys:
        store.put(key, contents_of(key))
    store.forget(keys[:1])
    [segment] = survey(tmp_path)
    assert (segment.num_bytes, len(segment.headers), len(segment.pages)) == (3 * RECORD_BYTES, 3, 2)
    assert (segment.num_lost_bytes, segment.num_damaged) == (0, 0)
    [(variant, group)] = groups(survey(tmp_path)).items()
    assert variant == OURS.variant
    assert (group.num_pages, group.num_bytes, len(group.namespaces)) == (2, 2 * RECORD_BYTES, 1)
    with pytest.raises(StoreError, match="in use by another engine"):
        clear(tmp_path)
    store.close()


def test_damaged_and_lost_pages_are_found_and_removed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for key in store.keys([*range(3 * PAGE_TOKENS)], ""):
        store.put(key, contents_of(key))
    store.close()
    [path] = (tmp_path / "octavo-kv").glob("segment-*.kv")
    content = bytearray(path.read_bytes())
    content[RECORD_BYTES - 20] ^= 1
    path.write_bytes(content[:-1])
    [segment] = survey(tmp_path, verify=True)
    assert (segment.num_damaged, segment.num_lost_bytes) == (1, RECORD_BYTES - 1)
    path.write_bytes(b"")
    [segment] = survey(tmp_path, verify=True)
    assert (segment.headers, segment.num_lost_bytes) == ([], 0)
    assert clear(tmp_path) == 0
    assert list(survey(tmp_path)) == []


def test_a_folder_without_a_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no store"):
        clear(tmp_path)
