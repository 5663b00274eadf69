"""`GenerationSpec` of a body of the Responses API. Knows nothing of items or of the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from server.generation import params
from server.generation.caching import PromptCacheBreakpoint, openai_caching
from server.generation.generation_spec import (
    Breakpoint,
    Conversation,
    OutputConstraint,
    PromptMessage,
)
from server.generation.params import Warned
from server.generation.prompt_messages import unread_reasoning
from server.generation.request_fields import GenerationSpec, Request
from server.http.errors import invalid
from server.responses.items import ItemPart
from server.responses.params import INCLUDABLE, LOGPROBS, REASONING, RESPONSES
from server.responses.schemas import ResponsesRequest
from server.responses.tools import callable_tools, tool_use, tool_warnings
from server.structured.schemas import unwrapped_constraint
from server.text.template import ChatTemplate


def response_spec(
    request: ResponsesRequest,
    messages: Sequence[PromptMessage],
    warnings: list[Warned],
    template: ChatTemplate | None,
    num_bytes: int,
) -> GenerationSpec:
    """Return the spec of a request that continues `messages`, of `num_bytes`. Raises `ApiError`.

    `warnings`: those known so far.
    """
    tools = callable_tools(request.tools or ())
    caching, about_cache = openai_caching(request, _marked(request, messages))
    verbosity = None if request.text is None else request.text.verbosity
    about_text = params.judge({"verbosity": verbosity}, params.CHAT, "text.")
    chat = Conversation(
        messages=messages,
        path=("input",),
        tools=[tool.spec() for tool in tools],
        tool_use=tool_use(request.tool_choice, tools),
        has_parallel_calls=request.parallel_tool_calls,
        variables=request.chat_template_kwargs or {},
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        effort_path=("reasoning", "effort"),
        has_reasoning=request.include_reasoning is not False,
        add_special_tokens=request.add_special_tokens is True,
        caching=caching,
        num_bytes=num_bytes,
    )
    warnings = [*warnings, *about_text, *about_cache, *unread_reasoning(messages, template)]
    max_tokens = 0 if caching.is_prewarming else request.max_output_tokens
    named: dict[str, Any] = {"max_tokens": max_tokens}
    if request.truncation == "auto" and request.truncate_prompt_tokens is None:
        named["truncate_prompt_tokens"] = -1
    fields = request.model_copy(update=named)
    return replace(
        fields.as_spec(chat, warnings, _constraint(request)),
        num_bytes=num_bytes,
        max_tokens_path=("max_output_tokens",),
        logprobs=(request.top_logprobs or 0) if LOGPROBS in (request.include or ()) else None,
        logprobs_path=("top_logprobs",),
        # The usage is always sent, at the end.
        has_usage_chunk=True,
    )


def _marked(
    request: ResponsesRequest, messages: Sequence[PromptMessage]
) -> list[tuple[Breakpoint, PromptCacheBreakpoint]]:
    """Return the breakpoints in the request's own items, in their order.

    An item of texts is one message, and its parts are the parts of the content.
    """
    indices = {message.path: index for index, message in enumerate(messages)}
    return [
        (Breakpoint(("input", at, name, part), "", indices["input", at], part), one)
        for at, item in enumerate(request.input)
        for name in ("content", "output")
        for part, text in enumerate(getattr(item, name, None) or ())
        if isinstance(text, ItemPart) and (one := text.prompt_cache_breakpoint) is not None
    ]


def _constraint(request: ResponsesRequest) -> OutputConstraint | None:
    asked = None if request.text is None else request.text.format
    if asked is None or asked.type == "text":
        return None
    fields = {"type": asked.type, **(asked.model_extra or {})}
    return unwrapped_constraint(fields, ("text", "format"))


def own_warnings(request: ResponsesRequest) -> list[Warned]:
    """Return warnings for fields without effect. Raises `ApiError` for refused ones."""
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
            message = f"{param}: {included!r} is nothing that can be included"
            raise invalid(message, ("include", index))
        warnings.append(params.warning(param, f"({included}) was ignored: {INCLUDABLE[included]}"))
    if request.top_logprobs and LOGPROBS not in (request.include or ()):
        raise invalid(f"top_logprobs needs include to have {LOGPROBS!r}", "top_logprobs")
    return warnings
