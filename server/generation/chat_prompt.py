"""The prompt that a model's template makes of a chat. Knows nothing of what is asked behind it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from server.generation.params import Warned
from server.generation.prompts import require_room, require_rows
from server.generation.tooling import tools_are_text
from server.http.errors import invalid
from server.http.work import LONG_CHARS, Check
from server.openai.chat_messages import Message
from server.openai.schemas import ChatRequest
from server.service import Service
from server.text.template import LIMIT_S, SlowTemplateError, TemplateError
from server.text.token_bytes import TextError
from server.text.tool_text import with_tools_in_text
from server.tools.schemas import Tool

#: To render a message takes as long as to encode this many characters, some 25 µs.
_MESSAGE_CHARS = 80
#: A template may hold up the event loop for so long; if it needs longer, it begins anew beside it.
_ON_LOOP_S = 0.02
#: What `ChatTemplate.render` takes itself.
_RESERVED_VARIABLES = (
    "self",
    "messages",
    "tools",
    "quote",
    "limit_s",
    "add_generation_prompt",
    "continues_final",
)


async def prompt_of_chat(
    service: Service,
    request: ChatRequest,
    tools: Sequence[Tool],
    warnings: list[Warned],
    *,
    must_fit: bool,
) -> list[int]:
    """Return a chat's prompt, however long; `tools`: the callable ones. Raises `ApiError`.

    `warnings` gets those of what the template does not know.
    """
    return await chat_tokens(
        service,
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        add_special_tokens=request.add_special_tokens,
        variables=_with_effort(service, request, warnings),
        tools=[tool.function.for_template() for tool in tools],
        continues_final=request.continue_final_message is True,
        must_fit=must_fit and request.truncate_prompt_tokens is None,
        num_bytes=request.num_bytes,
    )


async def chat_tokens(  # noqa: PLR0913 - what two kinds of bodies say of a chat
    service: Service,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool | None,
    add_special_tokens: bool | None,
    variables: dict[str, Any] | None,
    tools: Sequence[dict[str, Any]] = (),
    continues_final: bool = False,
    must_fit: bool = False,
    num_bytes: int,
) -> list[int]:
    """Return the prompt that the model's template makes of a chat; null flags mean the default.

    `num_bytes`: of the body it came in. Raises `ApiError`; with `must_fit` also for a prompt that
    cannot be as short as the context, before it is encoded.
    """
    template, tokenizer = service.text.template, service.text.tokenizer
    if template is None:
        raise invalid("this model has no chat template; use /v1/completions", "messages")
    _require_free(variables or {})
    if continues_final and add_generation_prompt:
        message = "continue_final_message and add_generation_prompt exclude each other"
        raise invalid(message, "continue_final_message")
    is_quoted = service.config.model.special_tokens_in_messages == "text"
    in_text = tools_are_text(service)
    origins: Sequence[int] = range(len(messages))

    def encode(check: Check, *, limit_s: float = LIMIT_S) -> list[int]:
        nonlocal origins
        shown = [message.for_template() for message in messages]
        if in_text:
            shown, origins = with_tools_in_text(shown, tools, has_system_role=template.shows_system)
        text = template.render(
            shown,
            add_generation_prompt=add_generation_prompt is not False,
            tools=None if in_text else tools or None,
            continues_final=continues_final,
            quote=tokenizer.quote if is_quoted else None,
            limit_s=limit_s,
            **(variables or {}),
        )
        if must_fit:
            require_room(service, text, "messages")
        token_ids = tokenizer.encode(
            text,
            add_special_tokens=add_special_tokens is True,
            is_quoted=is_quoted,
            check=check,
        )
        require_rows(service, token_ids, lambda text: _holder(text, messages, tools, variables))
        return token_ids

    try:
        length = num_bytes + len(messages) * _MESSAGE_CHARS
        if length < LONG_CHARS:
            with suppress(SlowTemplateError):
                return encode(lambda: None, limit_s=_ON_LOOP_S)
        return await service.work.run(encode, max(length, LONG_CHARS))
    except TemplateError as error:
        at = "" if error.message_index is None else f".{origins[error.message_index]}"
        # A template may say anything, such as what stands in the message.
        reason = "the chat template, or a limit on it, refuses the messages"
        raise invalid(str(error), "messages" + at, log_reason=reason) from error
    except TextError as error:
        raise invalid(str(error), "messages") from error


def _require_free(variables: dict[str, Any]) -> None:
    """Raise `ApiError` for a template's variable that the server sets itself."""
    for name in _RESERVED_VARIABLES:
        if name in variables:
            message = f"chat_template_kwargs: the variable {name!r} is the server's own"
            raise invalid(message, "chat_template_kwargs")


def _holder(
    text: str,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    variables: dict[str, Any] | None,
) -> str:
    """Return the field that holds `text`; where it is the template's own, `messages`."""
    fields: dict[str, object] = {
        f"messages.{index}": message.for_template() for index, message in enumerate(messages)
    }
    fields |= {"tools": tools, "chat_template_kwargs": variables}
    holding = (name for name, value in fields.items() if text in _json(value))
    return next(holding, "messages")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _with_effort(
    service: Service, request: ChatRequest, warnings: list[Warned]
) -> dict[str, Any] | None:
    """Return the template's variables, the effort among them if there is one and it knows it."""
    name, effort, given = "reasoning_effort", request.reasoning_effort, request.chat_template_kwargs
    template = service.text.template
    if effort is None or template is None:
        return given
    if any(name in source for source in template.sources.values()):
        return {name: effort, **(given or {})}
    if effort != "none":
        message = f"{name} was ignored: it has no effect on this model"
        warnings.append({"param": name, "message": message})
    return given
