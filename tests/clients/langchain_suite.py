"""langchain-openai, in the clients' own environment (see `test_langchain.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

QUESTION = "What is the capital of Japan?"


def weather_in(city: str) -> str:
    """Return the weather in a city."""
    return "snowy" if city == "Oslo" else "sunny"


WEATHER = StructuredTool.from_function(weather_in, name="get_weather")


@pytest.fixture
def chat(served: Any) -> Callable[..., Any]:
    """Make chat models: `chat(**settings)`."""

    def make(**settings: Any) -> Any:
        known = {"base_url": served.base_url, "api_key": served.key, "model": served.model}
        return ChatOpenAI(
            **known | {"temperature": 0, "max_retries": 0, "max_tokens": 24} | settings
        )

    return make


@pytest.fixture
def guarded_chat(guarded: Any) -> Any:
    return ChatOpenAI(
        base_url=guarded.base_url,
        api_key=guarded.key,
        model=guarded.model,
        temperature=0,
        max_retries=0,
        max_tokens=40,
    )


def test_an_answer_and_what_is_told_with_it(chat: Callable[..., Any]) -> None:
    answer = chat().invoke(QUESTION)
    assert "Tokyo" in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 3
    again = chat().invoke(QUESTION)
    cached = again.usage_metadata["input_token_details"]["cache_read"]
    assert cached > again.usage_metadata["input_tokens"] - 17


def test_a_stream_with_usage(chat: Callable[..., Any]) -> None:
    chunks = list(chat(stream_usage=True).stream(QUESTION))
    whole = sum(chunks[1:], start=chunks[0])
    assert len(chunks) > 2
    assert "Tokyo" in whole.content
    assert whole.usage_metadata["output_tokens"] > 3
    assert whole.response_metadata["finish_reason"] == "stop"


def test_a_chain_over_a_conversation(chat: Callable[..., Any]) -> None:
    prompt = ChatPromptTemplate.from_messages(
        [("system", "You are {manner}."), ("placeholder", "{before}"), ("user", "{ask}")]
    )
    chain = prompt | chat() | StrOutputParser()
    before = [HumanMessage(QUESTION), AIMessage("The capital of Japan is Tokyo.")]
    given = {"manner": "brief", "before": before, "ask": "And of Italy?"}
    assert "Rome" in "".join(chain.stream(given))


def test_settings_are_honoured(chat: Callable[..., Any]) -> None:
    assert "Tokyo" not in chat(stop=["Tokyo"]).invoke(QUESTION).content
    cut = chat(max_tokens=3).invoke(QUESTION)
    assert cut.response_metadata["finish_reason"] == "length"
    random = chat(temperature=1, seed=5)
    random.invoke(QUESTION)  # From now on the prompt is cached: cold and warm differ by rounding.
    assert random.invoke(QUESTION).content == random.invoke(QUESTION).content
    detailed = chat(logprobs=True, top_logprobs=2).invoke(QUESTION)
    tokens = detailed.response_metadata["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)


def test_sixteen_in_a_batch(chat: Callable[..., Any]) -> None:
    asked = [f"Say only the number {i}." for i in range(16)]
    answers = chat(max_tokens=12).batch(asked, config={"max_concurrency": 16})
    assert len(answers) == 16
    assert all(answer.usage_metadata["output_tokens"] > 0 for answer in answers)


def test_async_streams_side_by_side(chat: Callable[..., Any]) -> None:

    async def read(country: str) -> str:
        stream = chat().astream(f"What is the capital of {country}?")
        return "".join([chunk.content async for chunk in stream])

    async def read_all() -> list[str]:
        return list(await asyncio.gather(*map(read, ["Japan", "Greece", "England"])))

    told = asyncio.run(read_all())
    assert [
        city in text for city, text in zip(["Tokyo", "Athens", "London"], told, strict=True)
    ] == [True] * 3


def test_completions(served: Any) -> None:
    complete = OpenAI(
        base_url=served.base_url,
        api_key=served.key,
        model=served.model,
        temperature=0,
        max_tokens=6,
        max_retries=0,
    )
    assert complete.invoke("1, 2, 3, 4,").startswith(" 5, 6")
    assert "".join(complete.stream("1, 2, 3, 4,")).startswith(" 5, 6")


def test_tools_there_and_back(guarded_chat: Any) -> None:
    model = guarded_chat.bind_tools([WEATHER])
    messages: list[Any] = [
        SystemMessage("You are brief."),
        HumanMessage("What is the weather in Oslo?"),
    ]
    asked = model.invoke(messages)
    assert [(call["name"], call["args"]) for call in asked.tool_calls] == [
        ("get_weather", {"city": "Oslo"})
    ]
    first, *others = model.stream(messages)
    streamed = sum(others, start=first)
    assert streamed.tool_calls[0]["args"] == {"city": "Oslo"}
    result = WEATHER.invoke(asked.tool_calls[0])
    assert isinstance(result, ToolMessage)
    answer = model.invoke([*messages, asked, result])
    assert answer.tool_calls == []
    assert "snow" in answer.content


def test_faults_come_as_the_clients_own_classes(chat: Callable[..., Any], served: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature"):
        chat(temperature=9).invoke(QUESTION)
    with pytest.raises(openai.NotFoundError, match="gpt-x"):
        chat(model="gpt-x").invoke(QUESTION)
    with pytest.raises(ContextOverflowError, match="8192"):
        chat().invoke("word " * 9000)
    embed = OpenAIEmbeddings(
        base_url=served.base_url,
        api_key=served.key,
        model=served.model,
        check_embedding_ctx_length=False,
    )
    with pytest.raises(openai.NotFoundError, match="no route /v1/embeddings"):
        embed.embed_query("x")


def test_a_wrong_key_and_a_full_queue(guarded_chat: Any, fill: Callable[[], Any]) -> None:
    url = guarded_chat.openai_api_base
    with pytest.raises(openai.AuthenticationError):
        ChatOpenAI(base_url=url, api_key="wrong", model="x", max_retries=0).invoke("x")
    with fill(), pytest.raises(openai.RateLimitError):
        guarded_chat.invoke("x")


def test_leaving_a_stream_frees_what_it_held(chat: Callable[..., Any], served: Any) -> None:
    model = chat(max_tokens=8000, extra_body={"ignore_eos": True})
    stream = model.stream("Once")
    next(stream)
    assert served.metrics()["num_requests_running"] == 1
    stream.close()
    served.check_idle()
