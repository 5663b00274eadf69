from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

import openai
import pytest

from model.fake import fake_output
from scheduler.client import FinishReason, GenerateRequest, Started, TokenLogprobs, TokenOutput


def expected_text(live: Any, prompt: list[int], num_tokens: int) -> str:
    token_ids = fake_output(prompt, num_tokens, 300)
    text: str = live.text.tokenizer.decode(token_ids, skip_special_tokens=True)
    return text


@pytest.mark.parametrize(
    "prompt", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]], ids=["text", "texts", "ids", "idss"]
)
def test_a_prompt_may_be_text_or_tokens(live: Any, prompt: object) -> None:
    body = live.post("/v1/completions", prompt=prompt, ignore_eos=True).json()
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == expected_text(live, [97, 98, 99], 16)
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 16, "OpenAI's default"


def test_a_stream_adds_up_to_the_whole(live: Any) -> None:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as api:
        chunks = list(
            api.completions.create(
                model="fake",
                prompt="abc",
                max_tokens=30,
                stream=True,
                extra_body={"ignore_eos": True},
            )
        )
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected_text(
        live, [97, 98, 99], 30
    )
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_the_default_length_shrinks_to_what_fits(live: Any) -> None:
    body = live.post("/v1/completions", prompt=[5] * 250, ignore_eos=True).json()
    assert body["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"prompt": [5] * 250, "max_tokens": 7}, "max_tokens", ("250", "7", "256")),
        ({"prompt": [5] * 256}, "prompt", ("256",)),
        ({"prompt": ""}, "prompt", ("empty",)),
        ({"prompt": []}, "prompt", ("empty",)),
        ({"prompt": [300]}, "prompt", ("prompt.0", "299")),
        ({"prompt": [3, -1]}, "prompt", ("prompt.1",)),
        ({"prompt": [2**70]}, "prompt", ("prompt.0",)),
        ({"prompt": ["a", ""]}, "prompt.1", ("empty",)),
        ({"prompt": ["a", [5, 300]]}, "prompt.1", ("prompt.1.1", "299")),
        ({"prompt": ["a", [5] * 256]}, "prompt.1", ("256",)),
        ({"prompt": ["a", 3]}, "prompt", ("token ids",)),
        ({"prompt": ["a"] * 65}, "prompt", ("64",)),
        ({"prompt": ["a"] * 5, "n": 13}, "n", ("5", "13", "64")),
        ({"prompt": ["a"] * 5, "best_of": 13}, "best_of", ("5", "13", "64")),
        ({"prompt": "a", "n": 3, "best_of": 2}, "best_of", ("at least", "3")),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of", ("streamed",)),
        ({"prompt": "a", "n": 0}, "n", ("n",)),
        ({"prompt": "a", "n": 17}, "n", ("16",)),
        ({"prompt": "a", "best_of": 17}, "best_of", ("16",)),
        ({"prompt": [1, "b"]}, "prompt", ("token ids",)),
        ({"prompt": [True]}, "prompt", ("token ids",)),
        ({"prompt": {"a": 1}}, "prompt", ("token ids",)),
        ({}, "prompt", ("required",)),
        ({"prompt": "a", "suffix": "x"}, "suffix", ("suffix",)),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens", ("at least 1",)),
        ({"prompt": "a", "max_tokens": -1, "echo": True}, "max_tokens", ("at least 0",)),
        ({"prompt": "a", "prompt_logprobs": -1}, "prompt_logprobs", ("20",)),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs", ("20",)),
        ({"prompt": "a", "echo": True, "logprobs": 21}, "logprobs", ("20",)),
        ({"prompt": "a", "prompt_logprobs": 0, "stream": True}, "prompt_logprobs", ("stream",)),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens", ("-1",)),
        ({"prompt": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", ("-1",)),
        ({"prompt": "a", "logprobs": 21}, "logprobs", ("20",)),
    ],
)
def test_a_wrong_prompt_is_refused(
    shared: Any, asked: dict[str, Any], param: str, said: tuple[str, ...]
) -> None:
    answer = shared.post("/v1/completions", **asked)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert all(word in error["message"] for word in said), error["message"]


def test_logprobs_have_openais_shape(scripted: Callable[..., Any]) -> None:
    async def script(_: object, request: GenerateRequest) -> AsyncGenerator[TokenOutput, None]:
        assert request.params.logprobs == 1
        yield TokenOutput((72,), (TokenLogprobs(72, -1.0, 2, ((73, -0.5),)),), Started(1, 0.0, 0))
        yield TokenOutput((299,), (TokenLogprobs(299, -0.5, 1, ((299, -0.5),)),))
        yield TokenOutput((33,), (TokenLogprobs(33, float("-inf"), 9, ((73, -0.5),)),))
        yield TokenOutput(finish_reason=FinishReason.LENGTH)

    choice = scripted(script).post("/v1/completions", prompt="x", logprobs=1).json()["choices"][0]
    assert choice["text"] == "H 299!"
    assert choice["logprobs"] == {
        "tokens": ["H", " 299", "!"],
        "token_logprobs": [-1.0, -0.5, -9999.0],
        "top_logprobs": [{"I": -0.5, "H": -1.0}, {" 299": -0.5}, {"I": -0.5, "!": -9999.0}],
        "text_offset": [0, 1, 5],
    }
