"""A line on the terminal with the progress of a run. It only reads, and slows nothing down."""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from loadtest.drive import Driver

_EVERY_S = 0.25
_FORMAT = "{desc} {bar:24} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_FORMAT_ENDLESS = "{desc} {n_fmt} [{elapsed}{postfix}]"


class Progress:
    """While within, draws the driver's state; `screen` None draws nothing."""

    def __init__(self, driver: Driver, screen: TextIO | None) -> None:
        self._driver = driver
        self._screen = screen
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._screen is not None:
            self._task = asyncio.create_task(self._draw(self._screen))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _draw(self, screen: TextIO) -> None:
        driver, clock_s = self._driver, self._driver.target.clock_s
        bounds, began_s = driver.bounds, clock_s()
        total = None if bounds.num_conversations == sys.maxsize else bounds.num_conversations
        with tqdm(
            total=total,
            desc=f"{driver.target.name} {driver.composer.workload.name}",
            file=screen,
            leave=False,
            bar_format=_FORMAT if total else _FORMAT_ENDLESS,
            mininterval=0,
            dynamic_ncols=True,
        ) as bar:
            while True:
                live, since_s = driver.live, clock_s() - began_s
                rate = live.num_tokens / since_s if since_s else 0.0
                bar.set_postfix_str(
                    f"{rate:.0f} tokens/s, {len(live.running)} running, {live.num_failed} failed"
                    + (f", of {bounds.duration_s:g} s" if bounds.duration_s < math.inf else ""),
                    refresh=False,
                )
                bar.n = live.num_conversations
                bar.refresh()
                await asyncio.sleep(_EVERY_S)
