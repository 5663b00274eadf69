"""JSON Schemas translated to ones that the grammar library enforces; others are refused by name.

The library takes numbers for doubles, reads patterns in Rust's syntax, lets unnamed keys repeat,
and checks dates only roughly. Bounds that it cannot represent are moved inwards: the
translated schema may allow a little less than the original, never more. Knows nothing of grammars.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any, TypeGuard
from urllib.parse import unquote

from model.grammar.closed_objects import close_objects, referred
from model.grammar.json_patterns import translated

_MAX_PATTERN_CHARS = 16_384
#: Parts that a lenient translation may leave out.
_MAX_WARNINGS = 100
#: The library refuses most of these too, but without their place.
_UNKNOWN = {
    *("not", "if", "then", "else", "contains", "uniqueItems", "propertyNames", "dependentSchemas"),
    *("dependentRequired", "dependencies", "unevaluatedItems", "unevaluatedProperties"),
    *("$dynamicRef", "$recursiveRef", "divisibleBy", "disallow", "extends"),
}
_SCHEMAS = {"additionalProperties", "items"}
_LISTS_OF_SCHEMAS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_MAPS_OF_SCHEMAS = {"properties", "patternProperties"}
#: Drafts without `prefixItems`.
_OLD_DRAFTS = re.compile("draft-0[3-7]|2019-09")
_NO_SCHEMAS = [[name] for name in (*_MAPS_OF_SCHEMAS, "$defs", "definitions")]
#: The largest integer of 64 bits that is also a double.
_MAX_INTEGER = 2**63 - 1024
_MAX_PLACES = 18
_FIFTEEN_DIGITS = Context(prec=15, rounding=ROUND_CEILING)
_YEAR = "[1-9][0-9]{3}"
_LEAP_YEAR = "(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)"
_DATE = f"^(?:{_YEAR}-(?:0[13-9]|1[0-2]|02-(?:[01]|2[0-8]))|{_LEAP_YEAR}-02-29)"
#: Requirements of formats that the library does not enforce. It allows 60 seconds at any time.
_FORMATS: dict[str, list[dict[str, Any]]] = {
    "date": [{"pattern": _DATE}],
    "date-time": [{"pattern": _DATE}, {"pattern": "^.{17}[0-5]"}],
    "time": [{"pattern": "^.{6}[0-5]"}],
    "hostname": [{"maxLength": 253}],
}
#: Characters that the library's JSON strings have only as `\\uXXXX`.
_UNWRITABLE = re.compile(r"[\x00-\x07\x0b\x0e-\x1f\x7f]")


class SchemaError(ValueError):
    """A schema that cannot be enforced; the message begins with the place at fault."""


def strict_schema(schema: dict[str, Any]) -> list[str]:
    """Translate a schema in place; return a warning with the place of each part left out.

    The schema has the library's options in `x-guidance`. Parts are left out only with `lenient`.
    Raises `SchemaError`.
    """
    options = schema.pop("x-guidance")
    is_old = bool(_OLD_DRAFTS.search(str(schema.get("$schema"))))
    work = _Translation(schema, options.get("lenient", False), _is_old=is_old)
    try:
        close_objects(schema)
        work.visit(schema, "")
    except RecursionError:
        raise SchemaError("it is nested too deeply") from None
    if not work.allows_unicode_escapes():
        options["json_allowed_escapes"] = 'nrbtf\\"'
    schema["x-guidance"] = options
    return work.warnings


@dataclass
class _Translation:
    """One schema, translated in place."""

    root: dict[str, Any]
    is_lenient: bool
    warnings: list[str] = field(default_factory=list)
    #: By id; held so that no other object gets the same id.
    _seen: dict[int, object] = field(default_factory=dict)
    _multiples: set[Decimal] = field(default_factory=set)
    _has_open_names: bool = False
    _is_old: bool = False
    #: The place of a text that can only be written with `\\uXXXX`.
    _escaped_at: str = ""

    def allows_unicode_escapes(self) -> bool:
        """Return whether Unicode escapes may be allowed: they let unnamed keys equal named ones.

        Raises `SchemaError` if they are needed and may not be allowed.
        """
        if self._escaped_at and self._has_open_names:
            why = "has a control character, beside properties that are not named"
            raise SchemaError(f"{self._escaped_at} {why}")
        return not self._has_open_names

    def visit(self, schema: object, path: str) -> None:
        """Translate a schema and all schemas within."""
        if not isinstance(schema, dict) or id(schema) in self._seen:
            return
        self._seen[id(schema)] = schema
        # All drafts are translated to the newest.
        schema.pop("$schema", None)
        self._refuse_unknown(schema, path)
        self._bounds(schema, path)
        self._multiple(schema, path)
        self._text(schema, path)
        self._array(schema)
        self._object(schema, path)
        for key in list(schema):
            self._visit_in(schema, key, path)

    def _visit_in(self, schema: dict[str, Any], key: str, path: str) -> None:
        value, here = schema[key], f"{path}/{key}"
        if key in _SCHEMAS:
            self.visit(value, here)
        elif key in _LISTS_OF_SCHEMAS and isinstance(value, list):
            for index, one in enumerate(value):
                self.visit(one, f"{here}/{index}")
        elif key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
            for name, one in value.items():
                self.visit(one, f"{here}/{name}")
        elif key in {"const", "enum"}:
            try:
                schema[key] = self._constant(value, here)
            except ValueError as error:
                self._refuse(schema, key, path, str(error))
        elif key == "$ref" and isinstance(value, str):
            self._follow(schema, value, path)

    def _refuse(self, schema: dict[str, Any], key: str, path: str, why: str) -> None:
        message = f"{path}/{key} {why}"
        if not self.is_lenient or len(self.warnings) == _MAX_WARNINGS:
            raise SchemaError(message)
        self.warnings.append(message)
        del schema[key]

    def _refuse_unknown(self, schema: dict[str, Any], path: str) -> None:
        if schema.get("uniqueItems") is False:
            del schema["uniqueItems"]
        if path and isinstance(schema.get("$id"), str):
            self._refuse(schema, "$id", path, "gives a part of the schema a name of its own")
        for key in [one for one in schema if one in _UNKNOWN]:
            self._refuse(schema, key, path, "is a keyword that cannot be kept")

    def _follow(self, schema: dict[str, Any], ref: str, path: str) -> None:
        pointer = unquote(ref)
        if pointer[:1] != "#" or pointer[1:2] not in {"", "/"}:
            self._refuse(schema, "$ref", path, f"{ref!r} is no way from this schema's root (#/...)")
            return
        parts = pointer.split("/")[1:]
        if {"const", "enum"} & set(parts) or parts[-1:] in _NO_SCHEMAS:
            self._refuse(schema, "$ref", path, f"{ref!r} may lead to what is no schema")
            return
        try:
            target = referred(self.root, ref)
        except LookupError:
            self._refuse(schema, "$ref", path, f"{ref!r} leads nowhere")
        else:
            self.visit(target, pointer[1:])

    def _constant(self, value: object, path: str) -> object:
        """Return a value with its numbers as the library reads them. Raises `ValueError`."""
        if isinstance(value, list):
            return [self._constant(one, path) for one in value]
        if isinstance(value, dict):
            return {name: self._constant(one, path) for name, one in value.items()}
        if isinstance(value, str):
            if _UNWRITABLE.search(value):
                self._escaped_at = self._escaped_at or path
            return value
        if isinstance(value, bool) or value is None:
            return value
        assert isinstance(value, int | float), "JSON has nothing else"
        exact = _inwards(Decimal(repr(value)))
        if exact is None or exact != value:
            raise ValueError(f"has {value!r}, a number of more digits than can be kept")
        return exact

    def _bounds(self, schema: dict[str, Any], path: str) -> None:
        """Make bounds of numbers inclusive, and exact in the library's reading."""
        is_integer = schema.get("type") == "integer"
        for side, key, other in ((1, "minimum", "maximum"), (-1, "maximum", "minimum")):
            exclusive_key = f"exclusive{key.capitalize()}"
            stated, exclusive = schema.get(key), schema.get(exclusive_key)
            if exclusive is True:
                # Draft 4's form.
                stated, exclusive = None, stated
            bounds = []
            if _is_number(stated):
                bounds.append(side * Decimal(repr(stated)))
            if _is_number(exclusive):
                bounds.append(_behind(side * Decimal(repr(exclusive)), is_integer=is_integer))
            if not bounds:
                continue
            schema.pop(exclusive_key, None)
            bound = max(bounds)
            inner = _inwards(bound.to_integral_value(ROUND_CEILING) if is_integer else bound)
            if inner is None:
                schema[key] = stated
                self._refuse(schema, key, path, "leaves no number of 64 bits")
                continue
            schema[key] = side * inner
            if bound >= 10**17:
                schema.setdefault(other, side * _MAX_INTEGER)

    def _multiple(self, schema: dict[str, Any], path: str) -> None:
        """Refuse a factor that the library would round, or whose products exceed 32 bits."""
        factor = schema.get("multipleOf")
        if not _is_number(factor):
            return
        value, num_places = float(factor), 0
        while value % 1 and num_places < 20:
            value, num_places = value * 10, num_places + 1
        exact = Decimal(repr(factor))
        if factor <= 0 or value >= 2**32 or exact != Decimal(value).scaleb(-num_places):
            self._refuse(schema, "multipleOf", path, f"{factor!r} cannot be kept")
            return
        multiples = self._multiples | {exact}
        places = max(-min(int(one.as_tuple().exponent), 0) for one in multiples)
        factors = [int(one.scaleb(places)) for one in multiples]
        if len(factors) > 1 and math.lcm(*factors) * max(factors) >= 2**32:
            self._refuse(schema, "multipleOf", path, "cannot be kept together with all the others")
            return
        self._multiples = multiples

    def _text(self, schema: dict[str, Any], path: str) -> None:
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            try:
                schema["pattern"] = _translated(pattern)
            except ValueError as error:
                self._refuse(schema, "pattern", path, str(error))
        name, others = schema.get("format"), schema.get("allOf", [])
        if isinstance(name, str) and name in _FORMATS and isinstance(others, list):
            schema["allOf"] = [*others, *map(dict, _FORMATS[name])]

    def _array(self, schema: dict[str, Any]) -> None:
        """Rename the keywords for items by place to the newest draft's."""
        if self._is_old:
            schema.pop("prefixItems", None)
        rest = schema.pop("additionalItems", None)
        if isinstance(schema.get("items"), list):
            schema["prefixItems"] = schema.pop("items")
            if rest is not None:
                schema["items"] = rest

    def _object(self, schema: dict[str, Any], path: str) -> None:
        is_closed = schema.get("additionalProperties") is False
        patterns, required = schema.get("patternProperties"), schema.get("required")
        is_open = not is_closed or bool(patterns)
        self._has_open_names |= is_open and bool(patterns or required or schema.get("properties"))
        if isinstance(patterns, dict):
            try:
                names = {_translated(one, is_exact=True): value for one, value in patterns.items()}
            except ValueError as error:
                self._refuse(schema, "patternProperties", path, str(error))
            else:
                schema["patternProperties"] = names
                if len(names) < len(patterns):
                    why = "has patterns that mean the same"
                    self._refuse(schema, "patternProperties", path, why)
        least = schema.get("minProperties")
        num_named = len(set(map(str, required))) if isinstance(required, list) else 0
        if is_open and isinstance(least, int) and least > num_named + 1:
            why = "counts properties that are not named, which may repeat"
            self._refuse(schema, "minProperties", path, why)


def _translated(pattern: str, *, is_exact: bool = False) -> str:
    if len(pattern) > _MAX_PATTERN_CHARS:
        raise ValueError(f"has more than {_MAX_PATTERN_CHARS} characters")
    try:
        return translated(pattern, is_exact=is_exact)
    except ValueError as error:
        raise ValueError(f"{error}: {pattern!r}") from error


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _behind(bound: Decimal, *, is_integer: bool) -> Decimal:
    """Return the first number above a bound: an integer, or one of 15 digits."""
    if is_integer:
        return bound.to_integral_value(ROUND_FLOOR) + 1
    return bound + Decimal(1).scaleb(max(bound.adjusted(), 0) - 14)


def _inwards(bound: Decimal) -> int | float | None:
    """Return the least number, not below `bound`, that the library reads exactly as written.

    It reads digits as an integer and divides it by a power of ten. The result is exact, or rounded
    once, as long as both are doubles.
    """
    if bound > _MAX_INTEGER:
        return None
    if bound == bound.to_integral_value():
        whole = max(int(bound), -_MAX_INTEGER)
        near = float(whole)
        return int(near if near >= whole else math.nextafter(near, math.inf))
    _, digits, exponent = bound.normalize().as_tuple()
    if int("".join(map(str, digits))) > 2**53 or int(exponent) < -_MAX_PLACES:
        bound = _FIFTEEN_DIGITS.plus(bound)
        if int(bound.as_tuple().exponent) < -_MAX_PLACES:
            bound = bound.quantize(Decimal(1).scaleb(-_MAX_PLACES), ROUND_CEILING)
    return float(bound)
