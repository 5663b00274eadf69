"""One understood request, run: the engine's deltas become pieces, and what happened is noted.

Knows nothing of JSON or of how pieces are sent.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from scheduler.client import (
    Delta,
    EngineError,
    EngineFaultError,
    FinishReason,
    GenerateRequest,
    RequestRefusedError,
)
from server.context import RequestRecord
from server.errors import ApiError, from_engine, unavailable
from server.logs import milliseconds
from server.output import OutputOptions, OutputText, Piece
from server.params import Warned
from server.service import Service
from server.tooling import Spoken


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
    spoken: Spoken | None = None
    #: From the request's arrival; None: as long as it takes.
    timeout_s: float | None = None

    def read_as(self, spoken: Spoken | None) -> Job:
        """Return this job with its output read for reasoning and calls."""
        if spoken is None or not spoken.speech.has_special_marks:
            return replace(self, spoken=spoken)
        return replace(self, spoken=spoken, output=replace(self.output, skip_special_tokens=False))

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
) -> AsyncGenerator[Piece, None]:
    """Yield pieces of one of the job's requests, up to the one with a `finish_reason`.

    Closing it cancels the request. Raises `ApiError`. Whatever the end, `record` and the metrics
    tell it, once.
    """
    output = OutputText(service.text.tokenizer, job.output)
    pieces = service.text.tokenizer.pieces(skip_special_tokens=job.output.skip_special_tokens)
    reasoning = None if job.spoken is None else job.spoken.counter(pieces)
    record.finish_reason = "abort"
    try:
        # The length first: so no salt of a client's makes two keys' namespaces equal.
        key, request = record.namespace, job.requests[index]
        request = replace(request, namespace=f"{len(key)}:{key}{request.namespace}")
        async with aclosing(service.client.generate(request)) as deltas:
            async for delta in deltas:
                _require_sound(delta)
                piece = output.push(delta)
                if delta.prompt_logprobs:
                    piece = replace(piece, prompt_logprobs=delta.prompt_logprobs)
                _note(service, record, delta, piece)
                if reasoning is not None:
                    record.reasoning_tokens = reasoning.count(
                        piece.token_ids, is_last=piece.finish_reason is not None
                    )
                yield piece
                if piece.finish_reason is not None:
                    break
        _require_reason(record)
    except RequestRefusedError as error:
        record.finish_reason = ""
        raise from_engine(error, service.pace.retry_after_s(record.whose)) from error
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


def usage(record: RequestRecord) -> dict[str, Any]:
    """Return OpenAI's `usage`."""
    told: dict[str, Any] = {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.output_tokens,
        "total_tokens": record.prompt_tokens + record.output_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
    }
    if record.reasoning_tokens is not None:
        told["completion_tokens_details"] = {"reasoning_tokens": record.reasoning_tokens}
    return told


def usage_so_far(job: Job, record: RequestRecord) -> Callable[[], dict[str, Any]] | None:
    """Return what tells it, if every chunk is to tell it."""
    return (lambda: usage(record)) if job.has_continuous_usage else None


def octavo(job: Job, record: RequestRecord, now_s: float) -> dict[str, Any]:
    """Return our own object of the response: warnings, timings, and what the cache did."""
    decode_s, num_decoded = record.decode_s, record.output_tokens - len(job.requests)
    return {
        "warnings": list(job.warnings),
        "timings": {
            "queue_ms": milliseconds(record.queue_s),
            "ttft_ms": milliseconds(record.ttft_s),
            "total_ms": milliseconds(now_s - record.arrived_at_s),
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


def _note(service: Service, record: RequestRecord, delta: Delta, piece: Piece) -> None:
    started = delta.started
    if started is not None:
        record.queue_s = started.queue_s
        record.cached_tokens = started.cached_tokens
        record.miss_reason = started.miss_reason
        service.metrics.on_started(record)
        service.pace.note_started()
    if piece.num_tokens:
        now_s = service.clock.monotonic_s()
        last_s = record.last_token_at_s
        record.last_token_at_s = now_s
        record.output_tokens += piece.num_tokens
        if last_s is None:
            record.first_token_at_s = now_s
            service.metrics.on_first_token(record)
        since_last_s = None if last_s is None else now_s - last_s
        service.metrics.on_tokens(piece.num_tokens, since_last_s)
    if piece.finish_reason is not None:
        record.finish_reason = piece.finish_reason
        record.stop_text = piece.stop_text
