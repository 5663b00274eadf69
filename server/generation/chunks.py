"""Chunks of a stream put together from ready-made bytes: per token, only what varies is encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import orjson

from server.answer_types import StreamReport, Usage
from server.http import sse


class Envelope:
    """The bytes that all chunks of one response have in common."""

    def __init__(
        self,
        common: Mapping[str, object],
        *,
        has_usage: bool,
        usage_so_far: Callable[[], Usage] | None = None,
    ) -> None:
        """`has_usage`: a chunk with the usage will come; in the others it is null (OpenAI's way).

        `usage_so_far`: in place of null (vLLM's `continuous_usage_stats`).
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

    def choice(self, choice: Mapping[str, object], beside: Mapping[str, object]) -> bytes:
        """Return the event of a choice that is not ready-made, with what stands `beside` it."""
        more = b"," + orjson.dumps(beside)[1:-1] if beside else b""
        return b"".join((self._start, orjson.dumps(choice), self._tail_so_far(more)))

    def closing(self, choice: Mapping[str, object], report: StreamReport) -> bytes:
        """Return a choice's last event and, if `report` has a usage, the usage's event.

        The report is in the last of them. It is empty but for the choice that ends last.
        """
        if "usage" not in report:
            return self.choice(choice, report)
        rest = sse.event(self._head + b"]," + orjson.dumps(report)[1:-1] + b"}")
        return self.choice(choice, {}) + rest

    def _tail_so_far(self, more: bytes) -> bytes:
        usage = self._usage
        if self._usage_so_far is not None:
            usage = b',"usage":' + orjson.dumps(self._usage_so_far())
        return b"]" + more + usage + b"}\n\n"
