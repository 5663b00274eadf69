"""The options of a prompt, and the report of its tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import TypeAdapter

from event_streams import chunks_of
from model.fake import fake_output
from server.openai import response_models

ABC = [97, 98, 99]
ASKED = {"role": "user", "content": "count"}


@pytest.fixture
def api(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def answer_to(prompt: list[int], num_tokens: int) -> list[int]:
    return fake_output(prompt, num_tokens, 300, may_end=True)


# ---- echo


@pytest.mark.parametrize("prompt", ["abc", ABC])
def test_the_prompt_is_repeated_before_the_answer(api: openai.OpenAI, prompt: Any) -> None:
    def ask(**more: Any) -> Any:
        return api.completions.create(model="fake", prompt=prompt, max_tokens=5, **more)

    alone = ask().choices[0].text
    body = ask(echo=True, n=2)
    assert [choice.text for choice in body.choices] == ["abc" + alone] * 2
    assert body.usage.completion_tokens == 10
    texts = ["", ""]
    for chunk in ask(echo=True, n=2, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["abc" + alone] * 2


def test_each_prompt_is_repeated_before_its_own_answer(live: Any) -> None:
    answer = live.post("/v1/completions", prompt=["häß", [98]], n=2, max_tokens=1, echo=True)
    texts = [choice["text"] for choice in answer.json()["choices"]]
    assert [text.startswith("häß") for text in texts] == [True, True, False, False]
    assert [text.startswith("b") for text in texts] == [False, False, True, True]


# ---- the end of a prompt


def test_the_end_of_a_prompt_is_kept(live: Any) -> None:
    whole = live.post("/v1/completions", prompt="bc", max_tokens=5).json()
    cut = live.post(
        "/v1/completions", prompt="aaabc", max_tokens=5, truncate_prompt_tokens=2, echo=True
    ).json()
    assert cut["choices"][0]["text"] == "bc" + whole["choices"][0]["text"]
    assert cut["usage"]["prompt_tokens"] == 2
    longer = live.post("/v1/completions", prompt="abc", truncate_prompt_tokens=99, max_tokens=1)
    assert longer.json()["usage"]["prompt_tokens"] == 3


@pytest.mark.parametrize(("max_tokens", "num_kept"), [(6, 250), (None, 240)])
def test_what_fits_is_kept(live: Any, max_tokens: int | None, num_kept: int) -> None:
    body: dict[str, Any] = {"truncate_prompt_tokens": -1, "max_tokens": max_tokens}
    text = live.post("/v1/completions", prompt="x" * 1000, ignore_eos=True, **body).json()
    assert text["usage"]["prompt_tokens"] == num_kept
    assert text["usage"]["total_tokens"] == 256
    chat = live.chat("x" * 1000, ignore_eos=True, **body).json()
    assert chat["usage"]["prompt_tokens"] == num_kept
    assert chat["usage"]["total_tokens"] == 256


# ---- the tokens told


def test_a_chats_tokens_are_told(live: Any, api: openai.OpenAI) -> None:
    body = api.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=8,
        n=2,
        extra_body={"return_token_ids": True},
    ).model_dump()
    rendered = live.text.template.render([{"role": "user", "content": "hello"}])
    prompt = live.text.tokenizer.encode(rendered, add_special_tokens=False)
    assert body["prompt_token_ids"] == prompt
    assert [choice["token_ids"] for choice in body["choices"]] == [answer_to(prompt, 8)] * 2
    asked = {"max_tokens": 8, "stream": True, "n": 2, "return_token_ids": True}
    chunks = chunks_of(live.chat("hello", **asked).content)
    assert [chunk.get("prompt_token_ids") for chunk in chunks if "prompt_token_ids" in chunk] == [
        prompt
    ]
    told: list[list[int]] = [[], []]
    for chunk in chunks:
        [choice] = chunk["choices"]
        told[choice["index"]] += choice.get("token_ids", [])
        TypeAdapter(response_models.ChatChunk).validate_python(chunk)
    assert told == [answer_to(prompt, 8)] * 2


def test_a_completions_tokens_are_told(live: Any) -> None:
    asked = {"prompt": ["abc", [5, 6]], "max_tokens": 8, "return_token_ids": True, "logprobs": 0}
    expected = [(ABC, answer_to(ABC, 8)), ([5, 6], answer_to([5, 6], 8))]
    whole = live.post("/v1/completions", **asked)
    TypeAdapter(response_models.Completion).validate_json(whole.content)
    choices = whole.json()["choices"]
    assert [(c["prompt_token_ids"], c["token_ids"]) for c in choices] == expected
    told: dict[int, tuple[list[int], list[int]]] = {0: ([], []), 1: ([], [])}
    for chunk in chunks_of(live.post("/v1/completions", stream=True, **asked).content):
        TypeAdapter(response_models.Completion).validate_python(chunk)
        [choice] = chunk["choices"]
        told[choice["index"]][0].extend(choice.get("prompt_token_ids", []))
        told[choice["index"]][1].extend(choice.get("token_ids", []))
    assert [*told.values()] == expected


def test_a_token_without_text_is_told(live: Any) -> None:
    """The end is a token too; half a character is one before its text is."""
    prompt = next([x] for x in range(1, 256) if 0 in answer_to([x], 40))
    answer = answer_to(prompt, 40)
    expected = answer[: answer.index(0) + 1]
    asked = {"prompt": prompt, "max_tokens": 40, "return_token_ids": True}
    body = live.post("/v1/completions", **asked).json()
    assert body["choices"][0]["token_ids"] == expected
    assert body["usage"]["completion_tokens"] == len(expected)
    chunks = chunks_of(live.post("/v1/completions", stream=True, **asked).content)
    told = [token for c in chunks for token in c["choices"][0].get("token_ids", [])]
    assert told == expected


# ---- usage in every chunk


@pytest.mark.parametrize("has_end", [False, True])
def test_every_chunk_tells_the_usage_so_far(live: Any, has_end: bool) -> None:
    options = {"continuous_usage_stats": True, "include_usage": has_end}
    chunks = chunks_of(
        live.chat(max_tokens=6, n=2, stream=True, stream_options=options, ignore_eos=True).content
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2
    assert counts[-1] == 12
    assert len({chunk["usage"]["prompt_tokens"] for chunk in chunks}) == 1
    assert (chunks[-1]["choices"] == []) == has_end
    for chunk in chunks:
        TypeAdapter(response_models.ChatChunk).validate_python(chunk)


def test_a_chunks_usage_counts_its_own_tokens(live: Any) -> None:
    options = {"continuous_usage_stats": True}
    asked = {"prompt": "abc", "stream": True, "return_token_ids": True, "max_tokens": 30}
    [_, *chunks] = chunks_of(live.post("/v1/completions", stream_options=options, **asked).content)
    num_told = 0
    for chunk in chunks:
        num_told += len(chunk["choices"][0].get("token_ids", []))
        assert chunk["usage"]["completion_tokens"] == num_told
        assert chunk["usage"]["total_tokens"] == 3 + num_told


# ---- a message that goes on


def test_the_last_message_goes_on(live: Any) -> None:
    begun = [ASKED, {"role": "assistant", "content": "1, 2,"}]
    body = live.post(
        "/v1/chat/completions",
        messages=begun,
        continue_final_message=True,
        max_tokens=8,
        return_token_ids=True,
    ).json()
    text = live.text.tokenizer.decode(body["prompt_token_ids"], skip_special_tokens=False)
    opened = live.text.template.render([ASKED], add_generation_prompt=True)
    assert text == opened + "1, 2,"
    assert body["choices"][0]["token_ids"] == answer_to(body["prompt_token_ids"], 8)
