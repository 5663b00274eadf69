"""Items as messages for a chat template, and as the JSON that is stored.

An assistant's words, calls and reasoning are separate items here, and one message in a template.
Knows nothing of HTTP or of stores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from server.generation import params
from server.generation.generation_spec import PromptMessage
from server.generation.params import Warned
from server.generation.prompt_messages import REASONING, content_of, require_limits, text_part
from server.http.errors import Path, dotted, invalid
from server.responses.items import (
    CustomCallItem,
    FunctionCallItem,
    Item,
    ItemPart,
    ItemReference,
    MessageItem,
    ReasoningItem,
    ToolOutputItem,
)
from server.responses.store import Turn
from server.responses.tools import chat_name
from server.tools.custom import arguments_of

#: Prefixes of ids, by the type of the item.
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
    """The place of an item that the input refers to."""

    turn: Turn
    is_output: bool
    index: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """The conversation that a response continues."""

    messages: list[PromptMessage]
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
    """Return the conversation. Raises `ApiError` for a reference to nothing, or over `limit_bytes`.

    `response_key` goes into the ids of items that have none. Takes time by its length.
    """
    own = _resolved(response_key, items, references, limit_bytes)
    folding = _Folding()
    if instructions is not None:
        folding.add(("instructions",), "system", [instructions])
    for turn in previous.chain() if previous else ():
        for item in orjson.loads(turn.input_json) + orjson.loads(turn.output_json):
            folding.take(("previous_response_id",), item)
    for index, item in enumerate(own):
        folding.take(("input", index), item)
    folding.close()
    require_limits(folding.messages, ("input",))
    warnings = (_item_warnings(items) + folding.warnings)[:_MAX_WARNINGS]
    return Conversation(folding.messages, warnings, orjson.dumps(own))


def item_id(kind: str, response_key: str, index: int, *, is_output: bool) -> str:
    """Return the id of a response's item; `ResponseSession` finds the item by it again."""
    return f"{PREFIXES[kind]}_{response_key}{'o' if is_output else 'i'}{index}"


@dataclass(slots=True)
class _Folding:
    """Builds messages item by item."""

    messages: list[PromptMessage] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)
    #: The assistant's message in the making, and where it began.
    _open: dict[str, Any] | None = None
    _opened: Path = ()

    def take(self, path: Path, item: dict[str, Any]) -> None:
        """Add an item as it is kept."""
        match item["type"]:
            case "function_call_output" | "custom_tool_call_output":
                self.close()
                output = item["output"]
                texts = [output] if isinstance(output, str) else _texts(output)
                self.add(path, "tool", texts, tool_call_id=item["call_id"])
            case "function_call":
                self._take_call(path, item, item["arguments"] or "{}")
            case "custom_tool_call":
                self._take_call(path, item, arguments_of(item["input"]))
            case "reasoning":
                self._take_reasoning(path, item)
            case _ if item["role"] == "assistant":
                self._take_words(path, "".join(_texts(item["content"])))
            case _:
                self.close()
                role = "system" if item["role"] == "developer" else item["role"]
                self.add(path, role, _texts(item["content"]))

    def add(self, path: Path, role: str, texts: list[str], **fields: str) -> None:
        """Add a message that is not the assistant's."""
        content = content_of([text_part(text) for text in texts])
        self.messages.append(PromptMessage({**fields, "role": role, "content": content}, path))

    def close(self) -> None:
        """End the assistant's message in the making."""
        message, self._open = self._open, None
        if message is None:
            return
        if message.keys() <= {"role", REASONING}:
            self._warn(self._opened, "there is no answer behind this reasoning: it was left out")
            return
        self.messages.append(PromptMessage({"content": "", **message}, self._opened))

    def _take_call(self, path: Path, item: dict[str, Any], arguments: str) -> None:
        called = {"name": chat_name(item.get("namespace"), item["name"]), "arguments": arguments}
        call = {"id": item["call_id"], "type": "function", "function": called}
        self._assistant(path).setdefault("tool_calls", []).append(call)

    def _take_words(self, path: Path, text: str) -> None:
        if self._open is not None and "content" in self._open and "tool_calls" not in self._open:
            self.close()
        message = self._assistant(path)
        message["content"] = message.get("content", "") + text

    def _take_reasoning(self, path: Path, item: dict[str, Any]) -> None:
        parts = item.get("content") or item.get("summary") or ()
        if text := "".join(part["text"] for part in parts):
            if self._open is not None and self._open.keys() > {"role", REASONING}:
                self.close()
            message = self._assistant(path)
            message[REASONING] = message.get(REASONING, "") + text
        else:
            self._warn(path, "there is no text in this reasoning: it was left out")

    def _assistant(self, path: Path) -> dict[str, Any]:
        if self._open is None:
            self._open, self._opened = {"role": "assistant"}, path
        return self._open

    def _warn(self, path: Path, message: str) -> None:
        param = dotted(path)
        self.warnings.append({"param": param, "message": f"{param}: {message}"})


def _texts(parts: Iterable[dict[str, Any]]) -> list[str]:
    return [part["refusal"] if part["type"] == "refusal" else part["text"] for part in parts]


def _resolved(
    response_key: str, items: Sequence[Item], references: dict[int, Reference], limit_bytes: int
) -> list[dict[str, Any]]:
    """Return the items as they are stored, with references resolved."""
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
            raise invalid(message, ("input", index))
        resolved.append(found)
    return resolved


def no_such_item(index: int, name: str) -> Exception:
    """Return the error for a reference to an item that is not stored."""
    return invalid(f"input.{index}: item {name!r} is not stored here", ("input", index, "id"))


def _kept(item: Item) -> dict[str, Any]:
    """Return an item as it is stored and sent, without its id."""
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


def _kept_part(part: ItemPart, *, is_said: bool) -> dict[str, Any]:
    if part.type == "refusal":
        return {"type": "refusal", "refusal": part.words}
    if is_said:
        return {"type": "output_text", "text": part.words, "annotations": []}
    return {"type": "input_text", "text": part.words}


def _item_warnings(items: Sequence[Item]) -> list[Warned]:
    """Return a warning for each field of items without effect, once a field."""
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
