"""Requests of OpenAI's and vLLM's routes: every field here is honoured.

`server/generation/params.py` judges all other fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from server.generation.caching import CachingFields
from server.generation.prompt_messages import MAX_MESSAGES
from server.generation.request_fields import (
    MAX_CHOICES_IN_ALL,
    Choices,
    Effort,
    GenerateFields,
    Request,
    Salt,
    TemplateVariables,
    optional,
)
from server.openai.chat_messages import Message
from server.openai.prediction import Prediction
from server.tools.schemas import Choice, Tools


def _as_prompts(value: object) -> object:
    """Return a list of prompts, also for one prompt."""
    prompts = [value]
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        prompts = value
    if len(prompts) > MAX_CHOICES_IN_ALL:
        raise ValueError(f"must be at most {MAX_CHOICES_IN_ALL} prompts")
    for prompt in prompts:
        is_ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not is_ids and not isinstance(prompt, str):
            raise ValueError("must be a string or a list of token ids, or a list of such")
    return prompts


Prompts = Annotated[
    Any,
    BeforeValidator(
        _as_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]
    ),
]


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class ChatRequest(CachingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: int | None = optional("default: as many as the context has room for")
    logprobs: bool | None = None
    top_logprobs: int | None = optional("0 to 20; needs logprobs")
    add_generation_prompt: bool | None = optional(
        "default true, or false with continue_final_message"
    )
    continue_final_message: bool | None = optional(
        "go on with the last message instead of answering it"
    )
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools | None = None
    tool_choice: Choice | None = optional(
        "none, auto, required, one by name, allowed_tools; default auto"
    )
    parallel_tool_calls: bool | None = optional(
        "false: only the first call is returned; default true"
    )
    include_reasoning: bool | None = optional("default true")
    reasoning_effort: Effort | None = optional(
        "for models whose template knows it; else it is warned of"
    )
    prediction: Prediction | None = optional(
        "a text that the answer is expected to repeat; it changes the speed of the answer alone,"
        " and is warned of where the server makes no drafts"
    )


class CompletionRequest(GenerateFields):
    """Body of `POST /v1/completions`."""

    prompt: Prompts
    best_of: Choices | None = optional("generate as many, give the n likeliest (by mean logprob)")
    logprobs: int | None = optional("0 to 20")
    echo: bool | None = optional(
        "put the prompt before the answer, its logprobs before the answer's;"
        " max_tokens may be 0 then"
    )


class PromptRequest(Request):
    """A prompt alone: either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = optional("llama-server's name of prompt")
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateVariables | None = None
    tools: Tools | None = None


class TokenizeRequest(PromptRequest):
    """Body of `POST /tokenize`: either `prompt` or `messages`."""

    return_token_strs: bool | None = None


class UnpinRequest(PromptRequest):
    """Body of `POST /admin/cache/unpin`: a beginning of prompts, as `prompt` or `messages`."""

    add_generation_prompt: bool | None = optional("default false")
    cache_salt: Salt | None = optional("that of the requests that have it")


class PinRequest(UnpinRequest):
    """Body of `POST /admin/cache/pin`."""

    ttl: Literal["5m", "30m", "1h", "12h", "24h"] | None = optional(
        "how long it is kept without use; default 24h"
    )


class ExplainRequest(PromptRequest):
    """Body of `POST /admin/cache/explain`: a prompt, as `prompt` or `messages`."""

    cache_salt: Salt | None = optional("that of the request to explain")


class DetokenizeRequest(Request):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[int], Field(fail_fast=True)]
