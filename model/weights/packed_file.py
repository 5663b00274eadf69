"""Writes and reads files of packed weights: named parts of tensors and plain values.

A file is a prefix, a header in JSON and the tensors, each at a multiple of 4096 bytes and with a
checksum. The prefix is written last, after everything else is on the disk. So a file whose writing
was interrupted anywhere has no valid prefix. Knows nothing of layers, of linear formats or of the
folder of such files (`model/weights/packed_cache.py`).
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from model.kv.arena import Arena

Plain: TypeAlias = str | int | float | bool | None
#: The tensors and values of one part of a model, by attribute.
Part: TypeAlias = Mapping[str, Tensor | Plain]
#: Maps a file by its descriptor; returns None where its content is better copied.
Mapper: TypeAlias = Callable[[int], mmap.mmap | None]

#: Magic number with the version of this format, bytes of the header, bytes of the file, and the
#: checksum of the header.
_PREFIX = struct.Struct("<8sQQI")
_MAGIC = b"octavoW1"
_MAX_HEADER_BYTES = 64 * 2**20
#: A file can be mapped tensor by tensor.
_ALIGNMENT_BYTES = 4096
#: Checked while it is in the processor's cache.
_READ_BYTES = 2**20
#: Written at a time: whole huge pages.
_WRITE_BYTES = 8 * 2**20
#: Written to the disk at a time, so that other programs' writes do not wait behind gigabytes.
_SYNC_BYTES = 64 * 2**20
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class PackedError(ValueError):
    """A file that must not be used; the message is one line with the reason."""


# ---- writing -------------------------------------------------------------------------------------


def write_packed(descriptor: int, parts: Mapping[str, Part], facts: Mapping[str, object]) -> int:
    """Write parts, with facts about them in JSON's types, to an empty file; return its size.

    Raises `OSError`.
    """
    entries, placed = _place(parts)
    start = _aligned(_PREFIX.size + len(_encoded(entries, facts)))
    stream = _Stream(descriptor)
    end = start
    for offset_bytes, tensor, entry in placed:
        end = start + offset_bytes
        entry[_CHECKSUM] = stream.write(_bytes_of(tensor), end)
        end += tensor.nbytes
    stream.flush()
    os.ftruncate(descriptor, end)
    header = _encoded(entries, facts)
    _write(descriptor, memoryview(header), _PREFIX.size)
    os.fsync(descriptor)
    prefix = _PREFIX.pack(_MAGIC, len(header), end, zlib.crc32(header))
    _write(descriptor, memoryview(prefix), 0)
    os.fsync(descriptor)
    return end


def num_bytes_of(parts: Mapping[str, Part]) -> int:
    """Return the memory of all tensors."""
    values = (value for part in parts.values() for value in part.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


#: A tensor's entry in the header: dtype, shape, offset behind the header, checksum.
_DTYPE, _SHAPE, _OFFSET, _CHECKSUM = range(4)
_Entries: TypeAlias = dict[str, dict[str, dict[str, Any]]]


def _place(parts: Mapping[str, Part]) -> tuple[_Entries, list[tuple[int, Tensor, list[Any]]]]:
    """Return the header's entries of all parts, and each tensor with its offset and entry."""
    entries: _Entries = {}
    placed = []
    offset_bytes = 0
    # Parts are made side by side; the same parts give the same file.
    for name, part in sorted(parts.items()):
        tensors, values = {}, {}
        for attribute, value in part.items():
            if not isinstance(value, Tensor):
                values[attribute] = value
                continue
            # As many digits as every checksum has: the header's size is known before them.
            entry = [str(value.dtype), [*value.shape], offset_bytes, f"{0:08x}"]
            tensors[attribute] = entry
            placed.append((offset_bytes, value, entry))
            offset_bytes += _aligned(value.nbytes)
        entries[name] = {"tensors": tensors, "values": values}
    return entries, placed


def _encoded(entries: _Entries, facts: Mapping[str, object]) -> bytes:
    return json.dumps({"parts": entries, "facts": facts}).encode()


class _Stream:
    """Writes at rising offsets, in whole pieces: so the page cache keeps them in huge pages."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._piece = bytearray(_WRITE_BYTES)
        #: Offset in the file of the piece and of its end so far.
        self._start = self._end = 0

    def write(self, content: memoryview, offset_bytes: int) -> str:
        """Write, after zeros from the last end on, and return the checksum of the content."""
        self._append(memoryview(bytes(offset_bytes - self._end)))
        checksum = 0
        for start in range(0, len(content), _READ_BYTES):
            piece = content[start : start + _READ_BYTES]
            checksum = zlib.crc32(piece, checksum)
            self._append(piece)
        return _shown(checksum)

    def flush(self) -> None:
        """Write the rest."""
        _write(self._descriptor, memoryview(self._piece)[: self._end - self._start], self._start)
        self._start = self._end

    def _append(self, content: memoryview) -> None:
        while content:
            at = self._end - self._start
            part = content[: _WRITE_BYTES - at]
            self._piece[at : at + len(part)] = part
            self._end += len(part)
            content = content[len(part) :]
            if self._end - self._start == _WRITE_BYTES:
                self.flush()
                if self._end % _SYNC_BYTES == 0:
                    os.fdatasync(self._descriptor)


def _write(descriptor: int, content: memoryview, offset_bytes: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, offset_bytes)
        content, offset_bytes = content[written:], offset_bytes + written


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else _EMPTY


_EMPTY = memoryview(bytearray())


def _shown(checksum: int) -> str:
    return f"{checksum:08x}"


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


# ---- reading -------------------------------------------------------------------------------------


class PackedFile:
    """A file of packed weights, open for reading by any number of threads."""

    def __init__(self, path: Path, descriptor: int, map_file: Mapper | None = None) -> None:
        """Read the header; `close` closes the descriptor. Raises `PackedError`, `OSError`."""
        self.path = path
        self._descriptor = descriptor
        _check_owner(path, descriptor)
        self._entries, self.facts, self._start_bytes = _read_header(path, descriptor)
        self._mapping = map_file(descriptor) if map_file else None

    @classmethod
    def open(cls, path: Path, map_file: Mapper | None = None) -> Self:
        """Open a file. Raises `FileNotFoundError`, or `PackedError` if it must not be used.

        If `map_file` returns a mapping of the descriptor, tensors are not copied.
        """
        try:
            # A pipe would block, and a link may lead anywhere.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise PackedError(f"{path} cannot be read ({error.strerror})") from error
        try:
            return cls(path, descriptor, map_file)
        except OSError as error:
            os.close(descriptor)
            raise PackedError(f"{path} cannot be read ({error.strerror})") from error
        except PackedError:
            os.close(descriptor)
            raise

    def read(self, name: str, arena: Arena) -> dict[str, Tensor | Plain]:
        """Read a part; its tensors are mapped, or read into `arena`. Raises `PackedError`."""
        entry = self._entries.get(name)
        if entry is None:
            raise PackedError(f"{self.path} is damaged: it has no part {name}")
        part: dict[str, Tensor | Plain] = dict(entry["values"])
        for attribute, (dtype, shape, offset_bytes, checksum) in entry["tensors"].items():
            tensor, found = self._tensor(tuple(shape), _DTYPES[dtype], offset_bytes, arena)
            if found != checksum:
                raise PackedError(f"{self.path} is damaged: the checksum of {name} is wrong")
            part[attribute] = tensor
        return part

    def _tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype, offset_bytes: int, arena: Arena
    ) -> tuple[Tensor, str]:
        """Return a tensor and the checksum of its content."""
        if self._mapping is None or not (count := math.prod(shape)):
            tensor = arena.take(shape, dtype)
            return tensor, self._read_into(_bytes_of(tensor), offset_bytes)
        start = self._start_bytes + offset_bytes
        flat = torch.frombuffer(self._mapping, dtype=dtype, count=count, offset=start)
        return flat.view(shape), _shown(zlib.crc32(_bytes_of(flat)))

    def _read_into(self, target: memoryview, offset_bytes: int) -> str:
        """Fill `target` and return the checksum of its content."""
        checksum = 0
        offset_bytes += self._start_bytes
        try:
            while target:
                count = os.preadv(self._descriptor, [target[:_READ_BYTES]], offset_bytes)
                if count == 0:
                    raise PackedError(f"{self.path} is cut off")
                checksum = zlib.crc32(target[:count], checksum)
                target, offset_bytes = target[count:], offset_bytes + count
        except OSError as error:
            raise PackedError(f"{self.path} cannot be read ({error.strerror})") from error
        return _shown(checksum)

    def note_use(self) -> None:
        """Set the file's time to now: the least recently used file is removed first."""
        os.utime(self._descriptor)

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        os.close(self._descriptor)


_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


def _check_owner(path: Path, descriptor: int) -> None:
    status = os.fstat(descriptor)
    if status.st_uid not in {0, os.geteuid()}:
        raise PackedError(f"{path} belongs to another user")
    if status.st_mode & _WRITABLE_BY_OTHERS:
        raise PackedError(f"{path} can be written by other users")
    if not stat.S_ISREG(status.st_mode):
        raise PackedError(f"{path} is not a file")


def _read_header(path: Path, descriptor: int) -> tuple[_Entries, dict[str, Any], int]:
    """Return the entries, the facts and the offset of the first tensor."""
    prefix = os.pread(descriptor, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size:
        raise PackedError(f"{path} is cut off")
    magic, header_bytes, file_bytes, checksum = _PREFIX.unpack(prefix)
    if magic != _MAGIC or header_bytes > _MAX_HEADER_BYTES:
        raise PackedError(f"{path} is damaged, or was written by another version")
    if os.fstat(descriptor).st_size != file_bytes:
        raise PackedError(f"{path} is cut off, or was lengthened")
    header = os.pread(descriptor, header_bytes, _PREFIX.size)
    if zlib.crc32(header) != checksum:
        raise PackedError(f"{path} is damaged: the checksum of its header is wrong")
    start_bytes = _aligned(_PREFIX.size + header_bytes)
    try:
        content = json.loads(header)
        entries, facts = content["parts"], content["facts"]
        is_outside = any(start_bytes + end > file_bytes for end in _ends(entries))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise PackedError(f"{path} is damaged: {error!r}") from error
    if is_outside:
        raise PackedError(f"{path} is damaged: a tensor ends behind the file")
    return entries, facts, start_bytes


def _ends(entries: _Entries) -> Iterator[int]:
    """Yield the offset behind each tensor. Raises like damaged JSON where an entry is wrong."""
    for part in entries.values():
        dict(part["values"])
        for dtype, shape, offset_bytes, _checksum in part["tensors"].values():
            if min([offset_bytes, *shape]) < 0:
                raise ValueError("a negative size")
            yield offset_bytes + math.prod(shape) * _DTYPES[dtype].itemsize
