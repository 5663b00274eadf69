"""Anthropic's client and the real daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest

pytestmark = pytest.mark.e2e

_MODEL = "SmolLM2-135M-Instruct"
_QUESTION: Any = {"role": "user", "content": "What is the capital of France?"}
_ASKED: dict[str, Any] = {
    "model": _MODEL,
    "max_tokens": 24,
    "messages": [_QUESTION],
    "extra_body": {"temperature": 0},
}


@pytest.fixture
def client(daemon: Any) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=daemon.url, api_key="none", max_retries=0) as found:
        yield found


def text_of(message: Any) -> str:
    [block] = message.content
    assert block.type == "text"
    text: str = block.text
    return text


def test_a_message_streams_and_says_the_same_as_unstreamed(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**_ASKED)
    with client.messages.stream(**_ASKED) as stream:
        texts = list(stream.text_stream)
        message = stream.get_final_message()
    assert "Paris" in text_of(whole)
    assert "".join(texts) == text_of(whole) == text_of(message)
    assert len(texts) > 1
    assert whole.stop_reason == message.stop_reason == "end_turn"
    assert whole.usage.output_tokens == message.usage.output_tokens


def test_the_asynchronous_client_agrees(daemon: Any, client: anthropic.Anthropic) -> None:
    async def ask() -> str:
        async with (
            anthropic.AsyncAnthropic(base_url=daemon.url, api_key="none", max_retries=0) as own,
            own.messages.stream(**_ASKED) as stream,
        ):
            return "".join([text async for text in stream.text_stream])

    assert asyncio.run(ask()) == text_of(client.messages.create(**_ASKED))


def test_a_beginning_is_gone_on_with_up_to_a_stop_sequence(client: anthropic.Anthropic) -> None:
    beginning: Any = {"role": "assistant", "content": "The capital of France is"}
    asked = _ASKED | {"messages": [_QUESTION, beginning], "stop_sequences": ["xyz", "."]}
    message = client.messages.create(**asked)
    assert text_of(message).strip().startswith("Paris")
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", ".")
    assert "." not in text_of(message)


def test_tokens_are_counted_as_they_are_used_and_found_again(client: anthropic.Anthropic) -> None:
    system = "You are a brief archivist who answers in few words. " * 40
    prompt: dict[str, Any] = {"model": _MODEL, "messages": [_QUESTION], "system": system}
    total = client.messages.count_tokens(**prompt).input_tokens
    first, second = (client.messages.create(**prompt, max_tokens=2).usage for _ in range(2))
    for usage in (first, second):
        read, created = usage.cache_read_input_tokens, usage.cache_creation_input_tokens
        assert read is not None
        assert created is not None
        assert usage.input_tokens + read + created == total > 400
    assert (first.cache_creation_input_tokens or 0) > 400
    assert second.cache_creation_input_tokens == 0
    assert (second.cache_read_input_tokens or 0) > total - 17


def test_a_limit_beyond_the_context_is_no_error(client: anthropic.Anthropic) -> None:
    message = client.messages.create(**_ASKED | {"max_tokens": 20_000})
    assert "Paris" in text_of(message)
    assert message.stop_reason == "end_turn"


def test_errors_are_the_clients_own(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(**_ASKED | {"extra_body": {"temperature": 1.5}})
    with pytest.raises(anthropic.NotFoundError, match="claude"):
        client.messages.create(**_ASKED | {"model": "claude"})
    image: Any = {"role": "user", "content": [{"type": "image", "source": {}}]}
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.1\.content\.0.*'image'"):
        client.messages.create(**_ASKED | {"messages": [_QUESTION, image]})
    tool: Any = {"name": "an add", "input_schema": {"type": "object"}}
    with pytest.raises(anthropic.BadRequestError, match=r"tools\.0\.name"):
        client.messages.create(**_ASKED, tools=[tool])


def test_a_wrong_key_is_an_authentication_error(start_tiny: Callable[..., Any]) -> None:
    with (
        start_tiny("--api-key", "sesame") as daemon,
        anthropic.Anthropic(base_url=daemon.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError, match="key") as caught,
    ):
        stranger.messages.create(**_ASKED)
    assert caught.value.type == "authentication_error"
