from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.weights import mapped_file
from model.weights.mapped_file import map_file

SIZE_BYTES = 40 * 2**20


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    """Yield a file that is large enough, without content: it takes no room on the disk."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, SIZE_BYTES)
    os.pwrite(descriptor, b"x", 0)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("num_huge", [0, 11, 12, 16])
def test_a_file_is_mapped_if_most_places_are_in_huge_pages(
    descriptor: int, monkeypatch: pytest.MonkeyPatch, num_huge: int
) -> None:
    monkeypatch.setattr(mapped_file, "num_huge_pages", lambda _mapping: num_huge)
    mapping = map_file(descriptor)
    assert (mapping is not None) == (num_huge >= 12)
    if mapping is not None:
        assert (len(mapping), mapping[:2]) == (SIZE_BYTES, b"x\0")
        mapping[0] = 1
        assert os.pread(descriptor, 1, 0) == b"x"


def test_small_files_are_not_mapped(descriptor: int) -> None:
    os.ftruncate(descriptor, 31 * 2**20)
    assert map_file(descriptor) is None


def smaps(first: int, pmd_kib: int) -> str:
    return (
        "1000-2000 r--p 00000000 fe:00 1  /a\nFilePmdMapped:     512 kB\nVmFlags: rd mr\n"
        f"{first:x}-{first + SIZE_BYTES:x} rw-p 00000000 fe:00 2  /b: c\n"
        f"Size:  40960 kB\nFilePmdMapped:     {pmd_kib} kB\nVmFlags: rd wr hg\n"
        "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]\n"
    )


def test_the_huge_pages_of_this_mapping_are_counted(
    descriptor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = tmp_path / "smaps"
    monkeypatch.setattr(mapped_file, "_SMAPS", report)
    with mmap.mmap(descriptor, SIZE_BYTES, access=mmap.ACCESS_COPY) as mapping:
        # A system without this report.
        assert mapped_file.num_huge_pages(mapping) == 0
        address = mapped_file._address_of(mapping)
        report.write_text(smaps(address, 3 * 2048))
        assert mapped_file.num_huge_pages(mapping) == 3
        report.write_text(smaps(address + 4096, 3 * 2048))
        assert mapped_file.num_huge_pages(mapping) == 0


def test_the_systems_report_has_this_mapping(descriptor: int) -> None:
    with mmap.mmap(descriptor, SIZE_BYTES, access=mmap.ACCESS_COPY) as mapping:
        address = f"{mapped_file._address_of(mapping):x}-"
        assert any(line.startswith(address) for line in mapped_file._SMAPS.read_text().splitlines())
