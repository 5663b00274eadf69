"""A template that never ends is the fault of one request; all others are served meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from server.generation import chat_prompt

ENDLESS = """\
{% for m in messages %}{{ m.content }}{% endfor %}
{% for a in range(n or 0) %}{% for b in range(n) %}{% endfor %}{% endfor %}"""
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
USER = {"role": "user", "content": "x"}
MORE = {"chat_template_kwargs": {"n": 99_999}}


@pytest.fixture
def slow(speaking: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(chat_prompt, "LIMIT_S", 0.3)
    return speaking("a", template=ENDLESS)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [USER]}),
        (MESSAGES, {"messages": [USER], "max_tokens": 1}),
        (RESPONSES, {"input": "x"}),
        ("/tokenize", {"messages": [USER]}),
        ("/v1/messages/count_tokens", {"messages": [USER]}),
    ],
)
def test_a_template_that_does_not_end_is_a_fault_of_the_request(
    slow: Any, path: str, body: dict[str, Any]
) -> None:
    answer = slow.post(path, **body, **MORE)
    assert answer.status_code == 400, answer.text
    assert "the chat template takes too long" in answer.json()["error"]["message"]
    assert slow.chat("x").status_code == 200


def test_health_answers_while_templates_do_not_end(slow: Any) -> None:
    asking = [
        threading.Thread(target=lambda: slow.post(CHAT, messages=[USER], **MORE)) for _ in range(4)
    ]
    for thread in asking:
        thread.start()
    num_answers = 0
    while any(thread.is_alive() for thread in asking):
        assert slow.http.get("/health").status_code == 200
        num_answers += 1
    for thread in asking:
        thread.join()
    assert num_answers > 3, "the loop was held up"
