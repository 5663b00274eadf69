"""`octavo cache` on the store of an engine that may be running."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from store_faults import OURS, PAGE_TOKENS, RECORD_BYTES, contents_of, open_store

from scheduler.tier.store import DiskStore
from server.command import run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    opened = open_store(tmp_path)
    for namespace in ("", "a"):
        for key in opened.keys([*range(3 * PAGE_TOKENS)], namespace):
            opened.put(key, contents_of(key))
    opened.forget(opened.keys([*range(PAGE_TOKENS)], "a"))
    yield opened
    opened.close()


def said(action: str, folder: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert run(["cache", action, str(folder)]) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.usefixtures("store")
def test_segments_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = said("ls", tmp_path, capsys)
    assert line.split()[:6] == ["segment-00000001.kv", "1.55", "KiB", "5", "pages", "used"]
    assert said("verify", tmp_path, capsys).split()[3:] == ["5", "pages", "sound"]


def test_pages_are_counted_by_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for variant, num_pages in ((b"m" * 32, 5), (b"n" * 32, 1)):
        opened = open_store(tmp_path, OURS._replace(variant=variant))
        for key in opened.keys([5] * PAGE_TOKENS * num_pages, variant.decode()):
            opened.put(key, contents_of(key))
        opened.close()
    first, second = said("stats", tmp_path, capsys).splitlines()
    assert first.startswith("model 6d6d6d6d6d6d   1.29 KiB       5 pages of 4 tokens  1 namespace")
    assert second.startswith("model 6e6e6e6e6e6e      264 B       1 pages of 4 tokens  1 namespace")


@pytest.mark.usefixtures("store")
def test_damaged_pages_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [path] = (tmp_path / "octavo-kv").glob("segment-*.kv")
    content = bytearray(path.read_bytes())
    content[RECORD_BYTES - 40] ^= 1
    path.write_bytes(content[:-9])
    report = said("verify", tmp_path, capsys, code=1)
    assert "4 pages  1 damaged, 255 B unreadable at the end" in report
    assert "octavo: 1 pages are damaged; none of them is ever used" in report


def test_a_store_in_use_is_not_cleared(
    store: DiskStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is in use by another engine" in said("clear", tmp_path, capsys, code=1)
    assert store.stats().num_pages == 5


def test_a_store_is_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_store(tmp_path)
    [key] = opened.keys([5] * PAGE_TOKENS, "")
    opened.put(key, contents_of(key))
    opened.close()
    assert said("clear", tmp_path, capsys) == "264 B removed\n"
    assert said("ls", tmp_path, capsys) == ""


def test_a_folder_without_a_store_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in ("ls", "stats", "verify", "clear"):
        report = said(action, tmp_path, capsys, code=1)
        assert report == f"octavo: {tmp_path} holds no store: it has no folder octavo-kv\n"
