from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import openai
import pytest

from model.fake import FAKE_EOS_TOKEN_ID, fake_next_token
from scheduler.client import FinishReason, GenerateRequest, Started, TokenLogprobs, TokenOutput


@pytest.fixture
def api(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def expected_tokens(live: Any, content: str, num_tokens: int) -> list[int]:
    """Return the model's answer to one user message, computed by hand."""
    prompt = live.text.template.render([{"role": "user", "content": content}])
    token_ids = live.text.tokenizer.encode(prompt, add_special_tokens=False)
    known = list(token_ids)
    for _ in range(num_tokens):
        known.append(fake_next_token(known, 300))
        if known[-1] == FAKE_EOS_TOKEN_ID:
            break
    return known[len(token_ids) :]


def expected_text(live: Any, content: str, num_tokens: int) -> str:
    token_ids = expected_tokens(live, content, num_tokens)
    shown = [token for token in token_ids if token != FAKE_EOS_TOKEN_ID]
    text: str = live.text.tokenizer.decode(shown, skip_special_tokens=True)
    return text


def test_the_answer_is_the_models(live: Any, api: openai.OpenAI) -> None:
    answer = api.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hello"}], max_tokens=20
    )
    assert answer.choices[0].message.content == expected_text(live, "hello", 20)
    assert answer.choices[0].finish_reason == "length"
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_stream_adds_up_to_the_whole(live: Any, api: openai.OpenAI) -> None:
    chunks = list(
        api.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for c in deltas) == expected_text(live, "hello", 40)
    assert [c.finish_reason for c in deltas if c.finish_reason] == ["length"]
    assert deltas[-1].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 40
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_second_request_reuses_the_first_ones_pages(live: Any) -> None:
    live.chat("hello", max_tokens=2)
    body = live.chat("hello", max_tokens=2).json()
    cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == body["octavo"]["cache"]["reused_tokens"] > 0


def test_a_salt_keeps_prefixes_apart(live: Any) -> None:
    live.chat("hello", max_tokens=2, cache_salt="one")
    body = live.chat("hello", max_tokens=2, cache_salt="two").json()
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_the_end_token_ends_the_answer_and_is_not_shown(live: Any) -> None:
    content = next(
        word for word in map(str, range(200)) if len(expected_tokens(live, word, 30)) < 30
    )
    body = live.chat(content).json()
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["message"]["content"] == expected_text(live, content, 30)
    assert body["usage"]["completion_tokens"] == len(expected_tokens(live, content, 30))


def test_without_max_tokens_the_context_is_the_limit(live: Any) -> None:
    body = live.chat("hello", ignore_eos=True).json()
    assert body["usage"]["total_tokens"] == 256
    assert body["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_a_stop_string_is_never_shown(live: Any, api: openai.OpenAI, is_stream: bool) -> None:
    text = expected_text(live, "hello", 20)
    stop = text[8:11]
    cut = text[: text.index(stop)]
    asked: dict[str, Any] = {
        "model": "fake",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 20,
        "stop": [stop, "never there"],
    }
    if is_stream:
        chunks = list(api.chat.completions.create(**asked, stream=True))
        shown = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        choice = api.chat.completions.create(**asked).choices[0]
        shown, reason = choice.message.content, choice.finish_reason
    assert shown == cut
    assert reason == "stop"
    live.wait_idle()
    assert live.client.stats().scheduler.num_running == 0


def test_a_stop_string_is_shown_if_wanted(live: Any) -> None:
    text = expected_text(live, "hello", 20)
    stop = text[8:11]
    body = live.chat(max_tokens=20, stop=stop, include_stop_str_in_output=True).json()
    shown = text[: text.index(stop) + len(stop)]
    assert body["choices"][0]["message"]["content"] == shown


@pytest.mark.parametrize("num_top", [None, 0, 2])
def test_logprobs_have_openais_shape(scripted: Callable[..., Any], num_top: int | None) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        assert request.params.logprobs == (num_top or 0)
        top = ((72, -0.1), (240, float("-inf")))[: num_top or 0]
        yield TokenOutput(
            (72, 105),
            (TokenLogprobs(72, -0.1, 1, top), TokenLogprobs(105, -0.2, 1, top)),
            Started(1, 0.0, 0),
            FinishReason.LENGTH,
        )

    live = scripted(script)
    extra = {} if num_top is None else {"top_logprobs": num_top}
    choice = live.chat(max_tokens=2, logprobs=True, **extra).json()["choices"][0]
    assert choice["message"]["content"] == "Hi"
    first, second = choice["logprobs"]["content"]
    assert (first["token"], first["bytes"], first["logprob"]) == ("H", [72], -0.1)
    assert second["bytes"] == [105]
    tops = [
        {"token": "H", "bytes": [72], "logprob": -0.1},
        {"token": "bytes:\\xf0", "bytes": [240], "logprob": -9999.0},
    ]
    assert first["top_logprobs"] == tops[: num_top or 0]


def test_streamed_logprobs_are_the_whole_ones(api: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "fake",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 12,
        "logprobs": True,
    }
    whole = api.chat.completions.create(**asked).choices[0].logprobs
    chunks = list(api.chat.completions.create(**asked, stream=True))
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert whole is not None
    assert streamed == whole.content
    assert len(streamed) == 12


async def give_nothing(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    del request
    yield TokenOutput(finish_reason=FinishReason.STOP, started=Started(1, 0.0, 0))


def test_every_parameter_reaches_the_engine(scripted: Callable[..., Any]) -> None:
    live = scripted(give_nothing)
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "ignore_eos": True,
    }
    live.chat(
        max_completion_tokens=9,
        top_k=5,
        seed=-1,
        logit_bias={"7": 5, "8": -100},
        stop_token_ids=[3, 4],
        cache_salt="tenant",
        priority=-3,
        **given,
    )
    request = live.client.requests[0]
    for name, value in given.items():
        assert getattr(request.params, name) == value
    assert request.params.max_tokens == 9
    assert request.params.top_k == 5
    assert request.params.seed == 2**64 - 1
    assert request.params.logit_bias == ((7, 5.0), (8, -100.0))
    assert request.params.stop_token_ids == (3, 4)
    assert (request.namespace, request.priority) == ("0:tenant", -3)


def test_a_limit_beyond_the_vocabulary_is_none(scripted: Callable[..., Any]) -> None:
    live = scripted(give_nothing)
    live.chat(top_k=10**300)
    assert live.client.requests[0].params.top_k == 300


def test_without_parameters_the_engine_gets_the_defaults(scripted: Callable[..., Any]) -> None:
    live = scripted(give_nothing)
    for _ in range(2):
        assert live.chat(top_k=-1, temperature=None).status_code == 200
    first, second = (request.params for request in live.client.requests)
    assert (first.temperature, first.top_p, first.top_k) == (1.0, 1.0, 0)
    assert first.logprobs is None
    assert first.seed != second.seed, "each request without a seed gets one of its own"


def test_messages_reach_the_template(scripted: Callable[..., Any]) -> None:
    live = scripted(give_nothing)
    live.post(
        "/v1/chat/completions",
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": None, "name": "x"},
            {"role": "user", "content": "c"},
        ],
        add_generation_prompt=False,
    )
    prompt = live.text.tokenizer.decode(
        live.client.requests[0].prompt_token_ids, skip_special_tokens=False
    )
    assert prompt == live.text.template.render(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "content": ""},
            {"role": "user", "content": "c"},
        ],
        add_generation_prompt=False,
    )


def test_a_long_prompt_is_refused_as_a_short_one(start_server: Callable[..., Any]) -> None:
    live = start_server()
    error = live.chat("x" * 20_000).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "messages"
    assert "messages has at least 6" in error["message"]
    assert "256" in error["message"]
