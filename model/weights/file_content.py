"""Identifies the content of a model's files: by their state in the file system, and by digests.

A state is cheap to read, and trusted: a file whose size, times and inode are those of an earlier
start has the content of that start. The kernel sets the time of change (ctime) at every write and
at every change of the other times, and programs cannot set it. Digests are computed once for each
new state. Knows nothing of formats of weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO, Self

#: A write this soon after another may leave the times as they were, on any file system.
_TICK_NS = 2 * 10**9
_DIGEST_CHUNK_BYTES = 16 * 2**20
_DIGEST_THREADS = 2

#: Of each file its size and the digests of its chunks, in JSON's types.
Digests = list[list[object]]


@dataclass(frozen=True, slots=True)
class FileState:
    """A file without its content, links resolved."""

    path: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Read a file's state. Raises `OSError`."""
        real = path.resolve()
        status = real.stat()
        times = status.st_mtime_ns, status.st_ctime_ns
        return cls(str(real), status.st_size, *times, status.st_ino)


@dataclass(frozen=True, slots=True)
class FilesState:
    """The state of all files that hold a model's weights, in a fixed order."""

    files: tuple[FileState, ...]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> Self:
        """Read the state of files. Raises `OSError`."""
        return cls(tuple(FileState.of(path) for path in paths))

    @property
    def digest(self) -> str:
        """Different for different states."""
        return sha256_of([astuple(one) for one in self.files])

    def is_settled(self, now_ns: int) -> bool:
        """Return whether a write from now on changes the state: the last one is long enough ago."""
        newest_ns = max(max(one.mtime_ns, one.ctime_ns) for one in self.files)
        return newest_ns + _TICK_NS < now_ns

    def is_current(self) -> bool:
        """Return whether the files still have this state."""
        try:
            return FilesState.of([Path(one.path) for one in self.files]) == self
        except OSError:
            return False

    def digests(self) -> Digests:
        """Read all files and return the digests of their content. Raises `OSError`."""
        found: Digests = []
        for one in self.files:
            with Path(one.path).open("rb") as file:
                chunks = [_sha256(chunk) for chunk in _chunks(file)]
            found.append([one.size_bytes, chunks])
        return found

    def has_content(self, digests: object) -> bool:
        """Return whether the files have the content of these digests, which may be malformed.

        Reads until the first difference. Raises `OSError`.
        """
        sizes = [one.size_bytes for one in self.files]
        if not isinstance(digests, list) or [entry[0] for entry in digests] != sizes:
            return False
        with ThreadPoolExecutor(_DIGEST_THREADS, "digest") as pool:
            for one, (_size_bytes, expected) in zip(self.files, digests, strict=True):
                with Path(one.path).open("rb") as file:
                    if not _has_chunks(file, expected, pool):
                        return False
        return True


def sha256_of(value: object) -> str:
    """Return the digest of a value of JSON's types."""
    return _sha256(json.dumps(value).encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_DIGEST_CHUNK_BYTES):
        yield chunk


def _has_chunks(file: BinaryIO, expected: Sequence[str], pool: ThreadPoolExecutor) -> bool:
    """Compare a few chunks at a time, so that few are in memory."""
    num_compared = 0
    is_whole = False
    while not is_whole:
        chunks = [file.read(_DIGEST_CHUNK_BYTES) for _ in range(_DIGEST_THREADS)]
        is_whole = not chunks[-1]
        found = list(pool.map(_sha256, filter(None, chunks)))
        if found != list(expected[num_compared : num_compared + len(found)]):
            return False
        num_compared += len(found)
    return num_compared == len(expected)
