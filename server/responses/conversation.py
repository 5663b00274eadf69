"""Items to the messages of a chat, and to the JSON that is kept of them.

An assistant's words, calls and reasoning are items of their own here, and one message in a chat.
Knows nothing of HTTP or of stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from server.generation import params
from server.generation.params import Warned
from server.http.errors import invalid
from server.openai.chat_messages import Message
from server.responses.items import (
    ContentPart,
    CustomCallItem,
    FunctionCallItem,
    Item,
    ItemReference,
    MessageItem,
    ReasoningItem,
    ToolOutputItem,
)
from server.responses.store import Turn
from server.responses.tools import chat_name
from server.tools.custom import arguments_of

#: What an id begins with, by the type of its item.
PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
    "reasoning": "rs",
}
_MAX_WARNINGS = 64


@dataclass(frozen=True, slots=True)
class Reference:
    """Where an item lies that is referred to."""

    turn: Turn
    is_output: bool
    index: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a response answers."""

    messages: list[Message]
    #: The parameter that each message came in.
    origins: list[str]
    warnings: list[Warned]
    #: The response's own items, for its turn.
    input_json: bytes


def read_conversation(
    response_key: str,
    items: Sequence[Item],
    *,
    instructions: str | None,
    previous: Turn | None,
    references: dict[int, Reference],
    limit_bytes: int,
) -> Conversation:
    """Return it. Raises `ApiError` for a reference to nothing, or to more than `limit_bytes`.

    `response_key` goes into the ids of items that have none. Takes as long as the conversation is.
    """
    own = _resolved(response_key, items, references, limit_bytes)
    folding = _Folding()
    if instructions is not None:
        folding.add("instructions", "system", [instructions])
    for turn in previous.chain() if previous else ():
        for item in orjson.loads(turn.input_json) + orjson.loads(turn.output_json):
            folding.take("previous_response_id", item)
    for index, item in enumerate(own):
        folding.take(f"input.{index}", item)
    folding.close()
    messages = [Message.model_validate(fields) for fields in folding.messages]
    warnings = (_item_warnings(items) + folding.warnings)[:_MAX_WARNINGS]
    return Conversation(messages, folding.origins, warnings, orjson.dumps(own))


def item_id(kind: str, response_key: str, index: int, *, is_output: bool) -> str:
    """Return the id of a response's item; `ResponseSession` finds the item by it again."""
    return f"{PREFIXES[kind]}_{response_key}{'o' if is_output else 'i'}{index}"


@dataclass(slots=True)
class _Folding:
    """Builds messages item by item."""

    messages: list[dict[str, Any]] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)
    #: The assistant's message in the making, and where it began.
    _open: dict[str, Any] | None = None
    _opened: str = ""

    def take(self, origin: str, item: dict[str, Any]) -> None:
        """Take in an item as it is kept."""
        match item["type"]:
            case "function_call_output" | "custom_tool_call_output":
                self.close()
                output = item["output"]
                texts = [output] if isinstance(output, str) else _texts(output)
                self.add(origin, "tool", texts, call_id=item["call_id"])
            case "function_call":
                self._take_call(origin, item, item["arguments"])
            case "custom_tool_call":
                self._take_call(origin, item, arguments_of(item["input"]))
            case "reasoning":
                self._take_reasoning(origin, item)
            case _ if item["role"] == "assistant":
                self._take_words(origin, "".join(_texts(item["content"])))
            case _:
                self.close()
                self.add(origin, item["role"], _texts(item["content"]))

    def add(self, origin: str, role: str, texts: list[str], *, call_id: str | None = None) -> None:
        """Add a message that is not the assistant's."""
        content = [{"type": "text", "text": text} for text in texts]
        message: dict[str, Any] = {"role": role, "content": content}
        if call_id is not None:
            message["tool_call_id"] = call_id
        self.messages.append(message)
        self.origins.append(origin)

    def close(self) -> None:
        """End the assistant's message in the making."""
        message, self._open = self._open, None
        if message is None:
            return
        if message.keys() <= {"role", "reasoning_content"}:
            self._warn(self._opened, "there is no answer behind this reasoning: it was left out")
            return
        self.messages.append(message)
        self.origins.append(self._opened)

    def _take_call(self, origin: str, item: dict[str, Any], arguments: str) -> None:
        called = {"name": chat_name(item.get("namespace"), item["name"]), "arguments": arguments}
        call = {"id": item["call_id"], "type": "function", "function": called}
        self._assistant(origin).setdefault("tool_calls", []).append(call)

    def _take_words(self, origin: str, text: str) -> None:
        if self._open is not None and "content" in self._open and "tool_calls" not in self._open:
            self.close()
        message = self._assistant(origin)
        message["content"] = message.get("content", "") + text

    def _take_reasoning(self, origin: str, item: dict[str, Any]) -> None:
        parts = item.get("content") or item.get("summary") or ()
        if text := "".join(part["text"] for part in parts):
            if self._open is not None and self._open.keys() > {"role", "reasoning_content"}:
                self.close()
            message = self._assistant(origin)
            message["reasoning_content"] = message.get("reasoning_content", "") + text
        else:
            self._warn(origin, "there is no text in this reasoning: it was left out")

    def _assistant(self, origin: str) -> dict[str, Any]:
        if self._open is None:
            self._open, self._opened = {"role": "assistant"}, origin
        return self._open

    def _warn(self, origin: str, message: str) -> None:
        self.warnings.append({"param": origin, "message": f"{origin}: {message}"})


def _texts(parts: Iterable[dict[str, Any]]) -> list[str]:
    return [part["refusal"] if part["type"] == "refusal" else part["text"] for part in parts]


def _resolved(
    response_key: str, items: Sequence[Item], references: dict[int, Reference], limit_bytes: int
) -> list[dict[str, Any]]:
    """Return the items as they are kept, with those that are referred to in their places."""
    loaded: dict[tuple[Turn, bool], list[dict[str, Any]]] = {}
    resolved = []
    for index, item in enumerate(items):
        if not isinstance(item, ItemReference):
            kept = _kept(item)
            kept["id"] = item.id or item_id(kept["type"], response_key, index, is_output=False)
            resolved.append(kept)
            continue
        at = references[index]
        key = (at.turn, at.is_output)
        if key not in loaded:
            loaded[key] = orjson.loads(at.turn.output_json if at.is_output else at.turn.input_json)
        if at.index >= len(loaded[key]):
            raise no_such_item(index, item.id)
        found = loaded[key][at.index]
        limit_bytes -= len(orjson.dumps(found))
        if limit_bytes < 0:
            message = f"input.{index}: together the items referred to are too large"
            raise invalid(message, f"input.{index}")
        resolved.append(found)
    return resolved


def no_such_item(index: int, name: str) -> Exception:
    """Return the error for a reference to an item that is not stored."""
    return invalid(f"input.{index}: item {name!r} is not stored here", f"input.{index}.id")


def _kept(item: Item) -> dict[str, Any]:
    """Return an item as it is kept and told, without its id."""
    match item:
        case MessageItem():
            parts = [_kept_part(part, is_said=item.role == "assistant") for part in item.content]
            own: dict[str, Any] = {"type": "message", "role": item.role, "content": parts}
        case FunctionCallItem() | CustomCallItem():
            fields = {"type", "call_id", "name", "namespace", "arguments", "input"}
            own = item.model_dump(include=fields, exclude_none=True)
        case ToolOutputItem():
            outputs = [_kept_part(part, is_said=False) for part in item.output]
            is_one = len(outputs) == 1 and outputs[0]["type"] == "input_text"
            output = outputs[0]["text"] if is_one else outputs
            own = {"type": item.type, "call_id": item.call_id, "output": output}
        case ReasoningItem():
            content = [part.model_dump(include={"type", "text"}) for part in item.content or ()]
            summary = [part.model_dump(include={"type", "text"}) for part in item.summary or ()]
            own = {"type": "reasoning", "summary": summary, "content": content}
        case _:
            raise AssertionError("a reference is resolved, not kept")
    return own | {"status": item.status or "completed"}


def _kept_part(part: ContentPart, *, is_said: bool) -> dict[str, Any]:
    if part.type == "refusal":
        return {"type": "refusal", "refusal": part.words}
    if is_said:
        return {"type": "output_text", "text": part.words, "annotations": []}
    return {"type": "input_text", "text": part.words}


def _item_warnings(items: Sequence[Item]) -> list[Warned]:
    """Return what of the items has no effect, each field once."""
    warnings: list[Warned] = []
    seen: set[tuple[str, str]] = set()
    for index, item in enumerate(items):
        for at, part in params.nested(item, f"input.{index}"):
            kind, extras = str(getattr(part, "type", "")), dict(part.model_extra or {})
            if isinstance(part, ReasoningItem):
                extras["encrypted_content"] = part.encrypted_content
            fresh = {name: value for name, value in extras.items() if (kind, name) not in seen}
            seen.update((kind, name) for name, value in fresh.items() if value is not None)
            warnings += params.judge(fresh, {}, f"{at}.")
    return warnings
