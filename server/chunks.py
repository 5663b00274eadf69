"""Chunks of a stream put together from ready-made bytes: per token, only what varies is encoded."""

from __future__ import annotations

from typing import Any

import orjson

from server import sse


class Envelope:
    """What all chunks of one response have in common, as bytes."""

    def __init__(self, common: dict[str, Any], *, has_usage: bool) -> None:
        """`has_usage`: a chunk with the usage will come; the others say null (OpenAI's way)."""
        self._head = orjson.dumps(common)[:-1] + b',"choices":['
        self._usage = b',"usage":null' if has_usage else b""
        self._tail = b"]" + self._usage + b"}\n\n"
        self._start = b"data: " + self._head

    def text(self, before: bytes, text: str, logprobs: bytes) -> bytes:
        """Return the event of a text; `before`: the choice up to it."""
        parts = (self._start, before, orjson.dumps(text), logprobs, self._tail)
        return b"".join(parts)

    def closing(self, choice: dict[str, Any], told: dict[str, Any]) -> bytes:
        """Return the last choice's event and, if `told` has it, the usage's: `told` is in both."""
        extra = orjson.dumps(told)[1:-1]
        choices = orjson.dumps(choice)
        if "usage" not in told:
            return sse.event(self._head + choices + b"]," + extra + b"}")
        last = sse.event(self._head + choices + b"]" + self._usage + b"}")
        return last + sse.event(self._head + b"]," + extra + b"}")
