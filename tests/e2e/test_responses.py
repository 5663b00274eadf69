"""The Responses API of the real daemon, through the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from waiting import wait_until

pytestmark = pytest.mark.e2e

_MODEL = "SmolLM2-135M-Instruct"
_QUESTION = "What is the capital of France?"


@pytest.fixture
def client(daemon: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def test_a_response_says_what_a_chat_says(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=_MODEL, input=_QUESTION, temperature=0, max_output_tokens=24
    )
    chat = client.chat.completions.create(
        model=_MODEL,
        messages=[{"role": "user", "content": _QUESTION}],
        temperature=0,
        max_tokens=24,
    )
    assert response.status == "completed"
    assert "Paris" in response.output_text
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.total_tokens == chat.usage.total_tokens


def test_the_stream_helper_ends_with_what_is_stored(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": _MODEL, "input": _QUESTION, "temperature": 0}
    with client.responses.stream(**asked) as stream:
        text = "".join(
            event.delta for event in stream if event.type == "response.output_text.delta"
        )
        final = stream.get_final_response()
    stored = client.responses.retrieve(final.id)
    assert final.output_text == stored.output_text == text
    assert final.usage == stored.usage
    assert final.to_dict()["octavo"] == stored.to_dict()["octavo"]
    client.responses.delete(final.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(final.id)


def test_turns_go_on_and_reuse_what_was_computed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": _MODEL, "temperature": 0, "max_output_tokens": 24}
    first = client.responses.create(input=_QUESTION, **asked)
    previous = first
    for question in ("And of Spain?", "And of Italy?"):
        response = client.responses.create(
            input=question, previous_response_id=previous.id, **asked
        )
        assert response.usage is not None
        assert previous.usage is not None
        cached = response.usage.input_tokens_details.cached_tokens
        # Every whole page of the turn before was there already.
        assert cached > previous.usage.input_tokens - 16
        previous = response
    listed = list(client.responses.input_items.list(previous.id, order="asc"))
    texts = [json.loads(item.to_json())["content"][0]["text"] for item in listed]
    assert texts[:3] == [_QUESTION, first.output_text, "And of Spain?"]
    assert len(texts) == 5


def test_errors_name_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model=_MODEL, input=_QUESTION, previous_response_id="resp_1")
    assert error.value.code == "previous_response_not_found"
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model=_MODEL, input=_QUESTION, background=True)
    assert error.value.param == "background"
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(model=_MODEL, input="word " * 9000)
    assert (error.value.param, error.value.code) == ("input", "context_length_exceeded")


def test_many_at_once_are_kept_apart(daemon: Any) -> None:
    async def ask_all() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="none") as client:

            async def ask(index: int) -> tuple[str, str]:
                asked: dict[str, Any] = {"model": _MODEL, "max_output_tokens": 8}
                async with client.responses.stream(input=f"Say {index}", **asked) as stream:
                    events = [event async for event in stream]
                created = events[0]
                assert created.type == "response.created"
                text = "".join(e.delta for e in events if e.type == "response.output_text.delta")
                return text, (await client.responses.retrieve(created.response.id)).output_text

            return list(await asyncio.gather(*(ask(index) for index in range(16))))

    assert all(told == stored for told, stored in asyncio.run(ask_all()))


def test_a_client_that_leaves_frees_its_pages(daemon: Any, client: openai.OpenAI) -> None:
    kept = daemon.metric("octavo_stored_responses")
    with client.responses.create(
        model=_MODEL,
        input="Tell a long story.",
        stream=True,
        extra_body={"ignore_eos": True},
    ) as stream:
        while next(stream).type != "response.output_text.delta":
            pass
    wait_until(lambda: daemon.metric("octavo_num_requests_running") == 0, daemon.log)
    assert daemon.metric("octavo_stored_responses") == kept
