"""Server-sent events, as OpenAI's clients read them."""

from __future__ import annotations

#: No proxy may buffer or keep a stream.
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
DONE = b"data: [DONE]\n\n"
#: A comment: no event, whatever the client.
KEEP_ALIVE = b": keep-alive\n\n"


def event(data: bytes) -> bytes:
    """Return one event. `data` is JSON, so it holds no line break."""
    return b"data: " + data + b"\n\n"
