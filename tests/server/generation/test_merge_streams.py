from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from server.generation.merge_streams import merge_streams


class Source:
    """Gives its numbers, one a turn of the loop, and counts them."""

    def __init__(self, num_items: int, fault: Exception | None = None) -> None:
        self.num_given = 0
        self.is_closed = False
        self._num_items = num_items
        self._fault = fault

    async def items(self) -> AsyncGenerator[int, None]:
        try:
            while self.num_given < self._num_items:
                await asyncio.sleep(0)
                self.num_given += 1
                yield self.num_given - 1
            if self._fault is not None:
                raise self._fault
        finally:
            self.is_closed = True


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def test_what_comes_in_one_turn_is_one_batch() -> None:
    async def read() -> list[list[tuple[int, int]]]:
        sources = [Source(3), Source(3), Source(1)]
        return [batch async for batch in merge_streams([source.items() for source in sources])]

    batches = asyncio.run(read())
    assert [sorted(batch) for batch in batches] == [
        [(0, 0), (1, 0), (2, 0)],
        [(0, 1), (1, 1)],
        [(0, 2), (1, 2)],
    ]


def test_a_slow_reader_holds_the_sources_up() -> None:
    async def read() -> None:
        sources = [Source(100), Source(100)]
        async with aclosing(merge_streams([source.items() for source in sources])) as batches:
            async for _ in batches:
                before = [source.num_given for source in sources]
                await turns(50)
                assert all(
                    source.num_given <= given + 1
                    for source, given in zip(sources, before, strict=True)
                )
        assert [source.num_given for source in sources] == [100, 100]

    asyncio.run(read())


def test_leaving_closes_every_source() -> None:
    async def leave() -> list[Source]:
        sources = [Source(100), Source(2), Source(100)]
        async with aclosing(merge_streams([source.items() for source in sources])) as batches:
            async for _ in batches:
                await turns(3)
                break
        assert len(asyncio.all_tasks()) == 1, "nothing goes on behind the reader's back"
        return sources

    assert all(source.is_closed for source in asyncio.run(leave()))


def test_the_first_exception_ends_all() -> None:
    sources = [Source(100), Source(2, KeyError("a fault")), Source(5, ValueError("later"))]

    async def read() -> None:
        async for _ in merge_streams([source.items() for source in sources]):
            pass

    with pytest.raises(KeyError, match="a fault"):
        asyncio.run(read())
    assert all(source.is_closed for source in sources)
    assert sources[0].num_given < 10


def test_a_reader_that_is_cancelled_closes_every_source() -> None:
    sources = [Source(10**9), Source(10**9)]

    async def read() -> None:
        async for _ in merge_streams([source.items() for source in sources]):
            pass

    async def cancel() -> None:
        reader = asyncio.create_task(read())
        await turns(20)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert all(source.is_closed for source in sources)

    asyncio.run(cancel())
