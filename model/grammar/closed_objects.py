"""Closes JSON Schemas: an object has the properties that its schema names, and no others.

The standard allows more properties, and small models then add some until the limit. So a schema
that names properties is closed here, unless it has `additionalProperties`: every value of the
closed schema satisfies the open one. Schemas that apply to one value together (`allOf`, `$ref`
beside others, ...) are closed as one, with the names of all. A schema stays open where closing
might exclude all values, or make the library take alternatives for disjoint. Knows nothing of
grammars.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

_Schema = dict[str, Any]

#: Keywords whose schemas apply to the same value.
_IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref")
_OF_ARRAYS = ("items", "prefixItems", "additionalItems")
_OF_OBJECTS = ("properties", "patternProperties", "additionalProperties")
#: Keywords that constrain properties beyond their names.
_OPENING = {
    *("const", "enum", "if", "then", "else", "dependentSchemas", "dependencies", "extends"),
    *("unevaluatedProperties", "$dynamicRef", "$recursiveRef"),
}
#: Keywords that make a schema more than a list of alternatives.
_OWN_WORDS = _OPENING.union(
    _OF_ARRAYS, _OF_OBJECTS, ("required", "minProperties", "maxProperties", "unevaluatedItems")
)
#: A schema with more parts that apply together (a bomb of references) stays open.
_MAX_MEMBERS = 100_000


def close_objects(root: _Schema) -> None:
    """Add `additionalProperties: false` to each schema that can be closed."""
    closing = _Closing(root)
    closing.take(root)
    closing.close()


def referred(root: object, ref: str) -> object:
    """Return the target of a reference within a schema. Raises `LookupError` for any other."""
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
        #: Ids of schemas that do not describe a value alone.
        self._open: set[int] = set()
        self._left: set[int] = set()
        self._closable: list[tuple[_Schema, dict[str, Any]]] = []
        self._num_members = 0

    def take(self, schema: object) -> None:
        """Visit a schema that alone describes a value, and all schemas within."""
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
                # Closed, one of them might match alone where the original ones match together.
                for one in listed:
                    self._leave(one)

    def close(self) -> None:
        """Close the closable schemas."""
        for schema, names in self._closable:
            if id(schema) not in self._open:
                schema["properties"] = {**names, **schema.get("properties", {})}
                schema["additionalProperties"] = False

    def _alternatives(self, schema: _Schema) -> Sequence[object] | None:
        """Return schemas that each describe the value alone; None: not a list of such schemas."""
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
        """Return whether the alternatives require one property with different values."""
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
        """Yield a schema and all that apply to the same value."""
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
            # A required name may match one of the patterns.
            [first, *others] = members
            named = first.get("properties")
            if others or not isinstance(named, dict) or set(_required(first)) - named.keys():
                return False
        # No value may satisfy both schemas of a name that has two.
        num_names = num_names if len(members) == 1 else 0
        least = [member.get("minProperties") for member in members]
        return all(not isinstance(one, int | float) or one <= num_names for one in least)

    def _may_be_open(self, member: _Schema) -> bool:
        is_lost = "$ref" in member and self._target(member) is None
        is_open = member.get("additionalProperties", False) is not False
        return is_lost or is_open or not _OPENING.isdisjoint(member)

    def _take_parts(self, members: Sequence[_Schema]) -> None:
        """Visit the schemas of properties and items; leave open schemas of a shared part."""
        named: dict[str, list[object]] = {}
        for member in members:
            for name, one in _mapped(member, "properties"):
                named.setdefault(name, []).append(one)
        others = [one for member in members for _, one in _mapped(member, "patternProperties")]
        rest = [
            one
            for one in (member.get("additionalProperties") for member in members)
            if isinstance(one, dict)
        ]
        is_apart = not others and (not rest or len(members) == 1)
        for found in named.values():
            self._take_all(found, is_apart=is_apart and len(found) == 1)
        self._take_all(others, is_apart=len(others) == 1 and not named and not rest)
        self._take_all(rest, is_apart=len(members) == 1)
        arrays = [member for member in members if not member.keys().isdisjoint(_OF_ARRAYS)]
        for member in arrays:
            for key in _OF_ARRAYS:
                self._take_all(_listed(member, key), is_apart=len(arrays) == 1)

    def _take_all(self, schemas: Sequence[object], *, is_apart: bool) -> None:
        for one in schemas:
            if is_apart:
                self.take(one)
            else:
                self._leave(one)

    def _leave(self, schema: object) -> None:
        """Leave open a schema and all schemas within."""
        if not isinstance(schema, dict) or id(schema) in self._left:
            return
        self._left.add(id(schema))
        self._open.add(id(schema))
        if "$ref" in schema:
            self._leave(self._target(schema))
        for key in (*_IN_PLACE, *_OF_ARRAYS, "additionalProperties"):
            for one in _listed(schema, key):
                self._leave(one)
        for key in ("properties", "patternProperties"):
            for _, one in _mapped(schema, key):
                self._leave(one)


def _names(schema: _Schema) -> Iterator[str]:
    """Yield the properties that a schema names itself."""
    yield from (name for name, _ in _mapped(schema, "properties"))
    yield from _required(schema)


def _listed(schema: _Schema, key: str) -> list[object]:
    found = schema.get(key)
    return found if isinstance(found, list) else [found]


def _mapped(schema: _Schema, key: str) -> list[tuple[str, object]]:
    found = schema.get(key)
    return list(found.items()) if isinstance(found, dict) else []


def _required(schema: _Schema) -> list[str]:
    found = schema.get("required")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _texts(schema: _Schema, name: str) -> list[object]:
    """Return the values of a property if they are listed texts, else nothing."""
    part = dict(_mapped(schema, "properties")).get(name)
    if not isinstance(part, dict):
        return []
    listed: Any = [part["const"]] if "const" in part else part.get("enum")
    if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
        return []
    return listed
