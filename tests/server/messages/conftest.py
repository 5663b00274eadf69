"""A served model that says what a test says, and Anthropic's own client to it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import anthropic
import pytest

from scheduler.client import Delta, FinishReason, Started
from server.text.load import ModelText
from server.text.template import ChatTemplate

#: Shows all that reaches it; knows calls as Hermes does.
HERMES = """\
{%- if tools %}{{ tools | tojson }} <tool_call>{% endif %}
{%- for m in messages %}[{{ m.role }}]
{%- if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}={{ call.function.arguments.a }}
{%- endfor %}{% if m.tool_call_id %}<{{ m.name }}:{{ m.tool_call_id }}>{% endif %}{% endfor %}
{%- if add_generation_prompt %}[answer]{% endif %}"""
TEMPLATES = {
    "hermes": HERMES,
    "mistral": HERMES.replace("<tool_call>", "[TOOL_CALLS]"),
    "thinking": HERMES + "{# </think> #}<think>\n",
    "switched": HERMES + "{% if enable_thinking %}<think>{% endif %}",
    "effort": HERMES + "{{ reasoning_effort }}",
    "strict": HERMES + "{% if messages[0].role == 'system' %}"
    "{{ raise_exception('no system: ' ~ messages[0].content) }}{% endif %}",
}


def _script(output: str, width: int, reason: FinishReason) -> Any:
    async def tell(*_: object) -> AsyncGenerator[Delta, None]:
        token_ids = tuple(output.encode())
        started: Started | None = Started(0, queue_s=0.0, cached_tokens=5, miss_reason="x")
        for start in range(0, len(token_ids), width):
            yield Delta(token_ids[start : start + width], started=started)
            started = None
        yield Delta(finish_reason=reason, started=started)

    return tell


@pytest.fixture
def saying(scripted: Callable[..., Any], text: ModelText) -> Callable[..., Any]:
    """Start a server whose model says `output`, `width` tokens at a time."""

    def start(
        output: str,
        template: str = "hermes",
        width: int = 1,
        reason: FinishReason = FinishReason.STOP,
    ) -> Any:
        words = ChatTemplate(
            {"default": TEMPLATES[template]}, special_tokens={}, now=lambda: datetime.now(tz=UTC)
        )
        script = _script(output, width, reason)
        return scripted(script, words=replace(text, template=words))

    return start


@pytest.fixture
def client_of() -> Iterator[Callable[[Any], anthropic.Anthropic]]:
    """Anthropic's client to a server."""
    with ExitStack() as stack:
        yield lambda live: stack.enter_context(
            anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)
        )


@pytest.fixture
def prompt_of() -> Callable[[Any], str]:
    """What the model was last asked, as text."""

    def read(live: Any) -> str:
        token_ids = live.client.requests[-1].prompt_token_ids
        shown: str = live.text.tokenizer.decode(token_ids, skip_special_tokens=False)
        return shown

    return read
