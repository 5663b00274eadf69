"""Answers of a given form, by each client's own way to ask for them and to read them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.e2e

QUESTION: list[Any] = [{"role": "user", "content": "It snows in Oslo. Tell the weather as JSON."}]


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Oslo", "Rome"]
    sky: Literal["sunny", "rainy", "snowy"]
    is_cold: bool


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.base_url, api_key=served.key, max_retries=0) as found:
        yield found


@pytest.fixture
def guarded_client(guarded: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=guarded.base_url, api_key=guarded.key, max_retries=0) as found:
        yield found


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_is_parsed(client: Any, served: Any, temperature: float) -> None:
    asked: dict[str, Any] = {
        "model": served.model,
        "messages": QUESTION,
        "temperature": temperature,
        "response_format": Weather,
    }
    [choice] = client.chat.completions.parse(**asked).choices
    assert isinstance(choice.message.parsed, Weather)
    assert choice.finish_reason == "stop"
    with client.chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Weather)


def test_a_tool_that_must_be_called(guarded_client: Any, guarded: Any) -> None:
    tool = openai.pydantic_function_tool(Weather, name="tell_weather")
    asked: dict[str, Any] = {
        "model": guarded.model,
        "messages": QUESTION,
        "temperature": 1,
        "tools": [tool],
        "parallel_tool_calls": False,
    }
    named = {"type": "function", "function": {"name": "tell_weather"}}
    for choice in ("required", named):
        answer = guarded_client.chat.completions.parse(**asked, tool_choice=choice)
        [call] = answer.choices[0].message.tool_calls
        assert call.function.name == "tell_weather"
        assert isinstance(call.function.parsed_arguments, Weather)


def test_a_form_that_cannot_be_is_told(client: Any, served: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(
            model=served.model,
            messages=QUESTION,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "no such type"}},
            },
        )
    assert (error.value.param or "").startswith("response_format")


def test_node(run_suite: Callable[..., None]) -> None:
    run_suite("structured.mjs")
