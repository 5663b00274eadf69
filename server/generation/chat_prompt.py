"""The prompt that a model's template makes of a chat. Knows nothing of sampling or answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from server.generation.breakpoints import num_chars_before, num_tokens_before
from server.generation.generation_spec import Conversation, ToolSpec
from server.generation.params import Warned, ignored
from server.generation.prompt_messages import source_of
from server.generation.prompts import require_room, require_rows
from server.generation.tooling import tools_are_text
from server.http.errors import Path, invalid
from server.http.work import LONG_CHARS, Check
from server.service import Service
from server.text.template import LIMIT_S, SlowTemplateError, TemplateError
from server.text.token_bytes import TextError
from server.text.tool_text import Fields, with_tools_in_text

#: To render a message takes as long as to encode this many characters, some 25 µs.
_MESSAGE_CHARS = 80
#: A template may hold up the event loop for so long; if it needs longer, it begins anew beside it.
_ON_LOOP_S = 0.02
#: Variables that `ChatTemplate.render` sets itself.
_RESERVED_VARIABLES = (
    "self",
    "messages",
    "tools",
    "quote",
    "limit_s",
    "add_generation_prompt",
    "continues_final",
)


class ChatPrompt(NamedTuple):
    """The prompt of a chat."""

    token_ids: list[int]
    #: Tokens before each of the chat's breakpoints; None: the template does not show the block.
    ends: list[int | None]
    #: Renders other messages in place of the chat's, as it did these. Raises `TemplateError`.
    render: Callable[[list[Fields]], str]


async def chat_tokens(
    service: Service,
    chat: Conversation,
    tools: Sequence[ToolSpec],
    warnings: list[Warned],
    *,
    must_fit: bool = False,
) -> ChatPrompt:
    """Return the prompt that the model's template makes of a chat. Raises `ApiError`.

    `tools`: the callable ones; `warnings` gets one for an effort that the template does not know.
    With `must_fit` a prompt that cannot be as short as the context is refused before it is encoded.
    """
    template, tokenizer = service.text.template, service.text.tokenizer
    if template is None:
        raise invalid("this model has no chat template; use /v1/completions", chat.path)
    variables = _with_effort(service, chat, warnings)
    _require_possible(chat, variables)
    is_quoted = service.config.model.special_tokens_in_messages == "text"
    in_text = tools_are_text(service)
    functions = [tool.for_template() for tool in tools]
    origins: Sequence[int] = range(len(chat.messages))

    def render(shown: list[Fields], functions: list[Fields], limit_s: float) -> str:
        nonlocal origins
        if in_text:
            has_system_role = template.shows_system
            shown, origins = with_tools_in_text(shown, functions, has_system_role=has_system_role)
        return template.render(
            shown,
            add_generation_prompt=chat.add_generation_prompt is not False,
            tools=None if in_text else functions or None,
            continues_final=chat.continues_last,
            quote=tokenizer.quote if is_quoted else None,
            limit_s=limit_s,
            **variables,
        )

    def encode(check: Check, *, limit_s: float = LIMIT_S) -> ChatPrompt:
        shown = [dict(message.fields) for message in chat.messages]
        text = render(shown, functions, limit_s)
        if must_fit:
            require_room(service, text, chat.path)
        to_tokens = partial(
            tokenizer.encode,
            add_special_tokens=chat.add_special_tokens,
            is_quoted=is_quoted,
            check=check,
        )
        token_ids = to_tokens(text)
        require_rows(service, token_ids, lambda text: _holder(text, chat, functions, variables))
        ends: list[int | None] = []
        for one in chat.caching.breakpoints:
            num_chars = num_chars_before(
                one, text, shown, functions, partial(render, limit_s=limit_s)
            )
            ends.append(
                None
                if num_chars is None
                else num_tokens_before(tokenizer, text, token_ids, num_chars, to_tokens)
            )
        again = partial(render, functions=functions, limit_s=_ON_LOOP_S)
        return ChatPrompt(token_ids, ends, again)

    try:
        length = chat.num_bytes + len(chat.messages) * _MESSAGE_CHARS
        length *= 1 + len(chat.caching.breakpoints)
        if length < LONG_CHARS:
            with suppress(SlowTemplateError):
                return encode(lambda: None, limit_s=_ON_LOOP_S)
        return await service.work.run(encode, max(length, LONG_CHARS))
    except TemplateError as error:
        index = error.message_index
        path = chat.path if index is None else chat.messages[origins[index]].path
        # The error of a template may contain anything, such as the text of a message.
        reason = "the chat template, or a limit on it, refuses the messages"
        raise invalid(str(error), path, log_reason=reason) from error
    except TextError as error:
        raise invalid(str(error), chat.path) from error


def _require_possible(chat: Conversation, variables: Mapping[str, Any]) -> None:
    if reserved := next((name for name in _RESERVED_VARIABLES if name in variables), None):
        message = f"chat_template_kwargs: the variable {reserved!r} is the server's own"
        raise invalid(message, "chat_template_kwargs")
    if chat.continues_last and chat.add_generation_prompt:
        message = "continue_final_message and add_generation_prompt exclude each other"
        raise invalid(message, "continue_final_message")


def _holder(
    text: str, chat: Conversation, functions: Sequence[dict[str, Any]], variables: Mapping[str, Any]
) -> Path:
    """Return the field that holds `text`; the conversation where only the template does."""
    fields: list[tuple[Path, object]] = [(one.path, one.fields) for one in chat.messages]
    fields += [(("tools",), functions), (("chat_template_kwargs",), variables)]
    dumps = partial(json.dumps, ensure_ascii=False)
    return next((path for path, value in fields if text in dumps(value)), chat.path)


def _with_effort(service: Service, chat: Conversation, warnings: list[Warned]) -> dict[str, Any]:
    """Return the template's variables, with the effort if the template has that variable."""
    name, effort, template = "reasoning_effort", chat.reasoning_effort, service.text.template
    if name in source_of(template) and effort is not None:
        return {name: effort, **chat.variables}
    if effort not in {None, "none"}:
        warnings.append(ignored(chat.effort_path, "it has no effect on this model"))
    return {**chat.variables}
