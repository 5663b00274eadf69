"""The routes with which an operator pins, unpins, explains and resets cached prompts.

Knows nothing of how the engine keeps pins.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from scheduler.client import (
    CacheCommand,
    EngineUnavailableError,
    ExplainPrefix,
    PinPrefix,
    UnpinPrefix,
)
from server.generation.cache_report import cache_report
from server.generation.generate import namespace_of
from server.generation.params import Warned
from server.generation.request_fields import parse
from server.generation.respond import JsonResponse, PreparedResponse, read_body
from server.http.context import RequestContext
from server.http.errors import from_engine, invalid
from server.openai.response_models import (
    CacheExplained,
    CacheReset,
    PrefixPinned,
    PrefixUnpinned,
)
from server.openai.routes import prompt_tokens, report
from server.openai.schemas import ExplainRequest, PinRequest, UnpinRequest
from server.openapi import answers, body_of
from server.service import Service

_DEFAULT_LIFETIME = "24h"
_STATUSES = (400, 404, 408, 413, 503)


def cache_routes(service: Service) -> APIRouter:
    """Return the routes. Each has an effect in the namespace of its caller's API key alone."""
    router = APIRouter(prefix="/admin/cache")
    limit_bytes = service.config.server.max_request_bytes

    @router.post(
        "/pin",
        summary="Evict the cached pages of a prefix last",
        openapi_extra=body_of(PinRequest),
        responses=answers(PrefixPinned, *_STATUSES),
    )
    async def pin(request: Request) -> Response:
        asked = await parse(PinRequest, await read_body(request, limit_bytes), service.work)

        async def pinned() -> PrefixPinned:
            token_ids, namespace, warnings = await _prefix(service, request, asked)
            owner = RequestContext.of(request.scope).record.owner
            lifetime = asked.ttl or _DEFAULT_LIFETIME
            command = PinPrefix(token_ids, namespace, owner, lifetime)
            return {"pinned_pages": await _answer(service, command), **report(warnings)}

        return PreparedResponse(pinned)

    @router.post(
        "/unpin",
        summary="End the pins within a prefix",
        openapi_extra=body_of(UnpinRequest),
        responses=answers(PrefixUnpinned, *_STATUSES),
    )
    async def unpin(request: Request) -> Response:
        asked = await parse(UnpinRequest, await read_body(request, limit_bytes), service.work)

        async def unpinned() -> PrefixUnpinned:
            token_ids, namespace, warnings = await _prefix(service, request, asked)
            command = UnpinPrefix(token_ids, namespace)
            return {"ended_pins": await _answer(service, command), **report(warnings)}

        return PreparedResponse(unpinned)

    @router.post(
        "/reset",
        summary="Forget the cached prefixes that no request uses, and all pins",
        responses=answers(CacheReset, 503),
    )
    async def reset() -> Response:
        return JsonResponse(await reset_cache(service))

    @router.post(
        "/explain",
        summary="The reuse of a prompt that came now, and why no more",
        openapi_extra=body_of(ExplainRequest),
        responses=answers(CacheExplained, *_STATUSES),
    )
    async def explain(request: Request) -> Response:
        asked = await parse(ExplainRequest, await read_body(request, limit_bytes), service.work)

        async def explained() -> CacheExplained:
            token_ids, namespace, warnings = await _prefix(service, request, asked)
            if not token_ids:
                raise invalid("the prompt has no tokens", "prompt")
            try:
                story = await service.client.explain_cache(ExplainPrefix(token_ids, namespace))
            except EngineUnavailableError as error:
                raise from_engine(error) from error
            path = ("prompt",) if asked.messages is None else ("messages",)
            found = cache_report(service.text.tokenizer, story, token_ids, lambda _: path)
            return {"prompt_tokens": len(token_ids), **found, **report(warnings)}

        return PreparedResponse(explained)

    return router


async def reset_cache(service: Service) -> CacheReset:
    """Forget all cached prefixes that no request uses. Raises `ApiError`."""
    try:
        return {"freed_pages": await service.client.reset_cache()}
    except EngineUnavailableError as error:
        raise from_engine(error) from error


async def _answer(service: Service, command: CacheCommand) -> int:
    try:
        return await service.client.change_cache(command)
    except EngineUnavailableError as error:
        raise from_engine(error) from error


async def _prefix(
    service: Service, request: Request, asked: UnpinRequest | ExplainRequest
) -> tuple[tuple[int, ...], str, list[Warned]]:
    """Return the tokens and the namespace of a prefix, and the warnings about its request."""
    if isinstance(asked, UnpinRequest) and asked.add_generation_prompt is None:
        asked = asked.model_copy(update={"add_generation_prompt": False})
    token_ids, warnings = await prompt_tokens(service, asked)
    key = RequestContext.of(request.scope).record.namespace
    return tuple(token_ids), namespace_of(key, asked.cache_salt or ""), warnings
