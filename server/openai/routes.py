"""The routes that answer with generated text, and those about the model.

Each reads its own body (`server/generation/respond.py`): size, JSON and errors are the same
everywhere.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request
from starlette.responses import Response

from server.generation import params
from server.generation.chat_prompt import chat_tokens
from server.generation.params import Warned
from server.generation.prompts import token_text, tokens_of
from server.generation.request_fields import parse
from server.generation.respond import (
    GenerationResponse,
    JsonResponse,
    PreparedResponse,
    read_body,
    read_generation,
)
from server.http.errors import invalid
from server.openai import response_models, schemas
from server.openai.chat import ChatFormat
from server.openai.completions import CompletionFormat
from server.openai.spec import chat_spec, completion_spec, conversation_of, unread_fields
from server.openapi import answers, body_of, generation_answers
from server.service import Service
from server.text.export import tokenizer_config


def generation_routes(service: Service) -> APIRouter:
    """Return chat and text completions."""
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        summary="Answer a conversation",
        openapi_extra=body_of(schemas.ChatRequest),
        responses=generation_answers(response_models.ChatCompletion, response_models.ChatChunk),
    )
    async def create_chat_completion(request: Request) -> Response:
        _, prepare = await read_generation(service, request, schemas.ChatRequest, chat_spec)
        return GenerationResponse(service, prepare, partial(ChatFormat, service))

    @router.post(
        "/v1/completions",
        summary="Go on with a text",
        openapi_extra=body_of(schemas.CompletionRequest),
        responses=generation_answers(response_models.Completion, response_models.Completion),
    )
    async def create_completion(request: Request) -> Response:
        _, prepare = await read_generation(
            service, request, schemas.CompletionRequest, lambda asked, _: completion_spec(asked)
        )
        return GenerationResponse(service, prepare, partial(CompletionFormat, service))

    return router


def model_routes(service: Service) -> APIRouter:
    """Return the list of models, and the model's words."""
    router = APIRouter()
    limit_bytes = service.config.server.max_request_bytes
    created = int(service.clock.wall_s())

    def card() -> response_models.ModelCard:
        return {
            "id": service.model_name,
            "object": "model",
            "created": created,
            "owned_by": "octavo",
            "max_model_len": service.client.info.max_model_len,
            "sampling_defaults": service.sampling_defaults,
        }

    @router.get(
        "/v1/models", summary="What is served", responses=answers(response_models.ModelList, 503)
    )
    async def list_models() -> Response:
        models: response_models.ModelList = {"object": "list", "data": [card()]}
        return JsonResponse(models)

    @router.get(
        "/v1/models/{model_id:path}",
        summary="One model",
        responses=answers(response_models.ModelCard, 404, 503),
    )
    async def get_model(model_id: str) -> Response:
        service.require_model(model_id)
        return JsonResponse(card())

    @router.post(
        "/tokenize",
        summary="Text or a conversation to token ids",
        openapi_extra=body_of(schemas.TokenizeRequest),
        responses=answers(response_models.Tokenized, 400, 404, 408, 413, 503),
    )
    async def tokenize(request: Request) -> Response:
        asked = await parse(
            schemas.TokenizeRequest, await read_body(request, limit_bytes), service.work
        )
        return PreparedResponse(lambda: _tokenized(service, asked))

    @router.get(
        "/tokenizer_info",
        summary="The tokenizer's settings and the chat template",
        responses=answers(response_models.TokenizerInfo),
    )
    async def tokenizer_info() -> Response:
        return JsonResponse(tokenizer_config(service.text))

    @router.post(
        "/detokenize",
        summary="Token ids to text",
        openapi_extra=body_of(schemas.DetokenizeRequest),
        responses=answers(response_models.Detokenized, 400, 404, 408, 413, 503),
    )
    async def detokenize(request: Request) -> Response:
        asked = await parse(
            schemas.DetokenizeRequest, await read_body(request, limit_bytes), service.work
        )
        service.require_model(asked.model)

        async def detokenized() -> response_models.Detokenized:
            text = await token_text(service, asked.tokens)
            warnings = [*asked.notes, *params.judge(asked.model_extra, {})]
            return {"prompt": text, "content": text, **report(warnings)}

        return PreparedResponse(detokenized)

    return router


async def _tokenized(service: Service, asked: schemas.TokenizeRequest) -> response_models.Tokenized:
    token_ids, warnings = await prompt_tokens(service, asked)
    answer: response_models.Tokenized = {
        "tokens": token_ids,
        "count": len(token_ids),
        "max_model_len": service.client.info.max_model_len,
    }
    if asked.return_token_strs:
        text_of = service.text.tokenizer.token_text
        answer["token_strs"] = await service.work.run(
            lambda _: [*map(text_of, token_ids)], len(token_ids)
        )
    return {**answer, **report(warnings)}


def report(warnings: list[Warned]) -> response_models.Reported:
    """Return the part of an answer for warnings, if there are any."""
    return {"octavo": {"warnings": warnings}} if warnings else {}


async def prompt_tokens(
    service: Service, asked: schemas.PromptRequest
) -> tuple[list[int], list[Warned]]:
    """Return the tokens of a prompt, with warnings of fields without effect. Raises `ApiError`."""
    warnings = [*asked.notes, *params.judge(asked.model_extra, params.TOKENIZE)]
    warnings += await service.work.run(
        lambda _: unread_fields(asked, service.text.template), asked.num_bytes
    )
    return await _tokens_of(service, asked), warnings


async def _tokens_of(service: Service, asked: schemas.PromptRequest) -> list[int]:
    service.require_model(asked.model)
    prompt = asked.content if asked.prompt is None else asked.prompt
    if [asked.prompt, asked.content, asked.messages].count(None) != 2:
        raise invalid("one of prompt, content and messages must be given", "prompt")
    if asked.messages is not None:
        chat = await service.work.run(lambda _: conversation_of(asked), asked.num_bytes)
        return (await chat_tokens(service, chat, chat.tools, [])).token_ids
    assert prompt is not None
    adds = asked.add_special_tokens is not False
    [token_ids] = await tokens_of(service, [prompt], add_special_tokens=adds)
    return token_ids
