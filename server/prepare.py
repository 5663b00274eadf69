"""From a parsed body to a `Job`: prompt to tokens, parameters to `SamplingParams`, lengths checked.

So a client hears at once what is wrong with its request. Knows nothing of responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from scheduler.client import GenerateRequest, ModelInfo, SamplingParams
from server import params
from server.choices import params_of_try
from server.errors import invalid
from server.generate import Job
from server.output import OutputOptions
from server.params import Warned
from server.prompts import (
    DEFAULT_COMPLETION_TOKENS,
    completion_prompts,
    echoes,
    off_loop,
    require_tokens,
    truncated,
)
from server.schemas import (
    MAX_CHOICES_IN_ALL,
    ChatRequest,
    CompletionRequest,
    GenerateFields,
    Message,
)
from server.service import Service
from server.text.pieces import TextError
from server.text.template import TemplateError
from server.tooling import callable_tools, spoken, tool_warnings

#: To render a message takes as long as to encode this many characters, some 25 µs.
_MESSAGE_CHARS = 80
_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)
#: What `ChatTemplate.render` takes itself.
_RESERVED_VARIABLES = ("self", "messages", "tools", "add_generation_prompt", "continues_final")


async def chat_job(service: Service, request: ChatRequest) -> Job:
    """Return what a chat asks for. Raises `ApiError` that names the field at fault."""
    service.require_model(request.model)
    warnings = params.judge(request.model_extra, params.CHAT)
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    max_tokens, name = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        if max_tokens not in {None, request.max_completion_tokens}:
            raise invalid("max_tokens and max_completion_tokens disagree", "max_tokens")
        max_tokens, name = request.max_completion_tokens, "max_completion_tokens"
    tools = callable_tools(service, request)
    warnings += tool_warnings(tools)
    token_ids = await chat_tokens(
        service,
        request.messages,
        add_generation_prompt=request.add_generation_prompt,
        add_special_tokens=request.add_special_tokens,
        variables=request.chat_template_kwargs,
        tools=[tool.for_template() for tool in tools],
        continues_final=request.continue_final_message is True,
    )
    token_ids = truncated(service.client.info, request, token_ids, max_tokens)
    room = _room(service.client.info, token_ids, max_tokens, ("messages", name))
    sampling = _sampling(
        service,
        request,
        max_tokens=room if max_tokens is None else max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        names={"max_tokens": name, "logprobs": "top_logprobs"},
    )
    job = _job(
        service,
        request,
        [(token_ids, sampling)],
        warnings,
        continues=request.continue_final_message is True,
        has_logprobs=request.logprobs is True,
    )
    return job.read_as(spoken(service, request, tools, token_ids))


async def completion_job(service: Service, request: CompletionRequest) -> Job:
    """Return what a completion asks for. Raises `ApiError` that names the field at fault."""
    service.require_model(request.model)
    warnings = params.judge(request.model_extra, params.COMPLETION)
    num_tries = _tries(request)
    if request.echo and request.logprobs is not None:
        message = "echo with logprobs is not supported: of a prompt there are no probabilities"
        raise invalid(message, "echo", code="unsupported_parameter")
    prompts = await completion_prompts(service, request)
    is_one = len(prompts) == 1
    asked = [
        (prompt, _completion_sampling(service, request, prompt, "prompt" if is_one else name))
        for prompt, name in ((prompt, f"prompt.{i}") for i, prompt in enumerate(prompts))
    ]
    return _job(
        service,
        request,
        asked,
        warnings,
        continues=True,
        has_logprobs=request.logprobs is not None,
        num_tries=num_tries,
        prompt_texts=await echoes(service, request, prompts) if request.echo else (),
    )


def _tries(request: CompletionRequest) -> int:
    """Return how many answers to generate to each prompt. Raises `ApiError`."""
    num_choices = request.n or 1
    num_tries = num_choices if request.best_of is None else request.best_of
    if num_tries < num_choices:
        raise invalid(f"best_of must be at least n, which is {num_choices}", "best_of")
    if request.stream and num_tries > num_choices:
        raise invalid("best_of cannot be streamed: which is best shows at the end", "best_of")
    num_in_all = num_tries * len(request.prompt)
    if num_in_all > MAX_CHOICES_IN_ALL:
        name = "n" if request.best_of is None else "best_of"
        message = (
            f"{name} is {num_tries} for each of {len(request.prompt)} prompts:"
            f" together more than the {MAX_CHOICES_IN_ALL} answers one request may have"
        )
        raise invalid(message, name)
    return num_tries


def _completion_sampling(
    service: Service, request: CompletionRequest, token_ids: list[int], name: str
) -> SamplingParams:
    """Return the parameters for one prompt, which came in the field `name`. Raises `ApiError`."""
    info = service.client.info
    if not token_ids:
        raise invalid(f"{name} must not be empty", name)
    # The length first: it costs nothing, however many there are.
    room = _room(info, token_ids, request.max_tokens, (name, "max_tokens"))
    require_tokens(token_ids, info.vocab_size, name)
    max_tokens = request.max_tokens
    # The tries are ranked by them, if there are more than choices.
    is_ranked = (request.best_of or 1) > (request.n or 1)
    return _sampling(
        service,
        request,
        max_tokens=min(DEFAULT_COMPLETION_TOKENS, room) if max_tokens is None else max_tokens,
        logprobs=0 if is_ranked and request.logprobs is None else request.logprobs,
        names={},
    )


async def chat_tokens(
    service: Service,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool | None,
    add_special_tokens: bool | None,
    variables: dict[str, Any] | None,
    tools: Sequence[dict[str, Any]] = (),
    continues_final: bool = False,
) -> list[int]:
    """Return the prompt that the model's template makes of a chat; null flags mean the default.

    Raises `ApiError`.
    """
    template, tokenizer = service.text.template, service.text.tokenizer
    if template is None:
        raise invalid("this model has no chat template; use /v1/completions", "messages")
    for name in _RESERVED_VARIABLES:
        if name in (variables or {}):
            message = f"chat_template_kwargs: the variable {name!r} is the server's own"
            raise invalid(message, "chat_template_kwargs")

    if continues_final and add_generation_prompt:
        message = "continue_final_message and add_generation_prompt exclude each other"
        raise invalid(message, "continue_final_message")

    def encode() -> list[int]:
        text = template.render(
            [message.for_template() for message in messages],
            add_generation_prompt=add_generation_prompt is not False,
            tools=tools or None,
            continues_final=continues_final,
            **(variables or {}),
        )
        return tokenizer.encode(text, add_special_tokens=add_special_tokens is True)

    try:
        num_chars = sum(message.num_chars for message in messages) + len(orjson.dumps(tools))
        return await off_loop(encode, num_chars + len(messages) * _MESSAGE_CHARS)
    except TemplateError as error:
        at = "" if error.message_index is None else f".{error.message_index}"
        raise invalid(str(error), "messages" + at) from error
    except TextError as error:
        raise invalid(str(error), "messages") from error


def _room(
    info: ModelInfo, token_ids: Sequence[int], max_tokens: int | None, names: tuple[str, str]
) -> int:
    """Return how many tokens fit behind the prompt; raise `ApiError` if too few do.

    `names`: of the prompt's field and of the one `max_tokens` came in.
    """
    limit, num_prompt, (prompt_name, max_name) = info.max_model_len, len(token_ids), names
    code = "context_length_exceeded"
    # OpenAI's words: LiteLLM knows by them, and by nothing else, to try a model with more room.
    known = f"This model's maximum context length is {limit} tokens, prompt and answer together"
    if num_prompt >= limit:
        raise invalid(f"{known}: {prompt_name} has {num_prompt}", prompt_name, code)
    if max_tokens is not None and num_prompt + max_tokens > limit:
        message = f"{known}: {prompt_name} has {num_prompt} and {max_name} is {max_tokens}"
        raise invalid(message, max_name, code)
    return limit - num_prompt


def _sampling(
    service: Service,
    request: GenerateFields,
    *,
    max_tokens: int,
    logprobs: int | None,
    names: dict[str, str],
) -> SamplingParams:
    """Build the parameters; `names`: what the client calls a field otherwise than we do."""
    vocab_size = service.client.info.vocab_size
    given = {name: getattr(request, name) for name in _SAMPLING_FIELDS}
    stop_token_ids = request.stop_token_ids or []
    require_tokens(stop_token_ids, vocab_size, "stop_token_ids")
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=_top_k(request.top_k, vocab_size),
            seed=_seed(service, request.seed),
            logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
            logprobs=logprobs,
            stop_token_ids=tuple(stop_token_ids),
            **{name: value for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        param = names.get(name, name)
        raise invalid(f"{param} {rest}", param) from error


def _top_k(top_k: int | None, vocab_size: int) -> int:
    """-1 is vLLM's word for no limit."""
    return 0 if top_k in {None, -1} else min(top_k or 0, vocab_size)


def _seed(service: Service, seed: int | None) -> int:
    if seed is None:
        return service.chance.getrandbits(63)
    if not -(2**63) <= seed < 2**64:
        raise ValueError("seed must fit 64 bits")
    return seed % 2**64


def _logit_bias(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            raise invalid(
                f"logit_bias: its keys are token ids, 0 to {vocab_size - 1}, in strings",
                "logit_bias",
            )
    return tuple((int(key), bias) for key, bias in biases.items())


def _job(
    service: Service,
    request: GenerateFields,
    asked: Sequence[tuple[list[int], SamplingParams]],
    warnings: list[Warned],
    *,
    continues: bool,
    has_logprobs: bool,
    num_tries: int | None = None,
    prompt_texts: tuple[str, ...] = (),
) -> Job:
    """Build the job; `asked`: prompt by prompt; `num_tries` of each, default n."""
    [(_, sampling), *_] = asked
    num_choices = request.n or 1
    options = request.stream_options
    if options is not None:
        if not request.stream:
            raise invalid("stream_options needs stream to be true", "stream_options")
        warnings += params.judge(options.model_extra, params.STREAM_OPTIONS, "stream_options.")
    ends = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        ends.update(service.client.info.eos_token_ids)
    return Job(
        requests=tuple(
            GenerateRequest(
                prompt,
                params_of_try(own, index),
                request.priority or 0,
                request.cache_salt or "",
            )
            for prompt, own in ((tuple(token_ids), own) for token_ids, own in asked)
            for index in range(num_tries or num_choices)
        ),
        output=OutputOptions(
            stops=tuple(request.stop or ()),
            include_stop=request.include_stop_str_in_output is True,
            skip_special_tokens=request.skip_special_tokens is not False,
            end_token_ids=frozenset(ends),
            min_tokens=sampling.min_tokens,
            continues=continues,
        ),
        created_s=int(service.clock.wall_s()),
        warnings=tuple(warnings),
        is_stream=request.stream is True,
        has_usage_chunk=options is not None and options.include_usage is True,
        has_continuous_usage=options is not None and options.continuous_usage_stats is True,
        has_logprobs=has_logprobs,
        has_token_ids=request.return_token_ids is True,
        echoes=prompt_texts,
        num_choices=num_choices,
        num_tries=num_tries or num_choices,
    )
