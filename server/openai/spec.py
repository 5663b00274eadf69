"""`GenerationSpec` of OpenAI's chats and completions.

Knows nothing of the model but its chat template, which decides the fields that have an effect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import BaseModel

from server.generation.caching import PromptCacheBreakpoint, openai_caching
from server.generation.generation_spec import Breakpoint, Conversation, TextPrompts, ToolUse
from server.generation.params import (
    CHAT,
    COMPLETION,
    Unsupported,
    Warned,
    ignored,
    judge,
    nested,
    summed_up,
    warned,
)
from server.generation.prompt_messages import NOT_SHOWN, REASONING, source_of
from server.generation.request_fields import MAX_CHOICES_IN_ALL, GenerationSpec
from server.http.errors import invalid
from server.openai.chat_messages import ContentPart, Message
from server.openai.schemas import ChatRequest, CompletionRequest, PromptRequest
from server.text.template import ChatTemplate
from server.tools.schemas import AllowedToolsChoice, CalledFunctionInput, ToolCallInput, ToolChoice

#: Objects that templates get whole.
_SHOWN = (Message, ToolCallInput, CalledFunctionInput)
_TABLES: Mapping[type[BaseModel], Mapping[str, Unsupported]] = {
    Message: {
        "annotations": warned("there is nothing to annotate", []),
        REASONING: warned(NOT_SHOWN, ""),
        "name": warned("the model's template does not use names"),
    },
    ContentPart: {
        "annotations": warned("there is nothing to annotate", []),
    },
}


def chat_spec(request: ChatRequest, template: ChatTemplate | None) -> GenerationSpec:
    """Return the spec of a chat. Raises `ApiError`."""
    warnings = [*request.notes, *judge(request.model_extra, CHAT)]
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    max_tokens, name = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        if max_tokens not in {None, request.max_completion_tokens}:
            raise invalid("max_tokens and max_completion_tokens disagree", "max_tokens")
        max_tokens, name = request.max_completion_tokens, "max_completion_tokens"
    warnings += unread_fields(request, template)
    options = request.prompt_cache_options
    if options is not None and options.prewarm:
        path = "prompt_cache_options.prewarm"
        raise invalid(f"{path} is not supported here, as by OpenAI: see /v1/responses", path)
    if options is not None and options.comparison_response_id is not None:
        path = "prompt_cache_options.comparison_response_id"
        warnings.append(ignored(path, "responses of /v1/responses alone are compared"))
    caching, about_cache = openai_caching(request, _marked(request))
    warnings += about_cache
    chat = replace(
        conversation_of(request),
        caching=caching,
        tool_use=_tool_use(request.tool_choice),
        has_parallel_calls=request.parallel_tool_calls,
        has_reasoning=request.include_reasoning is not False,
        reasoning_effort=request.reasoning_effort,
    )
    return replace(
        request.model_copy(update={"max_tokens": max_tokens}).as_spec(chat, warnings),
        max_tokens_path=(name,),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        logprobs_path=("top_logprobs",),
        prediction="" if request.prediction is None else request.prediction.text,
    )


def _marked(request: ChatRequest) -> list[tuple[Breakpoint, PromptCacheBreakpoint]]:
    """Return the breakpoints in content, in their order."""
    return [
        (Breakpoint(("messages", index, "content", part), "", index, part), one)
        for index, message in enumerate(request.messages)
        for part, content in enumerate(message.content or ())
        if (one := content.prompt_cache_breakpoint) is not None
    ]


def conversation_of(request: ChatRequest | PromptRequest) -> Conversation:
    """Return the input of the chat template."""
    return Conversation(
        messages=[
            message.for_prompt(("messages", index))
            for index, message in enumerate(request.messages or ())
        ],
        tools=[tool.spec(("tools", index)) for index, tool in enumerate(request.tools or ())],
        variables=request.chat_template_kwargs or {},
        add_generation_prompt=request.add_generation_prompt,
        continues_last=request.continue_final_message is True,
        add_special_tokens=request.add_special_tokens is True,
        num_bytes=request.num_bytes,
    )


def completion_spec(request: CompletionRequest) -> GenerationSpec:
    """Return the spec of a completion. Raises `ApiError`."""
    warnings = [*request.notes, *judge(request.model_extra, COMPLETION)]
    texts = TextPrompts(
        request.prompt,
        add_special_tokens=request.add_special_tokens is not False,
        is_echoed=request.echo is True,
    )
    return replace(
        request.as_spec(texts, warnings), num_tries=_num_tries(request), logprobs=request.logprobs
    )


def _tool_use(choice: Any) -> ToolUse | None:  # noqa: ANN401 - a `Choice`
    if isinstance(choice, ToolChoice | AllowedToolsChoice):
        return choice.tool_use()
    return None if choice is None else ToolUse(choice)


def _num_tries(request: CompletionRequest) -> int:
    """Return how many answers to generate to each prompt. Raises `ApiError`."""
    num_choices = request.n or 1
    num_tries = num_choices if request.best_of is None else request.best_of
    if num_tries < num_choices:
        raise invalid(f"best_of must be at least n, which is {num_choices}", "best_of")
    if request.stream and num_tries > num_choices:
        raise invalid(
            "best_of cannot be streamed: the best answer is known only at the end", "best_of"
        )
    num_in_all = num_tries * len(request.prompt)
    if num_in_all > MAX_CHOICES_IN_ALL:
        name = "n" if request.best_of is None else "best_of"
        message = (
            f"{name} is {num_tries} for each of {len(request.prompt)} prompts:"
            f" together more than the {MAX_CHOICES_IN_ALL} answers one request may have"
        )
        raise invalid(message, name)
    return num_tries


def unread_fields(
    request: ChatRequest | PromptRequest, template: ChatTemplate | None
) -> list[Warned]:
    """Return a warning for each field without effect, once for each kind of object.

    Templates get all fields of a message or a call: one that no template names has no effect.
    """
    source = source_of(template)
    warnings: list[Warned] = []
    seen: set[tuple[type, str]] = set()
    for at, part in _parts(request):
        kind, extras = type(part), dict[str, object]()
        for name, value in (part.model_extra or {}).items():
            is_read = isinstance(part, _SHOWN) and name in source
            if not is_read and value is not None and (kind, name) not in seen:
                extras[name] = value
        # A tool's name repeats that of the call.
        if isinstance(part, Message) and part.role == "tool":
            extras.pop("name", None)
        seen.update((kind, name) for name in extras)
        warnings += judge(extras, _TABLES.get(kind, {}), f"{at}.")
    return summed_up(warnings)


def _parts(request: ChatRequest | PromptRequest) -> Iterator[tuple[str, BaseModel]]:
    for index, message in enumerate(request.messages or ()):
        yield from nested(message, f"messages.{index}")
    for index, tool in enumerate(request.tools or ()):
        yield from nested(tool, f"tools.{index}")
    for name in ("tool_choice", "prediction"):
        part = getattr(request, name, None)
        if isinstance(part, BaseModel):
            yield from nested(part, name)
