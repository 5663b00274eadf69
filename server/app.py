"""Builds the HTTP application. Knows nothing of processes or signals."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import NoReturn

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match, Route

from configs.schema import OctavoConfig
from scheduler.client import EngineClient
from server.answer_types import ErrorBody
from server.docs_page import docs_routes
from server.generation.fingerprints import Fingerprints
from server.generation.retry_after import QueueReservations
from server.generation.sampling import makers_sampling
from server.http.auth import PROBE_PATHS, AuthMiddleware
from server.http.context import Clock
from server.http.cors import Cors
from server.http.errors import from_status, shortened
from server.http.keys import Keyring, load_keys
from server.http.lifecycle import DrainGate, Lifecycle
from server.http.middleware import RequestMiddleware
from server.logs import LOGGER_NAME, fields
from server.messages.routes import DOCUMENTED as MESSAGES_DOCUMENTED
from server.messages.routes import ERROR_FORMS, message_routes
from server.metrics import Metrics
from server.openai import response_models, schemas
from server.openai.cache_routes import cache_routes
from server.openai.routes import generation_routes, model_routes
from server.openapi import DocumentedApp
from server.probes import probe_routes
from server.responses.response_models import (
    DeletedResponse,
    InputItems,
    ResponseBody,
    ResponseEvent,
)
from server.responses.routes import response_routes
from server.responses.schemas import ResponsesRequest
from server.responses.store import ResponseStore, StoreStats
from server.service import Service, served_name
from server.structured.checker import GrammarService
from server.text.load import ModelText

#: The types of all bodies and answers, for /openapi.json.
_DOCUMENTED = (
    schemas.ChatRequest,
    schemas.CompletionRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
    response_models.ChatCompletion,
    response_models.ChatChunk,
    response_models.Completion,
    response_models.ModelList,
    response_models.Tokenized,
    response_models.TokenizerInfo,
    response_models.Detokenized,
    response_models.Health,
    response_models.Version,
    response_models.CacheReset,
    response_models.PrefixPinned,
    response_models.PrefixUnpinned,
    response_models.CacheExplained,
    schemas.PinRequest,
    schemas.UnpinRequest,
    schemas.ExplainRequest,
    ErrorBody,
    *MESSAGES_DOCUMENTED,
    ResponsesRequest,
    ResponseBody,
    ResponseEvent,
    DeletedResponse,
    InputItems,
)

#: Bodies of the largest size that may be read at the same time.
_MAX_BODIES = 16


def create_app(  # noqa: PLR0913 - every part that the caller may hold too
    config: OctavoConfig,
    client: EngineClient,
    text: ModelText,
    *,
    version: str,
    lifecycle: Lifecycle | None = None,
    keyring: Keyring | None = None,
    clock: Clock | None = None,
    chance: random.Random | None = None,
    grammars: GrammarService | None = None,
    num_lines_dropped: Callable[[], int] = lambda: 0,
) -> FastAPI:
    """Return the application. `client` may still be starting: until it is up, /ready returns 503.

    The caller starts and closes `client`, closes `grammars`, drains `lifecycle`, counts dropped log
    lines and may change `keyring`. Without `keyring` the configured keys are loaded, which raises
    `ValueError` if they are wrong.
    """
    clock = clock or Clock()
    chance = chance or random.SystemRandom()
    lifecycle = lifecycle or Lifecycle()
    metrics = Metrics(client, lambda: served_name(config, client), config.server.metrics_alias)
    grammars = grammars or GrammarService()
    reservations = QueueReservations(client, clock.monotonic_s, config.scheduler)
    uses_defaults = config.model.generation_config != "vllm"
    defaults, notes = makers_sampling(text.sampling_defaults if uses_defaults else {})
    log = logging.getLogger(LOGGER_NAME)
    for note in notes:
        log.info("note", extra=fields(note=note))
    if defaults:
        note = "requests that do not say get the sampling of generation_config.json"
        log.info("note", extra=fields(note=note, **defaults))
    service = Service(
        config, client, text, lifecycle, metrics, clock, chance, reservations, grammars, defaults
    )
    store = ResponseStore(
        max_count=config.server.responses_max_count,
        max_bytes=config.server.responses_max_bytes,
        ttl_s=config.server.responses_ttl_s,
    )
    _show_store(metrics, store, clock)
    fingerprints = Fingerprints(
        max_count=config.server.responses_max_count, ttl_s=config.server.responses_ttl_s
    )
    metrics.add_counter("log_lines_dropped", "log lines that nobody read", num_lines_dropped)
    app = DocumentedApp(version, _DOCUMENTED)
    routers: tuple[APIRouter, ...] = (
        generation_routes(service),
        message_routes(service, fingerprints),
        response_routes(service, store, fingerprints),
        model_routes(service),
        probe_routes(service, version),
        docs_routes(),
    )
    if config.server.dev_endpoints:
        routers = (*routers, cache_routes(service))
    for router in routers:
        app.include_router(router)
    routes = [*app.routes, *(route for router in routers for route in router.routes)]
    known = [route for route in routes if isinstance(route, Route)]
    app.add_exception_handler(HTTPException, _router_errors(known))
    # The last one is the outermost.
    app.add_middleware(DrainGate, lifecycle=lifecycle)
    app.add_middleware(
        AuthMiddleware,
        keyring=Keyring(load_keys(config.server)) if keyring is None else keyring,
        open_paths=frozenset() if config.server.protect_metrics else PROBE_PATHS,
    )
    app.add_middleware(
        RequestMiddleware,
        lifecycle=lifecycle,
        metrics=metrics,
        clock=clock,
        chance=chance,
        max_body_bytes=_MAX_BODIES * config.server.max_request_bytes,
        error_forms=ERROR_FORMS,
    )
    if config.server.cors_origins:
        methods = sorted({method for route in known for method in route.methods or ()})
        app.add_middleware(Cors, origins=config.server.cors_origins, methods=methods)
    return app


def _show_store(metrics: Metrics, store: ResponseStore, clock: Clock) -> None:
    def kept() -> StoreStats:
        store.expire(clock.monotonic_s())
        return store.stats()

    metrics.add_gauge("stored_responses", "turns that are kept", lambda: kept().num_turns)
    metrics.add_gauge("stored_responses_bytes", "what they take", lambda: kept().num_bytes)


def _router_errors(routes: Sequence[Route]) -> Callable[[Request, Exception], NoReturn]:
    """Return a handler that raises a router's error as one in the form of the path's API."""

    def fail(request: Request, error: Exception) -> NoReturn:
        assert isinstance(error, HTTPException)
        method, path = request.method, shortened(request.url.path)
        message = {
            404: f"there is no route {path}; /openapi.json lists them",
            405: f"{method} is not allowed on {path}",
        }.get(error.status_code, error.detail)
        headers = dict(error.headers or {})
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # All methods of the path: the router finds only its first route.
            matching = [route for route in routes if route.matches(request.scope)[0] != Match.NONE]
            methods = {method for route in matching for method in route.methods or ()}
            headers["Allow"] = ", ".join(sorted(methods))
        raise from_status(error.status_code, message, headers) from error

    return fail
