"""One request for a response: its job, and its entry in the store. Knows nothing of events."""

from __future__ import annotations

import re
from typing import Any, cast

import orjson
from pydantic import BaseModel

from server.generation.generate import Job
from server.generation.params import ignored
from server.generation.prepare import generation_job
from server.generation.prompt_messages import MAX_MESSAGES
from server.http.errors import invalid
from server.http.work import Check
from server.responses.conversation import Conversation, Reference, no_such_item, read_conversation
from server.responses.items import ItemReference
from server.responses.response_models import CacheOptions, OutputItem, ResponseShell
from server.responses.schemas import ResponsesRequest
from server.responses.spec import own_warnings, response_spec
from server.responses.store import ResponseStore, Turn
from server.responses.tools import CallableTool, callable_tools
from server.service import Service

_KEY_BITS = 192
_ITEM_ID = re.compile(r"[a-z]+_(?P<key>[0-9a-f]{48})(?P<side>[io])(?P<index>[0-9]{1,5})")
#: To read an item takes as long as to encode this many characters.
_ITEM_CHARS = 120


class ResponseSession:
    """The state of one request, from its body to the stored response."""

    def __init__(
        self, service: Service, store: ResponseStore, owner: str, request: ResponsesRequest
    ) -> None:
        self._service = service
        self._store = store
        self._owner = owner
        self._request = request
        #: Part of the ids of the response and its items.
        self.key = f"{service.chance.getrandbits(_KEY_BITS):0{_KEY_BITS // 4}x}"
        self._previous: Turn | None = None
        self._input_json = b""
        #: Size of the whole conversation.
        self._num_bytes = 0
        self._tools = callable_tools(request.tools or ())

    async def prepare(self) -> Job:
        """Return the job. Raises `ApiError` that names the field at fault."""
        request = self._request
        warnings = own_warnings(request)
        if request.store and self._store.is_off:
            warnings.append(ignored("store", "this server keeps no responses"))
        self._previous = self._find_previous()
        conversation = await self._read()
        self._input_json = conversation.input_json
        spec = await self._service.work.run(
            lambda _: response_spec(
                request,
                conversation.messages,
                warnings + conversation.warnings,
                self._service.text.template,
                self._num_bytes,
            ),
            self._num_bytes,
        )
        return await generation_job(self._service, spec)

    def called(self, name: str) -> CallableTool | None:
        """Return the tool that the model calls by this name, or None."""
        return next((tool for tool in self._tools if tool.name == name), None)

    def shell(self, job: Job) -> ResponseShell:
        """Return the response as it is at its beginning, without its output."""
        request, sampling = self._request, job.requests[0].params
        reasoning, text = request.reasoning, request.text
        text_format = text.format if text is not None else None
        choice = request.tool_choice or "auto"
        return {
            "id": response_id(self.key),
            "object": "response",
            "created_at": job.created_s,
            "completed_at": None,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self._service.model_name,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "prompt_cache_key": request.prompt_cache_key,
            "prompt_cache_options": _cache_options(request),
            "prompt_cache_retention": request.prompt_cache_retention,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "store": self._is_kept,
            "temperature": sampling.temperature,
            "text": {"format": _json_of(text_format) if text_format else {"type": "text"}},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [_json_of(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": request.truncation or "disabled",
            "usage": None,
            "metadata": request.metadata or {},
        }

    def keep(self, shell: ResponseShell, items: list[OutputItem]) -> ResponseShell:
        """Store the finished response on request; return `shell`, with a warning on failure."""
        if not self._is_kept:
            return shell
        output_json = orjson.dumps(items)
        num_items = len(self._request.input) + len(items)
        turn = Turn(self._previous, self._input_json, output_json, num_items)
        now_s = self._service.clock.monotonic_s()
        shell_json = orjson.dumps(shell)
        if self._store.put(self._owner, response_id(self.key), shell_json, turn, now_s):
            return shell
        warning = ignored("store", "the conversation is larger than what is kept here")
        octavo = shell["octavo"]
        octavo = {**octavo, "warnings": [*octavo["warnings"], warning]}
        return {**shell, "store": False, "octavo": octavo}

    @property
    def _is_kept(self) -> bool:
        return self._request.store is not False and not self._store.is_off

    def _find_previous(self) -> Turn | None:
        name = self._request.previous_response_id
        if name is None:
            return None
        at = "previous_response_id"
        stored = self._store.recall(self._owner, name, self._service.clock.monotonic_s())
        if stored is None:
            message = f"previous_response_id: response {name!r} is not stored (any more)"
            raise invalid(message, at, code="previous_response_not_found")
        limit_bytes = self._service.config.server.max_request_bytes
        if stored.turn.chain_bytes > limit_bytes:
            message = f"{at}: the conversation has more than the {limit_bytes} bytes of a request"
            raise invalid(message, at)
        if stored.turn.chain_items + len(self._request.input) > MAX_MESSAGES:
            raise invalid(f"{at}: the conversation has more than {MAX_MESSAGES} items", at)
        return stored.turn

    async def _read(self) -> Conversation:
        request, previous = self._request, self._previous
        references = {
            index: self._find(index, item)
            for index, item in enumerate(request.input)
            if isinstance(item, ItemReference)
        }
        limit_bytes = self._service.config.server.max_request_bytes
        turns = {at.turn for at in references.values()}
        num_bytes = sum(turn.own_bytes for turn in turns)
        if num_bytes > limit_bytes:
            raise invalid("input: together the items referred to are too large", "input")

        def read(_: Check) -> Conversation:
            return read_conversation(
                self.key,
                request.input,
                instructions=request.instructions,
                previous=previous,
                references=references,
                limit_bytes=limit_bytes,
            )

        chain_bytes = previous.chain_bytes if previous else 0
        self._num_bytes = request.num_bytes + chain_bytes + num_bytes
        num_chars = len(request.input) * _ITEM_CHARS + self._num_bytes
        return await self._service.work.run(read, num_chars)

    def _find(self, index: int, item: ItemReference) -> Reference:
        found = _ITEM_ID.fullmatch(item.id)
        now_s = self._service.clock.monotonic_s()
        stored = found and self._store.recall(self._owner, response_id(found["key"]), now_s)
        if not found or not stored:
            raise no_such_item(index, item.id)
        return Reference(stored.turn, found["side"] == "o", int(found["index"]))


def response_id(key: str) -> str:
    """Return the name of the response with this key."""
    return f"resp_{key}"


def _cache_options(request: ResponsesRequest) -> CacheOptions | None:
    options = request.prompt_cache_options
    if options is None:
        return None
    return {"mode": options.mode or "implicit", "ttl": options.ttl or "30m"}


def _json_of(asked: BaseModel) -> dict[str, Any]:
    """Return a part of a request as JSON: schemas may have numbers that orjson does not write."""
    return cast("dict[str, Any]", orjson.Fragment(asked.model_dump_json()))
