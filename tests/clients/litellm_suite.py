"""LiteLLM, in the clients' own environment (see `test_litellm.py`)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import litellm
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(params=["openai", "hosted_vllm"])
def known_as(request: pytest.FixtureRequest, served: Any) -> dict[str, Any]:
    """The names of the server in LiteLLM: as one of OpenAI's kind, or as a vLLM."""
    return _known(served, request.param)


@pytest.fixture
def known(served: Any) -> dict[str, Any]:
    return _known(served, "openai")


@pytest.fixture
def guarded_known(guarded: Any) -> dict[str, Any]:
    return _known(guarded, "openai")


def _known(server: Any, provider: str) -> dict[str, Any]:
    return {
        "model": f"{provider}/{server.model}",
        "api_base": server.base_url,
        "api_key": server.key,
        "temperature": 0,
        "max_tokens": 24,
        "num_retries": 0,
        "max_retries": 0,
    }


def test_an_answer_whole_and_streamed(known_as: dict[str, Any]) -> None:
    whole = litellm.completion(**known_as, messages=QUESTION)
    assert "Tokyo" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    stream = litellm.completion(
        **known_as, messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert len(chunks) > 2
    rebuilt = litellm.stream_chunk_builder(chunks, messages=QUESTION)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content
    assert rebuilt.usage.completion_tokens == whole.usage.completion_tokens
    assert rebuilt.usage.prompt_tokens == whole.usage.prompt_tokens
    assert rebuilt.usage.prompt_tokens_details.cached_tokens > whole.usage.prompt_tokens - 17


def test_settings_are_honoured(known: dict[str, Any]) -> None:
    stopped = litellm.completion(**known, messages=QUESTION, stop=["Tokyo"])
    assert "Tokyo" not in stopped.choices[0].message.content
    several = litellm.completion(
        **known | {"temperature": 1, "max_tokens": 12}, messages=QUESTION, n=3, seed=3
    )
    assert len({choice.message.content for choice in several.choices}) > 1
    detailed = litellm.completion(**known, messages=QUESTION, logprobs=True, top_logprobs=2)
    tokens = detailed.choices[0].logprobs.content
    assert "".join(token.token for token in tokens).startswith("The capital of Japan")


def test_completions(known: dict[str, Any]) -> None:
    answer = litellm.text_completion(**known, prompt="1, 2, 3, 4,")
    assert answer.choices[0].text.startswith(" 5, 6")


def test_sixteen_at_once(known: dict[str, Any]) -> None:

    async def ask_all() -> list[Any]:
        asked = known | {"max_tokens": 8}
        return await asyncio.gather(
            *(
                litellm.acompletion(
                    **asked, messages=[{"role": "user", "content": f"What is {i} + 1?"}]
                )
                for i in range(16)
            )
        )

    answers = asyncio.run(ask_all())
    assert all(answer.choices[0].message.content for answer in answers)
    assert len({answer.id for answer in answers}) == 16


def test_tools_there_and_back(guarded_known: dict[str, Any]) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    asked = guarded_known | {"tools": [WEATHER], "max_tokens": 40}
    [choice] = litellm.completion(**asked, messages=messages).choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Oslo"},
    )
    chunks = list(litellm.completion(**asked, messages=messages, stream=True))
    [streamed] = litellm.stream_chunk_builder(chunks, messages=messages).choices
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments
    messages += [choice.message, {"role": "tool", "tool_call_id": call.id, "content": "snowy"}]
    [answer] = litellm.completion(**asked, messages=messages).choices
    assert "snow" in answer.message.content


def test_faults_come_as_the_clients_own_classes(known_as: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**known_as | {"temperature": 9}, messages=QUESTION)
    provider = known_as["model"].partition("/")[0]
    with pytest.raises(litellm.NotFoundError, match="gpt-x"):
        litellm.completion(**known_as | {"model": f"{provider}/gpt-x"}, messages=QUESTION)
    # Not just any bad request: by this class a router knows to try a model with more room.
    with pytest.raises(litellm.ContextWindowExceededError, match=r"8192 tokens.*has 90\d\d"):
        litellm.completion(**known_as, messages=[{"role": "user", "content": "word " * 9000}])
    with pytest.raises(litellm.NotFoundError, match="no route /v1/embeddings"):
        litellm.embedding(
            model=known_as["model"],
            api_base=known_as["api_base"],
            api_key=known_as["api_key"],
            input=["x"],
            max_retries=0,
        )


def test_a_wrong_key_and_a_full_queue(
    guarded_known: dict[str, Any], fill: Callable[[], Any]
) -> None:
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**guarded_known | {"api_key": "wrong"}, messages=QUESTION)
    with fill(), pytest.raises(litellm.RateLimitError):
        litellm.completion(**guarded_known, messages=QUESTION)


def test_a_timeout_frees_what_it_held(known: dict[str, Any], served: Any) -> None:
    asked = known | {"max_tokens": 8000, "extra_body": {"ignore_eos": True}}
    with pytest.raises(litellm.Timeout):
        litellm.completion(**asked, messages=QUESTION, timeout=0.3)
    served.check_idle()
