"""From a Messages body to a `ChatRequest`, and back from what is said of that one.

Whatever is checked, rendered or generated is the chat's; here only names and shapes change. Knows
nothing of responses.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from server.generation.params import Warned, summed_up
from server.http.errors import ApiError, from_validation
from server.messages.conversation import Conversation
from server.messages.params import passed, without_effect
from server.messages.schemas import (
    CountTokensRequest,
    InputTool,
    InputToolChoice,
    MessagesRequest,
)
from server.openai.schemas import ChatRequest
from server.text.template import ChatTemplate
from server.tools.declared import think_tags

#: What templates call the switch of reasoning, and its amount.
THINKING_VARIABLE = "enable_thinking"
EFFORT_VARIABLE = "reasoning_effort"

_PATH = re.compile(r"(?P<head>[a-z_]+)(?:\.(?P<index>\d+))?(?P<rest>\..*)?")
_RENAMED = {
    "stop": "stop_sequences",
    "user": "metadata.user_id",
    "response_format": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
}


@dataclass(frozen=True, slots=True)
class _Paths:
    """Where things stand in the request, by their places in the chat."""

    messages: tuple[str, ...]
    tools: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Translated:
    """A request as a chat."""

    chat: ChatRequest
    paths: _Paths
    #: What the chat cannot tell.
    warnings: tuple[Warned, ...]

    def error(self, error: ApiError) -> ApiError:
        """Return an error about the chat as one about the request."""
        return _about_request(error, self.paths)

    def all_warnings(self, of_chat: Iterable[Warned]) -> tuple[Warned, ...]:
        """Return the warnings, those about the chat too."""
        renamed: list[Warned] = []
        for warning in of_chat:
            param = _name(warning["param"], self.paths)
            message = warning["message"].replace(warning["param"], param)
            renamed.append({"param": param, "message": message})
        return tuple(summed_up([*self.warnings, *renamed]))


def translate(request: CountTokensRequest, template: ChatTemplate | None) -> Translated:
    """Return `request` as a chat for a model of that template. Raises `ApiError`."""
    warnings = without_effect(request)
    conversation = Conversation()
    if request.system is not None:
        conversation.instruct(request.system)
    for index, turn in enumerate(request.messages):
        conversation.add(turn, f"messages.{index}")
    variables = _variables(request, template, warnings)
    fields = {
        **passed(request),
        "model": request.model,
        "messages": conversation.messages(),
        "continue_final_message": conversation.require_answerable(),
        **_tools(request.tools, request.tool_choice),
        **_output(request),
    }
    if variables:
        fields["chat_template_kwargs"] = variables | (fields.get("chat_template_kwargs") or {})
    if isinstance(request, MessagesRequest):
        fields |= _sampling(request)
    places = [at for at, tool in enumerate(request.tools or ()) if isinstance(tool, InputTool)]
    paths = _Paths(tuple(conversation.origins), tuple(places))
    try:
        chat = ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise _about_request(from_validation(error), paths) from error
    chat.num_bytes = request.num_bytes
    return Translated(chat, paths, (*warnings, *conversation.warnings))


def _sampling(request: MessagesRequest) -> dict[str, Any]:
    """`max_tokens` is not among them: see `server/messages/prepare.py`."""
    user_id = None if request.metadata is None else request.metadata.user_id
    return {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "stop": request.stop_sequences,
        "stream": request.stream,
        "user": user_id,
    }


def _tools(tools: Sequence[object] | None, choice: InputToolChoice | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    own = [_tool(tool) for tool in tools or () if isinstance(tool, InputTool)]
    if tools is not None:
        fields["tools"] = own
    # Of tools that are all left out, none is called.
    if choice is not None and (own or choice.type != "auto" or not tools):
        fields["tool_choice"] = {
            "any": "required",
            "tool": {"type": "function", "function": {"name": choice.name}},
        }.get(choice.type, choice.type)
        if choice.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return fields


def _tool(tool: InputTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _output(request: CountTokensRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    config = request.output_config
    if config is not None and config.format is not None:
        # Anthropic's has no name, OpenAI's must have one.
        named = {"name": "output", "schema": config.format.get("schema"), "strict": True}
        is_schema = config.format.get("type") == "json_schema"
        fields["response_format"] = (
            {"type": "json_schema", "json_schema": named} if is_schema else config.format
        )
    return fields


def _variables(
    request: CountTokensRequest, template: ChatTemplate | None, warnings: list[Warned]
) -> dict[str, Any]:
    """Return what `thinking` and `output_config.effort` are in the template's terms.

    What it has no terms for goes to `warnings`.
    """
    sources = {} if template is None else template.sources
    source = "\n".join(sources.values())
    variables: dict[str, Any] = {}
    thinking = request.thinking
    if thinking is not None:
        wanted = {"enabled": True, "disabled": False}.get(thinking.type)
        reasons = think_tags(sources) is not None
        if wanted is not None and THINKING_VARIABLE in source:
            variables[THINKING_VARIABLE] = wanted
        elif thinking.type == "between_tools" or wanted not in {None, reasons}:
            warnings.append(_warning("thinking", "this model's template has no such switch"))
        if thinking.budget_tokens is not None:
            because = "reasoning is bounded by max_tokens alone"
            warnings.append(_warning("thinking.budget_tokens", because))
    effort = None if request.output_config is None else request.output_config.effort
    if effort is not None and EFFORT_VARIABLE in source:
        variables[EFFORT_VARIABLE] = effort
    elif effort is not None:
        warnings.append(_warning("output_config.effort", "has no effect on this model"))
    return variables


def _warning(param: str, because: str) -> Warned:
    return {"param": param, "message": f"{param} was ignored: {because}"}


def _about_request(error: ApiError, paths: _Paths) -> ApiError:
    if error.param is None:
        return error
    param = _name(error.param, paths)
    message = error.message.replace(error.param, param)
    return ApiError(error.status, message, param=param, code=error.code, headers=error.headers)


def _name(param: str, paths: _Paths) -> str:
    """Return what the request calls the chat's field `param`."""
    found = _PATH.fullmatch(param)
    if found is None:
        return param
    head, index, rest = found["head"], found["index"], found["rest"] or ""
    if head == "messages" and index is not None:
        origins = paths.messages
        return origins[int(index)] if int(index) < len(origins) else head
    if head == "tools" and index is not None:
        tools = paths.tools
        index = str(tools[int(index)]) if int(index) < len(tools) else index
        rest = rest.removeprefix(".function").replace(".parameters", ".input_schema", 1)
    if head == "response_format":
        rest = rest.removeprefix(".json_schema")
    place = "" if index is None else f".{index}"
    return _RENAMED.get(head, head) + place + rest
