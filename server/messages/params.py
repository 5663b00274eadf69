"""What becomes of Messages' parameters that are no fields, and of those that chats have.

Knows the names; the judging is `server/generation/params.py`'s.
"""

from __future__ import annotations

from typing import Any, get_args

from server.generation.params import Unsupported, Warned, judge, nested
from server.messages.schemas import (
    LEFT_OUT,
    Block,
    CountTokensRequest,
    InputTool,
    OtherTool,
    kind_of_tool,
)

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
_TABLES = {InputTool: _TOOL, **dict.fromkeys(get_args(Block), _BLOCK)}


def without_effect(request: CountTokensRequest) -> list[Warned]:
    """Return a warning for everything in it that is no field. Raises `ApiError` for the refused."""
    extras = {k: v for k, v in (request.model_extra or {}).items() if k not in PASSED}
    warnings = [*request.notes, *judge(extras, MESSAGES)]
    for at, part in nested(request):
        if part is not request and part.model_extra and not isinstance(part, OtherTool):
            warnings += judge(part.model_extra, _TABLES.get(type(part), {}), at + ".")
    for index, tool in enumerate(request.tools or ()):
        if isinstance(tool, OtherTool):
            param = f"tools.{index}"
            told = f"{param} ({tool.type}) was left out: {LEFT_OUT[kind_of_tool(tool.type)]}"
            warnings.append({"param": param, "message": told})
    return warnings


def passed(request: CountTokensRequest) -> dict[str, Any]:
    """Return the parameters that chats have too."""
    return {k: v for k, v in (request.model_extra or {}).items() if k in PASSED}
