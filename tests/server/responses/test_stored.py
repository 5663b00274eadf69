"""Conversations that the server keeps: gone on from, asked for, deleted, told apart by key."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import TypeAdapter

from server.responses import response_models, response_session
from server.responses.conversation import read_conversation

PATH = "/v1/responses"
TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'


def ids(items: list[dict[str, Any]]) -> list[str]:
    return [item["id"] for item in items]


def test_a_conversation_goes_on_by_its_last_response(
    speaking: Any, api_of: Any, prompt_of: Any
) -> None:
    live = speaking("two", "three", "four")
    with api_of(live) as api:
        first = api.responses.create(model="fake", input="1+1?", instructions="Count.")
        second = api.responses.create(model="fake", input="+1?", previous_response_id=first.id)
        assert prompt_of(live) == "[user]1+1?[assistant]two[user]+1?"
        api.responses.create(model="fake", input="and?", previous_response_id=second.id)
        assert prompt_of(live).endswith("[user]+1?[assistant]three[user]and?")
        # Two may go on from the same one.
        api.responses.create(model="fake", input="or?", previous_response_id=first.id)
        assert prompt_of(live) == "[user]1+1?[assistant]two[user]or?"
    assert second.previous_response_id == first.id
    assert second.instructions is None


def test_the_second_turn_reuses_the_pages_of_the_first(live: Any) -> None:
    first = live.post(PATH, input="hello", max_output_tokens=9).json()
    asked = {"input": "go on", "max_output_tokens": 3, "previous_response_id": first["id"]}
    usage = live.post(PATH, **asked).json()["usage"]
    details = usage["input_tokens_details"]
    assert details["cached_tokens"] >= first["usage"]["input_tokens"]
    assert details["cache_write_tokens"] == usage["input_tokens"] - details["cached_tokens"]


def test_a_tool_is_called_and_answered(speaking: Any, api_of: Any, prompt_of: Any) -> None:
    live = speaking(f"Hm.</think>Let me see.{CALL}", "Two.</think>2", thinks=True)
    with api_of(live) as api:
        first = api.responses.create(model="fake", input="1+1?", tools=[TOOL])
        [call] = [item for item in first.output if item.type == "function_call"]
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "2"}
        second = api.responses.create(
            model="fake", input=[output], tools=[TOOL], previous_response_id=first.id
        )
        kept = prompt_of(live)
        # The same without anything kept: the client sends it all again.
        api.responses.create(
            model="fake",
            input=[{"role": "user", "content": "1+1?"}, *first.output, output],
            tools=[TOOL],
            store=False,
        )
    assert second.output_text == "2"
    assert f"[user]1+1?[assistant]Let me see.(Hm.){call.call_id}:1[tool]2{call.call_id}" in kept
    assert prompt_of(live) == kept


def test_what_is_stored_is_what_was_told(speaking: Any) -> None:
    live = speaking(f"One.</think>Two.{CALL}", thinks=True)
    asked = {"tools": [TOOL], "metadata": {"a": "b"}, "include": ["message.output_text.logprobs"]}
    told = live.post(PATH, input="x", **asked).json()
    answer = live.http.get(f"{PATH}/{told['id']}")
    assert answer.json() == told
    assert answer.headers["content-type"] == "application/json"
    TypeAdapter(response_models.ResponseBody).validate_json(answer.content)


def test_a_deleted_response_is_gone_and_its_children_are_not(speaking: Any, prompt_of: Any) -> None:
    live = speaking("one", "two", "three")
    first = live.post(PATH, input="a").json()["id"]
    second = live.post(PATH, input="b", previous_response_id=first).json()["id"]
    deleted = live.http.delete(f"{PATH}/{first}")
    assert deleted.json() == {"id": first, "object": "response", "deleted": True}
    TypeAdapter(response_models.DeletedResponse).validate_json(deleted.content)
    assert live.http.get(f"{PATH}/{first}").status_code == 404
    assert live.http.delete(f"{PATH}/{first}").status_code == 404
    assert live.post(PATH, input="c", previous_response_id=first).status_code == 400
    assert live.post(PATH, input="c", previous_response_id=second).status_code == 200
    assert prompt_of(live) == "[user]a[assistant]one[user]b[assistant]two[user]c"


def test_nothing_is_kept_of_what_is_not_to_be_stored(live: Any) -> None:
    body = live.post(PATH, input="x", max_output_tokens=1, store=False).json()
    assert body["store"] is False
    assert live.http.get(f"{PATH}/{body['id']}").status_code == 404
    assert live.metric("octavo_stored_responses_bytes") == 0


def test_items_are_listed_page_by_page(speaking: Any, api_of: Any) -> None:
    live = speaking("one", "two")
    items = [{"role": "user", "content": str(i)} for i in range(30)]
    with api_of(live) as api:
        first = api.responses.create(model="fake", input=items)
        second = api.responses.create(model="fake", input="x", previous_response_id=first.id)
        # The client asks for page after page.
        listed = list(api.responses.input_items.list(second.id))
    texts = [item.content[0].text for item in listed]
    assert texts == ["x", "one", *map(str, reversed(range(30)))]
    page = live.http.get(f"{PATH}/{first.id}/input_items?order=asc&limit=2").json()
    TypeAdapter(response_models.InputItems).validate_python(page)
    assert (page["first_id"], page["last_id"], page["has_more"]) == (*ids(page["data"]), True)
    last = f"{PATH}/{first.id}/input_items?order=asc&after={listed[2].id}"
    assert live.http.get(last).json() == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }


def test_every_kind_of_item_is_listed_as_documented(speaking: Any) -> None:
    live = speaking(f"One.</think>Two.{CALL}", "x", thinks=True)
    first = live.post(PATH, input="1+1?", tools=[TOOL]).json()
    items = [
        *first["output"],
        {"type": "function_call_output", "call_id": "c", "output": "2"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    second = live.post(PATH, input=items, previous_response_id=first["id"]).json()
    listed = live.http.get(f"{PATH}/{second['id']}/input_items?order=asc").json()
    TypeAdapter(response_models.InputItems).validate_python(listed)
    assert ids(listed["data"])[1:4] == ids(first["output"])
    assert len(set(ids(listed["data"])[4:])) == len(items)


def test_items_may_be_referred_to(speaking: Any, prompt_of: Any) -> None:
    live = speaking("one", "two", "three")
    first = live.post(PATH, input="a").json()
    [said] = first["output"]
    [asked] = live.http.get(f"{PATH}/{first['id']}/input_items").json()["data"]
    items = [
        {"type": "item_reference", "id": asked["id"]},
        {"id": said["id"]},
        {"role": "user", "content": "b"},
    ]
    second = live.post(PATH, input=items).json()["id"]
    assert prompt_of(live) == "[user]a[assistant]one[user]b"
    # The turn that refers to the item holds it.
    live.http.delete(f"{PATH}/{first['id']}")
    live.post(PATH, input="c", previous_response_id=second)
    assert prompt_of(live) == "[user]a[assistant]one[user]b[assistant]two[user]c"
    error = live.post(PATH, input=items).json()["error"]
    assert error["param"] == "input.0.id"


@pytest.mark.parametrize("suffix", ["o1", "i1", "o99999", "i", "x0"])
def test_a_reference_to_no_item_is_refused(speaking: Any, suffix: str) -> None:
    live = speaking("one")
    key = live.post(PATH, input="a").json()["id"].removeprefix("resp_")
    error = live.post(PATH, input=[{"id": f"msg_{key}{suffix}"}]).json()["error"]
    assert error["param"] == "input.0.id"


def test_references_multiply_nothing_beyond_a_requests_size(speaking: Any) -> None:
    live = speaking("one", max_request_bytes=4096)
    first = live.post(PATH, input="x" * 3000, truncation="auto").json()["id"]
    [item] = live.http.get(f"{PATH}/{first}/input_items").json()["data"]
    refer = {"id": item["id"]}
    assert live.post(PATH, input=[refer], truncation="auto").status_code == 200
    error = live.post(PATH, input=[refer, refer]).json()["error"]
    assert error["param"] == "input.1"


def test_a_conversation_grows_no_larger_than_a_request_may_be(speaking: Any) -> None:
    live = speaking("one", max_request_bytes=4096)
    asked = {"input": "x" * 1500, "truncation": "auto"}
    first = live.post(PATH, **asked).json()["id"]
    second = live.post(PATH, **asked, previous_response_id=first).json()["id"]
    error = live.post(PATH, input="x", previous_response_id=second).json()["error"]
    assert error["param"] == "previous_response_id"


def test_each_key_sees_its_own(speaking: Any, api_of: Callable[..., Any]) -> None:
    live = speaking("one", api_key=["a-key", "b-key"])
    with api_of(live, "a-key") as mine, api_of(live, "b-key") as other:
        first = mine.responses.create(model="fake", input="x")
        assert mine.responses.retrieve(first.id).id == first.id
        with pytest.raises(openai.NotFoundError):
            other.responses.retrieve(first.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.input_items.list(first.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.delete(first.id)
        with pytest.raises(openai.BadRequestError):
            other.responses.create(model="fake", input="x", previous_response_id=first.id)
        with pytest.raises(openai.BadRequestError):
            other.responses.create(model="fake", input=[{"id": first.output[0].id}])
        mine.responses.delete(first.id)


def test_the_oldest_is_forgotten_for_want_of_room(speaking: Any) -> None:
    live = speaking("one", responses_max_count=2)
    names = [live.post(PATH, input=str(i)).json()["id"] for i in range(3)]
    found = [live.http.get(f"{PATH}/{name}").status_code for name in names]
    assert found == [404, 200, 200]
    assert live.metric("octavo_stored_responses") == 2


def test_what_is_too_large_to_keep_is_told(speaking: Any) -> None:
    live = speaking("one", responses_max_bytes=2048)
    body = live.post(PATH, input="x" * 2000, truncation="auto").json()
    assert body["store"] is False
    assert [warning["param"] for warning in body["octavo"]["warnings"]] == ["store"]
    assert live.http.get(f"{PATH}/{body['id']}").status_code == 404


def test_a_server_may_keep_nothing(speaking: Any) -> None:
    live = speaking("one", responses_max_count=0)
    body = live.post(PATH, input="x").json()
    assert (body["store"], body["octavo"]["warnings"]) == (False, [])
    wanted = live.post(PATH, input="x", store=True).json()
    assert [warning["param"] for warning in wanted["octavo"]["warnings"]] == ["store"]
    assert live.http.get(f"{PATH}/{body['id']}").status_code == 404


def test_a_long_conversation_is_read_beside_the_event_loop(
    speaking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = speaking("one")
    threads = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.get_ident())
        return read_conversation(*args, **kwargs)

    async def loop_thread() -> int:
        return threading.get_ident()

    monkeypatch.setattr(response_session, "read_conversation", noted)
    asked = {"input": "x" * 20_000, "truncation": "auto"}
    first = live.post(PATH, **asked).json()["id"]
    assert live.post(PATH, previous_response_id=first, **asked).status_code == 200
    assert len(threads) == 2
    assert live.call(loop_thread()) not in threads[1:]
