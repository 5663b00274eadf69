"""Reads the untrusted JSON files beside a model's weights.

`Infinity`, `NaN` and a byte-order mark are accepted, as by Python's own reader and so by
`transformers`. Knows nothing of keys.
"""

from __future__ import annotations

import json
from pathlib import Path

from model.formats import FormatError

#: Twice the largest known index or table of added tokens.
_MAX_BYTES = 64 * 2**20
#: Deeper than any such file, and far below Python's limit of recursion.
_MAX_LEVELS = 64


def read_json_object(path: Path) -> dict[str, object]:
    """Return the object in a JSON file. Raises `FormatError`, or `OSError`."""
    size_bytes = path.stat().st_size
    if size_bytes > _MAX_BYTES:
        raise FormatError(f"{path} has {size_bytes} bytes; at most {_MAX_BYTES} are read")
    return parse_json_object(path.read_bytes(), str(path))


def parse_json_object(raw: bytes, name: str) -> dict[str, object]:
    """Return the object in a JSON text. Raises `FormatError` that begins with `name`."""
    try:
        found = json.loads(raw.decode("utf-8-sig"))
        _check_depth(found)
        # Half of a surrogate pair can be escaped, but not logged or sent.
        json.dumps(found, ensure_ascii=False).encode()
    except RecursionError:
        raise FormatError(f"{name} is nested more than {_MAX_LEVELS} levels deep") from None
    except ValueError as error:
        raise FormatError(f"{name} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise FormatError(f"{name} must hold a JSON object")
    return found


def shown(value: object) -> str:
    """Return a value for a message: in one line, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_depth(found: object) -> None:
    level = [found]
    for _ in range(_MAX_LEVELS):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return
    raise RecursionError


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else []
