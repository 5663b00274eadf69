"""Custom tools, whose input is a text: for the model they are functions with that one argument.

So every model that calls functions can call them. Knows nothing of requests or of answers.
"""

from __future__ import annotations

import json
from typing import Any

from server.generation.generation_spec import ToolSpec
from server.http.errors import Path

#: The one argument.
INPUT = "input"
_SYNTAXES = {"lark": "a Lark grammar", "regex": "a regular expression"}


def custom_tool(
    name: str,
    description: str | None,
    syntax: str | None,
    definition: str | None,
    *,
    path: Path,
    schema_path: Path,
) -> ToolSpec:
    """Return a custom tool as a function whose description contains the grammar of its text.

    `syntax`: the language of the grammar; None: there is none.
    """
    text: dict[str, Any] = {"type": "string"}
    words = [description] if description else []
    if syntax is not None:
        words.append(f"The input matches {_SYNTAXES[syntax]}:\n{definition}")
        if syntax == "regex":
            text["pattern"] = f"^(?:{definition})$"
    schema = {"type": "object", "properties": {INPUT: text}, "required": [INPUT]}
    return ToolSpec(
        name,
        "\n\n".join(words) or None,
        {**schema, "additionalProperties": False},
        path,
        schema_path,
        is_custom=True,
        grammar_syntax=syntax,
    )


def arguments_of(text: str) -> str:
    """Return the arguments of a call with this input."""
    return json.dumps({INPUT: text}, ensure_ascii=False)


def input_of(arguments: str) -> str:
    """Return the input of a call; arguments of another shape are returned whole."""
    try:
        read = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return arguments
    text = read.get(INPUT) if isinstance(read, dict) and len(read) == 1 else None
    return text if isinstance(text, str) else arguments
