"""A request for a response said as one for a chat, and what comes of the chat said back.

Knows nothing of items or of what is stored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from server.generation import params
from server.generation.params import Warned
from server.http.errors import ApiError, from_validation, invalid
from server.openai.chat_messages import Message
from server.openai.schemas import ChatRequest, GenerateFields, Request
from server.responses.params import INCLUDABLE, LOGPROBS, REASONING, RESPONSES
from server.responses.schemas import WITHOUT_MEANING, ResponsesRequest, TextFormat
from server.responses.tools import callable_tools, chat_choice, tool_warnings

_PASSED = (
    *(name for name in GenerateFields.model_fields if name not in WITHOUT_MEANING),
    "parallel_tool_calls",
    "chat_template_kwargs",
    "include_reasoning",
)
#: A chat's name for a parameter to the name it has here.
_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
    "tool_choice.function": "tool_choice",
    "logprobs": "include",
}
_NAME = re.compile(
    r"(?<![\w.])(?:messages(?:\.(?P<message>\d+)(?:\.\w+)*)?"
    r"|tools\.(?P<tool>\d+)\.(?:function|custom(?P<format>\.format\.grammar)?)"
    r"|(?P<name>" + "|".join(map(re.escape, _NAMES)) + r"))(?!\w)"
)


def chat_request(request: ResponsesRequest, messages: Sequence[Message]) -> ChatRequest:
    """Return the chat that gives the answer. Raises `ApiError` in the words of a chat."""
    fields: dict[str, Any] = {
        name: getattr(request, name) for name in _PASSED if name in request.model_fields_set
    }
    fields["messages"] = list(messages)
    fields["max_completion_tokens"] = request.max_output_tokens
    fields["logprobs"] = has_logprobs(request)
    fields["top_logprobs"] = request.top_logprobs if has_logprobs(request) else None
    if request.truncation == "auto" and request.truncate_prompt_tokens is None:
        fields["truncate_prompt_tokens"] = -1
    tools = callable_tools(request.tools or ())
    if tools:
        fields["tools"] = [tool.for_chat() for tool in tools]
    # OpenAI's default, which many clients send along with no tools at all.
    if tools or request.tool_choice != "auto":
        fields["tool_choice"] = chat_choice(request.tool_choice, request.tools or ())
    if request.reasoning is not None:
        fields["reasoning_effort"] = request.reasoning.effort
    if request.text is not None:
        fields["verbosity"] = request.text.verbosity
        if request.text.format is not None:
            fields["response_format"] = _response_format(request.text.format)
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return ChatRequest.model_validate(given)
    except ValidationError as error:
        raise from_validation(error) from error


def has_logprobs(request: ResponsesRequest) -> bool:
    """Whether the answer is to tell them."""
    return LOGPROBS in (request.include or ())


def own_warnings(request: ResponsesRequest) -> list[Warned]:
    """Return what of the request has no effect. Raises `ApiError` for what is refused."""
    warnings = [*request.notes, *params.judge(request.model_extra, RESPONSES)]
    if request.text is not None:
        warnings += params.judge(request.text.model_extra, {}, "text.")
        text_format = request.text.format
        if text_format is not None and text_format.type == "text":
            warnings += params.judge(text_format.model_extra, {}, "text.format.")
    if request.reasoning is not None:
        warnings += params.judge(request.reasoning.model_extra, REASONING, "reasoning.")
    warnings += tool_warnings(request.tools or ())
    if isinstance(request.tool_choice, Request):
        warnings += params.judge(request.tool_choice.model_extra, {}, "tool_choice.")
    for index, included in enumerate(request.include or ()):
        if included == LOGPROBS:
            continue
        param = f"include.{index}"
        if included not in INCLUDABLE:
            raise invalid(f"{param}: {included!r} is nothing that can be included", param)
        told = f"{param} ({included}) was ignored: {INCLUDABLE[included]}"
        warnings.append({"param": param, "message": told})
    if request.top_logprobs and not has_logprobs(request):
        raise invalid(f"top_logprobs needs include to have {LOGPROBS!r}", "top_logprobs")
    return warnings


def renamed_error(error: ApiError, renamed: Renaming) -> ApiError:
    """Return a chat's error in the words of this API."""
    return ApiError(
        error.status,
        renamed(error.message),
        param=None if error.param is None else renamed(error.param),
        code=error.code,
        headers=error.headers,
    )


def renamed_warnings(warnings: Sequence[Warned], renamed: Renaming) -> list[Warned]:
    """Return a chat's warnings in the words of this API."""
    return [{"param": renamed(w["param"]), "message": renamed(w["message"])} for w in warnings]


class Renaming:
    """Puts our names in place of a chat's, wherever they stand in a text."""

    def __init__(self, origins: Sequence[str], tools: Sequence[str]) -> None:
        """`origins`: of the chat's messages; `tools`: where its tools stand."""
        self._origins = origins
        self._tools = tools

    def __call__(self, text: str) -> str:
        """Return a text with our names."""
        return _NAME.sub(self._name, text)

    def _name(self, found: re.Match[str]) -> str:
        if found["name"]:
            return _NAMES[found["name"]]
        if found["tool"]:
            place = int(found["tool"])
            path = self._tools[place] if place < len(self._tools) else f"tools.{place}"
            return path + (".format" if found["format"] else "")
        if found["message"] and int(found["message"]) < len(self._origins):
            return self._origins[int(found["message"])]
        return "input"


def _response_format(text_format: TextFormat) -> dict[str, Any] | None:
    if text_format.type == "text":
        return None
    rest = dict(text_format.model_extra or {})
    if text_format.type == "json_schema":
        return {"type": "json_schema", "json_schema": rest}
    return {"type": text_format.type, **rest}
