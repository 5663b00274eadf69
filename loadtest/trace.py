"""A workload from a file: JSON lines with requests and their times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson

from loadtest.workloads import Conversation, Drawn, Lane, Shape, Turn, Verbatim, Workload, draws

_KEYS = {"at_s", "prompt", "messages", "prompt_tokens", "max_tokens"}
_DEFAULT_MAX_TOKENS = 128


class TraceError(ValueError):
    """A trace that cannot be played; the message names the line."""


def read_trace(path: Path, shape: Shape, speed: float = 1.0) -> Workload:
    """Return the workload a file holds, played `speed` times as fast. Raises `TraceError`.

    Each line has `at_s`, `max_tokens`, and one of `prompt` (text or token ids), `messages`, or
    `prompt_tokens` (so many words, where the words themselves are not known).
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror}") from error
    asked: list[tuple[float, Turn]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                asked.append(_asked(orjson.loads(line), shape, number))
            except (ValueError, TypeError) as error:
                raise TraceError(f"{path}:{number}: {error}") from error
    if not asked:
        raise TraceError(f"{path}: holds no request")
    asked.sort(key=lambda one: one[0])
    asked = asked[: shape.num_conversations]
    is_chat = {_is_chat(turn) for _, turn in asked} - {None}
    if len(is_chat) > 1:
        raise TraceError(f"{path}: mixes prompts with messages; they are asked at different routes")
    began_s = asked[0][0]

    def make(index: int) -> Conversation:
        return (asked[index % len(asked)][1],)

    return Workload(
        "trace",
        (Lane("all", shape.concurrency or 1, make),),
        num_conversations=len(asked),
        endpoint="chat" if True in is_chat else shape.endpoint or "completions",
        due_s=tuple((at_s - began_s) / speed for at_s, _ in asked),
        shape={"trace": path.name, "speed": speed},
    )


def _asked(line: Any, shape: Shape, number: int) -> tuple[float, Turn]:  # noqa: ANN401 - any JSON
    if not isinstance(line, dict):
        raise ValueError("must be an object")  # noqa: TRY004 - one kind of error for all lines
    if unknown := sorted(line.keys() - _KEYS):
        raise ValueError(f"{unknown[0]} is unknown; known are {', '.join(sorted(_KEYS))}")
    contents = [name for name in ("prompt", "messages", "prompt_tokens") if name in line]
    if len(contents) != 1:
        raise ValueError("needs one of prompt, messages and prompt_tokens")
    at_s = line.get("at_s")
    if not isinstance(at_s, int | float) or isinstance(at_s, bool):
        raise ValueError("at_s must be a number of seconds")  # noqa: TRY004 - see above
    max_tokens = shape.max_tokens or line.get("max_tokens", _DEFAULT_MAX_TOKENS)
    if not _is_positive(max_tokens):
        raise ValueError("max_tokens must be a whole number above 0")
    content = line[contents[0]]
    if contents[0] == "prompt_tokens":
        if not _is_positive(content):
            raise ValueError("prompt_tokens must be a whole number above 0")
        return at_s, Turn(Drawn(draws(content, shape.seed, "trace", number)), max_tokens)
    _require(content, contents[0])
    return at_s, Turn(Verbatim(content), max_tokens)


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _require(content: object, name: str) -> None:
    if name == "messages":
        if isinstance(content, list) and content and all(isinstance(m, dict) for m in content):
            return
        raise ValueError("messages must be a list of objects")
    is_ids = isinstance(content, list) and content and all(type(one) is int for one in content)
    if not is_ids and not isinstance(content, str):
        raise ValueError("prompt must be text or a list of token ids")


def _is_chat(turn: Turn) -> bool | None:
    """Return the route that a turn needs; None if both are possible."""
    if isinstance(turn.prompt, Drawn):
        return None
    content = turn.prompt.content
    return isinstance(content, list) and isinstance(content[0], dict)
