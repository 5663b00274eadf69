"""Arguments that a model wrote as bare text, as JSON of the type in the tool's schema.

Knows nothing of the syntax around them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from server.text.json_text import dumped

#: Deeper schemas count as allowing anything.
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


def allows_only_strings(schema: object) -> bool:
    """Return whether a schema allows only strings."""
    return set(_types(schema, 0)) == {"string"}


def typed(text: str, schema: object, *, is_string: bool | None = None) -> str:
    """Return a bare text as JSON; `is_string`: whether it is a string, None: see `schema`.

    A text of another type than the schema's stays a string: the caller sees the model's text.
    """
    allowed = set(_types(schema, 0)) if is_string is None else set()
    if not (allowed == {"string"} if is_string is None else is_string):
        stripped = text.strip()
        stripped = _PYTHON_WORDS.get(stripped, stripped)
        try:
            parsed = json.loads(stripped, parse_constant=_refuse)
            kinds = _KINDS.get(type(parsed), ())
            if kinds and (not allowed or not allowed.isdisjoint(kinds)):
                # As it was written: a number may have more digits than a float holds.
                if isinstance(parsed, int | float):
                    return stripped
                return dumped(parsed)
        except (ValueError, RecursionError):
            pass
    return dumped(text)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _types(schema: object, depth: int) -> Iterator[str]:
    """Yield the types that a schema allows; nothing if it has none."""
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
