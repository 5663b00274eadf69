"""The comparison of a request with an earlier one of the same owner, beside its preparation.

Knows nothing of how the digests are made, nor of the vendors' words for the result.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from server.generation.fingerprints import NOT_FOUND, Fingerprints, compare, fingerprint_of
from server.generation.generate import Job
from server.http.context import RequestRecord
from server.service import Service


async def compared_job(
    service: Service,
    fingerprints: Fingerprints,
    record: RequestRecord,
    prepare: Callable[[], Awaitable[Job]],
    *,
    answer_id: str,
    previous_id: str | None,
) -> Job:
    """Return the prepared job, its prompt compared with that of an earlier answer of the owner.

    `record` gets the comparison. The fingerprint of the request is kept for later ones. Raises as
    `prepare` does.
    """
    job = await prepare()
    spec, token_ids = job.spec, job.requests[0].prompt_token_ids
    new = await service.work.run(lambda _: fingerprint_of(spec, token_ids), spec.num_bytes)
    now_s = service.clock.monotonic_s()
    if previous_id is not None:
        old = fingerprints.get(record.owner, previous_id, now_s)
        record.comparison = NOT_FOUND if old is None else compare(spec, new, old)
    fingerprints.put(record.owner, answer_id, new, now_s)
    return job
