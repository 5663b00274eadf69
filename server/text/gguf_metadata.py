"""The key/value part of a GGUF file, read quickly.

`gguf.GGUFReader` makes several arrays of each string: 1.7 s for SmolLM2's vocabulary, where this
takes 0.03 s. Reads no tensors. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from server.text.pieces import TextError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING = 8
_ARRAY = 9
#: `struct` letters of the types of fixed size.
_LETTERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_read_u64 = struct.Struct("<Q").unpack_from


class GGUFMetadata:
    """Typed look at a file's keys; a key of another type than asked for counts as a broken file."""

    def __init__(self, path: Path) -> None:
        """Read the file's keys. Raises `TextError` that names the file if it cannot be read."""
        self.path = path
        #: Choices that the file left to whoever reads it, a line each.
        self.notes: list[str] = []
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as m:
                self._values = _Cursor(m).read_all()
        # An empty file (ValueError), a short one (struct.error), bad UTF-8 (ValueError).
        except (OSError, ValueError, struct.error) as error:
            raise TextError(f"{path} is not a readable GGUF file: {error}") from error

    def text(self, key: str) -> str | None:
        """Return a string, or None where there is no such key."""
        value = self._values.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self._mistyped(key, "a string")

    def integer(self, key: str) -> int | None:
        """Return a whole number, or None where there is no such key."""
        value = self._values.get(key)
        if value is None or isinstance(value, int):
            return value
        raise self._mistyped(key, "a whole number")

    def flag(self, key: str) -> bool | None:
        """Return a truth value, or None where there is no such key."""
        value = self._values.get(key)
        if value is None or isinstance(value, bool):
            return value
        raise self._mistyped(key, "a truth value")

    def texts(self, key: str) -> list[str]:
        """Return an array of strings; empty where there is no such key."""
        value = self._values.get(key, [])
        if isinstance(value, list):
            return value
        raise self._mistyped(key, "an array of strings")

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return an array of numbers; empty where there is no such key."""
        value = self._values.get(key, ())
        if isinstance(value, tuple):
            return value
        raise self._mistyped(key, "an array of numbers")

    def _mistyped(self, key: str, wanted: str) -> TextError:
        return TextError(f"{self.path}: {key} is not {wanted}")


class _Cursor:
    """A place in the file that moves on as values are read."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at_byte = 0

    def read_all(self) -> dict[str, object]:
        if self._data[: len(_MAGIC)] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._at_byte = len(_MAGIC)
        version, _num_tensors, num_keys = self._unpack("IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version}; little-endian 2 and 3 are supported")
        values: dict[str, object] = {}
        for _ in range(num_keys):
            key = self._strings(1)[0]
            (kind,) = self._unpack("I")
            values[key] = self._value(kind)
        return values

    def _value(self, kind: int) -> object:
        if kind == _STRING:
            return self._strings(1)[0]
        if kind != _ARRAY:
            return self._unpack(_letter(kind))[0]
        inner, count = self._unpack("IQ")
        if inner == _STRING:
            return self._strings(count)
        return self._unpack(f"{count}{_letter(inner)}")

    def _unpack(self, layout: str) -> tuple[int, ...]:
        layout = "<" + layout
        values = struct.unpack_from(layout, self._data, self._at_byte)
        self._at_byte += struct.calcsize(layout)
        return values

    def _strings(self, count: int) -> list[str]:
        """Read `count` strings, in one loop without calls: what is fast here."""
        data, begin = self._data, self._at_byte
        strings = []
        for _ in range(count):
            end = begin + 8 + _read_u64(data, begin)[0]
            strings.append(data[begin + 8 : end].decode())
            begin = end
        if begin > len(data):
            raise ValueError("it ends inside a string")
        self._at_byte = begin
        return strings


def _letter(kind: int) -> str:
    if kind not in _LETTERS:
        raise ValueError(f"it has a value of the unknown type {kind}")
    return _LETTERS[kind]
