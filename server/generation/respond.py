"""Sends generated text, whole or as a stream, as long as the client is connected.

Knows nothing of the shapes of chats and completions: an `AnswerFormat` does. Errors are left to the
boundary (`server/http/middleware.py`), before the first byte and after it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any, Protocol, TypeAlias, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from scheduler.client import RejectKind, RequestRefusedError
from server.answer_types import Report, StreamReport
from server.generation.choices import best, generate_choices
from server.generation.generate import Job, octavo, usage
from server.generation.output import FinishWord, OutputChunk, joined
from server.generation.prepare import generation_job
from server.generation.request_fields import GenerationSpec, RequestT, parse
from server.http.context import RequestContext, RequestRecord
from server.http.deadline import Deadline
from server.http.errors import ApiError, ClientGoneError, from_engine
from server.http.event_stream import EventStream, send_json
from server.http.work import Check
from server.service import Service
from server.text.template import ChatTemplate

ChoiceT = TypeVar("ChoiceT")

#: Yielded by `generate_choices`.
Batches: TypeAlias = AsyncGenerator[Sequence[tuple[int, OutputChunk]], None]

#: To write a probability takes as long as to encode this many characters, some 2 µs.
_SCORE_CHARS = 8
#: A body that is too large is read and dropped up to this many times the limit. So a client that
#: writes before it reads receives the answer.
_DISCARD_FACTOR = 4
#: A body may come slowly, but not stand still for longer, nor be slower than this behind it.
BODY_TIMEOUT_S = 30.0
LEAST_BYTES_PER_S = 8192


class AnswerFormat(Protocol[ChoiceT]):
    """The form of one choice in one route's responses. Chunks are whole events."""

    def opening(self) -> bytes:
        """Return the events before the first chunk of any choice."""

    def chunk(self, chunk: OutputChunk) -> bytes:
        """Return the events with a chunk's text."""

    def closing(self, finish_reason: FinishWord, report: StreamReport) -> bytes:
        """Return the events after the last chunk.

        `report` has `usage` only on request; it is empty while other choices go on.
        """

    def ending(self) -> bytes:
        """Return the events that end the whole stream; only the first choice's are sent."""

    def choice(self, output: OutputChunk) -> ChoiceT:
        """Return the whole choice, for a request without a stream."""

    def answer(self, choices: list[ChoiceT], report: Report) -> Mapping[str, object]:
        """Return the whole body around all choices."""


#: Returns the format of the choice with this index.
FormatFactory: TypeAlias = Callable[[Job, RequestRecord, int], AnswerFormat[Any]]

#: The formats of one response's choices.
Formats: TypeAlias = Sequence[AnswerFormat[Any]]


class GenerationResponse(Response):
    """Runs a job while the client listens; a client that leaves cancels it."""

    def __init__(
        self, service: Service, prepare: Callable[[], Awaitable[Job]], new_format: FormatFactory
    ) -> None:
        super().__init__()
        self._service = service
        self._prepare = prepare
        self._new_format = new_format

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises `ApiError` for the boundary, `ClientGoneError` for a client that left."""
        context = RequestContext.of(scope)
        with closing(Deadline(context, self._service.clock)) as deadline:
            async with context.interruption.on_disconnect(receive):
                deadline.of_server(self._service.config.server.request_timeout_s)
                job = await self._prepare()
                deadline.of_request(job.spec.fields.timeout)
                await self._answer(job, context.record, send)

    async def _answer(self, job: Job, record: RequestRecord, send: Send) -> None:
        num_answers = len(job.prompts) * job.spec.num_choices
        formats = [self._new_format(job, record, i) for i in range(num_answers)]
        async with aclosing(generate_choices(self._service, job, record)) as batches:
            if job.spec.fields.stream:
                await self._stream(batches, job, formats, record, send)
            else:
                await self._whole(batches, job, formats, record, send)

    async def _stream(
        self, batches: Batches, job: Job, formats: Formats, record: RequestRecord, send: Send
    ) -> None:
        """Write once a step. Awaiting it is the backpressure: unread deltas become one."""
        num_left, has_begun = len(formats), False
        has_token_ids = job.spec.fields.return_token_ids
        keep_alive_s = self._service.config.server.sse_keep_alive_s
        async with EventStream(send, keep_alive_s) as stream:
            async for batch in batches:
                events = b""
                if not has_begun:
                    has_begun = True
                    events = b"".join(form.opening() for form in formats)
                for index, chunk in batch:
                    form = formats[index]
                    if chunk.delta.prompt_logprobs:
                        events += await self._with_scores(form, chunk)
                    elif chunk.text or chunk.tokens or (has_token_ids and chunk.delta.token_ids):
                        events += form.chunk(chunk)
                    if chunk.finish_reason is not None:
                        num_left -= 1
                        report = self._stream_report(job, record) if not num_left else {}
                        events += form.closing(chunk.finish_reason, report)
                if not num_left:
                    events += formats[0].ending()
                if events:
                    await stream.write(events, is_last=not num_left)

    async def _whole(
        self, batches: Batches, job: Job, formats: Formats, record: RequestRecord, send: Send
    ) -> None:
        collected: list[list[OutputChunk]] = [[] for _ in job.requests]
        async for batch in batches:
            for index, chunk in batch:
                collected[index].append(chunk)
        report = self._report(job, record)

        def write(_: Check) -> bytes:
            answers = best(job, [joined(own) for own in collected])
            choices = [form.choice(own) for form, own in zip(formats, answers, strict=True)]
            return orjson.dumps(formats[0].answer(choices, report))

        body = await self._service.work.run(write, sum(map(_num_score_chars, collected)))
        await send_json(send, 200, body)

    async def _with_scores(self, form: AnswerFormat[Any], chunk: OutputChunk) -> bytes:
        """Return the events of a chunk with the prompt's probabilities, which take a while."""
        return await self._service.work.run(lambda _: form.chunk(chunk), _num_score_chars([chunk]))

    def _stream_report(self, job: Job, record: RequestRecord) -> StreamReport:
        report: StreamReport = {**self._report(job, record)}
        if not job.spec.has_usage_chunk:
            del report["usage"]
        return report

    def _report(self, job: Job, record: RequestRecord) -> Report:
        now_s = self._service.clock.monotonic_s()
        return {"usage": usage(record), "octavo": octavo(self._service, job, record, now_s)}


def _num_score_chars(chunks: Iterable[OutputChunk]) -> int:
    """Return the length of a text that takes as long to write as the prompt's probabilities."""
    scores = (score for chunk in chunks for score in chunk.delta.prompt_logprobs)
    return _SCORE_CHARS * sum(1 + len(score.top) for score in scores)


class JsonResponse(Response):
    """`content` as JSON."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """See `Response`."""
        return orjson.dumps(content)


class PreparedResponse(JsonResponse):
    """The result of `prepare` as JSON; a client that leaves cancels it."""

    def __init__(self, prepare: Callable[[], Awaitable[object]]) -> None:
        super().__init__()
        self._prepare = prepare

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. Raises as `prepare` does, `ClientGoneError` for a client that left."""
        async with RequestContext.of(scope).interruption.on_disconnect(receive):
            body = self.render(await self._prepare())
        await send_json(send, 200, body)


async def read_generation(
    service: Service,
    request: Request,
    model: type[RequestT],
    spec_of: Callable[[RequestT, ChatTemplate | None], GenerationSpec],
) -> tuple[RequestT, Callable[[], Awaitable[Job]]]:
    """Return a request to generate, and the function that prepares its job. Raises `ApiError`."""
    asked = await parse(model, await read_work(service, request), service.work)

    async def prepare() -> Job:
        template = service.text.template
        spec = await service.work.run(lambda _: spec_of(asked, template), asked.num_bytes)
        return await generation_job(service, spec)

    return asked, prepare


async def read_work(service: Service, request: Request) -> bytes:
    """Return the body of a request for tokens, as `read_body` does.

    Raises `ApiError` (429) where there is no place to wait, before anything is made of the body.
    """
    body = await read_body(request, service.config.server.max_request_bytes)
    record = RequestContext.of(request.scope).record
    record.whose = hash((record.key_name, record.client, body))
    # With a priority it may take another's place, which the engine knows.
    lowest_priority = service.client.stats().scheduler.lowest_waiting_priority
    may_displace = b'"priority"' in body or lowest_priority > 0
    if not may_displace and not service.reservations.has_place(record.whose):
        message = "too many requests are waiting already, or were promised a place before this one"
        refused = RequestRefusedError(message, RejectKind.BUSY, None)
        raise from_engine(refused, service.reservations.retry_after_s(record.whose))
    return body


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Return the request's JSON, unparsed, never holding more than `limit_bytes` of it.

    Raises `ApiError`: 413 if it is larger, 408 if it stops coming or trickles, 503 if other bodies
    take too much memory, 400 for another content type. Raises `ClientGoneError`.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0]
    if media_type.strip().lower() != "application/json":
        raise ApiError(
            400, "the body must be JSON: send Content-Type: application/json", code="content_type"
        )
    # A client that waits for consent (RFC 9110, 10.1.1) is refused before it sends.
    max_bytes = limit_bytes if "expect" in request.headers else limit_bytes * _DISCARD_FACTOR
    chunks: list[bytes] = []
    num_bytes, has_more = 0, True
    if (announced_bytes := int(request.headers.get("content-length", "0"))) > max_bytes:
        num_bytes, has_more = announced_bytes, False
    began_s, context = time.monotonic(), RequestContext.of(request.scope)
    with context.bodies.reading(context.record.client) as take:
        while has_more and num_bytes <= max_bytes:
            left_s = began_s + num_bytes / LEAST_BYTES_PER_S - time.monotonic()
            message = await _next_of_body(request, BODY_TIMEOUT_S + min(0.0, left_s))
            num_bytes += len(message.get("body", b""))
            if num_bytes > limit_bytes:
                chunks.clear()
            else:
                take(len(message.get("body", b"")))
                chunks.append(message.get("body", b""))
            has_more = message.get("more_body", False)
    if num_bytes > limit_bytes:
        raise ApiError(
            413,
            f"the body is larger than the {limit_bytes} bytes that are allowed",
            code="request_too_large",
            headers={"Connection": "close"},
        )
    return b"".join(chunks)


async def _next_of_body(request: Request, timeout_s: float) -> Message:
    try:
        async with asyncio.timeout(timeout_s):
            message = await request.receive()
    except TimeoutError as error:
        raise ApiError(
            408,
            f"nothing came of the body for {BODY_TIMEOUT_S:g} seconds, or less than"
            f" {LEAST_BYTES_PER_S} bytes a second for longer",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from error
    if message["type"] == "http.disconnect":
        raise ClientGoneError
    return message
