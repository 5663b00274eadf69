"""Reads streamed answers with the load generator's parser, since a slow server adds comments."""

from __future__ import annotations

import json
import re
from typing import Any

from loadtest.sse import EventReader


def chunks_of(stream: bytes) -> list[dict[str, Any]]:
    """Return each chunk of a whole completion or chat, which `[DONE]` must end."""
    *chunks, done = EventReader().feed(stream)
    assert done == b"[DONE]", done
    return [json.loads(chunk) for chunk in chunks]


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """Return each event of a whole message or response; its type must be its name too."""
    events = [json.loads(data) for data in EventReader().feed(stream)]
    names = re.findall(r"^event: (.*)$", stream.decode(), re.MULTILINE)
    assert names == [event["type"] for event in events]
    return events
