"""Faulty rows and killed engines at once: exactly the faulty requests end in an error."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from functools import partial

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner, Fault, FaultKind, fake_output
from model.interface import SamplingParams
from scheduler.client import EngineFaultError, GenerateRequest
from scheduler.process import ProcessClient
from waiting import TIMEOUT_S

_VOCAB = 500
_CONFIG = SchedulerSection(max_num_seqs=32, max_num_batched_tokens=256)


def _requests(num_requests: int) -> tuple[list[GenerateRequest], dict[int, Fault]]:
    """Return requests whose prompts share beginnings; one in fifty fails at some token."""
    rng = random.Random(9)
    requests, faults = [], {}
    for seed in range(num_requests):
        stem = tuple(range(1, 1 + rng.choice((4, 9, 17))))
        prompt = (*stem, 20 + seed % 400, 1 + seed // 400)
        num_tokens = rng.randrange(8, 40)
        params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, seed=seed)
        requests.append(GenerateRequest(prompt, params))
        if seed % 50 == 17:
            position = rng.randrange(len(stem), len(prompt) + num_tokens - 1)
            faults[seed] = Fault(rng.choice(list(FaultKind)), position)
    return requests, faults


@pytest.mark.parametrize("max_steps_in_flight", [1, 2])
@pytest.mark.parametrize("num_requests", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_faults_and_kills_end_exactly_the_faulty(
    num_requests: int, max_steps_in_flight: int
) -> None:
    requests, faults = _requests(num_requests)
    runner = partial(
        FakeRunner,
        faults=faults,
        max_steps_in_flight=max_steps_in_flight,
        num_pages=400,
        vocab_size=_VOCAB,
    )
    failed: set[int] = set()
    texts: dict[int, list[int]] = {}

    async def ask(client: ProcessClient, gate: asyncio.Semaphore, request: GenerateRequest) -> None:
        seed, tokens = request.params.seed, list[int]()
        async with gate:
            while not client.is_alive:  # noqa: ASYNC110 - as a client that gets a 503
                await asyncio.sleep(0.005)
            try:
                async for delta in client.generate(request):
                    tokens += delta.token_ids
            except EngineFaultError:
                failed.add(seed)
        texts[seed] = tokens

    async def kill(client: ProcessClient) -> None:
        """Kill two engines in a row, a few times, in any state."""
        for number, share in enumerate((0.2, 0.25, 0.6, 0.65)):
            while (  # noqa: ASYNC110 - polls the life of processes
                len(texts) < share * num_requests
                or client.num_restarts < number
                or not client.is_alive
            ):
                await asyncio.sleep(0.005)
            assert client.engine_pid is not None
            os.kill(client.engine_pid, signal.SIGKILL)

    async def test() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            client = ProcessClient(runner, _CONFIG)
            await client.start()
            gate = asyncio.Semaphore(32)
            try:
                killer = asyncio.create_task(kill(client))
                await asyncio.gather(*(ask(client, gate, request) for request in requests))
                await killer
                client.check()
                assert client.num_restarts == 4
            finally:
                await client.close()

    asyncio.run(test())
    assert failed == faults.keys()
    for seed, request in enumerate(requests):
        wanted = fake_output(request.prompt_token_ids, request.params.max_tokens, _VOCAB)
        assert texts[seed] == (wanted[: len(texts[seed])] if seed in failed else wanted)
