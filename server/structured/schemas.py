"""What requests say of the form of their answers: OpenAI's and vLLM's shapes, strict types."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

#: More of these are a mistake or an attack.
MAX_CHOICES_OF_TEXT = 1024
MAX_PATTERN_CHARS = 16_384
MAX_GRAMMAR_CHARS = 65_536


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
        raise ValueError("must be a JSON Schema: an object")  # noqa: TRY004 - pydantic tells these
    return value


Schema = Annotated[
    dict[str, Any],
    BeforeValidator(_as_schema, json_schema_input_type=dict[str, Any] | str),
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


class ResponseFormat(_Shape):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema and the type 'json_schema' need each other")
        return self


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
