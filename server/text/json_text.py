r"""JSON that Python or other readers refuse: lone surrogates, long numbers, deep nesting.

JSON can hold half of a surrogate pair (`"\ud83d"`), which models and clients write that cut an
emoji in two. UTF-8 cannot. Knows nothing of the meaning of the JSON.
"""

from __future__ import annotations

import json
import math
import re

#: Deeper values stay text. The limit also holds for bodies.
MAX_DEPTH = 200
#: Python and pydantic read no longer integers.
MAX_DIGITS = 4300
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_STRING_OR_NUMBER = re.compile(
    rb'"(?:[^"\\]|\\.)*"|(-?[0-9]{%d,}[0-9.eE+-]*)' % MAX_DIGITS, re.DOTALL
)


def mended(body: bytes) -> bytes:
    """Return a JSON body that can be read: U+FFFD for lone surrogates, strings for long numbers."""

    def whole(found: re.Match[bytes]) -> bytes:
        return rb"\ufffd" if found[1] else found[0]

    def short(found: re.Match[bytes]) -> bytes:
        return b'"%b"' % found[1] if found[1] else found[0]

    return _STRING_OR_NUMBER.sub(short, _ESCAPE.sub(whole, body))


def dumped(value: object) -> str:
    """Return `value` as JSON that can be encoded, in plain letters of any alphabet."""
    return with_escapes(json.dumps(value, ensure_ascii=False))


def with_escapes(text: str) -> str:
    r"""Return JSON with lone surrogates as escapes (`\ud83d`), so that it can be encoded."""
    return _SURROGATE.sub(lambda at: f"\\u{ord(at[0]):04x}", text)


def without_surrogates(text: str) -> str:
    """Return plain text with U+FFFD in place of lone surrogates."""
    return _SURROGATE.sub("\ufffd", text)


def read_value(text: str) -> object:
    """Return the value of JSON; a number that Python cannot hold becomes a string.

    Raises `ValueError` for a text that is not JSON, or deeper than `MAX_DEPTH`.
    """
    try:
        value: object = json.loads(text, parse_int=_integer, parse_float=_fraction)
    except RecursionError:
        raise _too_deep() from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return value
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _integer(text: str) -> int | str:
    return int(text) if len(text) <= MAX_DIGITS else text


def _fraction(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else text
