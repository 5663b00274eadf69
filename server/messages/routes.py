"""The routes of Anthropic's Messages API."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation.diagnosis import compared_job
from server.generation.fingerprints import Fingerprints
from server.generation.generation_spec import CachingWish
from server.generation.params import summed_up
from server.generation.prepare import chat_prompt
from server.generation.request_fields import parse
from server.generation.respond import (
    GenerationResponse,
    PreparedResponse,
    read_body,
    read_generation,
)
from server.http.context import RequestContext
from server.messages.answer_format import MessagesErrors, MessagesFormat, message_id
from server.messages.response_models import (
    MessageAnswer,
    MessageEvent,
    MessagesErrorBody,
    TokenCount,
)
from server.messages.schemas import CountTokensRequest, MessagesRequest
from server.messages.spec import conversation_of, message_spec
from server.openapi import answers, body_of, generation_answers
from server.service import Service

_PATH = "/v1/messages"
_COUNT_PATH = "/v1/messages/count_tokens"
#: By path, for the middleware.
ERROR_FORMS = {path: MessagesErrors() for path in (_PATH, _COUNT_PATH)}
#: For /openapi.json.
DOCUMENTED = (
    MessagesRequest,
    CountTokensRequest,
    MessageAnswer,
    MessageEvent,
    TokenCount,
    MessagesErrorBody,
)


def message_routes(service: Service, fingerprints: Fingerprints) -> APIRouter:
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
        asked, prepare = await read_generation(service, request, MessagesRequest, message_spec)
        if asked.diagnostics is not None:
            record = RequestContext.of(request.scope).record
            prepare = partial(
                compared_job,
                service,
                fingerprints,
                record,
                prepare,
                answer_id=message_id(record),
                previous_id=asked.diagnostics.previous_message_id,
            )
        return GenerationResponse(
            service, prepare, lambda job, record, _: MessagesFormat(service, job, record, asked)
        )

    @router.post(
        _COUNT_PATH,
        summary="How long a prompt is",
        openapi_extra=body_of(CountTokensRequest),
        responses=answers(TokenCount, 400, 404, 408, 413, 503, error=MessagesErrorBody),
    )
    async def count_tokens(request: Request) -> Response:
        body = await read_body(request, limit_bytes)
        asked = await parse(CountTokensRequest, body, service.work)
        return PreparedResponse(lambda: _token_count(service, asked))

    return router


async def _token_count(service: Service, asked: CountTokensRequest) -> TokenCount:
    """Return how long the prompt would be, even if it does not fit. Raises `ApiError`."""
    service.require_model(asked.model)
    template = service.text.template
    chat, warnings = await service.work.run(
        lambda _: conversation_of(asked, template), asked.num_bytes
    )
    prompt, _ = await chat_prompt(service, replace(chat, caching=CachingWish()), warnings)
    return {"input_tokens": len(prompt.token_ids), "octavo": {"warnings": summed_up(warnings)}}
