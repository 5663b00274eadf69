"""One contract over both clients: the engine in this process and the one in its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from inline_client import InlineClient

from configs.schema import SchedulerSection
from model.fake import FakeRunner, Fault, FaultKind, fake_logprobs, fake_output
from model.interface import ModelRunner, SamplingParams
from scheduler.client import (
    CacheStory,
    EngineClient,
    EngineFaultError,
    EngineUnavailableError,
    ExplainPrefix,
    GenerateRequest,
    PinPrefix,
    RejectKind,
    RequestRefusedError,
    UnpinPrefix,
)
from scheduler.process import ProcessClient
from waiting import TIMEOUT_S

MakeClient = Callable[..., EngineClient]
_CONFIG = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=32, debug=True)


def _inline(make_runner: Callable[[], ModelRunner], config: SchedulerSection) -> EngineClient:
    return InlineClient(make_runner(), config, time.monotonic)


def _overlapped(make_runner: Callable[[], FakeRunner], config: SchedulerSection) -> EngineClient:
    runner = make_runner()
    runner.max_steps_in_flight = 2
    return InlineClient(runner, config, time.monotonic)


@pytest.fixture(params=["inline", "overlapped", "process"])
def make_client(request: pytest.FixtureRequest) -> MakeClient:
    return {"inline": _inline, "overlapped": _overlapped, "process": ProcessClient}[request.param]


def _request(prompt: tuple[int, ...], max_tokens: int = 10, **params: Any) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True, **params)
    return GenerateRequest(prompt, sampling)


async def _collect(client: EngineClient, request: GenerateRequest) -> list[int]:
    return [token async for delta in client.generate(request) for token in delta.token_ids]


@asynccontextmanager
async def _running(client: EngineClient) -> AsyncIterator[EngineClient]:
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110 - the engine next door sets no event of ours
            await asyncio.sleep(0.001)


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await test()

    asyncio.run(bounded())


def test_streams_side_by_side_each_get_their_own(make_client: MakeClient) -> None:
    async def test() -> None:
        async with _running(make_client(FakeRunner, _CONFIG)) as client:
            assert client.is_alive
            assert client.info.name == "fake"
            sizes: list[int] = []
            client.on_step(sizes.append)
            prompts = [tuple(range(i, i + 9)) for i in range(20)]
            outputs = await asyncio.gather(*(_collect(client, _request(p)) for p in prompts))
            assert outputs == [fake_output(prompt, 10) for prompt in prompts]
            assert sum(sizes) >= 20 * 10
            await _until(lambda: client.stats().scheduler.num_running == 0)
            assert client.stats().cache.pages_private == client.stats().cache.pages_leased == 0
        assert not client.is_alive

    _run(test)


def test_first_delta_tells_of_the_start_and_the_last_of_the_end(make_client: MakeClient) -> None:
    async def test() -> None:
        async with _running(make_client(FakeRunner, _CONFIG)) as client:
            prompt = tuple(range(12))
            for cached in (0, 11):
                deltas = [d async for d in client.generate(_request(prompt, 3, logprobs=0))]
                assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
                assert deltas[-1].finish_reason == "length"
                started = [d.started for d in deltas if d.started]
                assert [s.cached_tokens for s in started] == [cached]
                assert started[0].queue_s >= 0
                logprobs = [logprob for d in deltas for logprob in d.logprobs]
                assert [x.token_id for x in logprobs if x] == fake_output(prompt, 3)

    _run(test)


def test_leaving_the_iterator_cancels(make_client: MakeClient) -> None:
    async def test() -> None:
        async with _running(make_client(FakeRunner, _CONFIG)) as client:
            for _ in range(30):
                stream = client.generate(_request((1, 2, 3), 200))
                await anext(stream)
                await stream.aclose()
            await _until(
                lambda: client.stats().scheduler.num_running + client.stats().num_waiting == 0
            )
            assert client.stats().cache.pages_private == 0

    _run(test)


def test_refusals_reach_their_caller_alone(make_client: MakeClient) -> None:
    async def test() -> None:
        async with _running(make_client(FakeRunner, _CONFIG)) as client:
            good = asyncio.create_task(_collect(client, _request((1, 2, 3))))
            with pytest.raises(RequestRefusedError, match="300 tokens") as refused:
                await _collect(client, _request(tuple(range(300))))
            assert refused.value.kind is RejectKind.INVALID
            assert refused.value.param == "prompt"
            assert await good == fake_output((1, 2, 3), 10)

    _run(test)


def test_a_fault_ends_the_request_that_fails_alone_and_the_engine_lives(
    make_client: MakeClient,
) -> None:
    async def test() -> None:
        runner = partial(FakeRunner, faults={7: Fault(FaultKind.LAUNCH, 5)})
        async with _running(make_client(runner, _CONFIG)) as client:
            innocent = asyncio.create_task(_collect(client, _request((1, 2, 3))))
            guilty = _request((1, 2, 3))
            guilty = replace(guilty, params=replace(guilty.params, seed=7))
            with pytest.raises(EngineFaultError, match="RuntimeError"):
                await _collect(client, guilty)
            assert await innocent == fake_output((1, 2, 3), 10)
            assert await _collect(client, _request((1, 2, 3))) == fake_output((1, 2, 3), 10)

    _run(test)


def test_a_client_that_is_not_running_says_so(make_client: MakeClient) -> None:
    async def test() -> None:
        client = make_client(FakeRunner, _CONFIG)
        with pytest.raises(EngineUnavailableError):
            await _collect(client, _request((1, 2)))
        async with _running(client):
            pass
        with pytest.raises(EngineUnavailableError):
            await _collect(client, _request((1, 2)))

    _run(test)


def test_closing_ends_what_runs_with_an_error(make_client: MakeClient) -> None:
    async def test() -> None:
        async with _running(make_client(FakeRunner, _CONFIG)) as client:
            stream = client.generate(_request((1, 2, 3), 200))
            await anext(stream)
        with pytest.raises(EngineUnavailableError):
            [delta async for delta in stream]

    _run(test)


def test_faults_without_end_end_an_inline_engine() -> None:
    async def test() -> None:
        runner = FakeRunner(faulty_steps=frozenset(range(10)))
        client = InlineClient(runner, _CONFIG, time.monotonic)
        await client.start()
        with pytest.raises(EngineFaultError, match="the engine failed"):
            await _collect(client, _request((1, 2, 3)))
        await _until(lambda: not client.is_alive)
        await client.close()

    _run(test)


def test_an_inline_engine_checks_itself_and_closes_unstarted() -> None:
    async def test() -> None:
        config = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=32)
        async with _running(client := InlineClient(FakeRunner(), config, time.monotonic)):
            assert await _collect(client, _request((1, 2, 3))) == fake_output((1, 2, 3), 10)
            client.check()
        await InlineClient(FakeRunner(), config, time.monotonic).close()

    _run(test)


def test_a_scored_prompt_is_told_whole_before_its_first_token(make_client: MakeClient) -> None:
    async def test() -> None:
        async with _running(make_client(FakeRunner, _CONFIG)) as client:
            prompt = tuple(range(100))
            for max_tokens in (2, 0):
                request = _request(prompt, max_tokens, prompt_logprobs=2)
                first, *others = [delta async for delta in client.generate(request)]
                assert first.prompt_logprobs == tuple(
                    fake_logprobs(prompt[:i], prompt[i], 2) for i in range(1, 100)
                )
                assert not any(delta.prompt_logprobs for delta in others)
                assert bool(first.token_ids) == (max_tokens > 0)

    _run(test)


async def _abandon(client: EngineClient, request: GenerateRequest, before: int) -> None:
    """Leave once the engine has made so many steps more."""
    reading = asyncio.create_task(_collect(client, request))
    await _until(lambda: client.stats().scheduler.steps_total >= before + 2)
    reading.cancel()
    await asyncio.wait([reading])


def test_a_scored_prompt_may_be_left(make_client: MakeClient) -> None:
    async def test() -> None:
        async with _running(make_client(FakeRunner, _CONFIG)) as client:
            request = _request(tuple(range(200)), prompt_logprobs=0)
            await _abandon(client, request, client.stats().scheduler.steps_total)
            assert await _collect(client, _request((5,))) == fake_output((5,), 10)
            await _until(lambda: client.stats().scheduler.num_running == 0)

    _run(test)


def test_a_reset_forgets_what_nobody_uses_and_says_how_much(make_client: MakeClient) -> None:
    async def test() -> None:
        async with _running(make_client(FakeRunner, _CONFIG)) as client:
            page_size = client.info.page_size
            prompt = tuple(range(4 * page_size + 1))
            await _collect(client, _request(prompt, 1))
            used = prompt[: 2 * page_size + 1]
            deltas = client.generate(_request(used, 200))
            assert (await anext(deltas)).started is not None
            assert await client.change_cache(PinPrefix(prompt, "", "", "5m")) == 4
            assert await client.change_cache(UnpinPrefix(prompt, "")) == 1
            assert await client.reset_cache() == 2, "those behind the two that are used"
            kept = [delta async for delta in deltas if delta.token_ids]
            assert kept[-1].finish_reason == "length"
            num_cached = client.stats().cache.pages_cached
            both = await asyncio.gather(client.reset_cache(), client.reset_cache())
            assert [*both] == [num_cached, 0]
            await _until(lambda: client.stats().cache.pages_cached == 0)
            again = [delta async for delta in client.generate(_request(prompt, 1))]
            assert [d.started.cached_tokens for d in again if d.started] == [0]

    _run(test)


def test_a_prompt_is_explained_as_it_is_then_served(make_client: MakeClient) -> None:
    async def test() -> None:
        async with _running(make_client(FakeRunner, _CONFIG)) as client:
            page_size = client.info.page_size
            prompt = tuple(range(2 * page_size + 1))
            never = CacheStory(0, (("never", 2 * page_size),))
            for _ in range(2):
                assert await client.explain_cache(ExplainPrefix(prompt, "")) == never
            await _collect(client, _request(prompt, 1))
            both = ExplainPrefix(prompt, ""), ExplainPrefix((*prompt[:-2], 99, 99), "")
            found = await asyncio.gather(*map(client.explain_cache, both))
            at = 2 * page_size - 1
            assert found == [CacheStory(at + 1), CacheStory(at, (("diverged", 1),), at)]

    _run(test)


def test_an_engine_that_is_not_there_explains_nothing(make_client: MakeClient) -> None:
    async def test() -> None:
        with pytest.raises(EngineUnavailableError):
            await make_client(FakeRunner, _CONFIG).explain_cache(ExplainPrefix((1, 2), ""))

    _run(test)


def test_a_reset_whose_caller_left_harms_nobody(make_client: MakeClient) -> None:
    async def test() -> None:
        async with _running(make_client(FakeRunner, _CONFIG)) as client:
            await _collect(client, _request(tuple(range(9))))
            left = asyncio.create_task(client.reset_cache())
            await asyncio.sleep(0)
            left.cancel()
            assert await client.reset_cache() == 0
            assert await _collect(client, _request((1, 2))) == fake_output((1, 2), 10)

    _run(test)


def test_an_engine_that_is_not_there_resets_nothing(make_client: MakeClient) -> None:
    async def test() -> None:
        client = make_client(FakeRunner, _CONFIG)
        with pytest.raises(EngineUnavailableError):
            await client.reset_cache()
        await client.start()
        waiting = asyncio.create_task(client.reset_cache())
        await asyncio.sleep(0)
        await client.close()
        (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
        assert outcome == 0 or isinstance(outcome, EngineUnavailableError)

    _run(test)
