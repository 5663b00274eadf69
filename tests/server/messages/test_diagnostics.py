"""`diagnostics` of a message: the part that changed since an earlier one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import pytest
from pydantic import TypeAdapter

from event_streams import events_of
from server.messages import response_models

Body = dict[str, Any]
Saying = Callable[..., Any]

TOOL: Body = {"name": "f", "input_schema": {}}
TURNS: list[Body] = [
    {"role": "user", "content": "What is 1+1?"},
    {"role": "assistant", "content": "Two, by Peano."},
    {"role": "user", "content": "Go on."},
]
FIRST: Body = {
    "model": "fake",
    "max_tokens": 9,
    "system": "Be a calculator.",
    "tools": [TOOL],
    "messages": TURNS,
}
MORE: list[Body] = [
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "Please."},
]
OTHER_TURNS = [TURNS[0], {"role": "assistant", "content": "Three."}, *TURNS[2:], *MORE]


def ask(live: Any, previous_id: str | None, **changed: Any) -> Any:
    body = {**FIRST, "diagnostics": {"previous_message_id": previous_id}, **changed}
    answer = live.post("/v1/messages", **body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_first_turn_has_nothing_to_compare(saying: Saying) -> None:
    live = saying("Two.")
    answer = ask(live, None)
    assert answer["diagnostics"] is None
    assert "compared" not in answer["octavo"]["cache"]
    assert "diagnostics" not in live.post("/v1/messages", **FIRST).json(), "unasked"


@pytest.mark.parametrize(
    ("changed", "kind", "path"),
    [
        ({"messages": TURNS + MORE}, None, None),
        ({"messages": TURNS[:1]}, None, None),
        ({"tools": [TOOL, {**TOOL, "name": "g"}]}, "tools_changed", "tools"),
        ({"system": "Be a poet."}, "system_changed", "system"),
        ({"messages": OTHER_TURNS}, "messages_changed", "messages.1"),
        ({"kv_policy": {"type": "window", "window": 64}}, "model_changed", None),
        ({"cache_salt": "mine"}, "unavailable", None),
        ({"tool_choice": {"type": "none"}}, "unavailable", None),
    ],
)
def test_the_part_that_changed_is_named(
    saying: Saying, changed: Body, kind: str | None, path: str | None
) -> None:
    live = saying("Two.")
    first = ask(live, None)
    answer = ask(live, first["id"], **changed)
    TypeAdapter(response_models.MessageAnswer).validate_python(answer)
    compared = answer["octavo"]["cache"]["compared"]
    assert compared["is_found"]
    assert compared["path"] == path
    if kind is None:
        assert answer["diagnostics"] is None
        assert compared["changed"] is None
        return
    reason = answer["diagnostics"]["cache_miss_reason"]
    assert reason["type"] == kind
    if kind == "unavailable":
        assert reason == {"type": kind}
        assert compared["changed"] in changed
    else:
        [old, new] = [len(asked.prompt_token_ids) for asked in live.client.requests]
        missed = reason["cache_missed_input_tokens"]
        assert missed == compared["missed_tokens"] > 0
        assert compared["reusable_tokens"] + missed == min(old, new)


def test_tokens_before_the_change_are_counted(saying: Saying) -> None:
    live = saying("Two.")
    first = ask(live, None)
    compared = ask(live, first["id"], messages=OTHER_TURNS)["octavo"]["cache"]["compared"]
    old, new = [asked.prompt_token_ids for asked in live.client.requests]
    num_same = next(i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b)
    assert compared["reusable_tokens"] == num_same // 16 * 16 > 0


def test_setting_that_changes_the_prompt_is_named(saying: Saying) -> None:
    live = saying("Two.", "switched")
    long = [{"role": "user", "content": "x" * 40}]
    first = ask(live, None, messages=long, thinking={"type": "disabled"})
    again = ask(live, first["id"], messages=long, thinking={"type": "enabled"})
    assert again["diagnostics"] is None, "the prompt differs in its last tokens alone"


def test_only_the_key_of_the_first_message_may_compare(saying: Saying, tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    names = ("alice", "bob")
    keys.write_text("".join(f"[[key]]\nkey = 'sk-{name}'\nname = '{name}'\n" for name in names))
    keys.chmod(0o600)
    live = saying("Two.", api_key_file=keys)

    def asked(who: str, previous_id: str | None) -> Any:
        body = {**FIRST, "diagnostics": {"previous_message_id": previous_id}}
        headers = {"Authorization": f"Bearer sk-{who}"}
        return live.http.post("/v1/messages", json=body, headers=headers).json()

    first = asked("alice", None)["id"]
    assert asked("alice", first)["diagnostics"] is None
    not_found = {"cache_miss_reason": {"type": "previous_message_not_found"}}
    assert asked("bob", first)["diagnostics"] == not_found
    assert asked("bob", "msg_unknown")["diagnostics"] == not_found


def test_a_stream_begins_with_it(
    saying: Saying, client_of: Callable[[Any], anthropic.Anthropic]
) -> None:
    live = saying("Two.")
    first = ask(live, None)["id"]
    changed = {**FIRST, "system": "Be a poet."}
    asked = {**changed, "diagnostics": {"previous_message_id": first}}
    [start, *_] = events_of(live.post("/v1/messages", stream=True, **asked).content)
    reason = start["message"]["diagnostics"]["cache_miss_reason"]
    assert reason["type"] == "system_changed"
    message = client_of(live).messages.create(**asked)
    assert message.diagnostics is not None
    assert message.diagnostics.cache_miss_reason is not None
    assert message.diagnostics.cache_miss_reason.type == "system_changed"


def test_wrong_ids_are_refused_by_name(saying: Saying) -> None:
    live = saying("Two.")
    for wrong in (7, "x" * 257):
        asked = {**FIRST, "diagnostics": {"previous_message_id": wrong}}
        error = live.post("/v1/messages", **asked).json()["error"]
        assert error["param"] == "diagnostics.previous_message_id"
