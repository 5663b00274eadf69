"""Structured output of the real daemon with the real model, through the official client."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

pytestmark = pytest.mark.e2e

_MODEL = "SmolLM2-135M-Instruct"
_QUESTION: list[Any] = [{"role": "user", "content": "Invent a person."}]
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "city": {"enum": ["Berlin", "Rome", "Oslo"]},
        "hobbies": {"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 3},
    },
    "required": ["name", "age", "city", "hobbies"],
    "additionalProperties": False,
}
_FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "person", "strict": True, "schema": _PERSON},
}
_TOOLS: Any = [{"type": "function", "function": {"name": "save", "parameters": _PERSON}}]


@pytest.fixture(scope="module")
def api(daemon: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def _ask(api: openai.OpenAI, **more: Any) -> Any:
    return api.chat.completions.create(
        model=_MODEL, messages=_QUESTION, max_tokens=250, seed=1, **more
    )


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_satisfies_its_schema(api: openai.OpenAI, temperature: float) -> None:
    answer = _ask(api, response_format=_FORMAT, temperature=temperature, n=2)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), _PERSON)


def test_a_call_that_is_insisted_on_satisfies_its_schema(api: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "function": {"name": "save"}}
    [answer] = _ask(api, tools=_TOOLS, tool_choice=choice).choices
    [call] = answer.message.tool_calls
    assert call.function.name == "save"
    jsonschema.validate(json.loads(call.function.arguments), _PERSON)


def test_an_engine_that_is_killed_on_the_way_changes_no_form(
    start_daemon: Any, smollm2_file: Path
) -> None:
    del smollm2_file  # It is fetched by now.
    with start_daemon() as daemon:
        pid = daemon.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        [engine] = [
            child
            for child in children
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as api:
            text, has_killed = "", False
            for chunk in _ask(api, response_format=_FORMAT, stream=True):
                text += chunk.choices[0].delta.content or ""
                if len(text) > 5 and not has_killed:
                    has_killed = True
                    os.kill(int(engine), signal.SIGKILL)
        assert has_killed
        jsonschema.validate(json.loads(text), _PERSON)
