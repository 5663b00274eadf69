"""Chunks of a stream put together from ready-made bytes: per token, only its text is encoded."""

from __future__ import annotations

from collections.abc import Mapping

import orjson

from server.answer_types import StreamReport
from server.generation.generate import Job, usage
from server.http import sse
from server.http.context import RequestRecord


class Envelope:
    """The bytes that all chunks of one response have in common."""

    def __init__(self, common: Mapping[str, object], job: Job, record: RequestRecord) -> None:
        self._head = orjson.dumps(common)[:-1] + b',"choices":['
        # The chunks before the one with the usage have a null (OpenAI's way), or the usage so far
        # (vLLM's `continuous_usage_stats`).
        self._usage = b',"usage":null' if job.spec.has_usage_chunk else b""
        self._tail = b"]" + self._usage + b"}\n\n"
        self._start = b"data: " + self._head
        options = job.spec.fields.stream_options
        self._record = record if options and options.continuous_usage_stats else None

    def text(self, before: bytes, text: str, logprobs: bytes) -> bytes:
        """Return the event of a text; `before`: the choice up to it."""
        tail = self._tail if self._record is None else self._tail_so_far(b"")
        parts = (self._start, before, orjson.dumps(text), logprobs, tail)
        return b"".join(parts)

    def choice(self, choice: Mapping[str, object], beside: Mapping[str, object]) -> bytes:
        """Return the event of a choice that is not ready-made, with the fields `beside` it."""
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
        usage_so_far = self._usage
        if self._record is not None:
            usage_so_far = b',"usage":' + orjson.dumps(usage(self._record))
        return b"]" + more + usage_so_far + b"}\n\n"
