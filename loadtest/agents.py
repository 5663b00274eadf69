"""Agents that call tools, turn after turn, over one system prompt. Pure and seeded.

Contexts grow by the tools' results. Every other call is forced, the others are free: then an agent
may answer with text, and the result is sent as a user would send it.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from loadtest.workloads import (
    Conversation,
    Drawn,
    Preset,
    Shape,
    Turn,
    Workload,
    draws,
    of_one_lane,
)

_SYSTEM_TOKENS = 400
#: Of the tools' definitions and the words around all messages.
_TOOLS_TOKENS = 400
_FEWEST_RESULT_TOKENS = 16
_THINK_S = (0.2, 1.0)
_TASK = "You are a careful engineer. You read files, change them and run tests. Your notes: "


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in properties.items()},
        "required": list(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS: tuple[dict[str, Any], ...] = (
    _tool("read_file", "Return a file's lines.", path="string", first_line="integer"),
    _tool("replace_text", "Replace a text in a file.", path="string", old="string", new="string"),
    _tool("run_tests", "Run the tests of a folder.", folder="string", is_verbose="boolean"),
)


def _agentic(shape: Shape) -> Workload:
    context_tokens, max_tokens = shape.prompt_tokens or 8000, shape.max_tokens or 64
    num_turns = shape.num_turns or 20
    room_tokens = context_tokens - _SYSTEM_TOKENS - _TOOLS_TOKENS - num_turns * max_tokens
    result_tokens = max(_FEWEST_RESULT_TOKENS, room_tokens // num_turns)
    system = Drawn(draws(_SYSTEM_TOKENS, shape.seed, "system"), _TASK)

    def make(number: int) -> Conversation:
        chance = random.Random(f"{shape.seed}/agent/{number}")  # noqa: S311 - no secret
        turns = []
        for turn in range(num_turns):
            result = draws(result_tokens, shape.seed, "result", number, turn)
            prompt = Drawn(result, "Result: " if turn else "Do this task: ")
            fields = {"tools": list(TOOLS), "tool_choice": _choice(turn)}
            think_s = chance.uniform(*_THINK_S) if turn else 0.0
            turns.append(Turn(prompt, max_tokens, fields, think_s=think_s, is_result=turn > 0))
        return (replace(turns[0], system=system), *turns[1:])

    shaped = {
        "turns": num_turns,
        "context_tokens": context_tokens,
        "result_tokens": result_tokens,
        "max_tokens": max_tokens,
    }
    plain = of_one_lane("agentic", shape, 4, make, shaped=shaped, endpoint="chat", per_worker=1)
    return replace(plain, ends_itself=True)


def _choice(turn: int) -> str | dict[str, Any]:
    if turn % 2:
        return "auto"
    name = TOOLS[turn // 2 % len(TOOLS)]["function"]["name"]
    return {"type": "function", "function": {"name": name}}


#: Name to description and constructor.
AGENTS: dict[str, Preset] = {
    "agentic": ("four agents of 20 turns with tools, contexts up to 8,000 tokens", _agentic),
}
