"""No field of any object in a request is ignored silently, however deep the object lies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from server.generation.request_fields import Request
from server.messages.schemas import MessagesRequest
from server.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from server.responses.schemas import ResponsesRequest

_TEMPLATE = "{% if tools %}<tool_call>{% endif %}{% for m in messages %}{{ m.role }}{% endfor %}"
_MARK = {"mode": "explicit", "ttl": "30m"}
_USER = {
    "role": "user",
    "content": [{"type": "text", "text": "x", "prompt_cache_breakpoint": _MARK}],
}
_CACHE = {"mode": "explicit", "ttl": "30m", "prewarm": False}
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_SCHEMA = {"type": "object", "properties": {}}
_CUSTOM = {
    "type": "custom",
    "custom": {
        "name": "c",
        "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "a"}},
    },
}
_POLICY = {"type": "sinks", "window": 64, "sinks": 4}
#: Bodies that hold an object of each kind.
_BODIES: dict[str, tuple[type[Request], list[dict[str, Any]]]] = {
    "/v1/chat/completions": (
        ChatRequest,
        [
            {
                "messages": [
                    _USER,
                    {
                        "role": "assistant",
                        "content": [{"type": "refusal", "refusal": "no"}],
                        "tool_calls": [_CALL],
                    },
                    {"role": "tool", "tool_call_id": "1", "content": "y"},
                ],
                "tools": [{"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
                "stream_options": {"include_usage": True},
                "stream": True,
                "prompt_cache_options": _CACHE,
            },
            {
                "messages": [_USER],
                "prediction": {"type": "content", "content": [{"type": "text", "text": "x"}]},
            },
            {
                "messages": [_USER],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": _SCHEMA},
                },
            },
            {
                "messages": [_USER],
                "structured_outputs": {"choice": ["a"]},
                "kv_policy": _POLICY,
            },
            {
                "messages": [_USER],
                "tools": [_CUSTOM],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "custom", "custom": {"name": "c"}}],
                    },
                },
            },
        ],
    ),
    "/v1/completions": (
        CompletionRequest,
        [
            {
                "prompt": "x",
                "stream": True,
                "stream_options": {"include_usage": True},
                "kv_policy": _POLICY,
            }
        ],
    ),
    "/v1/responses": (
        ResponsesRequest,
        [
            {
                "input": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "input_text", "text": "x", "prompt_cache_breakpoint": _MARK}
                        ],
                    },
                    {
                        "type": "reasoning",
                        "id": "r",
                        "summary": [{"type": "summary_text", "text": "t"}],
                        "content": [{"type": "reasoning_text", "text": "t"}],
                    },
                    {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
                    {
                        "type": "function_call_output",
                        "call_id": "1",
                        "output": [{"type": "input_text", "text": "x"}],
                    },
                ],
                "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}],
                "tool_choice": {"type": "function", "name": "f"},
                "reasoning": {"effort": "low"},
                "text": {"verbosity": "low"},
                "prompt_cache_options": _CACHE,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
            {"input": "x", "text": {"format": {"type": "text"}}, "kv_policy": _POLICY},
            {
                "input": [
                    {"type": "custom_tool_call", "call_id": "1", "name": "c", "input": "x"},
                    {"type": "custom_tool_call_output", "call_id": "1", "output": "x"},
                ],
                "tools": [
                    {"type": "custom", "name": "c", "format": {"type": "text"}},
                    {
                        "type": "namespace",
                        "name": "n",
                        "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}],
                    },
                ],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "custom", "name": "c"}],
                },
            },
        ],
    ),
    "/v1/messages": (
        MessagesRequest,
        [
            {
                "max_tokens": 9,
                "system": [
                    {"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}},
                ],
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "x"}]},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "thinking", "thinking": "t"},
                            {"type": "redacted_thinking", "data": "t"},
                            {"type": "tool_use", "id": "1", "name": "f", "input": {}},
                        ],
                    },
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "tool_result",
                                "tool_use_id": "1",
                                "content": [{"type": "text", "text": "x"}],
                            }
                        ],
                    },
                ],
                "tools": [{"name": "f", "input_schema": _SCHEMA}],
                "tool_choice": {"type": "auto"},
                "thinking": {"type": "enabled", "budget_tokens": 1024},
                "output_config": {"effort": "low"},
                "metadata": {"user_id": "u"},
                "diagnostics": {"previous_message_id": "msg_1"},
                "kv_policy": _POLICY,
            }
        ],
    ),
}
_CHAT = _BODIES["/v1/chat/completions"][1][0]
_BODIES["/tokenize"] = (
    TokenizeRequest,
    [{"messages": _CHAT["messages"], "tools": [*_CHAT["tools"], _CUSTOM]}, {"prompt": "x"}],
)
_BODIES["/detokenize"] = (DetokenizeRequest, [{"tokens": [97]}])
#: Objects that mean something to others: a schema, arguments.
_FREE = {"parameters", "input_schema", "schema", "input"}


def _objects(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all objects with fields of ours."""
    inner: Iterator[tuple[str | int, Any]] = iter(())
    if "tool_choice" in path and path[-1] == "tools":
        return  # Names of tools; a client may repeat their definitions.
    if isinstance(value, dict):
        yield path
        inner = iter(value.items())
    elif isinstance(value, list):
        inner = iter(enumerate(value))
    for key, one in inner:
        if key not in _FREE or not isinstance(one, dict):
            yield from _objects(one, (*path, key))


_PLACES = [
    pytest.param(path, body, place, id=f"{path}-{'.'.join(map(str, place)) or 'body'}")
    for path, (_, bodies) in _BODIES.items()
    for body in bodies
    for place in _objects(body)
]


@pytest.mark.parametrize(("path", "body", "place"), _PLACES)
def test_an_unknown_field_is_warned_of_or_refused_by_its_path(
    speaking: Callable[..., Any], path: str, body: dict[str, Any], place: tuple[str | int, ...]
) -> None:
    live = speaking("y", template=_TEMPLATE)
    changed = json.loads(json.dumps(body))
    at = changed
    for key in place:
        at = at[key]
    at["new_one"] = 1
    answer = live.post(path, **changed)
    named = ".".join([*map(str, place), "new_one"])
    if answer.status_code == 400:
        assert answer.json()["error"]["param"] == named
        return
    assert answer.status_code == 200, answer.text
    assert f'"param":"{named}"' in answer.text


def _models(kind: Any, seen: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """Return the models that fields of `kind` may hold."""
    for inner in getattr(kind, "__args__", ()):
        _models(inner, seen)
    for inner in getattr(kind, "__metadata__", ()):
        _models(getattr(inner, "json_schema_input_type", None), seen)
    if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in seen:
        seen.add(kind)
        for field in kind.model_fields.values():
            _models(field.annotation, seen)
            for more in field.metadata:
                _models(getattr(more, "json_schema_input_type", None), seen)
    return seen


def _held(value: Any) -> Iterator[type[BaseModel]]:
    if isinstance(value, BaseModel):
        yield type(value)
        for name in type(value).model_fields:
            yield from _held(getattr(value, name))
    elif isinstance(value, list):
        for inner in value:
            yield from _held(inner)


@pytest.mark.parametrize("path", _BODIES)
def test_the_bodies_hold_an_object_of_each_kind(path: str) -> None:
    model, bodies = _BODIES[path]
    held = {kind for body in bodies for kind in _held(model.model_validate(body))}
    names = {kind.__name__ for kind in _models(model, set()) - held}
    # References to stored responses, fields that completions share with chats, and tools that
    # are left out with a warning.
    assert names <= {
        *(
            "ItemReference",
            "ResponseFormat",
            "NamedSchema",
            "StructuredOutputs",
            "HostedTool",
            "AnthropicTool",
        )
    }
