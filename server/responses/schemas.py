"""Body of `POST /v1/responses`: every field here is honoured, or can only be neutral.

`server/responses/params.py` judges all other fields. Besides OpenAI's fields there are those of
`GenerateFields`, which all routes have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationInfo, field_validator

from server.generation.caching import CachingFields
from server.generation.request_fields import (
    Effort,
    Request,
    StreamOptions,
    TemplateVariables,
    optional,
)
from server.responses.items import Items, Name
from server.responses.tools import ToolChoice, Tools

#: Inherited fields without meaning here, and why: other values than neutral ones are refused,
#: because they would be ignored.
WITHOUT_MEANING: Mapping[str, str] = {
    "n": "a response is one answer; for more, ask again",
    "max_tokens": "it is called max_output_tokens here",
    "response_format": "it is text.format here",
    "return_token_ids": "token ids have no place in a response",
    "prompt_logprobs": "the prompt's probabilities have no place in a response",
}
_NEUTRAL: Mapping[str, object] = {"n": 1, "return_token_ids": False}


class TextFormat(Request):
    """The format of the text; the other fields are those of a chat's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]


class TextOptions(Request):
    """About the text of the answer."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningOptions(Request):
    """About the reasoning before the answer."""

    effort: (
        Annotated[
            str, Field(max_length=64), AfterValidator(TypeAdapter[str](Effort).validate_python)
        ]
        | None
    ) = None


class ResponseStreamOptions(StreamOptions):
    """Options of a stream, which always ends with the usage."""

    continuous_usage_stats: Literal[False] | None = None


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class ResponsesRequest(CachingFields):
    """Body of `POST /v1/responses`."""

    input: Items
    instructions: str | None = optional("a system message before everything; of this response only")
    previous_response_id: Name | None = optional("go on behind this one, which must be stored")
    store: bool | None = optional("default true: kept in memory for a while, see operations.md")
    metadata: Metadata | None = optional("up to 16 texts, returned with the response")
    max_output_tokens: int | None = optional("default: as many as the context has room for")
    tools: Tools | None = optional(
        "function, custom, namespace; others are left out with a warning"
    )
    tool_choice: ToolChoice | None = optional("default auto")
    parallel_tool_calls: bool | None = optional(
        "false: only the first call is returned; default true"
    )
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: (
        Annotated[list[Annotated[str, Field(max_length=64)]], Field(max_length=64, fail_fast=True)]
        | None
    ) = optional("`message.output_text.logprobs`; others are warned of")
    top_logprobs: int | None = optional(
        "0 to 20; needs include to have message.output_text.logprobs"
    )
    truncation: Literal["auto", "disabled"] | None = optional(
        "auto: what does not fit is cut from the beginning, as by"
        " truncate_prompt_tokens -1; default disabled"
    )
    stream_options: ResponseStreamOptions | None = None
    chat_template_kwargs: TemplateVariables | None = None
    include_reasoning: bool | None = optional("default true")
    n: Literal[1] | None = None
    max_tokens: None = None
    response_format: None = None
    return_token_ids: Literal[False] | None = None
    prompt_logprobs: None = None

    @field_validator(*WITHOUT_MEANING, mode="before")
    @classmethod
    def _is_neutral(cls, value: object, info: ValidationInfo) -> object:
        name = info.field_name or ""
        neutral = _NEUTRAL.get(name)
        if value is None or (value == neutral and type(value) is type(neutral)):
            return value
        raise ValueError(f"is not supported: {WITHOUT_MEANING[name]}")
