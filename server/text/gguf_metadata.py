"""A typed look at the metadata of a GGUF file. Knows nothing of tensors or of the file's layout."""

from __future__ import annotations

from pathlib import Path

from model.formats import FormatError
from model.formats.gguf import read_gguf_header
from server.text.token_bytes import TextError


class GGUFMetadata:
    """Typed look at a file's keys; a key of another type than asked for counts as a broken file."""

    def __init__(self, path: Path) -> None:
        """Read the file's keys. Raises `TextError` that names the file if it cannot be read."""
        self.path = path
        #: Choices that the file left to whoever reads it, a line each.
        self.notes: list[str] = []
        try:
            self._values = read_gguf_header(path).metadata
        except FormatError as error:
            raise TextError(str(error)) from error
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror or error}") from error

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
