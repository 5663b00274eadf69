"""Servers of a model with scripted outputs, and the official client to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from pydantic import TypeAdapter

import event_streams
from server.responses import response_models

#: Writes calls, reasoning and contents by role, so that a test can check the prompt.
HERMES = """\
{%- if tools %}{{ tools | tojson }} <tool_call>{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}
{%- for call in m.tool_calls or [] %}{{ call.id }}:{{ call.function.arguments.a }}{% endfor %}
{{- m.tool_call_id }}{% endfor %}"""
THINKING = HERMES + "{# </think> #}<think>\n"

Speaking = Callable[..., Any]


@pytest.fixture
def speaking(speaking: Speaking) -> Speaking:
    """Start a server with these outputs in turn; the model may reason before each."""

    def start(*outputs: str, thinks: bool = False, **more: Any) -> Any:
        return speaking(*outputs, **{"template": THINKING if thinks else HERMES} | more)

    return start


@pytest.fixture
def api_of() -> Callable[..., Any]:
    """Open the official client to a server."""

    @contextmanager
    def opened(live: Any, key: str = "none") -> Iterator[openai.OpenAI]:
        with openai.OpenAI(base_url=live.url + "/v1", api_key=key, max_retries=0) as api:
            yield api

    return opened


@pytest.fixture
def events_of() -> Callable[[str], list[dict[str, Any]]]:
    """Read a stream's events, each as it is documented and numbered without a gap."""

    def read(stream: str) -> list[dict[str, Any]]:
        events = event_streams.events_of(stream.encode())
        for event in events:
            TypeAdapter(response_models.ResponseEvent).validate_python(event)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        return events

    return read


@pytest.fixture
def prompt_of() -> Callable[..., str]:
    """Return the prompt of the latest request as text."""

    def read(live: Any) -> str:
        token_ids = live.client.requests[-1].prompt_token_ids
        text: str = live.text.tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    return read
