from __future__ import annotations

import asyncio

import pytest

from model.interface import SamplingParams, TokenLogprobs
from scheduler.client import (
    EngineFaultError,
    EngineUnavailableError,
    GenerateRequest,
    RequestRefusedError,
)
from scheduler.messages import (
    Begun,
    CacheCommand,
    Cancel,
    FinishReason,
    Pinned,
    Rejected,
    RejectKind,
    ResetCache,
    Started,
    StepResult,
    Submit,
)
from scheduler.stats import EngineStats, SchedulerStats
from scheduler.streams import Streams

_REQUEST = GenerateRequest((1, 2), SamplingParams(max_tokens=9))


def test_news_of_requests_nobody_reads_is_dropped() -> None:
    streams = Streams()
    stats = EngineStats(SchedulerStats(num_running=3))
    streams.begin(Begun((5,)))
    streams.dispatch(
        StepResult(
            stats,
            request_ids=[5],
            token_ids=[1],
            logprobs=[TokenLogprobs(1, 0.0, 1)],
            prompt_logprobs=[(5, (TokenLogprobs(1, 0.0, 1),))],
            started=[Started(5, 0.0, 0)],
            rejected=[Rejected(6, RejectKind.BUSY, "full")],
            finished=[(7, FinishReason.STOP)],
            drafts=[(5, 3, 1)],
            failed=[(8, "a fault")],
            pinned=[Pinned(5, 0, 1)],
        )
    )
    streams.check()
    assert streams.engine_stats is stats
    assert len(streams) == 0


def test_drafts_are_counted_once() -> None:
    async def test() -> None:
        streams = Streams()
        stream = streams.generate(_REQUEST, lambda _: None)
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        streams.dispatch(StepResult(drafts=[(0, 5, 2)]))
        streams.dispatch(StepResult(request_ids=[0], token_ids=[1], drafts=[(0, 3, 0)]))
        output = await reading
        assert (output.draft_tokens, output.accepted_draft_tokens) == (8, 2)
        streams.dispatch(StepResult(request_ids=[0], token_ids=[2]))
        assert (await anext(stream)).draft_tokens == 0
        await stream.aclose()

    asyncio.run(test())


def test_tokens_that_came_before_an_error_are_read_first() -> None:
    async def test() -> None:
        streams = Streams()
        sent: list[Submit | Cancel] = []
        stream = streams.generate(_REQUEST, sent.append)
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        streams.check()
        assert len(streams) == 1
        streams.dispatch(StepResult(request_ids=[0, 0], token_ids=[4, 5], failed=[(0, "a fault")]))
        assert (await reading).token_ids == (4, 5)
        with pytest.raises(EngineFaultError, match="a fault"):
            await anext(stream)
        # It was over already: nothing is left to cancel.
        assert [type(message) for message in sent] == [Submit]

    asyncio.run(test())


def test_the_effect_of_pins_is_read_once() -> None:
    async def test() -> None:
        streams = Streams()
        stream = streams.generate(_REQUEST, lambda _: None)
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        streams.dispatch(StepResult(request_ids=[0], token_ids=[4], pinned=[Pinned(0, 1, 2)]))
        assert (await reading).pinned == Pinned(0, 1, 2)
        streams.dispatch(StepResult(request_ids=[0], token_ids=[4]))
        assert (await anext(stream)).pinned is None
        await stream.aclose()

    asyncio.run(test())


def test_a_refusal_is_raised_and_a_reader_who_leaves_cancels() -> None:
    async def test() -> None:
        streams = Streams()
        sent: list[Submit | Cancel] = []
        stream = streams.generate(_REQUEST, sent.append)
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        refused = Rejected(0, RejectKind.INVALID, "too long", "prompt")
        streams.dispatch(StepResult(rejected=[refused]))
        with pytest.raises(RequestRefusedError, match="too long"):
            await reading
        left = asyncio.create_task(anext(streams.generate(_REQUEST, sent.append)))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.wait([left])
        assert sent[-1] == Cancel(1)

    asyncio.run(test())


def test_resets_are_answered_in_order_and_a_lost_engine_ends_the_rest() -> None:
    async def test() -> None:
        streams, sent = Streams(), list[CacheCommand]()
        first, left, third, last = (
            asyncio.create_task(streams.change_cache(ResetCache(), sent.append)) for _ in range(4)
        )
        await asyncio.sleep(0)
        assert len(sent) == 4
        left.cancel()
        await asyncio.sleep(0)
        streams.dispatch(StepResult(cache_answers=[3, 2]))
        streams.dispatch(StepResult(cache_answers=[1]))
        assert (await first, await third) == (3, 1)
        streams.fail_commands("the engine died")
        with pytest.raises(EngineUnavailableError, match="died"):
            await last
        # An answer that no caller waits for any more.
        streams.dispatch(StepResult(cache_answers=[9]))

    asyncio.run(test())
