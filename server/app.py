"""Puts the HTTP side together. Knows everyone here, and nothing of processes or signals."""

from __future__ import annotations

import logging
import random

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from configs.schema import OctavoConfig
from scheduler.client import EngineClient
from server import schemas
from server.auth import PROBE_PATHS, AuthMiddleware, Keyring, load_keys
from server.boundary import BoundaryMiddleware
from server.context import Clock
from server.documents import ChatChunk
from server.errors import from_status, shortened
from server.gate import DrainGate
from server.lifecycle import Lifecycle
from server.logs import LOGGER_NAME, fields
from server.metrics import Metrics
from server.openapi import DocumentedApp
from server.probes import probe_routes
from server.routes import generation_routes, model_routes
from server.service import Service, sampling_defaults, served_name
from server.text.load import ModelText

_DOCUMENTED = (
    schemas.ChatRequest,
    schemas.CompletionRequest,
    schemas.TokenizeRequest,
    schemas.DetokenizeRequest,
    ChatChunk,
)


def create_app(
    config: OctavoConfig,
    client: EngineClient,
    text: ModelText,
    *,
    version: str,
    lifecycle: Lifecycle | None = None,
    clock: Clock | None = None,
    chance: random.Random | None = None,
) -> FastAPI:
    """Return the application. `client` may still be starting: until it is up, /ready says 503.

    The caller starts and closes `client`, and drains `lifecycle`. Raises `ValueError` for an API
    key (or a file of them) or a model's sampling that cannot be meant.
    """
    clock = clock or Clock()
    chance = chance or random.SystemRandom()
    lifecycle = lifecycle or Lifecycle()
    metrics = Metrics(client, lambda: served_name(config, client), config.server.metrics_alias)
    defaults = sampling_defaults(config, text)
    if defaults:
        note = "requests that do not say get the sampling of generation_config.json"
        logging.getLogger(LOGGER_NAME).info("note", extra=fields(note=note, **defaults))
    service = Service(config, client, text, lifecycle, metrics, clock, chance, defaults)
    app = DocumentedApp(version, _DOCUMENTED)
    for router in (
        generation_routes(service),
        model_routes(service),
        probe_routes(service, version),
    ):
        app.include_router(router)
    app.add_exception_handler(HTTPException, _tell_router_error)
    # The one added last is the outermost.
    app.add_middleware(DrainGate, lifecycle=lifecycle)
    app.add_middleware(
        AuthMiddleware,
        keyring=Keyring(load_keys(config.server)),
        open_paths=frozenset() if config.server.protect_metrics else PROBE_PATHS,
    )
    app.add_middleware(
        BoundaryMiddleware, lifecycle=lifecycle, metrics=metrics, clock=clock, chance=chance
    )
    return app


async def _tell_router_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    method, path = request.method, shortened(request.url.path)
    message = {
        404: f"there is no route {path}; /openapi.json lists them",
        405: f"{method} is not allowed on {path}",
    }.get(error.status_code, error.detail)
    told = from_status(error.status_code, message, dict(error.headers or {}))
    return Response(told.body(), told.status, headers=told.headers, media_type="application/json")
