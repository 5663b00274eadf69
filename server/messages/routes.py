"""The routes of Anthropic's Messages API."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation.generate import Job
from server.http.context import RequestRecord
from server.http.respond import (
    GenerationResponse,
    PreparedResponse,
    read_body,
    read_work,
)
from server.messages.answer_format import MessagesErrors, MessagesFormat
from server.messages.prepare import message_job, token_count
from server.messages.response_models import (
    MessageAnswer,
    MessageEvent,
    MessagesErrorBody,
    TokenCount,
)
from server.messages.schemas import CountTokensRequest, MessagesRequest, parse
from server.openapi import answers, body_of, generation_answers
from server.service import Service

_PATH = "/v1/messages"
_COUNT_PATH = "/v1/messages/count_tokens"
#: By path, for the boundary.
ERROR_FORMS = {path: MessagesErrors() for path in (_PATH, _COUNT_PATH)}
#: What /openapi.json has to know of besides the answers.
DOCUMENTED = (MessagesRequest, CountTokensRequest, MessageEvent)


def message_routes(service: Service) -> APIRouter:
    """Return the messages, and the counting of their tokens."""
    router = APIRouter()
    limit_bytes = service.config.server.max_request_bytes

    @router.post(
        _PATH,
        summary="Answer a conversation, as Anthropic does",
        openapi_extra=body_of(MessagesRequest),
        responses=generation_answers(MessageAnswer, MessageEvent, MessagesErrorBody),
    )
    async def create_message(request: Request) -> Response:
        body = await read_work(service, request)
        asked = await parse(MessagesRequest, body, service.work)

        def new_format(job: Job, record: RequestRecord, index: int) -> MessagesFormat:
            assert index == 0, "there is one answer"
            return MessagesFormat(service, job, record, asked)

        return GenerationResponse(service, lambda: message_job(service, asked), new_format)

    @router.post(
        _COUNT_PATH,
        summary="How long a prompt is",
        openapi_extra=body_of(CountTokensRequest),
        responses=answers(TokenCount, 400, 404, 408, 413, 503, error=MessagesErrorBody),
    )
    async def count_tokens(request: Request) -> Response:
        body = await read_body(request, limit_bytes)
        asked = await parse(CountTokensRequest, body, service.work)
        return PreparedResponse(lambda: token_count(service, asked))

    return router
