"""Records that are damaged, torn or lost are misses, and a folder of others is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from store_faults import (
    FIELDS,
    PAGE_TOKENS,
    RECORD_BYTES,
    Faults,
    FullDisk,
    SlowWriter,
    contents_of,
    fill,
    held,
    open_store,
    segments,
)

from scheduler.tier.folder import StoreError, check_is_on_disk
from scheduler.tier.store import DiskStore
from waiting import wait_until

SUPPORT = Path(__file__).parents[2] / "support"


@pytest.mark.parametrize("field", FIELDS)
def test_a_bit_flipped_in_any_field_is_a_counted_miss(
    store: DiskStore, tmp_path: Path, field: str
) -> None:
    keys = fill(store, 3)
    [path] = segments(tmp_path)
    first, length = FIELDS[field]
    content = bytearray(path.read_bytes())
    content[RECORD_BYTES + first + length // 2] ^= 4
    path.write_bytes(content)
    assert held(store, keys) == [True, False, True]
    assert held(store, keys) == [True, False, True]
    assert store.stats()[1:4] == (2, 3, 1)
    store.put(keys[1], contents_of(keys[1]))
    assert held(store, keys) == [True] * 3


@pytest.mark.parametrize("num_bytes", [0, 1, 60, RECORD_BYTES - 1, RECORD_BYTES])
def test_a_torn_tail_is_left_out_at_the_start(tmp_path: Path, num_bytes: int) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 3)
    store.close()
    [path] = segments(tmp_path)
    os.truncate(path, RECORD_BYTES + num_bytes)
    store = open_store(tmp_path)
    assert held(store, keys) == [True, num_bytes == RECORD_BYTES, False]
    assert store.stats().corrupt_pages_total == 0
    store.close()


def test_a_damaged_header_hides_the_rest_of_its_segment(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 4)
    store.close()
    [path] = segments(tmp_path)
    content = bytearray(path.read_bytes())
    content[RECORD_BYTES + FIELDS["chain"][0]] ^= 1
    path.write_bytes(content)
    store = open_store(tmp_path)
    assert held(store, keys) == [True, False, False, False]
    store.close()


def test_short_writes_are_continued(tmp_path: Path) -> None:
    store = open_store(tmp_path, open_writer=SlowWriter)
    assert held(store, fill(store, 3)) == [True] * 3
    store.close()


def test_a_write_that_failed_is_not_found(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = fill(store, 2)
    store.close()
    store = open_store(tmp_path, open_writer=FullDisk)
    [lacking] = store.keys([9] * PAGE_TOKENS, "")
    with pytest.raises(OSError, match="No space left"):
        store.put(lacking, contents_of(lacking))
    assert held(store, [*keys, lacking]) == [True, True, False]
    store.check()
    store.close()
    assert len(segments(tmp_path)) == 1


def test_a_failed_write_leaves_what_was_written_before(tmp_path: Path) -> None:
    written = []

    class SoonFull(FullDisk):
        def _write(self, content: memoryview, offset_bytes: int) -> int:
            written.append(offset_bytes)
            if len(written) > 3:
                return super()._write(content, offset_bytes)
            return os.pwrite(self._descriptor, content, offset_bytes)

    store = open_store(tmp_path, open_writer=SoonFull)
    keys = store.keys([*range(2 * PAGE_TOKENS)], "")
    store.put(keys[0], contents_of(keys[0]))
    with pytest.raises(OSError, match="No space left"):
        store.put(keys[1], contents_of(keys[1]))
    assert held(store, keys) == [True, False]
    assert segments(tmp_path)[0].stat().st_size == RECORD_BYTES
    store.close()


def test_a_removed_segment_is_a_miss(store: DiskStore, tmp_path: Path) -> None:
    keys = fill(store, 2)
    segments(tmp_path)[0].unlink()
    assert held(store, keys) == [False, False]
    assert store.stats().corrupt_pages_total == 0


def test_a_segment_that_cannot_be_read_is_a_miss(store: DiskStore, tmp_path: Path) -> None:
    keys = fill(store, 1)
    [path] = segments(tmp_path)
    path.unlink()
    path.mkdir()
    assert held(store, keys) == [False]
    assert store.stats().corrupt_pages_total == 1
    path.rmdir()


def test_what_is_not_a_file_is_passed_over_at_the_start(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    (tmp_path / "octavo-kv" / "segment-00000007.kv").symlink_to("/etc/hostname")
    (tmp_path / "octavo-kv" / "notes.txt").write_text("mine")
    store = open_store(tmp_path)
    assert store.stats().num_pages == 0
    fill(store, 1)
    assert "segment-00000008.kv" in {path.name for path in segments(tmp_path)}
    store.close()


def test_a_thousand_faults_give_no_wrong_answer(tmp_path: Path) -> None:
    faults = Faults(tmp_path, seed=1)
    faults.inject(1000)
    assert faults.wrong == 0
    assert len(faults.injected) > len(FIELDS)
    assert faults.missed > 900
    assert faults.right > 1000


def has_segments(folder: Path, number: int) -> bool:
    return len(segments(folder)) >= number


def test_a_killed_writer_leaves_sound_pages(tmp_path: Path) -> None:
    command = [sys.executable, str(SUPPORT / "store_victim.py"), str(tmp_path)]
    num_found = 0
    for num_lines in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE) as victim:
            assert victim.stdout is not None
            assert victim.stdout.readline() == b"open\n"
            wait_until(partial(has_segments, tmp_path, 2 + num_lines))
            victim.kill()
        store = open_store(tmp_path)
        for text in range(50):
            num_found += sum(held(store, store.keys([text, *range(11 * PAGE_TOKENS)], "")))
        store.check()
        store.close()
    assert num_found > 0


# ---- the folder ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("store")
def test_a_folder_is_of_one_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="octavo-kv is in use by another engine"):
        open_store(tmp_path)


def test_the_files_are_the_users_alone(store: DiskStore, tmp_path: Path) -> None:
    fill(store, 1)
    folder = tmp_path / "octavo-kv"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_a_folder_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "octavo-kv").mkdir(mode=0o755)
    with pytest.raises(StoreError, match="is open to other users: its mode must be 0700"):
        open_store(tmp_path)


def test_a_folder_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(StoreError, match="belongs to another user"):
        open_store(tmp_path)


def test_what_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "octavo-kv").symlink_to(tmp_path / "there")
    with pytest.raises(StoreError, match="is not a folder"):
        open_store(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used: "):
        open_store(tmp_path / "file")


def test_a_path_in_memory_is_refused(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mountinfo"
    number = f"{os.major(device)}:{os.minor(device)}"
    line = "36 35 {} / /mnt rw,noatime master:1 - {} device rw\n"
    mounts.write_text(line.format("0:0", "tmpfs") + line.format(number, "ext4"))
    check_is_on_disk(tmp_path / "not" / "there", mounts)
    mounts.write_text(line.format(number, "tmpfs"))
    with pytest.raises(StoreError, match="is on tmpfs, which is memory and not a disk"):
        check_is_on_disk(tmp_path / "not" / "there", mounts)
    check_is_on_disk(tmp_path, tmp_path / "no such file")
