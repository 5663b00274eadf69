"""Several answers to one request: one engine request each, one response."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from itertools import groupby
from typing import Any

import openai
import pytest
from pydantic import TypeAdapter

from event_streams import chunks_of
from model.fake import FakeRunner
from scheduler.client import (
    EngineFaultError,
    FinishReason,
    GenerateRequest,
    RejectKind,
    RequestRefusedError,
    Started,
    TokenLogprobs,
    TokenOutput,
)
from server.openai import response_models
from waiting import TIMEOUT_S

USER = {"role": "user", "content": "hello"}


@pytest.fixture
def api(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def text_of(live: Any, prompt: str | list[int], num_tokens: int = 8) -> str:
    answer = live.post("/v1/completions", prompt=prompt, max_tokens=num_tokens)
    text: str = answer.json()["choices"][0]["text"]
    return text


def test_a_chat_has_n_answers_and_one_usage(live: Any, api: openai.OpenAI) -> None:
    alone = live.chat("hello", max_tokens=9).json()
    answer = api.chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "hello"}], max_tokens=9, n=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.message.content == alone["choices"][0]["message"]["content"]
        assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == alone["usage"]["prompt_tokens"]
    assert answer.usage.completion_tokens == 27


def test_a_streamed_chat_has_n_answers(live: Any, api: openai.OpenAI) -> None:
    alone = live.chat("hello", max_tokens=9).json()
    chunks = list(
        api.chat.completions.create(
            model="fake",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=9,
            n=3,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    usage = chunks.pop().usage
    assert usage is not None
    assert usage.prompt_tokens == alone["usage"]["prompt_tokens"]
    assert usage.completion_tokens == 27
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    for index in range(3):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        text = "".join(choice.delta.content or "" for choice in own)
        assert text == alone["choices"][0]["message"]["content"]
        assert [c.finish_reason for c in own if c.finish_reason] == ["length"]
        assert own[-1].finish_reason == "length"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_prompt_is_computed_once(start_server: Callable[..., Any], path: str) -> None:
    runner = FakeRunner(vocab_size=300)
    live = start_server(runner=runner)
    content = "a prompt of a few pages, so that it shows" * 2
    body = {"messages": [{"role": "user", "content": content}], "prompt": content}
    usage = live.post(path, n=8, max_tokens=1, **body).json()["usage"]
    live.wait_idle()
    num_prompt = usage["prompt_tokens"]
    computed = live.client.stats().scheduler.prompt_tokens_computed_total
    assert num_prompt > 10 * runner.page_size
    # Of the last page each choice computes its own: it is not whole.
    assert num_prompt <= computed <= num_prompt + 7 * runner.page_size
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0, "nothing was there before"
    assert usage["completion_tokens"] == 8
    assert live.metric("octavo_prompt_tokens_total") == num_prompt
    assert live.metric("octavo_generation_tokens_total") == 8
    assert live.metric('octavo_request_success_total{finished_reason="length"}') == 8


def test_several_prompts_are_answered_in_order(live: Any, api: openai.OpenAI) -> None:
    prompts = ["abc", "xyz", "a longer one"]
    alone = [text_of(live, prompt) for prompt in prompts]
    answer = api.completions.create(model="fake", prompt=prompts, n=2, max_tokens=8)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [alone[i // 2] for i in range(6)]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    chunks = api.completions.create(model="fake", prompt=prompts, n=2, max_tokens=8, stream=True)
    told = ["" for _ in range(6)]
    for chunk in chunks:
        told[chunk.choices[0].index] += chunk.choices[0].text
    assert told == [alone[i // 2] for i in range(6)]
    ids = api.completions.create(model="fake", prompt=[[1, 2, 3], [4, 5]], max_tokens=8)
    assert [c.text for c in ids.choices] == [text_of(live, [1, 2, 3]), text_of(live, [4, 5])]


def test_each_choice_has_a_seed_of_its_own(scripted: Callable[..., Any]) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        yield TokenOutput(finish_reason=FinishReason.STOP, started=Started(1, 0.0, 0))

    live = scripted(script)
    for body in ({"n": 1, "seed": 7}, {"n": 4, "seed": 7}, {"n": 2, "seed": 7}, {"n": 2}):
        assert live.chat(**body).status_code == 200
    seeds = [request.params.seed for request in live.client.requests]
    assert seeds[0] == 7, "one answer has the seed that was asked for"
    assert seeds[1:3] == seeds[5:7], "the same choice has the same seed, however many there are"
    assert len({*seeds[1:5]}) == 4
    assert seeds[1] == 7
    assert len({*seeds[7:9], 7}) == 3
    live.client.requests.clear()
    assert live.post("/v1/completions", prompt=["a", "b"], n=2, seed=7).status_code == 200
    assert [r.params.seed for r in live.client.requests] == [*seeds[1:3], *seeds[1:3]]


def test_choices_are_told_as_they_come(scripted: Callable[..., Any]) -> None:
    async def script(client: Any, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        index = len(client.requests) - 1
        yield TokenOutput((65 + index,), started=Started(index, 0.0, 0))
        for _ in range(index):
            await asyncio.sleep(0)
            yield TokenOutput((65 + index,))
        yield TokenOutput(finish_reason=FinishReason.LENGTH)

    chunks = chunks_of(
        scripted(script).post("/v1/completions", prompt="x", n=3, stream=True).content
    )
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert len(list(groupby(order))) > 3, "they are interleaved"
    texts = [
        "".join(c["choices"][0]["text"] for c in chunks if c["choices"][0]["index"] == i)
        for i in range(3)
    ]
    assert texts == ["A", "BB", "CCC"]
    assert ["octavo" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert sum(c["choices"][0]["finish_reason"] == "length" for c in chunks) == 3
    for chunk in chunks:
        TypeAdapter(response_models.Completion).validate_python(chunk)


def test_the_likeliest_of_many_are_given(scripted: Callable[..., Any]) -> None:
    logprobs = {0: [-3.0], 1: [-0.5, -0.7], 2: [-1.0], 3: []}

    async def script(client: Any, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        assert request.params.logprobs == 0
        index = len(client.requests) - 1
        yield TokenOutput(started=Started(index, 0.0, 0))
        for logprob in logprobs[index]:
            yield TokenOutput((65 + index,), (TokenLogprobs(65 + index, logprob, 1),))
        yield TokenOutput(finish_reason=FinishReason.LENGTH)

    live = scripted(script)
    body = live.post("/v1/completions", prompt="x", n=2, best_of=4).json()
    assert [choice["text"] for choice in body["choices"]] == ["BB", "C"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in body["choices"]), "not asked for"
    assert body["usage"]["completion_tokens"] == 4, "what was generated is counted"
    assert body["usage"]["prompt_tokens"] == 1


async def _endless(client: Any, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
    del request
    try:
        yield TokenOutput((72,), started=Started(1, 0.0, 0))
        if len(client.requests) == 4:
            client.is_full.set()
        await asyncio.Event().wait()
    finally:
        client.num_closed += 1


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
def test_a_client_that_leaves_cancels_every_choice(
    scripted: Callable[..., Any], is_stream: bool
) -> None:
    live = scripted(_endless)
    live.client.num_closed, live.client.is_full = 0, threading.Event()
    data = json.dumps({"prompt": "x", "n": 4, "stream": is_stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", live.port)) as connection:
        connection.sendall(head.encode() + data)
        assert live.client.is_full.wait(TIMEOUT_S)
    live.wait_idle()
    assert live.client.num_closed == 4
    assert live.metric('octavo_request_success_total{finished_reason="abort"}') == 4
    assert live.log_lines()[-1]["finish_reason"] == "abort"


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (EngineFaultError("a step failed"), 500),
        (RequestRefusedError("the queue is full", RejectKind.BUSY, None), 429),
    ],
)
def test_an_error_in_one_ends_all(
    scripted: Callable[..., Any], is_stream: bool, fault: Exception, status: int
) -> None:
    async def script(client: Any, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        is_last = len(client.requests) == 3
        try:
            if is_last:
                raise fault
            yield TokenOutput((72,), started=Started(1, 0.0, 0))
            await asyncio.Event().wait()
        finally:
            client.num_closed += 1

    live = scripted(script)
    live.client.num_closed = 0
    answer = live.post("/v1/completions", prompt="x", n=3, stream=is_stream)
    assert answer.status_code == status, "nothing was sent before"
    assert list(answer.json()) == ["error"]
    live.wait_idle()
    assert live.client.num_closed == 3
    assert live.metric('octavo_request_success_total{finished_reason="abort"}') == 2


def test_an_error_after_the_first_byte_is_one_event(scripted: Callable[..., Any]) -> None:
    async def script(client: Any, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        del request
        number = len(client.requests)
        yield TokenOutput((72,), started=Started(1, 0.0, 0))
        if number == 2:
            raise EngineFaultError("a step failed")
        await asyncio.Event().wait()

    answer = scripted(script).chat(n=3, stream=True)
    assert answer.status_code == 200
    chunks = chunks_of(answer.content)
    assert ["error" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


def test_nothing_is_left_in_the_real_engine(live: Any) -> None:
    body = {"prompt": ["x", "y"], "n": 4, "stream": True, "max_tokens": 250, "ignore_eos": True}
    with live.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_raw())
    live.wait_idle()
    live.post("/v1/completions", prompt="z", max_tokens=1)
    stats = live.client.stats()
    assert stats.scheduler.num_running == 0
    assert (stats.cache.pages_private, stats.cache.pages_leased) == (0, 0)
    live.client.check()
