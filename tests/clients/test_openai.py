"""The official client, against the real daemon. Runs under two major versions of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.e2e

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of Japan?"}]
#: Some of them are several tokens, and end in the middle of a character.
EMOJI_LINE = "👩‍🚀 naïve 漢字 🇫🇷 Ωμέγα\n"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture
def client(served: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=served.base_url, api_key=served.key, max_retries=0) as found:
        yield found


@pytest.fixture
def guarded_client(guarded: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=guarded.base_url, api_key=guarded.key, max_retries=0) as found:
        yield found


@pytest.fixture
def greedy(served: Any) -> dict[str, Any]:
    return {"model": served.model, "messages": QUESTION, "temperature": 0, "max_tokens": 24}


def test_the_model_is_listed_and_found(client: Any, served: Any) -> None:
    assert [model.id for model in client.models.list()] == [served.model]
    assert client.models.retrieve(served.model).owned_by
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-x")
    assert error.value.code == "model_not_found"


def test_a_chat_streams_and_says_the_same_as_unstreamed(
    client: Any, greedy: dict[str, Any]
) -> None:
    whole = client.chat.completions.create(**greedy)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**greedy, stream=True, stream_options=options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "Tokyo" in text
    assert text == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    # Asked a second time, every whole page of the prompt was there already.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > whole.usage.prompt_tokens - 17


def test_a_stream_tells_no_usage_unasked(client: Any, greedy: dict[str, Any]) -> None:
    chunks = list(client.chat.completions.create(**greedy, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"


def test_the_clients_own_stream_helper_reads_it(client: Any, greedy: dict[str, Any]) -> None:
    # Drafts may bring several tokens at a time.
    one_by_one = greedy | {"extra_body": {"speculation": False}}
    with client.chat.completions.stream(**one_by_one) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == final.choices[0].message.content
    assert len(deltas) > 3


def test_several_answers_whole_and_streamed(client: Any, greedy: dict[str, Any]) -> None:
    asked = greedy | {"n": 3, "temperature": 1, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**asked)
    assert len({choice.message.content for choice in whole.choices}) > 1
    assert whole.usage.completion_tokens == 3 * greedy["max_tokens"]
    streamed = ["", "", ""]
    reasons: list[tuple[int, str]] = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        [choice] = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            reasons.append((choice.index, choice.finish_reason))
    assert len(set(streamed)) > 1
    assert sorted(reasons) == [(index, "length") for index in range(3)]


def test_stop_and_length(client: Any, greedy: dict[str, Any]) -> None:
    [stopped] = client.chat.completions.create(**greedy, stop=["Tokyo"]).choices
    assert stopped.finish_reason == "stop"
    assert stopped.message.content.startswith("The capital")
    assert "Tokyo" not in stopped.message.content
    cut = client.chat.completions.create(**greedy | {"max_tokens": 3})
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 3


def test_seeds_repeat_and_differ(client: Any, served: Any) -> None:

    def said(seed: int) -> str:
        answer = client.completions.create(
            model=served.model, prompt="A story:", max_tokens=8, seed=seed, temperature=1
        )
        text: str = answer.choices[0].text
        return text

    said(0)  # From now on the prompt is cached: cold and warm differ by rounding.
    assert said(1) == said(1)
    assert len({said(seed) for seed in range(4)}) > 1


def test_logprobs_spell_the_answer(client: Any, greedy: dict[str, Any]) -> None:
    [choice] = client.chat.completions.create(**greedy, logprobs=True, top_logprobs=3).choices
    tokens = choice.logprobs.content
    spelt = b"".join(bytes(token.bytes) for token in tokens if not token.token.startswith("<|"))
    assert spelt.decode() == choice.message.content
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    # Greedy: the token is the likeliest.
    assert all(token.logprob == token.top_logprobs[0].logprob <= 0 for token in tokens)


def test_a_conversation_goes_on_from_what_is_cached(client: Any, greedy: dict[str, Any]) -> None:
    system = {"role": "system", "content": "You are brief. " * 16}
    messages: list[Any] = [system, *QUESTION]
    first = client.chat.completions.create(**greedy | {"messages": messages})
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": [{"type": "text", "text": "And of Italy?"}]},
    ]
    second = client.chat.completions.create(**greedy | {"messages": messages})
    assert "Rome" in second.choices[0].message.content
    assert second.usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens - 17


def test_completions_of_several_prompts(client: Any, served: Any) -> None:
    asked: dict[str, Any] = {"model": served.model, "max_tokens": 2, "temperature": 0, "echo": True}
    prompts = ["1, 2, 3, 4,", "a, b, c, d,"]
    texts = [one.text for one in client.completions.create(**asked, prompt=prompts).choices]
    assert texts[0].startswith("1, 2, 3, 4, 5")
    assert texts[1].startswith("a, b, c, d, e")
    streamed = ["", ""]
    for chunk in client.completions.create(**asked, prompt=prompts, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts


def test_characters_of_several_tokens_arrive_whole(client: Any, served: Any) -> None:
    asked: dict[str, Any] = {
        "model": served.model,
        "prompt": EMOJI_LINE * 6,
        "max_tokens": 40,
        "temperature": 0,
    }
    whole = client.completions.create(**asked).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**asked, stream=True)]
    assert whole.startswith(EMOJI_LINE)
    assert "".join(pieces) == whole
    assert "\ufffd" not in whole
    # Fewer pieces with text than tokens: half a character waits for its other half.
    assert 1 < len([piece for piece in pieces if piece]) < 40


def test_what_is_our_own_reaches_the_caller(client: Any, greedy: dict[str, Any]) -> None:
    answer = client.chat.completions.create(
        **greedy,
        user="someone",
        extra_body={"top_k": 5, "ignore_eos": True},
        extra_headers={"X-Request-Id": "atlas-7"},
    )
    assert answer._request_id == "atlas-7"
    assert answer.usage.completion_tokens == greedy["max_tokens"]
    told = answer.model_extra["octavo"]
    assert [warning["param"] for warning in told["warnings"]] == ["user"]
    assert told["timings"]["total_ms"] >= told["timings"]["ttft_ms"] > 0


def test_tools_there_and_back(guarded_client: Any, guarded: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    asked: dict[str, Any] = {"model": guarded.model, "tools": [WEATHER], "temperature": 0}
    [choice] = guarded_client.chat.completions.create(**asked, messages=messages).choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}

    with guarded_client.chat.completions.stream(**asked, messages=messages) as stream:
        streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls[0].function.arguments == call.function.arguments

    result = {"role": "tool", "tool_call_id": call.id, "content": "snowy"}
    messages += [choice.message.model_dump(exclude_none=True), result]
    [answer] = guarded_client.chat.completions.create(**asked, messages=messages).choices
    assert answer.finish_reason == "stop"
    assert "snow" in answer.message.content


def test_a_template_without_a_place_for_tools_takes_them(
    client: Any, greedy: dict[str, Any]
) -> None:
    """The default model's: a first agent gets an answer, and can go on from a call."""
    ask = client.chat.completions.create
    asked = greedy | {"tools": [WEATHER], "max_tokens": 100}
    answer = ask(**asked)
    [warning] = answer.model_extra["octavo"]["warnings"]
    assert warning["param"] == "tools"
    called = ask(**asked, tool_choice="required", parallel_tool_calls=False)
    message = called.choices[0].message
    [call] = message.tool_calls
    assert call.function.name == "get_weather"
    json.loads(call.function.arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    again = ask(**asked | {"messages": [*QUESTION, message, result]})
    assert again.choices[0].message.content
    # The list of tools and the question are not computed again.
    cached_tokens = again.usage.prompt_tokens_details.cached_tokens
    assert cached_tokens >= called.usage.prompt_tokens - 1


def test_wrong_requests_are_told_by_class_and_field(client: Any, greedy: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**greedy | {"temperature": 9})
    assert error.value.param == "temperature"
    with pytest.raises(openai.NotFoundError, match="gpt-x") as missing:
        client.chat.completions.create(**greedy | {"model": "gpt-x"})
    assert missing.value.param == "model"


def test_a_prompt_too_long_is_told_with_both_lengths(client: Any, greedy: dict[str, Any]) -> None:
    long = [{"role": "user", "content": "word " * 9000}]
    with pytest.raises(openai.BadRequestError, match=r"8192 tokens.*has 90\d\d") as error:
        client.chat.completions.create(**greedy | {"messages": long})
    assert (error.value.param, error.value.code) == ("messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("route", "ask"),
    [
        ("/v1/embeddings", lambda api, model: api.embeddings.create(model=model, input="x")),
        ("/v1/moderations", lambda api, _: api.moderations.create(input="x")),
        ("/v1/images/generations", lambda api, _: api.images.generate(prompt="x")),
        ("/v1/files", lambda api, _: api.files.list()),
    ],
)
def test_what_is_not_served_is_a_404_that_names_the_route(
    client: Any, served: Any, route: str, ask: Callable[[Any, str], object]
) -> None:
    with pytest.raises(openai.NotFoundError, match=f"no route {route}"):
        ask(client, served.model)


def test_a_wrong_key(guarded_client: Any) -> None:
    for client in (guarded_client.with_options(api_key="wrong"), guarded_client):
        if client is guarded_client:
            assert client.models.list().data
            continue
        with pytest.raises(openai.AuthenticationError) as error:
            client.models.list()
        assert error.value.code == "invalid_api_key"


def test_a_full_queue_is_told_and_waited_for(
    guarded_client: Any, guarded: Any, fill: Callable[[], Any]
) -> None:
    asked: dict[str, Any] = {"model": guarded.model, "prompt": "1, 2,", "max_tokens": 2}
    with fill():
        with pytest.raises(openai.RateLimitError) as error:
            guarded_client.completions.create(**asked)
        assert error.value.code == "queue_full"
        assert int(error.value.response.headers["retry-after"]) >= 1
    statuses: list[int] = []
    with fill() as free:

        def watch(response: Any) -> None:
            statuses.append(response.status_code)
            free()
            guarded.check_idle()

        with (
            openai.DefaultHttpxClient(event_hooks={"response": [watch]}) as http,
            openai.OpenAI(
                base_url=guarded.base_url, api_key=guarded.key, max_retries=1, http_client=http
            ) as patient,
        ):
            assert patient.completions.create(**asked).usage.completion_tokens == 2
    assert statuses == [429, 200]


def test_a_timeout_frees_what_it_held(client: Any, served: Any) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).completions.create(
            model=served.model,
            prompt="Once",
            max_tokens=8000,
            extra_body={"ignore_eos": True},
        )
    served.check_idle()


def test_leaving_a_stream_frees_what_it_held(client: Any, served: Any) -> None:
    stream = client.completions.create(
        model=served.model,
        prompt="Once",
        max_tokens=8000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _, _ in zip(range(3), stream, strict=False):
        assert served.metrics()["num_requests_running"] == 1
    stream.close()
    served.check_idle()


def test_sixteen_at_once_each_get_their_own_answer(served: Any) -> None:

    async def count(api: openai.AsyncOpenAI, start: int) -> str:
        prompt = "".join(f"{start + i}, " for i in range(5)).rstrip()
        stream = await api.completions.create(
            model=served.model, prompt=prompt, max_tokens=12, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def count_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key=served.key) as api:
            return await asyncio.gather(*(count(api, 10 * i) for i in range(1, 17)))

    for i, text in enumerate(asyncio.run(count_all()), start=1):
        assert text.startswith(f" {10 * i + 5}, {10 * i + 6}"), (i, text)


def test_async_cancellation_frees_what_it_held(served: Any) -> None:

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=served.base_url, api_key=served.key) as api:
            stream = await api.completions.create(
                model=served.model, prompt="Once", max_tokens=8000, stream=True
            )
            started = asyncio.Event()

            async def read() -> None:
                async for _ in stream:
                    started.set()

            reading = asyncio.create_task(read())
            await started.wait()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading

    asyncio.run(leave())
    served.check_idle()
