"""Every value that the official clients type is honoured, warned of, or refused with a reason."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal, NotRequired, Required, Union, get_args, get_origin

import pytest
import typing_extensions
from anthropic.types import message_create_params as messages
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chats
from openai.types.responses import response_create_params as responses

_TEMPLATE = "{% if tools %}<tool_call>{% endif %}{% for m in messages %}{{ m.role }}{% endfor %}"
_USER = {"role": "user", "content": "x"}
_TOOL = {"type": "function", "function": {"name": "f"}}
_REQUESTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (chats.CompletionCreateParamsBase, {"messages": [_USER]}),
    "/v1/completions": (completions.CompletionCreateParamsBase, {"prompt": "x"}),
    "/v1/responses": (responses.ResponseCreateParamsBase, {"input": "x"}),
    "/v1/messages": (messages.MessageCreateParamsBase, {"messages": [_USER], "max_tokens": 9}),
}
#: Unions of many kinds of objects: each kind has tests of its own.
_OBJECTS = {"messages", "input", "tools", "tool_choice", "functions", "mcp_servers", "model"}
#: Fields that these values need beside them.
_NEEDED: dict[str, dict[str, Any]] = {
    "function_call": {"tools": [_TOOL]},
    "stream_options": {"stream": True},
    "top_logprobs": {"logprobs": True},
}
_SAMPLES: dict[Any, Any] = {str: "x", int: 1024, float: 0.5, bool: True, object: {}}


def _bare(kind: Any) -> Any:
    while get_origin(kind) in {Required, NotRequired, typing.Annotated}:
        kind = get_args(kind)[0]
    return kind


def _fields(kind: Any) -> dict[str, Any]:
    hints: dict[str, Any] = typing_extensions.get_type_hints(kind, include_extras=True)
    return hints


def _is_object(kind: Any) -> bool:
    return typing_extensions.is_typeddict(kind)


def _values(kind: Any) -> Iterator[Any]:
    """Yield values of `kind` in which each enumerated one is at its place."""
    kind = _bare(kind)
    if get_origin(kind) is Literal:
        yield from get_args(kind)
    elif get_origin(kind) in {Union, types.UnionType}:
        for one in get_args(kind):
            yield from _values(one)
    elif _is_object(kind):
        least = _sample(kind)
        for name, inner in _fields(kind).items():
            for value in _values(inner):
                yield {**least, name: value}
    elif get_args(kind) and get_origin(kind) is not dict:
        yield from ([value] for value in _values(get_args(kind)[0]))


def _sample(kind: Any) -> Any:
    """Return the smallest value of `kind`."""
    kind = _bare(kind)
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    if get_origin(kind) in {Union, types.UnionType}:
        return _sample(get_args(kind)[0])
    if _is_object(kind):
        hints = _fields(kind)
        return {name: _sample(hints[name]) for name in sorted(kind.__required_keys__)}
    return _SAMPLES.get(kind, {} if get_origin(kind) is dict else [])


_CASES = [
    pytest.param(path, name, list(_values(kind)), id=f"{path}-{name}")
    for path, (model, _) in _REQUESTS.items()
    for name, kind in _fields(model).items()
    if name not in _OBJECTS and list(_values(kind))
]


@pytest.mark.parametrize(("path", "name", "values"), _CASES)
def test_no_value_is_unknown_here(
    speaking: Callable[..., Any], path: str, name: str, values: list[Any]
) -> None:
    live = speaking("y", template=_TEMPLATE)
    for value in values:
        answer = live.post(path, **_REQUESTS[path][1], **_NEEDED.get(name, {}), **{name: value})
        assert answer.status_code in {200, 400}, (value, answer.text)
        # Pydantic's words for an unforeseen value.
        assert "Input should be" not in answer.text, (value, answer.text)


def test_there_are_values_to_try() -> None:
    assert {"reasoning_effort", "verbosity", "include", "truncation", "thinking", "speed"} <= {
        case.values[1] for case in _CASES
    }
