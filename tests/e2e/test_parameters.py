"""Parameters whose effect only a real model shows, through the real daemon."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from waiting import TIMEOUT_S

pytestmark = pytest.mark.e2e


@pytest.fixture
def ask(daemon: Any) -> Iterator[Callable[..., dict[str, Any]]]:
    """Completions of the default model."""
    with httpx.Client(base_url=daemon.url, timeout=TIMEOUT_S) as http:

        def post(path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
            answer = http.post(path, json=body)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        yield post


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
