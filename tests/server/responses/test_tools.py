"""Custom tools and namespaces: the client gets the shapes that it sent, and may send them back."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types.responses import Response as OpenAIResponse
from pydantic import TypeAdapter

from server.responses import response_models

ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}
PATCH = {"type": "custom", "name": "patch", "description": "Patches."}
SPACE = {"type": "namespace", "name": "desk", "description": "Of files.", "tools": [ADD, PATCH]}
TOOLS = [PATCH, SPACE]
#: Shows calls and results, and no more: the context is small.
SHORT = """\
{%- if tools %}<tool_call>{% for t in tools %}{{ t.function.name }},{% endfor %}{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments.input }}
{%- endfor %}{% endfor %}"""
CALLS = "".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>\n'
    for name, arguments in [
        ("patch", '{"input": "- a\\n+ b"}'),
        ("desk__add", '{"a": 1}'),
        ("desk__patch", '{"input": ""}'),
    ]
)

CALLED = [
    ("custom_tool_call", None, "patch", "- a\n+ b"),
    ("function_call", "desk", "add", '{"a": 1}'),
    ("custom_tool_call", "desk", "patch", ""),
]


def _called(items: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (
            item["type"],
            item.get("namespace"),
            item["name"],
            item.get("input", item.get("arguments")),
        )
        for item in items
    ]


def test_calls_have_the_shapes_of_their_tools(speaking: Any, prompt_of: Any) -> None:
    live = speaking(CALLS, "done", template=SHORT)
    body = live.post("/v1/responses", input="x", tools=TOOLS).json()
    TypeAdapter(response_models.ResponseBody).validate_python(body)
    OpenAIResponse.model_validate(body)
    assert _called(body["output"]) == CALLED
    assert prompt_of(live).startswith("<tool_call>patch,desk__add,desk__patch,")
    results = [
        {"type": f"{item['type']}_output", "call_id": item["call_id"], "output": "ok"}
        for item in body["output"]
    ]
    told = "[assistant]patch- a\n+ bdesk__adddesk__patch[tool]ok[tool]ok[tool]ok"
    # After the stored conversation, and with all of it sent again.
    live.post("/v1/responses", input=results, previous_response_id=body["id"], tools=TOOLS)
    assert told in prompt_of(live)
    sent = [{"role": "user", "content": "x"}, *body["output"], *results]
    again = live.post("/v1/responses", input=sent, tools=TOOLS)
    assert again.status_code == 200, again.text
    assert told in prompt_of(live)
    listed = live.http.get(f"/v1/responses/{again.json()['id']}/input_items?limit=50").json()
    TypeAdapter(response_models.InputItems).validate_python(listed)


@pytest.mark.parametrize("width", [1, 1000])
def test_a_stream_of_calls_adds_up(speaking: Any, events_of: Any, width: int) -> None:
    live = speaking(CALLS, template=SHORT, width=width)
    answer = live.post("/v1/responses", input="x", tools=TOOLS, stream=True)
    events = events_of(answer.text)
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert _called(done) == CALLED
    written: dict[str, str] = {}
    for event in events:
        if event["type"].endswith(("_input.delta", "_arguments.delta")):
            written[event["item_id"]] = written.get(event["item_id"], "") + event["delta"]
    assert [written[item["id"]] for item in done] == [text for *_, text in CALLED]
    ends = [e["input"] for e in events if e["type"] == "response.custom_tool_call_input.done"]
    assert ends == ["- a\n+ b", ""]


def test_a_choice_names_a_tool_in_its_namespace(speaking: Any, prompt_of: Any) -> None:
    live = speaking("no", template=SHORT)
    entry = {"type": "function", "name": "add", "namespace": "desk"}
    for named in (entry, {"type": "namespace", "name": "desk"}):
        choice = {"type": "allowed_tools", "mode": "auto", "tools": [named]}
        answer = live.post("/v1/responses", input="x", tools=TOOLS, tool_choice=choice)
        assert answer.status_code == 200, answer.text
        assert answer.json()["tool_choice"] == choice
        assert prompt_of(live).startswith("<tool_call>desk__add,")
    only = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "image_generation"}]}
    live.post("/v1/responses", input="x", tools=TOOLS, tool_choice=only)
    assert "desk" not in prompt_of(live)


def test_tools_that_are_left_out_are_not_counted(speaking: Any) -> None:
    live = speaking("no", template=SHORT)
    tools = [{"type": "web_search"}, {**ADD, "defer_loading": True}, {**ADD, "strict": True}]
    error = live.post("/v1/responses", input="x", tools=tools).json()["error"]
    assert error["param"] == "tools.2.name"
    body = live.post("/v1/responses", input="x", tools=[tools[0]], tool_choice="auto").json()
    assert [warning["param"] for warning in body["octavo"]["warnings"]] == ["tools.0"]
    body = live.post("/v1/responses", input="x", tools=[tools[0], tools[1]]).json()
    warned = [warning["param"] for warning in body["octavo"]["warnings"]]
    assert warned == ["tools.0", "tools.1.defer_loading"]
