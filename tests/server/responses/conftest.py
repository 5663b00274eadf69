"""Servers whose model says what a test wants it to say, and the official client to them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import openai
import pytest

from scheduler.client import Delta, FinishReason, GenerateRequest, TokenLogprobs
from server.responses import documents
from server.text.load import ModelText
from server.text.template import ChatTemplate

#: Writes calls, reasoning and what the roles said, so that a test sees what the model was told.
HERMES = """\
{%- if tools %}{{ tools | tojson }} <tool_call>{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}
{%- for call in m.tool_calls or [] %}{{ call.id }}:{{ call.function.arguments.a }}{% endfor %}
{{- m.tool_call_id }}{% endfor %}"""
THINKING = HERMES + "{# </think> #}<think>\n"

Speaking = Callable[..., Any]


def _script(outputs: list[str], width: int, reason: FinishReason) -> Any:
    left = list(outputs)

    async def tell(_: Any, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        token_ids = tuple((left.pop(0) if len(left) > 1 else left[0]).encode())
        for start in range(0, len(token_ids), width):
            some = token_ids[start : start + width]
            logprobs: tuple[TokenLogprobs, ...] = ()
            if request.params.logprobs is not None:
                logprobs = tuple(TokenLogprobs(token, -1.0, 1, ()) for token in some)
            yield Delta(some, logprobs)
        yield Delta(finish_reason=reason)

    return tell


@pytest.fixture
def speaking(scripted: Callable[..., Any], text: ModelText) -> Speaking:
    """Start a server whose model says `outputs` in turn, `width` tokens at a time."""

    def start(
        *outputs: str,
        thinks: bool = False,
        width: int = 1,
        reason: FinishReason = FinishReason.STOP,
        **section: Any,
    ) -> Any:
        words = ChatTemplate(
            {"default": THINKING if thinks else HERMES},
            special_tokens={},
            now=lambda: datetime.now(tz=UTC),
        )
        script = _script(list(outputs), width, reason)
        return scripted(script, words=replace(text, template=words), **section)

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
        events = []
        for block in stream.strip().split("\n\n"):
            name, data = block.split("\n")
            event = json.loads(data.removeprefix("data: "))
            assert name == f"event: {event['type']}"
            documents.ResponseEvent.model_validate(event)
            events.append(event)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        return events

    return read


@pytest.fixture
def prompt_of() -> Callable[..., str]:
    """What the model was told in its last request."""

    def read(live: Any) -> str:
        token_ids = live.client.requests[-1].prompt_token_ids
        text: str = live.text.tokenizer.decode(token_ids, skip_special_tokens=False)
        return text

    return read
