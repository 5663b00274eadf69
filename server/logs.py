"""Log lines with fields, as `key=value` text or as JSON, without contents or keys.

A caller logs an event and its fields: `logger.info("request", extra=fields(status=200))`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Literal, TextIO

from server.http.context import RequestRecord

LOGGER_NAME = "octavo"
_ATTRIBUTE = "octavo_fields"
_REPEAT_INTERVAL_S = 15.0


def fields(**values: object) -> dict[str, object]:
    """Return the `extra` argument that carries `values`; None values are left out."""
    return {_ATTRIBUTE: {name: value for name, value in values.items() if value is not None}}


class TextFormatter(logging.Formatter):
    """`2026-01-01T00:00:00.000Z INFO request id=… status=200`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line; a traceback follows on lines of its own."""
        pairs = (f"{name}={_plain(value)}" for name, value in _fields_of(record).items())
        line = " ".join((_time_of(record), record.levelname, record.getMessage(), *pairs))
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, a traceback in it as a string."""
        payload: dict[str, object] = {
            "time": _time_of(record),
            "level": record.levelname,
            "event": record.getMessage(),
            **_fields_of(record),
        }
        if record.exc_info:
            payload["traceback"] = self.formatException(record.exc_info)
        return json.dumps(payload, default=str)


def configure(log_format: Literal["text", "json"], stream: TextIO | None = None) -> None:
    """Send every log record of the process to `stream` (default: stderr) in this format."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(LOGGER_NAME).setLevel(logging.INFO)
    # Its warnings are about invalid requests: three lines for each that is not HTTP.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)


def log_request(record: RequestRecord, now_s: float, *, is_probe: bool) -> None:
    """Log a request in one line; probes and scrapes only at level DEBUG."""
    has_generated, error = bool(record.model), record.error
    logging.getLogger(LOGGER_NAME).log(
        logging.DEBUG if is_probe else logging.INFO,
        "request",
        extra=fields(
            id=record.request_id,
            method=record.method,
            route=record.path,
            model=record.model or None,
            status=record.status,
            prompt_tokens=record.prompt_tokens if has_generated else None,
            cached_tokens=record.cached_tokens if has_generated else None,
            output_tokens=record.output_tokens if has_generated else None,
            queue_ms=milliseconds(record.queue_s),
            ttft_ms=milliseconds(record.ttft_s),
            total_ms=milliseconds(now_s - record.arrived_at_s),
            finish_reason=record.finish_reason or None,
            error=error and (error.code or error.type),
            param=error and error.param,
            reason=error and error.log_reason,
            key=record.key_name or None,
            cache_key=record.cache_key or None,
            client=record.client,
        ),
    )


@asynccontextmanager
async def reported(
    event: str, *, interval_s: float = _REPEAT_INTERVAL_S, **values: object
) -> AsyncIterator[None]:
    """Log that a long event has begun, and again with `elapsed_s` until the block is left.

    A progress bar needs a terminal; these lines are there without one.
    """
    log, began_s = logging.getLogger(LOGGER_NAME), time.monotonic()
    log.info(event, extra=fields(**values))

    async def repeat() -> None:
        while True:
            await asyncio.sleep(interval_s)
            elapsed_s = round(time.monotonic() - began_s, 1)
            log.info(event, extra=fields(**values, elapsed_s=elapsed_s))

    repeating = asyncio.create_task(repeat())
    try:
        yield
    finally:
        repeating.cancel()


def milliseconds(duration_s: float | None) -> float | None:
    """Return a duration in milliseconds, rounded."""
    return None if duration_s is None else round(duration_s * 1000, 2)


def _fields_of(record: logging.LogRecord) -> dict[str, object]:
    found: dict[str, object] = getattr(record, _ATTRIBUTE, {})
    return found


def _time_of(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: object) -> str:
    """Quote text that would break a line or a `key=value` pair, or control a terminal."""
    text = str(value)
    is_plain = text.isprintable() and not set(text) & set(" \"='")
    return text if is_plain and text else json.dumps(text)
