"""From a parsed body to a `Job`: prompt to tokens, parameters to `SamplingParams`, lengths checked.

So a client hears at once what is wrong with its request. Knows nothing of responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from scheduler.client import GenerateRequest, ModelInfo, SamplingParams
from server.generation import params
from server.generation.chat_prompt import prompt_of_chat
from server.generation.choices import params_of_try
from server.generation.generate import Job
from server.generation.output import OutputOptions
from server.generation.params import Warned
from server.generation.prompt_logprobs import num_wanted, require_few
from server.generation.prompts import (
    DEFAULT_COMPLETION_TOKENS,
    bad_word_tokens,
    completion_prompts,
    context_words,
    echoes,
    require_tokens,
    truncated,
)
from server.generation.sampling import sampling_of
from server.generation.tooling import callable_tools, parser_options, tool_warnings
from server.http.errors import invalid
from server.openai.schemas import (
    MAX_CHOICES_IN_ALL,
    ChatRequest,
    CompletionRequest,
    GenerateFields,
)
from server.openai.unread import unread_fields
from server.service import Service
from server.structured.requests import chat_grammar, completion_grammar


async def chat_job(service: Service, request: ChatRequest) -> Job:
    """Return what a chat asks for. Raises `ApiError` that names the field at fault."""
    service.require_model(request.model)
    warnings = [*request.notes, *params.judge(request.model_extra, params.CHAT)]
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs to be true", "top_logprobs")
    max_tokens, name = request.max_tokens, "max_tokens"
    if request.max_completion_tokens is not None:
        if max_tokens not in {None, request.max_completion_tokens}:
            raise invalid("max_tokens and max_completion_tokens disagree", "max_tokens")
        max_tokens, name = request.max_completion_tokens, "max_completion_tokens"
    tools = callable_tools(service, request)
    warnings += await service.work.run(
        lambda _: unread_fields(request, service.text.template), request.num_bytes
    )
    warnings += tool_warnings(service, request, tools)
    token_ids = await prompt_of_chat(service, request, tools, warnings, must_fit=True)
    token_ids = truncated(service.client.info, request, token_ids, max_tokens)
    room = _room(service.client.info, token_ids, max_tokens, ("messages", name))
    sampling = sampling_of(
        service,
        request,
        max_tokens=room if max_tokens is None else max_tokens,
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        prompt_logprobs=num_wanted(request),
        bad_words=await bad_word_tokens(service, request.bad_words),
        names={"max_tokens": name, "logprobs": "top_logprobs"},
    )
    heard = parser_options(service, request, tools, token_ids)
    grammar, relaxed = await chat_grammar(service, request, tools, heard, token_ids)
    job = _job(
        service,
        request,
        {"messages": (token_ids, replace(sampling, grammar=grammar))},
        warnings + relaxed,
        continues=request.continue_final_message is True,
        has_logprobs=request.logprobs is True,
    )
    return job.read_as(heard)


async def completion_job(service: Service, request: CompletionRequest) -> Job:
    """Return what a completion asks for. Raises `ApiError` that names the field at fault."""
    service.require_model(request.model)
    warnings = [*request.notes, *params.judge(request.model_extra, params.COMPLETION)]
    num_tries = _tries(request)
    prompts = await completion_prompts(service, request)
    is_one = len(prompts) == 1
    bad_words = await bad_word_tokens(service, request.bad_words)
    named = {"prompt" if is_one else f"prompt.{i}": prompt for i, prompt in enumerate(prompts)}
    asked = {
        name: (
            prompt,
            _completion_sampling(service, request, prompt, name, bad_words=bad_words),
        )
        for name, prompt in named.items()
    }
    grammar, relaxed = await completion_grammar(service, request)
    return _job(
        service,
        request,
        {
            name: (prompt, replace(sampling, grammar=grammar))
            for name, (prompt, sampling) in asked.items()
        },
        warnings + relaxed,
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
    service: Service,
    request: CompletionRequest,
    token_ids: list[int],
    name: str,
    *,
    bad_words: tuple[tuple[int, ...], ...],
) -> SamplingParams:
    """Return the parameters for one prompt, which came in the field `name`. Raises `ApiError`."""
    info = service.client.info
    if not token_ids:
        raise invalid(f"{name} must not be empty", name)
    # The length first: it costs nothing, however many there are.
    room = _room(info, token_ids, request.max_tokens, (name, "max_tokens"))
    max_tokens = request.max_tokens
    # The tries are ranked by them, if there are more than choices.
    is_ranked = (request.best_of or 1) > (request.n or 1)
    return sampling_of(
        service,
        request,
        max_tokens=min(DEFAULT_COMPLETION_TOKENS, room) if max_tokens is None else max_tokens,
        logprobs=0 if is_ranked and request.logprobs is None else request.logprobs,
        prompt_logprobs=num_wanted(request, request.logprobs if request.echo else None),
        bad_words=bad_words,
        least_tokens=0 if request.echo else 1,
        names={},
    )


def _room(
    info: ModelInfo, token_ids: Sequence[int], max_tokens: int | None, names: tuple[str, str]
) -> int:
    """Return how many tokens fit behind the prompt; raise `ApiError` if too few do.

    `names`: of the prompt's field and of the one `max_tokens` came in.
    """
    limit, num_prompt, (prompt_name, max_name) = info.max_model_len, len(token_ids), names
    code = "context_length_exceeded"
    known = context_words(limit)
    if num_prompt >= limit:
        raise invalid(f"{known}: {prompt_name} has {num_prompt}", prompt_name, code)
    if max_tokens is not None and num_prompt + max_tokens > limit:
        message = f"{known}: {prompt_name} has {num_prompt} and {max_name} is {max_tokens}"
        raise invalid(message, max_name, code)
    return limit - num_prompt


def _job(
    service: Service,
    request: GenerateFields,
    asked: Mapping[str, tuple[list[int], SamplingParams]],
    warnings: list[Warned],
    *,
    continues: bool,
    has_logprobs: bool,
    num_tries: int | None = None,
    prompt_texts: tuple[str, ...] = (),
) -> Job:
    """Build the job; `asked`: prompts by the fields they came in; `num_tries` of each, default n.

    The one place that requests to the engine come from, so none holds a token that the model does
    not have, whatever it was made from. Raises `ApiError`.
    """
    for name, (token_ids, own) in asked.items():
        for param, ids in ((name, token_ids), *(("bad_words", word) for word in own.bad_words)):
            require_tokens(ids, service.client.info.vocab_size, param)
    [(_, sampling), *_] = asked.values()
    num_choices = request.n or 1
    options = request.stream_options
    if options is not None:
        if not request.stream:
            raise invalid("stream_options needs stream to be true", "stream_options")
        warnings += params.judge(options.model_extra, params.STREAM_OPTIONS, "stream_options.")
    ends = set(sampling.stop_token_ids)
    if not sampling.ignore_eos:
        ends.update(service.client.info.eos_token_ids)
    if sampling.prompt_logprobs is not None:
        prompts = [
            token_ids for token_ids, _ in asked.values() for _ in range(num_tries or num_choices)
        ]
        require_few(request, prompts, sampling.prompt_logprobs)
    return Job(
        requests=tuple(
            GenerateRequest(
                prompt,
                params_of_try(own, index),
                request.priority or 0,
                request.cache_salt or "",
            )
            for prompt, own in ((tuple(token_ids), own) for token_ids, own in asked.values())
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
        has_usage_chunk=service.config.server.force_include_usage
        or (options is not None and options.include_usage is True),
        has_continuous_usage=options is not None and options.continuous_usage_stats is True,
        has_logprobs=has_logprobs,
        has_token_ids=request.return_token_ids is True,
        echoes=prompt_texts,
        num_prompt_logprobs=request.prompt_logprobs,
        num_choices=num_choices,
        num_tries=num_tries or num_choices,
        timeout_s=request.timeout,
    )
