"""From a `GenerationSpec` to a `Job`: prompts to tokens, `SamplingParams`, lengths checked.

So a request that the model cannot serve is refused before anything is generated. Knows nothing of
the APIs or of responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from model.splitmix64 import splitmix64
from scheduler.client import GenerateRequest, SamplingParams
from server.generation.caching import caching_of
from server.generation.chat_prompt import ChatPrompt, chat_tokens
from server.generation.generate import Job
from server.generation.generation_spec import Conversation, TextPrompts, ToolSpec
from server.generation.kv_keys import selection_of, view_of
from server.generation.output import OutputOptions
from server.generation.params import Warned, ignored, warning
from server.generation.prompt_logprobs import require_few
from server.generation.prompts import (
    DEFAULT_COMPLETION_TOKENS,
    bad_word_tokens,
    context_words,
    echoes,
    require_tokens,
    tokens_of,
    truncated,
)
from server.generation.request_fields import GenerationSpec
from server.generation.sampling import sampling_of
from server.generation.tooling import callable_tools, parser_options, tool_warnings
from server.http.errors import Path, dotted, invalid
from server.service import Service
from server.structured.requests import chat_grammar, text_grammar


async def generation_job(service: Service, spec: GenerationSpec) -> Job:
    """Return the work for the engine. Raises `ApiError` that names the field at fault."""
    service.require_model(spec.fields.model)
    if isinstance(spec.prompt, TextPrompts):
        return await _text_job(service, spec, spec.prompt)
    return await _chat_job(service, spec, spec.prompt)


async def chat_prompt(
    service: Service, chat: Conversation, warnings: list[Warned], *, must_fit: bool = False
) -> tuple[ChatPrompt, list[ToolSpec]]:
    """Return a chat's prompt, however long, and the callable tools. Raises `ApiError`.

    `warnings`: gets those of fields without effect on the prompt; `must_fit`: see `chat_tokens`.
    """
    tools = callable_tools(service, chat)
    warnings += tool_warnings(service, chat, tools)
    return await chat_tokens(service, chat, tools, warnings, must_fit=must_fit), tools


async def _chat_job(service: Service, spec: GenerationSpec, chat: Conversation) -> Job:
    warnings = list(spec.warnings)
    view = view_of(service, spec)
    must_fit = spec.fields.truncate_prompt_tokens is None and view.window is None
    (whole, ends, render), tools = await chat_prompt(service, chat, warnings, must_fit=must_fit)
    prompt = truncated(service.client.info.max_len(view), spec, whole)
    caching = caching_of(chat.caching, ends, len(whole) - len(prompt), warnings)
    params = await _sampling(service, spec, [prompt], [chat.path], warnings)
    output = parser_options(service, chat, tools, prompt)
    grammar, relaxed = await chat_grammar(service, spec, chat, tools, output, prompt)
    predicted = await _predicted_tokens(service, spec)
    drafts = service.config.scheduler.drafting.kind(service.client.info.device)
    if predicted and drafts == "none":
        warnings.append(ignored("prediction", "this server makes no drafts (--speculation)"))
    elif predicted and spec.fields.speculation is False:
        warnings.append(ignored("prediction", "speculation is false"))
    job = _job(service, spec, [prompt], params, grammar, warnings + relaxed)
    if predicted:
        requests = (replace(one, prediction_token_ids=predicted) for one in job.requests)
        job = replace(job, requests=tuple(requests))
    if caching is not None:
        job = replace(job, caching=caching, requests=tuple(map(caching.applied_to, job.requests)))
    if output is not None and output.syntax.has_special_marks:
        job = replace(job, output=replace(job.output, skip_special_tokens=False))
    return replace(job, parser_options=output, render=render)


async def _predicted_tokens(service: Service, spec: GenerationSpec) -> tuple[int, ...]:
    """Return the tokens of the text that the answer is expected to repeat. Raises `ApiError`."""
    texts = [spec.prediction] if spec.prediction else []
    encoded = await tokens_of(
        service, texts, add_special_tokens=False, field="prediction", must_fit=True
    )
    # An answer has no room for more.
    return tuple(encoded[0][: service.client.info.max_model_len]) if encoded else ()


async def _text_job(service: Service, spec: GenerationSpec, texts: TextPrompts) -> Job:
    warnings, view = list(spec.warnings), view_of(service, spec)
    encoded = await tokens_of(
        service,
        texts.prompts,
        add_special_tokens=texts.add_special_tokens,
        must_fit=spec.fields.truncate_prompt_tokens is None and view.window is None,
    )
    limit = service.client.info.max_len(view)
    prompts = [truncated(limit, spec, token_ids) for token_ids in encoded]
    paths = [texts.path_of(index) for index in range(len(prompts))]
    params = await _sampling(service, spec, prompts, paths, warnings)
    grammar, relaxed = await text_grammar(service, spec)
    job = _job(service, spec, prompts, params, grammar, warnings + relaxed)
    if not texts.is_echoed:
        return job
    return replace(job, echoes=await echoes(service, spec, texts, prompts))


async def _sampling(
    service: Service,
    spec: GenerationSpec,
    prompts: Sequence[list[int]],
    paths: Sequence[Path],
    warnings: list[Warned],
) -> list[SamplingParams]:
    """Return the parameters of each prompt, which `paths` lead to. Raises `ApiError`."""
    vocab_size = service.client.info.vocab_size
    bad_words = await bad_word_tokens(service, spec.fields.bad_words or ())
    params = []
    for prompt, path in zip(prompts, paths, strict=True):
        if not prompt and isinstance(spec.prompt, TextPrompts):
            raise invalid(f"{dotted(path)} must not be empty", path)
        max_tokens = _max_tokens(service, spec, len(prompt), path, warnings)
        params.append(sampling_of(service, spec, max_tokens=max_tokens, bad_words=bad_words))
        # No request to the engine holds a token that the model does not have.
        require_tokens(prompt, vocab_size, path)
    for word in bad_words:
        require_tokens(word, vocab_size, ("bad_words",))
    return params


def _max_tokens(
    service: Service, spec: GenerationSpec, num_prompt: int, path: Path, warnings: list[Warned]
) -> int:
    """Return the limit of generated tokens; raise `ApiError` if they do not fit."""
    info = service.client.info
    limit, code = info.max_len(view_of(service, spec)), "context_length_exceeded"
    room, known, wanted = limit - num_prompt, context_words(limit), spec.fields.max_tokens
    if room <= 0:
        raise invalid(f"{known}: {dotted(path)} has {num_prompt}", path, code)
    if wanted is None:
        is_text = isinstance(spec.prompt, TextPrompts)
        # A bounded view has room for many more, but an answer may never end by itself.
        return min(DEFAULT_COMPLETION_TOKENS if is_text else info.max_model_len, room)
    if wanted <= room:
        return wanted
    name = dotted(spec.max_tokens_path)
    if not spec.cuts_max_tokens:
        message = f"{known}: {dotted(path)} has {num_prompt} and {name} is {wanted}"
        raise invalid(message, spec.max_tokens_path, code)
    warnings.append(warning(name, f"was cut to {room}: the context has room for no more"))
    return room


def _job(
    service: Service,
    spec: GenerationSpec,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    grammar: str | None,
    warnings: list[Warned],
) -> Job:
    """Return the job for `prompts` with the `params` of each. Raises `ApiError`."""
    first = params[0]
    ends = set(first.stop_token_ids)
    if not first.ignore_eos:
        ends.update(service.client.info.eos_token_ids)
    if first.prompt_logprobs is not None:
        require_few(spec, prompts, first.prompt_logprobs)
    view, selection = view_of(service, spec), selection_of(service, spec)
    has_usage_chunk = service.config.server.force_include_usage or spec.has_usage_chunk
    return Job(
        spec=replace(spec, warnings=tuple(warnings), has_usage_chunk=has_usage_chunk),
        requests=tuple(
            GenerateRequest(
                prompt,
                # The first of a prompt's tries has the given seed.
                replace(
                    own, grammar=grammar, seed=splitmix64(own.seed, index) if index else own.seed
                ),
                spec.fields.priority or 0,
                spec.fields.cache_salt or "",
                may_speculate=spec.fields.speculation is not False,
                view=view,
                selection=selection,
            )
            for prompt, own in zip(map(tuple, prompts), params, strict=True)
            for index in range(spec.num_tries)
        ),
        output=OutputOptions(
            stops=tuple(spec.fields.stop or ()),
            include_stop=spec.fields.include_stop_str_in_output is True,
            skip_special_tokens=spec.fields.skip_special_tokens is not False,
            end_token_ids=frozenset(ends),
            min_tokens=first.min_tokens,
            continues=isinstance(spec.prompt, TextPrompts) or spec.prompt.continues_last,
        ),
        created_s=int(service.clock.wall_s()),
    )
