from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from model.weights import file_content
from model.weights.file_content import FilesState

SECOND_NS = 10**9


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("a", "b")]
    for path in found:
        path.write_bytes(path.name.encode() * 1000)
    return found


def _rewrite_with_the_same_times(path: Path) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _replace_with_a_copy(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    status = path.stat()
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    copy.replace(path)


@pytest.mark.parametrize(
    "change",
    [
        _rewrite_with_the_same_times,
        _replace_with_a_copy,
        lambda path: path.write_bytes(b"short"),
        os.utime,
        lambda path: path.rename(path.with_name("moved")),
        lambda path: path.unlink(),
    ],
)
def test_every_change_of_a_file_changes_the_state(
    paths: list[Path], change: Callable[[Path], object]
) -> None:
    state = FilesState.of(paths)
    assert state.is_current()
    time.sleep(0.02)  # A tick of the clock that stamps files.
    change(paths[1])
    assert not state.is_current()


def test_a_link_stands_for_its_file(paths: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(paths[0])
    state = FilesState.of([link])
    assert state == FilesState.of(paths[:1])
    link.unlink()
    link.symlink_to(paths[1])
    assert state != FilesState.of([link])


def test_a_state_is_settled_when_no_write_is_recent(paths: list[Path]) -> None:
    state = FilesState.of(paths)
    written_ns = paths[1].stat().st_ctime_ns
    assert not state.is_settled(written_ns)
    assert not state.is_settled(written_ns + SECOND_NS)
    assert state.is_settled(written_ns + 3 * SECOND_NS)
    # A file from the future never is.
    os.utime(paths[0], ns=(0, written_ns + 100 * SECOND_NS))
    assert not FilesState.of(paths).is_settled(written_ns + 3 * SECOND_NS)


@pytest.mark.parametrize("chunk_bytes", [7, 500, 1000, 2**20])
def test_digests_depend_on_the_content_alone(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(file_content, "_DIGEST_CHUNK_BYTES", chunk_bytes)
    state = FilesState.of(paths)
    digests = state.digests()
    assert state.has_content(digests)
    other = tmp_path / "other"
    other.mkdir()
    copies = [other / path.name for path in paths]
    for path, copy in zip(paths, copies, strict=True):
        copy.write_bytes(path.read_bytes())
    assert FilesState.of(copies).digests() == digests
    for where in (0, 499, 999):
        content = bytearray(paths[1].read_bytes())
        content[where] ^= 1
        copies[1].write_bytes(content)
        changed = FilesState.of(copies)
        assert changed.digests() != digests
        assert not changed.has_content(digests)
    copies[1].write_bytes(paths[1].read_bytes() + b"x")
    assert not FilesState.of(copies).has_content(digests)
    assert not FilesState.of(paths[::-1]).has_content(digests)


@pytest.mark.parametrize("digests", [None, 1, [], [[1000, []]], [[1000, []], [1000, []]]])
def test_other_digests_are_no_match(paths: list[Path], digests: object) -> None:
    assert not FilesState.of(paths).has_content(digests)
