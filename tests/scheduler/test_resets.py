"""Answers go to their callers, in order, or none is left waiting."""

from __future__ import annotations

import asyncio

import pytest

from scheduler.client import EngineUnavailableError
from scheduler.messages import EngineStats, ResetCache, StepResult
from scheduler.resets import CacheResets


def test_answers_come_in_order_and_a_lost_engine_is_told() -> None:
    async def test() -> None:
        resets, sent = CacheResets(), list[ResetCache]()
        first, left, third, last = (asyncio.create_task(resets.ask(sent.append)) for _ in range(4))
        await asyncio.sleep(0)
        assert len(sent) == 4
        left.cancel()
        await asyncio.sleep(0)
        resets.dispatch(StepResult(EngineStats(), reset_pages=(3, 2)))
        resets.dispatch(StepResult(EngineStats(), reset_pages=(1,)))
        assert (await first, await third) == (3, 1)
        resets.fail("the engine died")
        with pytest.raises(EngineUnavailableError, match="died"):
            await last
        # Of an engine that nobody waits for any more.
        resets.dispatch(StepResult(EngineStats(), reset_pages=(9,)))

    asyncio.run(test())
