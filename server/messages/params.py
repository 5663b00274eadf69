"""What becomes of Messages' parameters that are no fields, and of those that chats have.

Knows the names; the judging is `server/params.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from server.messages.schemas import CountTokensRequest, MessagesRequest, ToolResultBlock
from server.params import Unsupported, Warned, judge
from server.schemas import Request

#: More are summed up.
MAX_WARNINGS = 64

#: Chats' parameters that mean the same here: `ChatRequest` has them, and judges their values.
PASSED = (
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "min_tokens",
    "ignore_eos",
    "cache_salt",
    "priority",
    "add_special_tokens",
    "chat_template_kwargs",
)


def _warned(reason: str, *neutral: object) -> Unsupported:
    return Unsupported(neutral, is_refused=False, reason=reason)


def _refused(*neutral: object, because: str = "is not supported") -> Unsupported:
    return Unsupported(neutral, is_refused=True, reason=because)


MESSAGES = {
    "container": _refused(),
    "mcp_servers": _refused([], because="are not supported: tools are run by the client"),
    "output_format": _refused(because="has become output_config.format"),
    "context_management": _warned("the conversation is taken as it is sent", {}),
    "service_tier": _warned("there is one tier", "auto", "standard_only"),
    "speed": _warned("there is one speed", "standard"),
    "diagnostics": _warned("see octavo.cache in the answer"),
    "inference_geo": _warned("there is one place"),
    "user_profile_id": _warned("callers are not told apart by it"),
    "workspace_id": _warned("there are no workspaces"),
}
_BLOCK = {
    "citations": _warned("there is nothing to cite", [], {"enabled": False}),
    "caller": _warned("calls are made by the model", {"type": "direct"}),
    "toolset_name": _warned("tools have no sets"),
}
_TOOL = {
    "allowed_callers": _refused(["direct"], because="can only be ['direct']"),
    "defer_loading": _warned("tools are shown at once", False),  # noqa: FBT003 - a value, no switch
    "eager_input_streaming": _warned("a call is told when it is complete", False),  # noqa: FBT003 - likewise
    "input_examples": _warned("they are not shown to the model", []),
}


def without_effect(request: CountTokensRequest) -> list[Warned]:
    """Return a warning for everything in it that is no field. Raises `ApiError` for the refused."""
    extras = {k: v for k, v in (request.model_extra or {}).items() if k not in PASSED}
    warnings = [*request.notes, *judge(extras, MESSAGES)]
    for at, part, table in _parts(request):
        if part.model_extra:
            warnings += judge(part.model_extra, table, at + ".")
    return warnings


def summed_up(warnings: list[Warned]) -> list[Warned]:
    """Return no more of them than anybody reads."""
    left = len(warnings) - MAX_WARNINGS
    told = f"and {left} more parameters were ignored"
    more: list[Warned] = [{"param": "*", "message": told}] if left > 0 else []
    return warnings[:MAX_WARNINGS] + more


def passed(request: CountTokensRequest) -> dict[str, Any]:
    """Return the parameters that chats have too."""
    return {k: v for k, v in (request.model_extra or {}).items() if k in PASSED}


def _parts(request: CountTokensRequest) -> Iterator[tuple[str, Request, dict[str, Unsupported]]]:
    """Yield the path, the part and the table of everything that may have fields of its own."""
    for name in ("tool_choice", "thinking", "output_config"):
        if (part := getattr(request, name)) is not None:
            yield name, part, {}
    if isinstance(request, MessagesRequest) and request.metadata is not None:
        yield "metadata", request.metadata, {}
    for index, tool in enumerate(request.tools or ()):
        yield f"tools.{index}", tool, _TOOL
    for index, block in enumerate(request.system or ()):
        yield f"system.{index}", block, _BLOCK
    for index, turn in enumerate(request.messages):
        yield f"messages.{index}", turn, {}
        for place, part in enumerate(turn.content):
            at = f"messages.{index}.content.{place}"
            yield at, part, _BLOCK
            if isinstance(part, ToolResultBlock):
                for depth, text in enumerate(part.content or ()):
                    yield f"{at}.content.{depth}", text, _BLOCK
