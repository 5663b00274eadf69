"""Several streams of items read as one. Knows nothing of what the items are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


async def merge_streams(
    sources: Sequence[AsyncGenerator[ItemT, None]],
) -> AsyncGenerator[list[tuple[int, ItemT]], None]:
    """Yield the new items as batches: (index of the source, item), at most one of each source.

    The items of one turn of the loop are one batch. A source is read on only when the reader takes
    the next batch, so a slow reader holds them all up. The first exception of any source is raised,
    before other ready items. Leaving this generator closes every source.
    """
    flow = _Flow[ItemT](len(sources))
    pumps = [asyncio.create_task(flow.pump(index, src)) for index, src in enumerate(sources)]
    try:
        while True:
            await flow.wakes.wait()
            flow.wakes.clear()
            if flow.error is not None:
                raise flow.error
            if flow.ready:
                batch, flow.ready = flow.ready, []
                # Swapped before the reader has it: later items wait for the next.
                taken, flow.taken = flow.taken, asyncio.Event()
                yield batch
                taken.set()
            elif not flow.num_open:
                return
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.wait(pumps)


class _Flow(Generic[ItemT]):
    """The state that the pumps and the reader share."""

    def __init__(self, num_sources: int) -> None:
        self.ready: list[tuple[int, ItemT]] = []
        self.error: Exception | None = None
        self.num_open = num_sources
        #: Set when there is news for the reader.
        self.wakes = asyncio.Event()
        #: Set when the batch in the making has been read.
        self.taken = asyncio.Event()

    async def pump(self, index: int, source: AsyncGenerator[ItemT, None]) -> None:
        """Read `source` to its end, item by item as they are taken."""
        try:
            async with aclosing(source):
                async for item in source:
                    taken = self.taken
                    self.ready.append((index, item))
                    self.wakes.set()
                    await taken.wait()
        except Exception as error:  # noqa: BLE001 - raised again where the batches are read
            self.error = self.error or error
        finally:
            self.num_open -= 1
            self.wakes.set()
