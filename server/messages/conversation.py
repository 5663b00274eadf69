"""Messages' turns as the messages of a chat: OpenAI's roles, calls and results.

One turn may become several (each result of a tool is one), and several turns one. Knows nothing of
templates or of parameters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from server.generation.params import Warned
from server.http.errors import invalid
from server.messages.schemas import (
    Block,
    RedactedThinkingBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)

#: What the model is shown before the result of a tool that failed: templates have no place for it.
ERROR_MARK = "Error:"
_BLOCKS_OF = {
    "user": (TextBlock, ToolResultBlock),
    "assistant": (TextBlock, ToolUseBlock, ThinkingBlock, RedactedThinkingBlock),
    "system": (TextBlock,),
}


class Conversation:
    """Collects messages."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        #: By message: where it stands in the request.
        self.origins: list[str] = []
        self.warnings: list[Warned] = []
        #: Names of the tools that were called, by the call's id: some templates show them.
        self._tool_names: dict[str, str] = {}

    def instruct(self, blocks: Sequence[TextBlock]) -> None:
        """Begin with a system prompt."""
        self._append("system", "system", content=[_text(block.text) for block in blocks])

    def add(self, turn: Turn, at: str) -> None:
        """Go on with a turn; `at` is its path. Raises `ApiError` for a block out of place."""
        if not turn.content:
            self._open(turn.role, at)
        for index, block in enumerate(turn.content):
            if not isinstance(block, _BLOCKS_OF[turn.role]):
                path = f"{at}.content.{index}"
                said = f"{path}: a {block.type} block cannot stand in a message of the {turn.role}"
                raise invalid(said, path)
            self._add_block(turn.role, block, at, f"{at}.content.{index}")

    def messages(self) -> list[dict[str, Any]]:
        """Return them all."""
        thoughts = "reasoning_content"
        return [
            message | {thoughts: "".join(message[thoughts])} if thoughts in message else message
            for message in self._messages
        ]

    def require_answerable(self) -> bool:
        """Return whether the last message is gone on with. Raises `ApiError` if it cannot be."""
        last = self._messages[-1]
        if last["role"] == "assistant" and "tool_calls" in last:
            at = self.origins[-1]
            raise invalid(f"{at}: a tool_use block must be followed by its tool_result", at)
        return bool(last["role"] == "assistant")

    def _add_block(self, role: str, block: Block, at: str, path: str) -> None:
        match block:
            case TextBlock():
                self._open(role, at).setdefault("content", []).append(_text(block.text))
            case ToolUseBlock():
                self._tool_names[block.id] = block.name
                self._open(role, at).setdefault("tool_calls", []).append(_call(block))
            case ToolResultBlock():
                self._append_result(block, at)
            case ThinkingBlock():
                self._open(role, at).setdefault("reasoning_content", []).append(block.thinking)
            case RedactedThinkingBlock():
                self._open(role, at)
                told = f"{path} was ignored: only its maker can read it"
                self.warnings.append({"param": path, "message": told})

    def _append_result(self, block: ToolResultBlock, at: str) -> None:
        mark = [_text(ERROR_MARK)] if block.is_error else []
        name = self._tool_names.get(block.tool_use_id)
        self._append(
            "tool",
            at,
            tool_call_id=block.tool_use_id,
            content=mark + [_text(part.text) for part in block.content or ()],
            **({} if name is None else {"name": name}),
        )

    def _open(self, role: str, at: str) -> dict[str, Any]:
        """Return the message that a block of `role` belongs to: the last one if it is its own."""
        if not self._messages or self._messages[-1]["role"] != role:
            self._append(role, at)
        return self._messages[-1]

    def _append(self, role: str, at: str, **fields: Any) -> None:  # noqa: ANN401 - what a message has
        self._messages.append({"role": role, **fields})
        self.origins.append(at)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _call(block: ToolUseBlock) -> dict[str, Any]:
    arguments = json.dumps(block.input, ensure_ascii=False)
    return {
        "id": block.id,
        "type": "function",
        "function": {"name": block.name, "arguments": arguments},
    }
