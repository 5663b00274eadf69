"""Custom tools, whose input is a text: for the model they are functions with that one argument.

So every model that calls functions can call them. Knows nothing of requests or of answers.
"""

from __future__ import annotations

import json

#: The one argument.
INPUT = "input"


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
