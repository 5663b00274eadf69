"""Parameters of Messages that are not fields of its body, and those it shares with chats.

Has the names; `server/generation/params.py` judges them.
"""

from __future__ import annotations

from typing import get_args

from pydantic import ValidationError

from server.generation.params import Warned, judge, nested, refused, warned, warning
from server.http.errors import from_validation
from server.messages.schemas import (
    LEFT_OUT,
    AnthropicTool,
    Block,
    CountTokensRequest,
    InputTool,
    SharedFields,
    kind_of_tool,
)

#: Parameters of chats that mean the same here; `SharedFields` checks their values.
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
    "speculation",
    "kv_policy",
    "add_special_tokens",
    "chat_template_kwargs",
)
MESSAGES = {
    "container": refused(),
    "mcp_servers": refused([], because="are not supported: tools are run by the client"),
    "output_format": refused(because="has become output_config.format"),
    "context_management": warned("the conversation is taken as it is sent", {}),
    "service_tier": warned("there is one tier", "auto", "standard_only"),
    "speed": warned("there is one speed", "standard"),
    "inference_geo": warned("there is one place"),
    "user_profile_id": warned("it does not distinguish callers"),
    "workspace_id": warned("there are no workspaces"),
}
_BLOCK = {
    "citations": warned("there is nothing to cite", [], {"enabled": False}),
    "caller": warned("calls are made by the model", {"type": "direct"}),
    "toolset_name": warned("tools have no sets"),
}
_TOOL = {
    "allowed_callers": refused(["direct"], because="can only be ['direct']"),
    "defer_loading": warned("all tools are in the prompt", False),  # noqa: FBT003 - a value, no switch
    "eager_input_streaming": warned("a call's input is streamed as it is written", False),  # noqa: FBT003 - likewise
    "input_examples": warned("they are not in the prompt", []),
}
_TABLES = {InputTool: _TOOL, **dict.fromkeys(get_args(Block), _BLOCK)}


def without_effect(request: CountTokensRequest) -> list[Warned]:
    """Return a warning for each unknown field. Raises `ApiError` for a refused one."""
    extras = {k: v for k, v in (request.model_extra or {}).items() if k not in PASSED}
    warnings = [*request.notes, *judge(extras, MESSAGES)]
    for at, part in nested(request):
        if part is not request and part.model_extra and not isinstance(part, AnthropicTool):
            warnings += judge(part.model_extra, _TABLES.get(type(part), {}), at + ".")
    for index, tool in enumerate(request.tools or ()):
        if isinstance(tool, AnthropicTool):
            because = LEFT_OUT[kind_of_tool(tool.type)]
            warnings.append(warning(f"tools.{index}", f"({tool.type}) was left out: {because}"))
    return warnings


def shared_fields(request: CountTokensRequest) -> SharedFields:
    """Return the parameters that chats have too. Raises `ApiError` that names a wrong one."""
    given = {k: v for k, v in (request.model_extra or {}).items() if k in PASSED}
    try:
        return SharedFields.model_validate(given)
    except ValidationError as error:
        raise from_validation(error) from error
