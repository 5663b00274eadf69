"""Chunks of a stream put together from ready-made bytes: per token, only what varies is encoded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson

from server.http import sse


class Envelope:
    """What all chunks of one response have in common, as bytes."""

    def __init__(
        self,
        common: dict[str, Any],
        *,
        has_usage: bool,
        usage_so_far: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        """`has_usage`: a chunk with the usage will come; the others say null (OpenAI's way).

        `usage_so_far`: they say this instead (vLLM's `continuous_usage_stats`).
        """
        self._head = orjson.dumps(common)[:-1] + b',"choices":['
        self._usage = b',"usage":null' if has_usage else b""
        self._tail = b"]" + self._usage + b"}\n\n"
        self._start = b"data: " + self._head
        self._usage_so_far = usage_so_far

    def text(self, before: bytes, text: str, logprobs: bytes) -> bytes:
        """Return the event of a text; `before`: the choice up to it."""
        tail = self._tail if self._usage_so_far is None else self._tail_so_far(b"")
        parts = (self._start, before, orjson.dumps(text), logprobs, tail)
        return b"".join(parts)

    def choice(self, choice: dict[str, Any], beside: dict[str, Any]) -> bytes:
        """Return the event of a choice that is not ready-made, with what stands `beside` it."""
        more = b"," + orjson.dumps(beside)[1:-1] if beside else b""
        return b"".join((self._start, orjson.dumps(choice), self._tail_so_far(more)))

    def closing(self, choice: dict[str, Any], told: dict[str, Any]) -> bytes:
        """Return a choice's last event and, if `told` has it, the usage's: `told` is in the last.

        It is empty but for the choice that ends last.
        """
        if "usage" not in told:
            return self.choice(choice, told)
        rest = sse.event(self._head + b"]," + orjson.dumps(told)[1:-1] + b"}")
        return self.choice(choice, {}) + rest

    def _tail_so_far(self, more: bytes) -> bytes:
        usage = self._usage
        if self._usage_so_far is not None:
            usage = b',"usage":' + orjson.dumps(self._usage_so_far())
        return b"]" + more + usage + b"}\n\n"
