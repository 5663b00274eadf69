"""The breakpoints of a Messages body: `cache_control` of its tools, its blocks and the whole.

Knows nothing of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from server.generation.caching import MAX_BREAKPOINTS
from server.generation.generation_spec import Breakpoint, CachingWish
from server.http.errors import dotted, invalid
from server.messages.schemas import CacheControl, CountTokensRequest, InputTool, MessagesRequest

_FIELD = "cache_control"
_DEFAULT_LIFETIME = "5m"


def lifetime_of(control: CacheControl | None) -> str:
    """Return the lifetime that a block asks for; an empty string: none."""
    return "" if control is None else control.ttl or _DEFAULT_LIFETIME


def caching_wish(request: CountTokensRequest, blocks: Sequence[Breakpoint]) -> CachingWish:
    """Return the wish of a request. Raises `ApiError`.

    `blocks`: those of the system prompt and the messages, in order, whose lifetime is an empty
    string where they ask for nothing.
    """
    places = [*_tools(request), *blocks]
    if request.cache_control is not None and places:
        places[-1] = _automatic(request.cache_control, places[-1])
    found = [place for place in places if place.lifetime]
    if len(found) > MAX_BREAKPOINTS:
        message = (
            f"A maximum of {MAX_BREAKPOINTS} blocks with cache_control may be provided."
            f" Found {len(found)}."
        )
        raise invalid(message, found[MAX_BREAKPOINTS].path)
    for before, place in pairwise(found):
        if (before.lifetime, place.lifetime) == ("5m", "1h"):
            path = (*place.path, "ttl")
            raise invalid(
                f"{dotted(path)}: a ttl='1h' cache_control block must not come after a ttl='5m'"
                " cache_control block. Note that blocks are processed in the following order:"
                " `tools`, `system`, `messages`.",
                path,
            )
    is_prewarming = isinstance(request, MessagesRequest) and request.max_tokens == 0
    return CachingWish(tuple(found), is_prewarming=is_prewarming)


def require_prewarming(request: MessagesRequest) -> None:
    """Raise `ApiError` for a field that has no meaning where no answer is written."""
    choice, thinking, output = request.tool_choice, request.thinking, request.output_config
    wrong = {
        "stream": request.stream is True,
        "thinking": thinking is not None and thinking.type == "enabled",
        "output_config.format": output is not None and output.format is not None,
        "tool_choice": choice is not None and choice.type in {"any", "tool"},
    }
    for path, is_wrong in wrong.items():
        if is_wrong:
            raise invalid(f"{path} is not supported with max_tokens 0, which writes nothing", path)


def _tools(request: CountTokensRequest) -> list[Breakpoint]:
    return [
        Breakpoint(("tools", index, _FIELD), lifetime_of(tool.cache_control), tool=tool.name)
        for index, tool in enumerate(request.tools or ())
        if isinstance(tool, InputTool)
    ]


def _automatic(control: CacheControl, last: Breakpoint) -> Breakpoint:
    """Return the last block with the breakpoint of the whole request."""
    lifetime = lifetime_of(control)
    if not last.lifetime:
        return replace(last, path=(_FIELD,), lifetime=lifetime)
    if last.lifetime != lifetime:
        raise invalid(f"{_FIELD}: the last block has one with another ttl", _FIELD)
    return last
