"""/openapi.json: the routes' requests and every way they answer.

Routes read and validate their bodies themselves, so FastAPI learns the types of them here. The
code that builds the answers is typed with the same types. Routes hold references to the types, and
only the document their schemas: building those takes longer than the rest of a start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from fastapi import FastAPI
from pydantic import TypeAdapter

from server.answer_types import ErrorBody

_REF = "#/components/schemas/{model}"
_MEANINGS = {
    400: "the request is wrong; `param` names the field",
    401: "no accepted API key",
    404: "no such model or route",
    408: "the body stopped coming, or the time for the request is over",
    413: "the body is too large",
    429: "the queue is full, or the key's limit reached; see Retry-After",
    500: "a bug of ours, in this request alone",
    503: "not ready, or shutting down; see Retry-After",
}


#: A pydantic model, a TypedDict or an alias of a union of them.
Model: TypeAlias = Any
Responses: TypeAlias = dict[int | str, dict[str, Any]]


def answers(model: Model | None, *error_statuses: int, error: Model = ErrorBody) -> Responses:
    """Return a route's responses for FastAPI: success holds `model`; None: it is plain text."""
    success = _json_of(model) if model else {"text/plain": {"schema": {"type": "string"}}}
    responses: Responses = {200: {"content": success}}
    for status in sorted({401, 500, *error_statuses}):
        responses[status] = {"content": _json_of(error), "description": _MEANINGS[status]}
    return responses


def generation_answers(model: Model, chunk: Model, error: Model = ErrorBody) -> Responses:
    """Return the responses of a route that generates; a stream's events hold `chunk`s."""
    responses = answers(model, 400, 404, 408, 413, 429, 503, error=error)
    responses[200]["content"]["text/event-stream"] = {"schema": _event_of(chunk, error)}
    return responses


def _event_of(*models: Model) -> dict[str, Any]:
    """Return the schema of an event of a stream, whose data is one of these or the end."""
    references = [{"$ref": _REF.format(model=model.__name__)} for model in models]
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": references},
    }
    properties = {"event": {"type": "string"}, "data": {"anyOf": [{"const": "[DONE]"}, data]}}
    return {"type": "object", "properties": properties, "required": ["data"]}


def body_of(model: Model) -> dict[str, Any]:
    """Return the request body of a route, for FastAPI's `openapi_extra`."""
    return {"requestBody": {"required": True, "content": _json_of(model)}}


def _json_of(model: Model) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}}


class DocumentedApp(FastAPI):
    """FastAPI with the bodies that the routes read themselves in its document."""

    def __init__(self, version: str, documented: Iterable[Model]) -> None:
        # No documentation pages: theirs load scripts from elsewhere (see `server/docs_page.py`). No
        # redirect for a trailing slash: it would answer for a path that does not exist.
        super().__init__(
            title="Octavo", version=version, docs_url=None, redoc_url=None, redirect_slashes=False
        )
        self._documented = documented

    def openapi(self) -> dict[str, Any]:
        """Return the document, built once."""
        if self.openapi_schema is None:
            document = super().openapi()
            components = document.setdefault("components", {})
            schemas = components.setdefault("schemas", {})
            for model in self._documented:
                schema = TypeAdapter(model).json_schema(ref_template=_REF)
                found = schema.pop("$defs", {})
                if "$ref" not in schema:
                    found[model.__name__] = schema
                for name, one in found.items():
                    assert schemas.setdefault(name, one) == one, f"two types are named {name}"
            components["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            }
            document["security"] = [{"key": []}, {"header": []}, {}]
            for path in document["paths"].values():
                for operation in path.values():
                    # FastAPI's own shape of a validation error is never sent.
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
        assert self.openapi_schema is not None
        return self.openapi_schema
