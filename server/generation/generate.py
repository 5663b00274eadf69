"""Run one request: the engine's deltas become output chunks, and the record is kept up to date.

Knows nothing of JSON or of how chunks are sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from scheduler.client import (
    Delta,
    EngineError,
    EngineFaultError,
    FinishReason,
    GenerateRequest,
    RequestRefusedError,
)
from server.answer_types import Octavo, Usage
from server.generation.output import OutputChunk, OutputOptions, OutputText
from server.generation.params import Warned
from server.generation.tooling import ParserOptions
from server.http.context import RequestRecord
from server.http.errors import ApiError, from_engine, unavailable
from server.logs import milliseconds
from server.service import Service


@dataclass(frozen=True, slots=True)
class Job:
    """What the engine is asked, and what its answer becomes."""

    #: Prompt by prompt, `num_tries` each.
    requests: tuple[GenerateRequest, ...]
    output: OutputOptions
    #: By the wall clock: what responses call `created`.
    created_s: int
    warnings: tuple[Warned, ...] = ()
    is_stream: bool = False
    has_usage_chunk: bool = False
    #: Every chunk tells the usage so far.
    has_continuous_usage: bool = False
    #: Not only wanted by us, to rank the tries.
    has_logprobs: bool = False
    has_token_ids: bool = False
    #: Answers given to each prompt, and those generated to choose them from.
    num_choices: int = 1
    num_tries: int = 1
    #: Prompt by prompt; empty where they are not repeated.
    echoes: tuple[str, ...] = ()
    #: Others told beside each token of the prompt, in `prompt_logprobs`; None: it is not asked for.
    num_prompt_logprobs: int | None = None
    #: None: the output is plain text.
    parser_options: ParserOptions | None = None
    #: From the request's arrival; None: as long as it takes.
    timeout_s: float | None = None

    def read_as(self, parser_options: ParserOptions | None) -> Job:
        """Return this job with its output read for reasoning and calls."""
        if parser_options is None or not parser_options.syntax.has_special_marks:
            return replace(self, parser_options=parser_options)
        return replace(
            self,
            parser_options=parser_options,
            output=replace(self.output, skip_special_tokens=False),
        )

    @property
    def prompts(self) -> list[tuple[int, ...]]:
        """The prompts' tokens, each prompt once."""
        return [request.prompt_token_ids for request in self.requests[:: self.num_tries]]

    @property
    def num_answers(self) -> int:
        """The choices of the response."""
        return len(self.requests) // self.num_tries * self.num_choices


async def generate(
    service: Service, job: Job, index: int, record: RequestRecord
) -> AsyncGenerator[OutputChunk, None]:
    """Yield chunks of one of the job's requests, up to the one with a `finish_reason`.

    Closing it cancels the request. Raises `ApiError`. Whatever the end, `record` and the metrics
    tell it, once.
    """
    output = OutputText(service.text.tokenizer, job.output)
    token_bytes = service.text.tokenizer.bytes_by_id(
        skip_special_tokens=job.output.skip_special_tokens
    )
    reasoning = None if job.parser_options is None else job.parser_options.counter(token_bytes)
    record.finish_reason = "abort"
    try:
        # The length first: so no salt of a client's makes two keys' namespaces equal.
        key, request = record.namespace, job.requests[index]
        request = replace(request, namespace=f"{len(key)}:{key}{request.namespace}")
        async with aclosing(service.client.generate(request)) as deltas:
            async for delta in deltas:
                _require_sound(delta)
                chunk = output.push(delta)
                _note(service, record, delta, chunk)
                if reasoning is not None:
                    record.reasoning_tokens = reasoning.count(
                        chunk.token_ids, is_last=chunk.finish_reason is not None
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


def usage(record: RequestRecord) -> Usage:
    """Return OpenAI's `usage`."""
    report: Usage = {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.output_tokens,
        "total_tokens": record.prompt_tokens + record.output_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }
    if record.reasoning_tokens is not None:
        report["completion_tokens_details"] = {"reasoning_tokens": record.reasoning_tokens}
    return report


def usage_so_far(job: Job, record: RequestRecord) -> Callable[[], Usage] | None:
    """Return a function for the usage of each chunk; None: chunks have no usage."""
    return (lambda: usage(record)) if job.has_continuous_usage else None


def octavo(job: Job, record: RequestRecord, now_s: float) -> Octavo:
    """Return our own object of the response: warnings, timings, and what the cache did."""
    decode_s, num_decoded = record.decode_s, record.output_tokens - len(job.requests)
    return {
        "warnings": list(job.warnings),
        "timings": {
            "queue_ms": milliseconds(record.queue_s),
            "ttft_ms": milliseconds(record.ttft_s),
            "total_ms": milliseconds(now_s - record.arrived_at_s) or 0.0,
            "decode_tokens_per_s": round(num_decoded / decode_s, 2) if decode_s else None,
        },
        "cache": {"reused_tokens": record.cached_tokens, "miss_reason": record.miss_reason or None},
    }


def _require_sound(delta: Delta) -> None:
    if delta.finish_reason is FinishReason.ABORT:
        raise unavailable("the engine was stopped and ended this request")
    if delta.finish_reason is FinishReason.ERROR:
        raise EngineFaultError("the engine failed on this request")


def _require_reason(record: RequestRecord) -> None:
    if record.finish_reason == "abort":
        raise EngineFaultError("the engine's stream ended without a reason")


def _note(service: Service, record: RequestRecord, delta: Delta, chunk: OutputChunk) -> None:
    started = delta.started
    if started is not None:
        record.queue_s = started.queue_s
        record.cached_tokens = started.cached_tokens
        record.miss_reason = started.miss_reason
        service.metrics.on_started(record)
        service.reservations.note_started()
    if num_tokens := len(chunk.token_ids):
        now_s = service.clock.monotonic_s()
        last_s = record.last_token_at_s
        record.last_token_at_s = now_s
        record.output_tokens += num_tokens
        if last_s is None:
            record.first_token_at_s = now_s
            service.metrics.on_first_token(record)
        since_last_s = None if last_s is None else now_s - last_s
        service.metrics.on_tokens(num_tokens, since_last_s)
    if chunk.finish_reason is not None:
        record.finish_reason = chunk.finish_reason
        record.stop_text = chunk.stop_text
