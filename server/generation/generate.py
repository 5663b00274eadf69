"""Runs one engine request: its deltas become output chunks, and the record is kept up to date.

Knows nothing of JSON or of how chunks are sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from scheduler.client import (
    EngineError,
    EngineFaultError,
    FinishReason,
    GenerateRequest,
    RequestRefusedError,
    TokenOutput,
)
from server.answer_types import CacheReport, CompletionTokensDetails, Octavo, Usage
from server.generation.cache_report import cache_report
from server.generation.caching import Caching, pin_warnings
from server.generation.generation_spec import TextPrompts
from server.generation.kv_keys import dropped_tokens, report_of
from server.generation.output import OutputChunk, OutputOptions, OutputText
from server.generation.prompt_places import Render, path_at
from server.generation.reasoning import ReasoningCounter
from server.generation.request_fields import GenerationSpec
from server.generation.tooling import ParserOptions
from server.http.context import RequestRecord
from server.http.errors import ApiError, Path, from_engine, unavailable
from server.logs import milliseconds
from server.service import Service

#: Behind so many tokens the message that diverged is not searched for: it takes milliseconds.
_MAX_PLACED_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class Job:
    """A request that the model can serve, with its requests to the engine."""

    #: With all warnings.
    spec: GenerationSpec
    #: Prompt by prompt, `spec.num_tries` each.
    requests: tuple[GenerateRequest, ...]
    output: OutputOptions
    #: By the wall clock: `created` in responses.
    created_s: int
    #: Prompt by prompt; empty where they are not repeated.
    echoes: tuple[str, ...] = ()
    #: None: the output is plain text.
    parser_options: ParserOptions | None = None
    #: None: the request has no fields for it.
    caching: Caching | None = None
    #: Of a chat, to find the message that a place in its prompt belongs to.
    render: Render | None = None

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The prompts' tokens, each prompt once."""
        return [request.prompt_token_ids for request in self.requests[:: self.spec.num_tries]]

    @property
    def has_logprobs(self) -> bool:
        """Whether the client requested log-probabilities; we also rank tries by them."""
        return self.spec.logprobs is not None


async def generate(
    service: Service, job: Job, index: int, record: RequestRecord
) -> AsyncGenerator[OutputChunk, None]:
    """Yield chunks of one of the job's requests, up to the one with a `finish_reason`.

    Closing it cancels the request. Raises `ApiError`. However it ends, `record` and the metrics
    report it once.
    """
    output, reasoning = OutputText(service.text.tokenizer, job.output), _reasoning(service, job)
    record.finish_reason = "abort"
    try:
        key, request = record.namespace, job.requests[index]
        namespace = namespace_of(key, request.namespace)
        request = replace(request, namespace=namespace, owner=record.owner)
        async with aclosing(service.client.generate(request)) as deltas:
            async for delta in deltas:
                _require_sound(delta)
                chunk = output.push(delta)
                _note(service, job, record, chunk)
                record.dropped_tokens = dropped_tokens(request, record.output_tokens)
                if reasoning is not None:
                    record.reasoning_tokens = reasoning.count(
                        chunk.delta.token_ids, is_last=chunk.finish_reason is not None
                    )
                yield chunk
                if chunk.finish_reason is not None:
                    break
        _require_reason(record)
    except RequestRefusedError as error:
        record.finish_reason = ""
        raise from_engine(error, service.reservations.retry_after_s(record.whose)) from error
    except EngineError as error:
        record.finish_reason = "error"
        raise from_engine(error) from error
    except ApiError:
        raise
    except Exception:
        record.finish_reason = "error"
        raise
    finally:
        if record.finish_reason:
            service.metrics.on_finished(record, service.clock.monotonic_s(), job.requests[index])


def namespace_of(key: str, salt: str) -> str:
    """Return the namespace of an API key's namespace and a salt.

    The length first: so no salt of a client's makes two keys' namespaces equal.
    """
    return f"{len(key)}:{key}{salt}"


def _reasoning(service: Service, job: Job) -> ReasoningCounter | None:
    """Return a counter of reasoning tokens; None: the model does not reason."""
    syntax = None if job.parser_options is None else job.parser_options.syntax
    if syntax is None or syntax.tags is None:
        return None
    skips = job.output.skip_special_tokens
    token_bytes = service.text.tokenizer.bytes_by_id(skip_special_tokens=skips)
    return ReasoningCounter(token_bytes, syntax.tags, is_thinking=syntax.is_thinking)


def usage(record: RequestRecord) -> Usage:
    """Return OpenAI's `usage`."""
    report: Usage = {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.output_tokens,
        "total_tokens": record.prompt_tokens + record.output_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }
    if record.written_tokens is not None:
        written_tokens = sum(record.written_tokens.values())
        report["prompt_tokens_details"]["cache_write_tokens"] = written_tokens
    details: CompletionTokensDetails = {}
    if record.reasoning_tokens is not None:
        details["reasoning_tokens"] = record.reasoning_tokens
    if record.draft_tokens:
        rejected_tokens = record.draft_tokens - record.accepted_draft_tokens
        details["accepted_prediction_tokens"] = record.accepted_draft_tokens
        details["rejected_prediction_tokens"] = rejected_tokens
    if details:
        report["completion_tokens_details"] = details
    return report


def octavo(service: Service, job: Job, record: RequestRecord, now_s: float) -> Octavo:
    """Return our own object of the response: warnings, timings and cache hits."""
    decode_s, num_decoded = record.decode_s, record.output_tokens - len(job.requests)
    report: Octavo = {
        "warnings": [*job.spec.warnings, *pin_warnings(job.caching, record)],
        "timings": {
            "queue_ms": milliseconds(record.queue_s),
            "ttft_ms": milliseconds(record.ttft_s),
            "total_ms": milliseconds(now_s - record.arrived_at_s) or 0.0,
            "decode_tokens_per_s": round(num_decoded / decode_s, 2) if decode_s else None,
        },
        "cache": _cache(service, job, record),
    }
    if record.draft_tokens:
        report["speculation"] = {
            "offered": record.draft_tokens,
            "accepted": record.accepted_draft_tokens,
        }
    keys = report_of(job.requests, record.output_tokens, record.dropped_tokens)
    if keys is not None:
        report["kv"] = keys
    return report


def _require_sound(delta: TokenOutput) -> None:
    if delta.finish_reason is FinishReason.ABORT:
        raise unavailable("the engine was stopped and ended this request")
    if delta.finish_reason is FinishReason.ERROR:
        raise EngineFaultError("the engine failed on this request")


def _require_reason(record: RequestRecord) -> None:
    if record.finish_reason == "abort":
        raise EngineFaultError("the engine's stream ended without a reason")


def _note(service: Service, job: Job, record: RequestRecord, chunk: OutputChunk) -> None:
    started = chunk.delta.started
    if started is not None:
        record.queue_s = started.queue_s
        record.cached_tokens = started.cached_tokens
        record.story = started.story
        if job.caching is not None:
            record.written_tokens = job.caching.written_tokens(started.cached_tokens)
        service.metrics.on_started(record)
        service.reservations.note_started()
    if pinned := chunk.delta.pinned:
        record.num_refused_pins = pinned.num_refused
        record.num_displaced_pins = pinned.num_displaced
    if num_tokens := len(chunk.delta.token_ids):
        now_s = service.clock.monotonic_s()
        last_s = record.last_token_at_s
        record.last_token_at_s = now_s
        record.output_tokens += num_tokens
        if last_s is None:
            record.first_token_at_s = now_s
            service.metrics.on_first_token(record)
        since_last_s = None if last_s is None else now_s - last_s
        service.metrics.on_tokens(num_tokens, since_last_s)
    record.draft_tokens += chunk.delta.draft_tokens
    record.accepted_draft_tokens += chunk.delta.accepted_draft_tokens
    if chunk.finish_reason is not None:
        record.finish_reason = chunk.finish_reason
        record.stop_text = chunk.stop_text


def _cache(service: Service, job: Job, record: RequestRecord) -> CacheReport:
    """Return the report of the first prompt's reuse, and of the comparison with another request."""
    prompt, tokenizer = job.requests[0].prompt_token_ids, service.text.tokenizer
    report = cache_report(tokenizer, record.story, prompt, partial(_path_at, service, job))
    report["reused_tokens"] = record.cached_tokens
    if record.queue_s is None:
        report["miss_reason"] = None
    if record.comparison is not None:
        report["compared"] = record.comparison
    return report


def _path_at(service: Service, job: Job, token: int) -> Path:
    """Return the field that has a token of the first prompt."""
    asked, prompt = job.spec.prompt, job.requests[0].prompt_token_ids
    if isinstance(asked, TextPrompts):
        return asked.path_of(0)
    if job.render is None or token > _MAX_PLACED_TOKENS:
        return asked.path
    head = service.text.tokenizer.decode(prompt[:token], skip_special_tokens=False)
    # Its last character may be cut.
    return path_at(asked, job.render, head.rstrip("\ufffd"))
