"""The routes that probes, load balancers, scrapers and benchmarks ask for."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from scheduler.client import EngineUnavailableError
from server.generation.respond import JsonResponse
from server.http.errors import from_engine, unavailable
from server.openai import response_models
from server.openapi import answers
from server.service import Service


def probe_routes(service: Service, version: str) -> APIRouter:
    """Return health, readiness, metrics and version."""
    router = APIRouter()

    @router.get(
        "/health", summary="Whether the process answers", responses=answers(response_models.Health)
    )
    async def health() -> Response:
        return JsonResponse(response_models.Health(status="ok"))

    @router.get(
        "/ready",
        summary="Whether a request would be served now",
        responses=answers(response_models.Health, 503),
    )
    async def is_ready() -> Response:
        if service.lifecycle.is_draining:
            raise unavailable("the server is shutting down")
        if not service.client.is_alive:
            raise unavailable("the engine is not running or does not answer")
        return JsonResponse(response_models.Health(status="ready"))

    @router.get(
        "/metrics",
        summary="Counts and times for Prometheus",
        responses=answers(None),
        response_class=Response,
    )
    async def metrics(request: Request) -> Response:
        body, content_type = service.metrics.exposition(request.headers.get("accept", ""))
        return Response(body, headers={"Content-Type": content_type})

    @router.get("/version", summary="What is running", responses=answers(response_models.Version))
    async def get_version() -> Response:
        return JsonResponse(response_models.Version(version=version))

    if service.config.server.dev_endpoints:

        @router.post(
            "/reset_prefix_cache",
            summary="Forget the cached prefixes that no request uses",
            responses=answers(response_models.CacheReset, 503),
        )
        async def reset_prefix_cache() -> Response:
            try:
                num_freed = await service.client.reset_cache()
                return JsonResponse(response_models.CacheReset(freed_pages=num_freed))
            except EngineUnavailableError as error:
                raise from_engine(error) from error

    # Probes that only want the status, such as `wget --spider`.
    router.add_api_route("/health", health, methods=["HEAD"], include_in_schema=False)
    router.add_api_route("/ready", is_ready, methods=["HEAD"], include_in_schema=False)
    return router
