"""The choices of one request: several engine requests, read together and told as one.

Knows nothing of JSON, and of one engine request only that `server/generation/generate.py` runs it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from scheduler.client import SamplingParams
from server.generation.generate import Job, generate
from server.generation.merge_streams import merge_streams
from server.generation.output import OutputChunk
from server.http.context import RequestRecord
from server.service import Service

_WORD = 2**64 - 1


async def generate_choices(
    service: Service, job: Job, record: RequestRecord
) -> AsyncGenerator[Sequence[tuple[int, OutputChunk]], None]:
    """Yield what became known since the last time: (index of the engine request, chunk).

    Raises as `generate` does: the first error of any choice ends them all. Closing it cancels all.
    `record` tells of the whole request; the metrics are told of each choice.
    """
    record.model = service.model_name
    record.prompt_tokens = sum(map(len, job.prompts))
    if len(job.requests) == 1:
        try:
            async with aclosing(generate(service, job, 0, record)) as chunks:
                async for chunk in chunks:
                    yield ((0, chunk),)
        finally:
            service.metrics.on_answered([record])
        return
    records = [_record_of_choice(job, index, record) for index in range(len(job.requests))]
    sources = [generate(service, job, index, own) for index, own in enumerate(records)]
    try:
        async with aclosing(merge_streams(sources)) as batches:
            async for batch in batches:
                _sum_up(record, records, job.num_tries)
                yield batch
    finally:
        _sum_up(record, records, job.num_tries)
        for first in range(0, len(records), job.num_tries):
            service.metrics.on_answered(records[first : first + job.num_tries])


def best(job: Job, answers: Sequence[OutputChunk]) -> list[OutputChunk]:
    """Return the answers that are given, prompt by prompt: of more tries, the likeliest."""
    if job.num_tries == job.num_choices:
        return list(answers)
    chosen: list[OutputChunk] = []
    for first in range(0, len(answers), job.num_tries):
        tries = answers[first : first + job.num_tries]
        chosen += sorted(tries, key=_mean_logprob, reverse=True)[: job.num_choices]
    return chosen


def params_of_try(params: SamplingParams, index: int) -> SamplingParams:
    """Return the parameters of a prompt's answer number `index`: the first has the given seed."""
    return replace(params, seed=_mixed(params.seed, index)) if index else params


def _mixed(seed: int, index: int) -> int:
    """Return a seed unlike that of any neighbour (SplitMix64; Steele, Lea and Flood 2014)."""
    state = (seed + index * 0x9E3779B97F4A7C15) & _WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
    return state ^ (state >> 31)


def _mean_logprob(answer: OutputChunk) -> float:
    logprobs = [token.logprobs.logprob for token in answer.tokens]
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


def _record_of_choice(job: Job, index: int, record: RequestRecord) -> RequestRecord:
    """Return a record for one choice: the first of each prompt counts the prompt."""
    is_first = index % job.num_tries == 0
    num_prompt = len(job.requests[index].prompt_token_ids) if is_first else 0
    return replace(record, prompt_tokens=num_prompt)


def _sum_up(record: RequestRecord, records: Sequence[RequestRecord], num_tries: int) -> None:
    """Tell in `record` what is known of the choices' `records` by now.

    Of one prompt's choices, all but the first to run find it cached by that very one: what was
    cached for the request is what the one with the least found.
    """
    leaders = [
        _leader(records[first : first + num_tries]) for first in range(0, len(records), num_tries)
    ]
    record.cached_tokens = sum(own.cached_tokens for own in leaders)
    record.miss_reason = leaders[0].miss_reason
    record.output_tokens = sum(own.output_tokens for own in records)
    counts = [own.reasoning_tokens for own in records if own.reasoning_tokens is not None]
    record.reasoning_tokens = sum(counts) if counts else None
    record.queue_s = min((own.queue_s for own in records if own.queue_s is not None), default=None)
    first_s = [own.first_token_at_s for own in records if own.first_token_at_s is not None]
    last_s = [own.last_token_at_s for own in records if own.last_token_at_s is not None]
    record.first_token_at_s = min(first_s, default=None)
    record.last_token_at_s = max(last_s, default=None)
    reasons = [own.finish_reason for own in records]
    # One that the engine refused has none; then the request never ran as a whole.
    record.finish_reason = next(
        (worst for worst in ("", "error", "abort") if worst in reasons), reasons[0]
    )


def _leader(records: Sequence[RequestRecord]) -> RequestRecord:
    """Return the one that found least of its prompt in the cache, of those that run."""
    started = [own for own in records if own.queue_s is not None]
    return min(started or records, key=lambda own: own.cached_tokens)
