"""The items of a response in the making, and the events that tell of each change.

Events are dictionaries without their number. At any moment at most one item is open, the last.
Knows nothing of tokens or of how events are sent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import orjson

from server.responses.conversation import item_id

Fields = dict[str, Any]
Ended = Literal["completed", "incomplete"]

_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
#: What the model writes of a call, by its kind, and the events that tell it.
_WRITTEN = {"function_call": "arguments", "custom_tool_call": "input"}
_CALL_EVENTS = {
    "function_call": "function_call_arguments",
    "custom_tool_call": "custom_tool_call_input",
}


class OutputItems:
    """Takes in what the model said, in order."""

    def __init__(self, response_key: str, new_call_id: Callable[[], str]) -> None:
        """`response_key` goes into the items' ids."""
        self._response_key = response_key
        self._new_call_id = new_call_id
        self._items: list[Fields] = []
        self._is_open = False
        self._texts: list[str] = []
        self._logprobs: list[Fields] = []

    @property
    def is_message_open(self) -> bool:
        """Whether text that follows goes on with what is there."""
        return self._is_open and self._items[-1]["type"] == "message"

    def items(self) -> list[Fields]:
        """Return them as they are by now."""
        if not self._is_open:
            return list(self._items)
        return [*self._items[:-1], self._items[-1] | self._written()]

    def text(self, text: str, logprobs: list[Fields]) -> list[Fields]:
        """Go on with the message, or begin one."""
        events = [] if self.is_message_open else self._begin("message", {"role": "assistant"})
        self._logprobs += logprobs
        return [*events, self._delta(text) | {"logprobs": logprobs}]

    def grow(self, text: str) -> None:
        """Go on with the message, which is open, without an event."""
        self._texts.append(text)

    def delta_head(self) -> bytes:
        """Return the event of a text that follows, up to its number: `grow` and this are `text`."""
        kind = "response.output_text.delta"
        event = {"type": kind, **self._at(), "content_index": 0, "logprobs": []}
        head = orjson.dumps(event)[:-1] + b',"sequence_number":'
        return b"event: %b\ndata: %b" % (kind.encode(), head)

    def reasoning(self, text: str) -> list[Fields]:
        """Go on with the reasoning, or begin it."""
        is_open = self._is_open and self._items[-1]["type"] == "reasoning"
        events = [] if is_open else self._begin("reasoning", {"summary": []})
        return [*events, self._delta(text)]

    def call(self, name: str, namespace: str | None, *, is_custom: bool) -> list[Fields]:
        """Begin a call."""
        events = self.end("completed")
        kind = "custom_tool_call" if is_custom else "function_call"
        called = {"call_id": self._new_call_id(), "name": name, _WRITTEN[kind]: ""}
        if namespace is not None:
            called["namespace"] = namespace
        item = self._add(kind, called | {"status": "in_progress"})
        self._is_open = True
        return [*events, self._added(dict(item))]

    def arguments(self, text: str) -> list[Fields]:
        """Go on with the arguments of the call that is open."""
        self._texts.append(text)
        kind = _CALL_EVENTS[self._items[-1]["type"]]
        return [{"type": f"response.{kind}.delta", **self._at(), "delta": text}]

    def end(self, status: Ended) -> list[Fields]:
        """End the item that is open, if one is."""
        if not self._is_open:
            return []
        written = self._written()
        self._items[-1] |= {"status": status, **written}
        self._is_open = False
        self._texts, self._logprobs = [], []
        if "content" in written:
            return [*self._content_done(written["content"][0]), self._done()]
        if status == "incomplete":
            return [self._done()]
        kind = _CALL_EVENTS[self._items[-1]["type"]]
        named = {"name": self._items[-1]["name"]} if "arguments" in written else {}
        return [{"type": f"response.{kind}.done", **self._at(), **named, **written}, self._done()]

    @property
    def is_call_open(self) -> bool:
        """Whether the last item is a call that is not complete."""
        return self._is_open and self._items[-1]["type"] in _WRITTEN

    def _content_done(self, part: Fields) -> list[Fields]:
        at = self._at() | {"content_index": 0}
        text_done = {key: value for key, value in part.items() if key in {"text", "logprobs"}}
        return [
            {"type": f"response.{part['type']}.done", **at, **text_done},
            {"type": "response.content_part.done", **at, "part": part},
        ]

    def _begin(self, kind: str, fields: Fields) -> list[Fields]:
        events = self.end("completed")
        item = self._add(kind, {"status": "in_progress", "content": [], **fields})
        self._is_open = True
        at = self._at() | {"content_index": 0}
        added = {"type": "response.content_part.added", **at, "part": self._part()}
        # A copy: the item goes on changing, the event does not.
        return [*events, self._added({**item, "content": []}), added]

    def _add(self, kind: str, fields: Fields) -> Fields:
        index = len(self._items)
        own = item_id(kind, self._response_key, index, is_output=True)
        self._items.append({"id": own, "type": kind, **fields})
        return self._items[-1]

    def _written(self) -> Fields:
        """Return what the open item holds by now."""
        kind = self._items[-1]["type"]
        if kind in _WRITTEN:
            return {_WRITTEN[kind]: "".join(self._texts)}
        return {"content": [self._part()]}

    def _part(self) -> Fields:
        kind = _PARTS[self._items[-1]["type"]]
        part: Fields = {"type": kind, "text": "".join(self._texts)}
        if kind == "output_text":
            part |= {"annotations": [], "logprobs": list(self._logprobs)}
        return part

    def _delta(self, text: str) -> Fields:
        self._texts.append(text)
        kind = _PARTS[self._items[-1]["type"]]
        return {"type": f"response.{kind}.delta", **self._at(), "content_index": 0, "delta": text}

    def _at(self) -> Fields:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _added(self, item: Fields) -> Fields:
        index = len(self._items) - 1
        return {"type": "response.output_item.added", "output_index": index, "item": item}

    def _done(self) -> Fields:
        index = len(self._items) - 1
        item = dict(self._items[-1])
        return {"type": "response.output_item.done", "output_index": index, "item": item}
