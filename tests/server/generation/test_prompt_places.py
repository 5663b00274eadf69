"""The message that a place in the prompt belongs to, whatever the template does to messages."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.generation.generation_spec import Conversation, PromptMessage, ToolSpec
from server.generation.prompt_places import path_at
from server.text.template import ChatTemplate

PLAIN = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
TRIMMED = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}[assistant]"
PARTS = (
    "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p.text }};{% endfor %}"
    "{% endfor %}"
)
TOOLS = "{% for t in tools %}{{ t.function.name }}{% endfor %}" + PLAIN
CALLS = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.id }}{% endfor %}"
    "|{% endfor %}"
)
PICKY = PLAIN + "{% if messages[0].content != 'x' %}{{ raise_exception('no') }}{% endif %}"
CHANGING = "{% for m in messages %}{{ m.content | length }}{{ m.content }}{% endfor %}"

texts = st.text(st.sampled_from("ab [user]\n"), max_size=6)
roles = st.sampled_from(("user", "assistant"))


def chat_of(*contents: Any, tools: tuple[ToolSpec, ...] = (), **fields: Any) -> Conversation:
    messages = [
        PromptMessage({"role": "user", "content": content, **fields}, ("messages", index))
        for index, content in enumerate(contents)
    ]
    return Conversation(messages=messages, tools=tools, variables={}, num_bytes=0)


class Rendered:
    """A chat under a template."""

    def __init__(self, source: str, chat: Conversation) -> None:
        self._template = ChatTemplate(
            {"default": source}, special_tokens={}, now=lambda: datetime.now(tz=UTC)
        )
        self._tools = [tool.for_template() for tool in chat.tools]
        self._chat = chat
        self.prompt = self._render([dict(message.fields) for message in chat.messages])

    def _render(self, messages: list[dict[str, Any]]) -> str:
        return self._template.render(messages, tools=self._tools or None)

    def path(self, place: int) -> str:
        return ".".join(map(str, path_at(self._chat, self._render, self.prompt[:place])))


@settings(max_examples=60)
@given(st.lists(texts, min_size=1, max_size=5), st.sampled_from((PLAIN, TRIMMED)))
def test_each_character_of_a_content_leads_to_its_message(contents: list[str], source: str) -> None:
    rendered = Rendered(source, chat_of(*contents))
    place = len("<s>")
    for index, content in enumerate(contents):
        shown = content.strip() if source is TRIMMED else content
        place += len("[user]")
        for offset in range(len(shown)):
            assert rendered.path(place + offset) == f"messages.{index}.content"
        assert rendered.path(place - 1) == "messages", "the template's own"
        place += len(shown) + 1


def test_all_parts_of_a_content_are_of_one_message() -> None:
    parts = [{"type": "text", "text": text} for text in ("ab", "cd")]
    rendered = Rendered(PARTS, chat_of("x", parts))
    assert rendered.prompt == "[user]x;[user]ab;cd;"
    places = [rendered.path(rendered.prompt.index(letter)) for letter in "xabcd"]
    assert places == ["messages.0.content"] + ["messages.1.content"] * 4


def test_tools_and_calls_have_paths_of_their_own() -> None:
    tool = ToolSpec("add", None, None, ("tools", 0), ("tools", 0))
    assert Rendered(TOOLS, chat_of("x", tools=(tool,))).path(1) == "tools"
    called = chat_of("x", "y", tool_calls=[{"id": "call"}])
    rendered = Rendered(CALLS, called)
    assert rendered.path(rendered.prompt.index("call")) == "messages.0"


@pytest.mark.parametrize(("source", "place"), [(PICKY, 9), (CHANGING, 1), (PLAIN, 999)])
def test_an_unknown_place_leads_to_the_conversation(source: str, place: int) -> None:
    assert Rendered(source, chat_of("x")).path(place) == "messages"


@pytest.mark.parametrize(
    "content", ["a\ue002b", "a\ue003b", "a\ue004b", "\ue0021", "\ue0029\ue003"]
)
def test_marks_in_a_content_do_no_harm(content: str) -> None:
    rendered = Rendered(PLAIN, chat_of(content, "y"))
    assert rendered.path(rendered.prompt.index("y")) in {"messages", "messages.1.content"}


def test_a_system_prompt_of_its_own_field_is_that_field() -> None:
    chat = Conversation(
        messages=[PromptMessage({"role": "system", "content": "be brief"}, ("system",))],
        variables={},
        num_bytes=0,
    )
    rendered = Rendered(PLAIN, chat)
    assert rendered.path(rendered.prompt.index("brief")) == "system"
