"""JSON Schemas taken as closed: an object has the properties that its schema names, and no others.

The standard lets every object have more. Small models then add properties until the limit, so a
schema that names properties is closed here, unless it says `additionalProperties` itself: whatever
satisfies the closed schema satisfies the open one. Schemas that apply to one value together
(`allOf`, `$ref` beside others, ...) are closed as one, with the names of all. Where closing might
exclude all values, or the library takes alternatives for disjoint only because they are closed, a
schema stays open. Knows nothing of grammars.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

_Schema = dict[str, Any]

#: What applies to the same value.
_IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref")
_OF_ARRAYS = ("items", "prefixItems", "additionalItems")
_OF_OBJECTS = ("properties", "patternProperties", "additionalProperties")
#: What says of properties in a way that names alone do not show.
_OPENING = {
    *("const", "enum", "if", "then", "else", "dependentSchemas", "dependencies", "extends"),
    *("unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
}
#: What makes a schema more than a list of alternatives.
_OWN_WORDS = _OPENING.union(
    _OF_ARRAYS, _OF_OBJECTS, ("required", "minProperties", "maxProperties", "unevaluatedItems")
)
#: A schema of more parts that apply together (a bomb of references) stays open.
_MAX_MEMBERS = 100_000


def close_objects(root: _Schema) -> None:
    """Add `additionalProperties: false` wherever a schema names properties and does not say it."""
    closing = _Closing(root)
    closing.take(root)
    closing.close()


def referred(root: object, ref: str) -> object:
    """Return what a reference within a schema leads to. Raises `LookupError`, also for others."""
    pointer, target = unquote(ref), root
    if pointer[:1] != "#" or pointer[1:2] not in {"", "/"}:
        raise LookupError(ref)
    for part in pointer.split("/")[1:]:
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(target, list) and name.isdecimal():
            target = target[int(name)]
        elif isinstance(target, dict):
            target = target[name]
        else:
            raise LookupError(ref)
    return target


class _Closing:
    """One schema; changed by `close` alone."""

    def __init__(self, root: _Schema) -> None:
        self._root = root
        self._taken: set[int] = set()
        #: Schemas that do not describe a value alone.
        self._open: set[int] = set()
        self._left: set[int] = set()
        self._closable: list[tuple[_Schema, dict[str, Any]]] = []
        self._num_members = 0

    def take(self, schema: object) -> None:
        """Take a schema that alone describes a value, and all that it needs."""
        if not isinstance(schema, dict) or id(schema) in self._taken:
            return
        self._taken.add(id(schema))
        alternatives = self._alternatives(schema)
        if alternatives is not None:
            for one in alternatives:
                self.take(one)
            return
        members = list(self._members(schema, set()))
        self._open.update(id(member) for member in members[1:])
        names: dict[str, Any] = {name: {} for member in members for name in _names(member)}
        if self._num_members <= _MAX_MEMBERS and self._is_closable(members, len(names)):
            self._closable.append((schema, names))
        self._take_parts(members)
        for member in members:
            listed = member.get("oneOf")
            if isinstance(listed, list) and not self._is_apart(listed):
                # To be closed would let one of them pass where the others match as well.
                for one in listed:
                    self._leave(one)

    def close(self) -> None:
        """Close what can be closed."""
        for schema, names in self._closable:
            if id(schema) not in self._open:
                schema["properties"] = {**names, **schema.get("properties", {})}
                schema["additionalProperties"] = False

    def _alternatives(self, schema: _Schema) -> Sequence[object] | None:
        """Return schemas of which each describes the value alone; None: it is no list of such."""
        keys = [key for key in _IN_PLACE if key in schema]
        if len(keys) != 1 or not _OWN_WORDS.isdisjoint(schema):
            return None
        [key] = keys
        if key == "$ref":
            target = self._target(schema)
            return None if target is None else [target]
        listed = schema[key]
        if not isinstance(listed, list):
            return None
        if key == "anyOf" or len(listed) == 1:
            return listed
        return listed if key == "oneOf" and self._is_apart(listed) else None

    def _target(self, schema: _Schema) -> _Schema | None:
        try:
            target = referred(self._root, str(schema["$ref"]))
        except LookupError:
            return None
        return target if isinstance(target, dict) else None

    def _is_apart(self, listed: list[object]) -> bool:
        """Whether a property that all require has other values in each."""
        if len(listed) == 1:
            return True
        branches: list[dict[str, list[object]]] = []
        for one in listed:
            schema = self._target(one) if isinstance(one, dict) and "$ref" in one else one
            if not isinstance(schema, dict):
                return False
            branches.append({name: _texts(schema, name) for name in _required(schema)})
        for name in branches[0] if branches else ():
            found = [branch.get(name, []) for branch in branches]
            texts = [text for one in found for text in one]
            if all(found) and len(set(texts)) == len(texts):
                return True
        return False

    def _members(self, schema: _Schema, seen: set[int]) -> Iterator[_Schema]:
        """Yield it and what applies to the same value."""
        if id(schema) in seen or self._num_members > _MAX_MEMBERS:
            return
        seen.add(id(schema))
        self._num_members += 1
        yield schema
        target = self._target(schema) if "$ref" in schema else None
        lists = [schema[key] for key in _IN_PLACE if isinstance(schema.get(key), list)]
        for one in [target, *(one for listed in lists for one in listed)]:
            if isinstance(one, dict):
                yield from self._members(one, seen)

    def _is_closable(self, members: Sequence[_Schema], num_names: int) -> bool:
        has_names = any(isinstance(member.get("properties"), dict) for member in members)
        if not has_names or "additionalProperties" in members[0]:
            return False
        if any(self._may_be_open(member) for member in members):
            return False
        if any("patternProperties" in member for member in members):
            # A name that is required may be one of the patterns'.
            [first, *others] = members
            named = first.get("properties")
            if others or not isinstance(named, dict) or set(_required(first)) - named.keys():
                return False
        # Of names that are given twice, no value may be left.
        num_names = num_names if len(members) == 1 else 0
        least = [member.get("minProperties") for member in members]
        return all(not isinstance(one, int | float) or one <= num_names for one in least)

    def _may_be_open(self, member: _Schema) -> bool:
        is_lost = "$ref" in member and self._target(member) is None
        says = member.get("additionalProperties", False) is not False
        return is_lost or says or not _OPENING.isdisjoint(member)

    def _take_parts(self, members: Sequence[_Schema]) -> None:
        """Take the schemas of properties and items; leave open what describes one part together."""
        named: dict[str, list[object]] = {}
        for member in members:
            for name, one in _mapped(member, "properties"):
                named.setdefault(name, []).append(one)
        others = [one for member in members for _, one in _mapped(member, "patternProperties")]
        rest = [member["additionalProperties"] for member in members if _has_rest(member)]
        is_apart = not others and (not rest or len(members) == 1)
        for found in named.values():
            self._take_all(found, is_apart=is_apart and len(found) == 1)
        self._take_all(others, is_apart=len(others) == 1 and not named and not rest)
        self._take_all(rest, is_apart=len(members) == 1)
        arrays = [member for member in members if not member.keys().isdisjoint(_OF_ARRAYS)]
        for member in arrays:
            for key in _OF_ARRAYS:
                given = member.get(key)
                listed = given if isinstance(given, list) else [given]
                self._take_all(listed, is_apart=len(arrays) == 1)

    def _take_all(self, schemas: Sequence[object], *, is_apart: bool) -> None:
        for one in schemas:
            if is_apart:
                self.take(one)
            else:
                self._leave(one)

    def _leave(self, schema: object) -> None:
        """Leave a schema open, and all that it needs."""
        if not isinstance(schema, dict) or id(schema) in self._left:
            return
        self._left.add(id(schema))
        self._open.add(id(schema))
        if "$ref" in schema:
            self._leave(self._target(schema))
        for key in (*_IN_PLACE, *_OF_ARRAYS, *_OF_OBJECTS):
            found = schema.get(key)
            parts = found if isinstance(found, list) else [found]
            if key in {"properties", "patternProperties"} and isinstance(found, dict):
                parts = list(found.values())
            for one in parts:
                self._leave(one)


def _names(schema: _Schema) -> Iterator[str]:
    """Yield the properties that a schema names itself."""
    yield from (name for name, _ in _mapped(schema, "properties"))
    yield from _required(schema)


def _mapped(schema: _Schema, key: str) -> list[tuple[str, object]]:
    found = schema.get(key)
    return list(found.items()) if isinstance(found, dict) else []


def _required(schema: _Schema) -> list[str]:
    found = schema.get("required")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _has_rest(schema: _Schema) -> bool:
    return isinstance(schema.get("additionalProperties"), dict)


def _texts(schema: _Schema, name: str) -> list[object]:
    """Return the values that a property can have, if they are listed and texts; else nothing."""
    part = dict(_mapped(schema, "properties")).get(name)
    if not isinstance(part, dict):
        return []
    listed: Any = [part["const"]] if "const" in part else part.get("enum")
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        return []
    return listed
