"""The choices of one request: several engine requests, read together and reported as one.

Knows nothing of JSON, and of one engine request only that `server/generation/generate.py` runs it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

from scheduler.cache_story import summed_story
from server.generation.generate import Job, generate
from server.generation.generation_spec import Conversation
from server.generation.merge_streams import merge_streams
from server.generation.output import OutputChunk
from server.http.context import RequestRecord
from server.service import Service


async def generate_choices(
    service: Service, job: Job, record: RequestRecord
) -> AsyncGenerator[Sequence[tuple[int, OutputChunk]], None]:
    """Yield the chunks since the last batch: (index of the engine request, chunk).

    Raises as `generate` does: the first error of any choice ends them all. Closing it cancels all.
    `record` has the data of the whole request; the metrics count each choice.
    """
    record.model = service.model_name
    record.prompt_tokens = sum(map(len, job.prompts))
    if isinstance(job.spec.prompt, Conversation):
        record.cache_key = job.spec.prompt.caching.key
    if len(job.requests) == 1:
        try:
            async with aclosing(generate(service, job, 0, record)) as chunks:
                async for chunk in chunks:
                    yield ((0, chunk),)
        finally:
            service.metrics.on_answered([record])
        return
    # The first choice of each prompt counts the prompt.
    records = [
        replace(
            record, prompt_tokens=0 if index % job.spec.num_tries else len(request.prompt_token_ids)
        )
        for index, request in enumerate(job.requests)
    ]
    sources = [generate(service, job, index, own) for index, own in enumerate(records)]
    try:
        async with aclosing(merge_streams(sources)) as batches:
            async for batch in batches:
                _sum_up(record, records, job.spec.num_tries)
                yield batch
    finally:
        _sum_up(record, records, job.spec.num_tries)
        for first in range(0, len(records), job.spec.num_tries):
            service.metrics.on_answered(records[first : first + job.spec.num_tries])


def best(job: Job, answers: Sequence[OutputChunk]) -> list[OutputChunk]:
    """Return the answers to send, prompt by prompt: the likeliest where there are more tries."""
    if job.spec.num_tries == job.spec.num_choices:
        return list(answers)
    chosen: list[OutputChunk] = []
    for first in range(0, len(answers), job.spec.num_tries):
        tries = answers[first : first + job.spec.num_tries]
        chosen += sorted(tries, key=_mean_logprob, reverse=True)[: job.spec.num_choices]
    return chosen


def _mean_logprob(answer: OutputChunk) -> float:
    logprobs = [token.logprobs.logprob for token in answer.tokens]
    return sum(logprobs) / len(logprobs) if logprobs else float("-inf")


def _sum_up(record: RequestRecord, records: Sequence[RequestRecord], num_tries: int) -> None:
    """Sum up the choices' `records` in `record`.

    The first choice of a prompt puts it into the cache, where the others find it. So the number of
    cached tokens is that of the choice with the fewest.
    """
    leaders = [
        _leader(records[first : first + num_tries]) for first in range(0, len(records), num_tries)
    ]
    record.cached_tokens = sum(own.cached_tokens for own in leaders)
    record.story = summed_story([own.story for own in leaders])
    record.written_tokens = leaders[0].written_tokens
    record.num_refused_pins = max(own.num_refused_pins for own in records)
    record.num_displaced_pins = max(own.num_displaced_pins for own in records)
    record.output_tokens = sum(own.output_tokens for own in records)
    record.draft_tokens = sum(own.draft_tokens for own in records)
    record.accepted_draft_tokens = sum(own.accepted_draft_tokens for own in records)
    record.dropped_tokens = sum(own.dropped_tokens for own in records)
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
    """Return the running choice with the fewest cached tokens."""
    started = [own for own in records if own.queue_s is not None]
    return min(started or records, key=lambda own: own.cached_tokens)
