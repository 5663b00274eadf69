"""A served model with a scripted output, and Anthropic's own client to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import anthropic
import pytest

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


@pytest.fixture
def saying(speaking: Callable[..., Any]) -> Callable[..., Any]:
    """Start a server with a scripted `output` and a template; 5 tokens of prompts are cached."""

    def start(output: str, template: str = "hermes", **more: Any) -> Any:
        return speaking(output, template=TEMPLATES[template], cached_tokens=5, **more)

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
    """Return the prompt of the latest request as text."""

    def read(live: Any) -> str:
        token_ids = live.client.requests[-1].prompt_token_ids
        shown: str = live.text.tokenizer.decode(token_ids, skip_special_tokens=False)
        return shown

    return read
