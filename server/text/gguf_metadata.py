"""Typed access to the metadata of a GGUF file. Knows nothing of tensors or of the file's layout."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from model.formats import FormatError
from model.formats.gguf import read_gguf_header
from server.text.token_bytes import TextError

_T = TypeVar("_T")


class GGUFMetadata:
    """The keys of a file. A value of another type than requested raises `TextError`."""

    def __init__(self, path: Path) -> None:
        """Read the file's keys. Raises `TextError` that names the file if it cannot be read."""
        self.path = path
        #: Decisions that the file leaves open, a line each.
        self.notes: list[str] = []
        try:
            self._values = read_gguf_header(path).metadata
        except FormatError as error:
            raise TextError(str(error)) from error
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror or error}") from error

    def text(self, key: str) -> str | None:
        """Return a string, or None where there is no such key."""
        return self._value(key, str, "a string")

    def integer(self, key: str) -> int | None:
        """Return a whole number, or None where there is no such key."""
        return self._value(key, int, "a whole number")

    def flag(self, key: str) -> bool | None:
        """Return a truth value, or None where there is no such key."""
        return self._value(key, bool, "a truth value")

    def texts(self, key: str) -> list[str]:
        """Return an array of strings; empty where there is no such key."""
        return self._value(key, list, "an array of strings") or []

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return an array of numbers; empty where there is no such key."""
        return self._value(key, tuple, "an array of numbers") or ()

    def _value(self, key: str, kind: type[_T], kind_name: str) -> _T | None:
        value = self._values.get(key)
        if value is None or isinstance(value, kind):
            return value
        raise TextError(f"{self.path}: {key} is not {kind_name}")
