"""The routes of the Responses API."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation.diagnosis import compared_job
from server.generation.fingerprints import Fingerprints
from server.generation.request_fields import parse
from server.generation.respond import GenerationResponse, JsonResponse, read_work
from server.http.context import RequestContext
from server.http.errors import ApiError, invalid, shortened
from server.openapi import answers, body_of, generation_answers
from server.responses import response_models
from server.responses.answer_format import ResponsesFormat
from server.responses.response_session import ResponseSession, response_id
from server.responses.schemas import ResponsesRequest
from server.responses.store import ResponseStore, Stored
from server.service import Service

_PATH = "/v1/responses"
_DEFAULT_LIMIT = 20
_MAX_LIMIT = 100


def response_routes(
    service: Service, store: ResponseStore, fingerprints: Fingerprints
) -> APIRouter:
    """Return the routes that generate responses and read or delete stored ones."""
    router = APIRouter()

    @router.post(
        _PATH,
        summary="Answer a conversation, or go on with one that is stored",
        openapi_extra=body_of(ResponsesRequest),
        responses=generation_answers(response_models.ResponseBody, response_models.ResponseEvent),
    )
    async def create_response(request: Request) -> Response:
        body = await read_work(service, request)
        asked = await parse(ResponsesRequest, body, service.work)
        session = ResponseSession(service, store, _owner(request), asked)
        options = asked.prompt_cache_options
        prepare = partial(
            compared_job,
            service,
            fingerprints,
            RequestContext.of(request.scope).record,
            session.prepare,
            answer_id=response_id(session.key),
            previous_id=None if options is None else options.comparison_response_id,
        )
        return GenerationResponse(
            service,
            prepare,
            lambda job, record, _: ResponsesFormat(service, job, record, session),
        )

    _add_stored_routes(router, service, store)
    return router


def _add_stored_routes(router: APIRouter, service: Service, store: ResponseStore) -> None:
    def found(request: Request, response_id: str) -> Stored:
        now_s = service.clock.monotonic_s()
        stored = store.recall(_owner(request), response_id, now_s)
        if stored is None:
            raise _not_found(response_id)
        return stored

    @router.get(
        _PATH + "/{response_id}",
        summary="A response that is stored",
        responses=answers(response_models.ResponseBody, 400, 404, 503),
    )
    async def get_response(request: Request, response_id: str) -> Response:
        _query(request, ())
        body = found(request, response_id).body()
        return Response(body, media_type="application/json")

    @router.delete(
        _PATH + "/{response_id}",
        summary="Forget a response; what goes on from it keeps what it needs",
        responses=answers(response_models.DeletedResponse, 400, 404, 503),
    )
    async def delete_response(request: Request, response_id: str) -> Response:
        _query(request, ())
        if not store.forget(_owner(request), response_id, service.clock.monotonic_s()):
            raise _not_found(response_id)
        return JsonResponse({"id": response_id, "object": "response", "deleted": True})

    @router.get(
        _PATH + "/{response_id}/input_items",
        summary="What a response answers, the whole conversation, newest first",
        responses=answers(response_models.InputItems, 400, 404, 503),
    )
    async def list_input_items(request: Request, response_id: str) -> Response:
        query = _query(request, ("after", "limit", "order"))
        order = query.get("order", "desc")
        if order not in {"asc", "desc"}:
            raise invalid("order can be 'asc' or 'desc'", "order")
        limit = _limit(query.get("limit", str(_DEFAULT_LIMIT)))
        stored = found(request, response_id)
        items = await service.work.run(lambda _: _conversation(stored), stored.turn.chain_bytes)
        if order == "desc":
            items.reverse()
        return JsonResponse(_page(items, query.get("after"), limit))


def _conversation(stored: Stored) -> list[dict[str, Any]]:
    """Return all items of the conversation before the response's own output."""
    *earlier, last = stored.turn.chain()
    parts = [part for turn in earlier for part in (turn.input_json, turn.output_json)]
    return [item for part in (*parts, last.input_json) for item in orjson.loads(part)]


def _page(items: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    start = 0
    if after is not None:
        indexes = [index for index, item in enumerate(items) if item["id"] == after]
        if not indexes:
            raise invalid(f"after: there is no item {shortened(after)!r}", "after")
        start = indexes[0] + 1
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


def _limit(text: str) -> int:
    limit = int(text) if text.isascii() and text.isdecimal() and len(text) < 4 else 0
    if not 1 <= limit <= _MAX_LIMIT:
        raise invalid(f"limit must be a number from 1 to {_MAX_LIMIT}", "limit")
    return limit


def _query(request: Request, known: Collection[str]) -> dict[str, str]:
    """Return the query's parameters. Raises `ApiError` for one that would be ignored."""
    for name, value in request.query_params.multi_items():
        if name not in known and (name, value) != ("stream", "false"):
            param = shortened(name)
            raise invalid(f"{param} is not supported here", param, code="unsupported_parameter")
    return dict(request.query_params)


def _owner(request: Request) -> str:
    """Return the owner of the responses."""
    return RequestContext.of(request.scope).record.owner


def _not_found(response_id: str) -> ApiError:
    message = f"response {shortened(response_id)!r} is not stored (any more)"
    return ApiError(404, message, path=("response_id",), code="response_not_found")
