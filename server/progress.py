"""Logs that something long has begun, and at intervals that it goes on.

A progress bar needs a terminal; these lines are there without one. Knows nothing of what is done.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.logs import LOGGER_NAME, fields

_log = logging.getLogger(LOGGER_NAME)

_INTERVAL_S = 15.0


@asynccontextmanager
async def reported(
    event: str, *, interval_s: float = _INTERVAL_S, **told: object
) -> AsyncIterator[None]:
    """Log `event` with its fields, and again with `elapsed_s`, until the block is left."""
    _log.info(event, extra=fields(**told))
    repeating = asyncio.create_task(_repeat(event, interval_s, told))
    try:
        yield
    finally:
        repeating.cancel()


async def _repeat(event: str, interval_s: float, told: dict[str, object]) -> None:
    began_s = time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        elapsed_s = round(time.monotonic() - began_s, 1)
        _log.info(event, extra=fields(**told, elapsed_s=elapsed_s))
