"""Tools, calls and results as plain text, for templates without a place for them.

The form is that of Hermes. The system message lists the tools. A call is a JSON object in
`<tool_call>` tags; a result stands in `<tool_response>` tags in a message of the user. A call of
the model is written again letter by letter, so its tokens are found in the prefix cache. Knows
nothing of templates or of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from server.text.json_text import dumped, read_value

Fields = dict[str, Any]

_INSTRUCTIONS = """\
# Tools

You can call functions to help with the user's request. Their signatures are listed between the
<tools></tools> tags:
<tools>
{tools}
</tools>

To call a function, write one JSON object with its name and arguments between
<tool_call></tool_call> tags, and nothing behind it:
<tool_call>
{{"name": "<function name>", "arguments": {{<arguments>}}}}
</tool_call>
The results come back between <tool_response></tool_response> tags."""
_RESULT_ROLES = {"tool", "function"}


def with_tools_in_text(
    messages: Sequence[Fields], tools: Sequence[Mapping[str, Any]], *, has_system_role: bool
) -> tuple[list[Fields], list[int]]:
    """Return messages with `tools`, calls and results as text, and the index of each one's source.

    `has_system_role`: whether the template shows system messages; else the first message of the
    user lists the tools.
    """
    shown: list[Fields] = []
    origins: list[int] = []
    for index, message in enumerate(messages):
        is_result = message["role"] in _RESULT_ROLES
        if is_result and index and messages[index - 1]["role"] in _RESULT_ROLES:
            shown[-1]["content"] += "\n" + _result(message)
            continue
        text = {"role": "user", "content": _result(message)} if is_result else _with_calls(message)
        shown.append(text)
        origins.append(index)
    if tools:
        role = "system" if has_system_role else "user"
        _instruct(shown, origins, _INSTRUCTIONS.format(tools="\n".join(map(dumped, tools))), role)
    return shown, origins


def _instruct(shown: list[Fields], origins: list[int], instructions: str, role: str) -> None:
    """Add the instructions to the first message if it is of `role`, else as a new one."""
    if shown[0]["role"] != role:
        shown.insert(0, {"role": role, "content": instructions})
        origins.insert(0, 0)
        return
    own = _text(shown[0])
    parts = [own, instructions] if role == "system" else [instructions, own]
    shown[0] = {**shown[0], "content": "\n\n".join(part for part in parts if part)}


def _with_calls(message: Fields) -> Fields:
    """Return a message with its calls in its text."""
    calls = message.get("tool_calls")
    if not calls:
        return message
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    texts = [_text(message), *map(_call, calls)]
    return rest | {"content": "\n".join(text for text in texts if text)}


def _call(call: Mapping[str, Any]) -> str:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    try:
        read_value(arguments)
    except ValueError:
        arguments = dumped(arguments)
    return f'<tool_call>\n{{"name": {dumped(name)}, "arguments": {arguments}}}\n</tool_call>'


def _result(message: Fields) -> str:
    return f"<tool_response>\n{_text(message)}\n</tool_response>"


def _text(message: Fields) -> str:
    """Return the content, a string or a list of parts, as templates join them."""
    content = message["content"]
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
