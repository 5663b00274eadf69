"""The prompt's own log-probabilities, in the form of vLLM and of OpenAI's echo."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from event_streams import chunks_of
from model.fake import fake_logprobs
from scheduler.client import FinishReason, GenerateRequest, TokenLogprobs, TokenOutput
from server.generation import prompt_logprobs
from server.openai import response_models
from server.text.load import ModelText
from server.text.template import ChatTemplate

COMPLETION = "/v1/completions"
ABC = [97, 98, 99]


def scores_of(prompt: list[int], count: int) -> list[TokenLogprobs]:
    return [fake_logprobs(prompt[:i], prompt[i], count) for i in range(1, len(prompt))]


def logprob_of(prompt: list[int], index: int) -> float:
    return fake_logprobs(prompt[:index], prompt[index], 0).logprob


def candidates(live: Any, prompt: list[int], count: int) -> list[Any]:
    """Return the candidates in the form of vLLM."""
    told: list[Any] = [None]
    for score in scores_of(prompt, count):
        ids = dict.fromkeys((score.token_id, *(token for token, _ in score.top)))
        told.append(
            {
                str(token): {
                    "logprob": score.logprob,
                    "rank": 1 if token == score.token_id else token + 1,
                    "decoded_token": live.text.tokenizer.token_text(token),
                }
                for token in ids
            }
        )
    return told


# ---- prompt_logprobs


@pytest.mark.parametrize("count", [0, 3])
def test_completions_tell_them_by_choice(live: Any, count: int) -> None:
    asked = {"prompt": ["abc", [5]], "n": 2, "max_tokens": 2, "prompt_logprobs": count}
    answer = live.post(COMPLETION, **asked, ignore_eos=True)
    TypeAdapter(response_models.Completion).validate_json(answer.content)
    told = [choice["prompt_logprobs"] for choice in answer.json()["choices"]]
    assert told == [candidates(live, ABC, count)] * 2 + [[None]] * 2
    assert [choice["logprobs"] for choice in answer.json()["choices"]] == [None] * 4


def test_chats_tell_them_once(live: Any) -> None:
    asked = {"n": 2, "max_tokens": 2, "prompt_logprobs": 1, "return_token_ids": True}
    answer = live.chat(**asked, ignore_eos=True)
    TypeAdapter(response_models.ChatCompletion).validate_json(answer.content)
    body = answer.json()
    assert body["prompt_logprobs"] == candidates(live, body["prompt_token_ids"], 1)
    assert all("prompt_logprobs" not in choice for choice in body["choices"])


def test_so_do_chats_with_tools(start_server: Callable[..., Any], text: ModelText) -> None:
    source = "{% if tools %}<tool_call>{% endif %}{{ messages[0].content }}"
    words = replace(
        text,
        template=ChatTemplate({"default": source}, special_tokens={}, now=lambda: None),  # type: ignore[arg-type, return-value] # has no clock
    )
    live = start_server(words=words)
    tool = {"type": "function", "function": {"name": "add"}}
    body = live.chat("ab", tools=[tool], max_tokens=1, prompt_logprobs=0).json()
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]


def test_they_are_not_there_unasked(live: Any) -> None:
    assert "prompt_logprobs" not in live.chat(max_tokens=1).json()
    choice = live.post(COMPLETION, prompt="abc", echo=True, max_tokens=1, logprobs=1).json()
    assert "prompt_logprobs" not in choice["choices"][0]


def test_a_prompt_that_is_cached_is_told_all_the_same(live: Any) -> None:
    for _ in range(2):
        body = live.post(COMPLETION, prompt=ABC * 20, max_tokens=1, prompt_logprobs=0).json()
        assert len(body["choices"][0]["prompt_logprobs"]) == 60
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert body["octavo"]["cache"]["miss_reason"] == "limited"


def test_a_chat_cannot_stream_them(live: Any) -> None:
    error = live.chat(prompt_logprobs=1, stream=True).json()["error"]
    assert (error["param"], error["code"]) == ("prompt_logprobs", "unsupported_parameter")


def test_a_probability_of_nothing_is_a_number_and_a_token_is_told_once(
    scripted: Callable[..., Any],
) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        assert request.params.prompt_logprobs == 2
        score = TokenLogprobs(98, float("-inf"), 2, ((99, -0.5), (98, float("-inf"))))
        yield TokenOutput(finish_reason=FinishReason.LENGTH, prompt_logprobs=(score,))

    answer = scripted(script).post(COMPLETION, prompt="ab", prompt_logprobs=2)
    assert answer.json()["choices"][0]["prompt_logprobs"] == [
        None,
        {
            "98": {"logprob": -9999.0, "rank": 2, "decoded_token": "b"},
            "99": {"logprob": -0.5, "rank": 1, "decoded_token": "c"},
        },
    ]


def test_more_than_an_answer_can_hold_is_refused(
    live: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_logprobs, "MAX_ENTRIES", 40)
    asked = {"prompt": [ABC, ABC], "max_tokens": 1, "n": 2, "prompt_logprobs": 2}
    for change, name, status in (
        ({}, None, 200),
        ({"prompt_logprobs": 3}, "prompt_logprobs", 400),
        ({"prompt_logprobs": None, "echo": True, "logprobs": 3}, "logprobs", 400),
        ({"n": 3}, "prompt_logprobs", 400),
    ):
        answer = live.post(COMPLETION, **(asked | change))
        assert answer.status_code == status, change
        assert answer.json().get("error", {}).get("param") == name


# ---- echo with logprobs


@pytest.mark.parametrize("prompt", ["häß", [*"häß".encode()]], ids=["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_an_echo_has_the_prompts_tokens_first(live: Any, prompt: Any, max_tokens: int) -> None:
    asked = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 1}
    plain = live.post(COMPLETION, **(asked | {"max_tokens": max(1, max_tokens)})).json()
    answer = live.post(COMPLETION, **asked, echo=True)
    TypeAdapter(response_models.Completion).validate_json(answer.content)
    [choice] = answer.json()["choices"]
    generated = plain["choices"][0]["text"] if max_tokens else ""
    assert choice["text"] == "häß" + generated
    assert choice["finish_reason"] == "length"
    assert answer.json()["usage"]["completion_tokens"] == max_tokens
    logprobs = choice["logprobs"]
    ids = [*"häß".encode()]
    assert len({len(column) for column in logprobs.values()} | {len(ids) + max_tokens}) == 1
    assert logprobs["tokens"][:2] == ["h", "bytes:\\xc3"]
    assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:5] == [logprob_of(ids, i) for i in range(1, 5)]
    # A letter of two bytes is there with its second.
    assert logprobs["text_offset"][:5] == [0, 1, 1, 2, 2]
    if max_tokens:
        own = plain["choices"][0]["logprobs"]
        assert logprobs["tokens"][5:] == own["tokens"]
        assert logprobs["text_offset"][5:] == [3 + offset for offset in own["text_offset"]]


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("prompt", [["abc", [5]], [[5]]], ids=["two", "of one token"])
def test_a_stream_adds_up_to_the_whole(live: Any, prompt: list[Any], max_tokens: int) -> None:
    asked = {
        "prompt": prompt,
        "n": 2,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "echo": True,
        "logprobs": 2,
        "temperature": 0,
        "return_token_ids": True,
    }
    whole = live.post(COMPLETION, **asked).json()["choices"]
    events = chunks_of(live.post(COMPLETION, **asked, stream=True).content)
    for choice in whole:
        TypeAdapter(response_models.Completion).validate_python(events[-1])
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == choice["index"]]
        assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert "".join(each["text"] for each in own) == choice["text"]
        columns = [each["logprobs"] for each in own if each["logprobs"] is not None]
        for name, expected in choice["logprobs"].items():
            assert [entry for column in columns for entry in column[name]] == expected
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + ["length"]


def test_both_ways_at_once_each_as_many_as_it_asked_for(live: Any) -> None:
    asked = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 1, "prompt_logprobs": 4}
    [choice] = live.post(COMPLETION, **asked).json()["choices"]
    assert choice["prompt_logprobs"] == candidates(live, ABC, 4)
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [2, 2]


def test_harnesses_ask_with_lists_of_tokens(live: Any) -> None:
    """The request of lm-eval's `local-completions`, and the parts of the answer that it reads."""
    prompts = [ABC, [5, 6, 7, 8]]
    asked = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    choices = live.post(COMPLETION, **asked, echo=True).json()["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        continued = choice["logprobs"]["token_logprobs"][2:-1]
        assert continued == [logprob_of(prompt, i) for i in range(2, len(prompt))]
        tops = choice["logprobs"]["top_logprobs"][2:-1]
        assert all(max(top.values()) >= one for top, one in zip(tops, continued, strict=True))
