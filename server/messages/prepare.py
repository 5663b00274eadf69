"""From a parsed Messages body to a `Job`, by way of the chat it means.

Knows nothing of responses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from server.generation.chat_prompt import prompt_of_chat
from server.generation.generate import Job
from server.generation.params import Warned
from server.generation.prepare import chat_job
from server.generation.tooling import callable_tools, tool_warnings
from server.http.errors import ApiError, invalid
from server.messages.schemas import CountTokensRequest, MessagesRequest
from server.messages.translate import Translated, translate
from server.service import Service


async def message_job(service: Service, request: MessagesRequest) -> Job:
    """Return what a request asks for. Raises `ApiError` that names the field."""
    translated = await _translated(service, request)
    try:
        job = await chat_job(service, translated.chat)
    except ApiError as error:
        raise translated.error(error) from error
    warnings = translated.all_warnings(job.warnings)
    return _limited(replace(job, warnings=warnings), request.max_tokens)


async def token_count(service: Service, request: CountTokensRequest) -> dict[str, Any]:
    """Return how long the prompt would be, even if it does not fit. Raises `ApiError`."""
    service.require_model(request.model)
    translated = await _translated(service, request)
    try:
        tools = callable_tools(service, translated.chat)
        told = tool_warnings(service, translated.chat, tools)
        prompt = await prompt_of_chat(service, translated.chat, tools, told, must_fit=False)
    except ApiError as error:
        raise translated.error(error) from error
    warnings = translated.all_warnings(told)
    return {"input_tokens": len(prompt), "octavo": {"warnings": warnings}}


def _limited(job: Job, max_tokens: int) -> Job:
    """Return `job` with no more output than asked for. It has as much as there is room for.

    Clients of this API ask for tens of thousands of tokens whatever the model, so what is too many
    is cut, as Anthropic does, and not refused, as in chats. Raises `ApiError`.
    """
    [request] = job.requests
    room = request.params.max_tokens
    if max_tokens > room:
        told = f"max_tokens was cut to {room}: the context has room for no more"
        warning: Warned = {"param": "max_tokens", "message": told}
        return replace(job, warnings=(*job.warnings, warning))
    try:
        params = replace(request.params, max_tokens=max_tokens)
    except ValueError as error:
        raise invalid(str(error), str(error).partition(" ")[0]) from error
    return replace(job, requests=(replace(request, params=params),))


async def _translated(service: Service, request: CountTokensRequest) -> Translated:
    return await service.work.run(
        lambda _: translate(request, service.text.template), request.num_bytes
    )
