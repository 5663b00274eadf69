"""`GenerationSpec` of a Messages body.

Knows nothing of the model but its chat template, which decides the fields that have an effect.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from server.generation.generation_spec import Conversation, OutputConstraint, ToolSpec, ToolUse
from server.generation.params import CHAT, Warned, ignored, judge, summed_up
from server.generation.prompt_messages import unread_reasoning
from server.generation.request_fields import GenerationSpec
from server.messages.caching import caching_wish, require_prewarming
from server.messages.conversation import TurnReader
from server.messages.params import shared_fields, without_effect
from server.messages.schemas import CountTokensRequest, InputTool, InputToolChoice, MessagesRequest
from server.structured.schemas import unwrapped_constraint
from server.text.template import ChatTemplate
from server.tools.declared import think_tags

#: Fields that are not among the `PASSED` ones and have the same name in all APIs.
_OWN = {"model", "max_tokens", "temperature", "top_p", "top_k", "stream"}
#: Names in templates of the switch of reasoning, and of its amount.
THINKING_VARIABLE = "enable_thinking"
EFFORT_VARIABLE = "reasoning_effort"


def message_spec(request: MessagesRequest, template: ChatTemplate | None) -> GenerationSpec:
    """Return the spec of a request to a model with that template. Raises `ApiError`."""
    chat, warnings = conversation_of(request, template)
    if chat.caching.is_prewarming:
        require_prewarming(request)
    user_id = None if request.metadata is None else request.metadata.user_id
    about_user = judge({"user_id": user_id}, {"user_id": CHAT["user"]}, "metadata.")
    unread = unread_reasoning(chat.messages, template)
    warnings = summed_up([*warnings, *about_user, *unread])
    own = request.model_dump(include=_OWN) | {"stop": request.stop_sequences}
    fields = shared_fields(request).model_copy(update=own)
    return replace(
        fields.as_spec(chat, warnings, _constraint(request)),
        num_bytes=request.num_bytes,
        # Clients of this API ask for tens of thousands of tokens of every model.
        cuts_max_tokens=True,
    )


def conversation_of(
    request: CountTokensRequest, template: ChatTemplate | None
) -> tuple[Conversation, list[Warned]]:
    """Return the input of the template, with warnings for fields without effect.

    Raises `ApiError`.
    """
    warnings = without_effect(request)
    _constraint(request)  # One that is wrong is refused, although it adds nothing to the prompt.
    reader = TurnReader()
    if request.system is not None:
        reader.add_system(request.system)
    for index, turn in enumerate(request.messages):
        reader.add(turn, ("messages", index))
    fields = shared_fields(request)
    variables = _variables(request, template, warnings) | (fields.chat_template_kwargs or {})
    tools = [
        _tool(tool, index)
        for index, tool in enumerate(request.tools or ())
        if isinstance(tool, InputTool)
    ]
    choice = request.tool_choice
    # There is no tool to call if all are left out.
    if choice is not None and choice.type == "auto" and request.tools and not tools:
        choice = None
    is_single = None if choice is None else choice.disable_parallel_tool_use
    chat = Conversation(
        messages=reader.messages(),
        tools=tools,
        tool_use=None if choice is None else _tool_use(choice),
        has_parallel_calls=None if is_single is None else not is_single,
        variables=variables,
        continues_last=reader.continues_last(),
        add_special_tokens=fields.add_special_tokens is True,
        caching=caching_wish(request, reader.blocks),
        num_bytes=request.num_bytes,
    )
    return chat, [*warnings, *reader.warnings]


def _tool(tool: InputTool, index: int) -> ToolSpec:
    path = ("tools", index)
    return ToolSpec(
        tool.name,
        tool.description,
        tool.input_schema,
        path,
        (*path, "input_schema"),
        is_strict=tool.strict is True,
    )


def _tool_use(choice: InputToolChoice) -> ToolUse:
    if choice.type in {"auto", "none"}:
        return ToolUse(choice.type)
    if choice.name is None:
        return ToolUse("required")
    return ToolUse("required", (choice.name,), is_named=True)


def _constraint(request: CountTokensRequest) -> OutputConstraint | None:
    asked = None if request.output_config is None else request.output_config.format
    if asked is None:
        return None
    if asked.get("type") == "json_schema":
        # Anthropic's has no name, OpenAI's must have one.
        schema = asked.get("schema")
        asked = {"type": "json_schema", "name": "output", "schema": schema, "strict": True}
    return unwrapped_constraint(asked, ("output_config", "format"))


def _variables(
    request: CountTokensRequest, template: ChatTemplate | None, warnings: list[Warned]
) -> dict[str, Any]:
    """Return the template's variables for `thinking` and `output_config.effort`.

    `warnings`: gets one for each that the template has no variable for.
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
            warnings.append(ignored("thinking", "this model's template has no such switch"))
        if thinking.budget_tokens is not None:
            because = "reasoning is bounded by max_tokens alone"
            warnings.append(ignored("thinking.budget_tokens", because))
    effort = None if request.output_config is None else request.output_config.effort
    if effort is not None and EFFORT_VARIABLE in source:
        variables[EFFORT_VARIABLE] = effort
    elif effort is not None:
        warnings.append(ignored("output_config.effort", "has no effect on this model"))
    return variables
