"""Arguments that a model wrote as bare text, as the JSON that the tool's schema asks for.

Knows nothing of how they were written down.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from server.text.json_text import with_escapes
from server.tools.events import SpelledValue

#: Deeper schemas are taken to allow anything.
_MAX_DEPTH = 8
_KINDS: Mapping[type, tuple[str, ...]] = {
    bool: ("boolean",),
    int: ("integer", "number"),
    float: ("number",),
    dict: ("object",),
    list: ("array",),
    type(None): ("null",),
}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def typed_arguments(values: tuple[SpelledValue, ...], schema: Mapping[str, Any]) -> str:
    """Return an object of JSON; of a key that stands twice, the last value counts."""
    properties = schema.get("properties")
    known = properties if isinstance(properties, Mapping) else {}
    written = {value.key: _typed(value, known.get(value.key)) for value in values}
    members = (f"{json.dumps(key, ensure_ascii=False)}: {value}" for key, value in written.items())
    return "{" + ", ".join(members) + "}"


def _typed(value: SpelledValue, schema: object) -> str:
    text = value.text.strip()
    text = _PYTHON_WORDS.get(text, text)
    if value.is_string is None:
        allowed = set(_types(schema, 0))
        is_string = allowed == {"string"}
    else:
        allowed, is_string = set(), value.is_string
    if not is_string:
        try:
            parsed = json.loads(text, parse_constant=_refuse)
            kinds = _KINDS.get(type(parsed), ())
            if kinds and (not allowed or not allowed.isdisjoint(kinds)):
                # As it was written: a number may have more digits than a float holds.
                return text if isinstance(parsed, int | float) else _dumped(parsed)
        except (ValueError, RecursionError):
            pass
    return _dumped(value.text)


def _dumped(value: object) -> str:
    return with_escapes(json.dumps(value, ensure_ascii=False))


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _types(schema: object, depth: int) -> Iterator[str]:
    """Yield the types a schema allows; none at all where it does not say."""
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return
    stated = schema.get("type")
    yield from [stated] if isinstance(stated, str) else _strings(stated)
    for name in ("anyOf", "oneOf", "allOf"):
        members = schema.get(name)
        for member in members if isinstance(members, list) else ():
            yield from _types(member, depth + 1)
    if stated is None:
        listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        for one in listed if isinstance(listed, list) else ():
            yield "string" if isinstance(one, str) else _KINDS.get(type(one), ("string",))[-1]


def _strings(value: object) -> list[str]:
    return [one for one in value if isinstance(one, str)] if isinstance(value, list) else []
