"""Fields for the form of an answer: OpenAI's and vLLM's shapes, strict types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from server.generation.generation_spec import ConstraintKind, OutputConstraint
from server.http.errors import Path, from_validation

#: More of these are a mistake or an attack.
MAX_CHOICES_OF_TEXT = 1024
MAX_PATTERN_CHARS = 16_384
MAX_GRAMMAR_CHARS = 65_536
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class _Shape(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _as_schema(value: object) -> object:
    """Read JSON in a string, which vLLM takes for a schema too."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise ValueError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON Schema: an object")  # noqa: TRY004 - pydantic reports these
    return value


Schema = Annotated[
    dict[str, Any], BeforeValidator(_as_schema, json_schema_input_type=dict[str, Any] | str)
]
Pattern = Annotated[str, Field(max_length=MAX_PATTERN_CHARS)]
Grammar = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARS)]
Texts = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARS)]],
    Field(min_length=1, max_length=MAX_CHOICES_OF_TEXT, fail_fast=True),
]


class NamedSchema(_Shape):
    """OpenAI's wrapping of a schema."""

    name: str = Field(pattern=r"^[A-Za-z0-9_\-]{1,64}$")
    description: str | None = None
    given: Schema | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def constraint(self, path: Path, value_path: Path) -> OutputConstraint:
        """Return the form that it asks for."""
        schema = _ANY_OBJECT if self.given is None else self.given
        is_lenient = self.strict is not True
        return OutputConstraint("json", schema, path, value_path, is_lenient=is_lenient)


class ResponseFormat(_Shape):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema and the type 'json_schema' need each other")
        return self

    def constraint(self, path: Path) -> OutputConstraint | None:
        """Return the form that it asks for; None: any text."""
        if self.json_schema is not None:
            return self.json_schema.constraint(path, (*path, "json_schema", "schema"))
        return OutputConstraint("json", _ANY_OBJECT, path, path) if self.type != "text" else None


def unwrapped_constraint(given: Mapping[str, Any], path: Path) -> OutputConstraint | None:
    """Read a format whose schema stands in the format itself. Raises `ApiError`.

    `path`: of the format in the request.
    """
    try:
        if given.get("type") == "json_schema":
            fields = {name: value for name, value in given.items() if name != "type"}
            return NamedSchema.model_validate(fields).constraint(path, (*path, "schema"))
        return ResponseFormat.model_validate(given).constraint(path)
    except ValidationError as error:
        raise from_validation(error, path) from error


class StructuredOutputs(_Shape):
    """vLLM's `structured_outputs`: exactly one form."""

    given: Schema | None = Field(default=None, alias="json")
    regex: Pattern | None = None
    choice: Texts | None = None
    grammar: Grammar | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: Pattern | None = None

    @model_validator(mode="after")
    def _is_one_form(self) -> Self:
        forms = (self.given, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(form is not None for form in forms) != 1:
            raise ValueError("needs exactly one of json, regex, choice, grammar and json_object")
        return self

    def constraint(self, field: str, *, is_alias: bool = False) -> OutputConstraint:
        """Return the form that it asks for; `is_alias`: `field` is an older name of one form."""
        forms: dict[ConstraintKind, Any] = {
            "json": self.given,
            "regex": self.regex,
            "choice": self.choice,
            "grammar": self.grammar,
        }
        kind = next((kind for kind, form in forms.items() if form is not None), None)
        return OutputConstraint(
            kind or "json",
            forms[kind] if kind else _ANY_OBJECT,
            (field,),
            (field,) if is_alias else (field, kind or "json_object"),
            is_compact=self.disable_any_whitespace is True,
            whitespace=self.whitespace_pattern,
        )
