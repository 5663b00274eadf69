"""One streamed answer: text, counts, errors and their times. Pure: the caller passes the time."""

from __future__ import annotations

import json
from typing import Any

import orjson

from loadtest.records import Failure

_DONE = b"[DONE]"
_MAX_MESSAGE_CHARS = 300


class Answer:
    """Reads the events of one completion or chat, as OpenAI-compatible servers write them.

    A user waits for the first *text*: the opening event of a chat, with a role and no content, does
    not count. Reasoning and the arguments of tool calls count as text.
    """

    def __init__(self) -> None:
        self.failure: Failure | None = None
        self.finish_reason: str | None = None
        self.prompt_tokens: int | None = None
        self.output_tokens: int | None = None
        self.cached_tokens: int | None = None
        self._texts: list[str] = []
        self._contents: list[str] = []
        #: By index, as they grow: id, name and arguments.
        self._calls: dict[int, dict[str, str]] = {}
        #: For each piece of text: its time, and the usage's count by then if events have it.
        self._moments: list[float] = []
        self._counts: list[int | None] = []
        self._is_done = False

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    @property
    def num_pieces(self) -> int:
        """How many pieces of text came so far."""
        return len(self._moments)

    def take(self, payload: bytes, now_s: float) -> None:
        """Take in the data of one event; an empty one only keeps the connection alive."""
        if not payload:
            return
        if payload == _DONE:
            self._is_done = True
            return
        try:
            event = orjson.loads(payload)
        except orjson.JSONDecodeError as error:
            self._fail("malformed", f"an event that is no JSON ({error}): {payload[:80]!r}")
            return
        if not isinstance(event, dict):
            self._fail("malformed", f"an event that is no object: {payload[:80]!r}")
        elif event.get("error"):
            self._fail("stream error", message_of(event))
        else:
            self._take_usage(event.get("usage"))
            for choice in event.get("choices") or ():
                self._take_choice(choice, now_s)

    def _take_usage(self, usage: Any) -> None:  # noqa: ANN401 - any JSON of the server
        if not isinstance(usage, dict):
            return
        self.prompt_tokens = _count(usage.get("prompt_tokens"))
        self.output_tokens = _count(usage.get("completion_tokens"))
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self.cached_tokens = _count(details.get("cached_tokens"))

    def _take_choice(self, choice: Any, now_s: float) -> None:  # noqa: ANN401 - see above
        if not isinstance(choice, dict):
            self._fail("malformed", f"a choice that is no object: {str(choice)[:80]}")
            return
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        delta = choice.get("delta")
        if isinstance(delta, dict):
            self._take_message(delta)
        text = choice.get("text") if not isinstance(delta, dict) else _text_of(delta)
        if isinstance(text, str) and text:
            self._texts.append(text)
            self._moments.append(now_s)
            self._counts.append(self.output_tokens)

    def _take_message(self, delta: dict[str, Any]) -> None:
        if isinstance(delta.get("content"), str):
            self._contents.append(delta["content"])
        for part in delta.get("tool_calls") or ():
            if isinstance(part, dict):
                index = _count(part.get("index")) or 0
                call = self._calls.setdefault(index, {"id": "", "name": "", "arguments": ""})
                function = part.get("function") or {}
                call["id"] = part.get("id") or call["id"]
                call["name"] = function.get("name") or call["name"]
                call["arguments"] += function.get("arguments") or ""

    def message(self) -> dict[str, Any]:
        """Return the answer as a message of the next request."""
        message = {"role": "assistant", "content": "".join(self._contents)}
        if not self._calls:
            return message
        return {**message, "tool_calls": [_call(index, c) for index, c in self._calls.items()]}

    def end(self) -> None:
        """Note that the body ended: without `[DONE]` or a finish reason it was cut off."""
        if self.failure is None and not self._is_done and self.finish_reason is None:
            self._fail("truncated", f"the stream ended after {self.num_pieces} pieces of text")

    def _fail(self, kind: str, message: str) -> None:
        if self.failure is None:
            self.failure = Failure(kind, message[:_MAX_MESSAGE_CHARS])

    def arrivals(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the moments at which text came, and how many tokens came at each.

        Pieces that were read together arrived together. Counts are exact if each event has the
        usage so far. Otherwise every piece counts the same: the usage's total over the number of
        pieces. Servers hold text back (half a character, half a stop string), and then send two
        tokens in one piece.
        """
        moments: list[float] = []
        counts: list[float] = []
        for moment_s, count in zip(self._moments, self._tokens_of_pieces(), strict=True):
            if moments and moments[-1] == moment_s:
                counts[-1] += count
            else:
                moments.append(moment_s)
                counts.append(count)
        return tuple(moments), tuple(counts)

    def _tokens_of_pieces(self) -> list[float]:
        total, num_pieces = self.output_tokens, self.num_pieces
        told = [count for count in self._counts if count is not None]
        if total is not None and len(told) == num_pieces and told[:1] != [total]:
            before = [0, *told]
            return [float(after - before[i]) for i, after in enumerate(told)]
        mean = 1.0 if total is None else total / max(1, num_pieces)
        return [mean] * num_pieces

    def is_json(self) -> bool:
        """Return whether the text is one JSON value."""
        return _is_json(self.text)


def _text_of(delta: dict[str, Any]) -> str:
    text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
    if isinstance(text, str) and text:
        return text
    calls = delta.get("tool_calls") or ()
    functions = [call.get("function") or {} for call in calls if isinstance(call, dict)]
    return "".join(str(one.get("name") or one.get("arguments") or "") for one in functions)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _call(index: int, parts: dict[str, str]) -> dict[str, Any]:
    """Return a call as a message holds it; arguments that were cut off are left out."""
    arguments = parts["arguments"] if _is_json(parts["arguments"]) else "{}"
    function = {"name": parts["name"], "arguments": arguments}
    return {"id": parts["id"] or f"call_{index}", "type": "function", "function": function}


def _count(value: object) -> int | None:
    return value if isinstance(value, int) else None


def message_of(body: Any) -> str:  # noqa: ANN401 - any JSON of the server
    """Return the message in an error's body, of any of the shapes servers give it."""
    error = body.get("error", body) if isinstance(body, dict) else body
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return str(error)[:_MAX_MESSAGE_CHARS]
