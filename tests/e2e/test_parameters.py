"""Parameters whose effect only a real model shows, through the real daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch

from waiting import TIMEOUT_S

pytestmark = pytest.mark.e2e

PROMPT = (
    "The atlases stand on the lowest shelf, for they are heavy. Ask the librarian for the key of "
    "the glass case. Le café est fermé le dimanche; 東京 is 9,500 km away, and 2 + 2 = 4."
)


@pytest.fixture(scope="module")
def ask(start_daemon: Callable[..., Any]) -> Iterator[Callable[..., dict[str, Any]]]:
    """Completions of a daemon that computes in float32, a few tokens of a prompt at a time."""
    flags = ("--quantization", "none", "--max-num-batched-tokens", "24", "--max-num-seqs", "8")
    with (
        start_daemon(*flags) as daemon,
        httpx.Client(base_url=daemon.url, timeout=TIMEOUT_S) as http,
    ):

        def post(path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
            answer = http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        yield post


@pytest.fixture(scope="module")
def reference(transformers_model: Any) -> Callable[[list[int]], torch.Tensor]:
    """The natural-log probabilities of transformers for the token after each of these."""

    def logprobs(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = transformers_model(torch.tensor([token_ids])).logits[0]
        return logits.log_softmax(-1)

    return logprobs


def test_a_prompts_logprobs_are_those_of_transformers(
    ask: Callable[..., dict[str, Any]], reference: Callable[[list[int]], torch.Tensor]
) -> None:
    asked = {"prompt": PROMPT, "echo": True, "logprobs": 5, "prompt_logprobs": 5}
    [choice] = ask(**asked, max_tokens=0, return_token_ids=True)["choices"]
    token_ids = choice["prompt_token_ids"]
    expected = reference(token_ids)
    told = choice["logprobs"]["token_logprobs"]
    assert told[0] is choice["prompt_logprobs"][0] is None
    assert told[1:] == pytest.approx(
        [expected[i, token].item() for i, token in enumerate(token_ids[1:])], abs=1e-3
    )
    for i, (candidates, token) in enumerate(
        zip(choice["prompt_logprobs"][1:], token_ids[1:], strict=True)
    ):
        own = candidates[str(token)]
        assert own["logprob"] == told[i + 1]
        assert own["rank"] == 1 + int((expected[i] > expected[i, token]).sum())
        for token_id, one in candidates.items():
            assert one["logprob"] == pytest.approx(expected[i, int(token_id)].item(), abs=1e-3)
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    assert text == PROMPT
    for token, start in zip(choice["logprobs"]["tokens"], offsets, strict=True):
        assert token.startswith("bytes:") or text.startswith(token, start)


def test_bad_words_do_not_come(ask: Callable[..., dict[str, Any]]) -> None:
    asked = {"prompt": "The capital of France is", "temperature": 0, "max_tokens": 12}
    [free] = ask(**asked)["choices"]
    assert "Paris" in free["text"]
    [bound] = ask(**asked, bad_words=["Paris"])["choices"]
    assert "Paris" not in bound["text"]
    # A word of several tokens: each of them may come, their sequence may not.
    tokens = ask("/tokenize", prompt=" Brussels sprouts", add_special_tokens=False)["tokens"]
    assert len(tokens) > 1
    prompt = "I like Brussels sprouts and Brussels sprouts and Brussels sprouts and"
    forced = {"prompt": prompt, "temperature": 0, "max_tokens": 4, "allowed_token_ids": tokens}
    assert "Brussels sprouts" in ask(**forced)["choices"][0]["text"]
    [choice] = ask(**forced, bad_words=["Brussels sprouts"])["choices"]
    assert "Brussels sprouts" not in choice["text"]


def test_only_allowed_tokens_come(ask: Callable[..., dict[str, Any]]) -> None:
    yes, no = (
        ask("/tokenize", prompt=prompt, add_special_tokens=False)["tokens"]
        for prompt in (" Yes", " No")
    )
    assert len(yes) == len(no) == 1
    for temperature in (0, 1.5):
        [choice] = ask(
            prompt="Is the sky blue? Answer:",
            max_tokens=4,
            temperature=temperature,
            allowed_token_ids=[*yes, *no],
            return_token_ids=True,
        )["choices"]
        assert len(choice["token_ids"]) == 4
        assert set(choice["token_ids"]) <= {*yes, *no}
