"""Messages' turns as chat templates read them: OpenAI's roles, calls and results.

One turn may become several (each result of a tool is one), and several turns one. Knows nothing of
templates or of parameters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from server.generation.generation_spec import Breakpoint, PromptMessage
from server.generation.params import Warned, ignored
from server.generation.prompt_messages import REASONING, content_of, require_limits, text_part
from server.http.errors import Path, dotted, invalid
from server.messages.caching import lifetime_of
from server.messages.schemas import (
    Block,
    CacheControl,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)

#: Marks the result of a tool that failed, for templates have no field for it.
ERROR_MARK = "Error:"
_BLOCKS_OF = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ToolUseBlock, ThinkingBlock, RedactedThinkingBlock),
    "system": (TextBlock,),
}


class TurnReader:
    """Collects the messages of a conversation."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        #: By message: where it is in the request.
        self._paths: list[Path] = []
        self.warnings: list[Warned] = []
        #: Of all blocks that can have a `cache_control`.
        self.blocks: list[Breakpoint] = []
        #: Names of the tools that were called, by the call's id: some templates show them.
        self._tool_names: dict[str, str] = {}

    def add_system(self, blocks: Sequence[TextBlock]) -> None:
        """Begin with a system prompt."""
        content = [text_part(block.text) for block in blocks]
        self._append("system", ("system",), content=content)
        for index, block in enumerate(blocks):
            self._note(block.cache_control, ("system", index), part=index)

    def add(self, turn: Turn, path: Path) -> None:
        """Add a turn. Raises `ApiError` for a block out of place."""
        if not turn.content:
            self._open(turn.role, path)
        for index, block in enumerate(turn.content):
            at = (*path, "content", index)
            if not isinstance(block, _BLOCKS_OF[turn.role]):
                kind, role = block.type, turn.role
                message = f"{dotted(at)}: a {kind} block cannot stand in a message of the {role}"
                raise invalid(message, at)
            self._add_block(turn.role, block, path, at)

    def messages(self) -> list[PromptMessage]:
        """Return all messages. Raises `ApiError` for too many."""
        messages = []
        for message, path in zip(self._messages, self._paths, strict=True):
            fields = {**message, "content": content_of(message.get("content", ()))}
            if REASONING in message:
                fields[REASONING] = "".join(message[REASONING])
            messages.append(PromptMessage(fields, path))
        require_limits(messages, ("messages",))
        return messages

    def continues_last(self) -> bool:
        """Return whether the answer goes on with the last message; raise `ApiError` if it can't."""
        last = self._messages[-1]
        if last["role"] == "assistant" and "tool_calls" in last:
            path = self._paths[-1]
            message = f"{dotted(path)}: a tool_use block must be followed by its tool_result"
            raise invalid(message, path)
        return bool(last["role"] == "assistant")

    def _add_block(self, role: str, block: Block, path: Path, at: Path) -> None:
        match block:
            case TextBlock():
                parts = self._open(role, path).setdefault("content", [])
                parts.append(text_part(block.text))
                self._note(block.cache_control, at, part=len(parts) - 1)
            case ToolUseBlock():
                self._tool_names[block.id] = block.name
                calls = self._open(role, path).setdefault("tool_calls", [])
                calls.append(_call(block))
                self._note(block.cache_control, at, call=len(calls) - 1)
            case ToolResultBlock():
                self._append_result(block, path)
                first = 1 if block.is_error else 0
                for index, part in enumerate(block.content or ()):
                    self._note(part.cache_control, (*at, "content", index), part=first + index)
                self._note(block.cache_control, at)
            case ThinkingBlock():
                self._open(role, path).setdefault(REASONING, []).append(block.thinking)
            case RedactedThinkingBlock():
                self._open(role, path)
                self.warnings.append(ignored(at, "only its maker can read it"))

    def _append_result(self, block: ToolResultBlock, path: Path) -> None:
        mark = [text_part(ERROR_MARK)] if block.is_error else []
        name = self._tool_names.get(block.tool_use_id)
        self._append(
            "tool",
            path,
            tool_call_id=block.tool_use_id,
            content=mark + [text_part(part.text) for part in block.content or ()],
            **({} if name is None else {"name": name}),
        )

    def _note(
        self, control: CacheControl | None, at: Path, *, part: int = -1, call: int | None = None
    ) -> None:
        """Note a block of the last message."""
        index = len(self._messages) - 1
        path = (*at, "cache_control")
        self.blocks.append(Breakpoint(path, lifetime_of(control), index, part, call))

    def _open(self, role: str, path: Path) -> dict[str, Any]:
        """Return the message that a block of `role` belongs to: the last one if it is its own."""
        if not self._messages or self._messages[-1]["role"] != role:
            self._append(role, path)
        return self._messages[-1]

    def _append(self, role: str, path: Path, **fields: Any) -> None:  # noqa: ANN401 - values of several types
        self._messages.append({"role": role, **fields})
        self._paths.append(path)


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {
        "id": block.id,
        "type": "function",
        "function": {"name": block.name, "arguments": arguments},
    }
