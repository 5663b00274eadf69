"""Fields of a chat's messages and tools that nothing reads, as warnings.

Templates get all fields of a message or a call. A field that no template names is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from server.generation.params import Unsupported, Warned, judge, nested, summed_up, warned
from server.generation.prompt_messages import NOT_SHOWN, REASONING, source_of
from server.openai.chat_messages import ContentPart, Message
from server.openai.schemas import ChatRequest, TokenizeRequest
from server.text.template import ChatTemplate
from server.tools.schemas import CalledFunction, ToolCall

#: Objects that templates get whole.
_SHOWN = (Message, ToolCall, CalledFunction)
_TABLES: Mapping[type[BaseModel], Mapping[str, Unsupported]] = {
    Message: {
        "annotations": warned("there is nothing to annotate", []),
        REASONING: warned(NOT_SHOWN, ""),
        "name": warned("the model's template shows no names"),
    },
    ContentPart: {
        "prompt_cache_breakpoint": warned("every prefix is kept as long as there is room"),
        "annotations": warned("there is nothing to annotate", []),
    },
}


def unread_fields(
    request: ChatRequest | TokenizeRequest, template: ChatTemplate | None
) -> list[Warned]:
    """Return a warning for each field without effect, once for each kind of object."""
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


def _parts(request: ChatRequest | TokenizeRequest) -> Iterator[tuple[str, BaseModel]]:
    for index, message in enumerate(request.messages or ()):
        yield from nested(message, f"messages.{index}")
    for index, tool in enumerate(request.tools or ()):
        yield from nested(tool, f"tools.{index}")
    if isinstance(request, ChatRequest) and isinstance(request.tool_choice, BaseModel):
        yield from nested(request.tool_choice, "tool_choice")
