"""The model's routes, the reports of parameters, and the document of the whole API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from event_streams import chunks_of
from server import answer_types
from server.generation import params
from server.generation.request_fields import Request
from server.openai import response_models, schemas
from server.text.export import export_tokenizer

USER = {"role": "user", "content": "x"}


def test_the_model_is_listed(shared: Any) -> None:
    listed = shared.http.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["fake"]
    assert shared.http.get("/v1/models/fake").json() == listed["data"][0]


def test_tokenize_and_detokenize_are_each_others_inverse(shared: Any) -> None:
    told = shared.post("/tokenize", prompt="häß 260").json()
    assert told["count"] == len(told["tokens"])
    assert told["max_model_len"] == 256
    assert shared.post("/detokenize", tokens=told["tokens"]).json() == {
        "prompt": "häß 260",
        "content": "häß 260",
    }


def test_llama_servers_clients_find_their_names(shared: Any) -> None:
    told = shared.post("/tokenize", content="häß", parse_special=True, with_pieces=True).json()
    assert told["tokens"] == list("häß".encode())
    assert [warning["param"] for warning in told["octavo"]["warnings"]] == ["with_pieces"]
    TypeAdapter(response_models.Tokenized).validate_python(told)
    back = shared.post("/detokenize", tokens=told["tokens"], x=1).json()
    assert back["content"] == "häß"
    assert [warning["param"] for warning in back["octavo"]["warnings"]] == ["x"]
    TypeAdapter(response_models.Detokenized).validate_python(back)


def test_a_conversation_is_tokenized_as_a_chat_is(shared: Any) -> None:
    told = shared.post("/tokenize", messages=[USER]).json()
    usage = shared.post("/v1/chat/completions", messages=[USER], max_tokens=1).json()["usage"]
    assert told["count"] == usage["prompt_tokens"]
    shorter = shared.post("/tokenize", messages=[USER], add_generation_prompt=False).json()
    assert shorter["count"] < told["count"]


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": [USER]}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
        ("/tokenize", {"prompt": "x", "content": "x"}, "prompt"),
        ("/tokenize", {"prompt": "x", "suffix": 1, "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [300]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [2**80]}, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, "tokens.0"),
        ("/detokenize", {"tokens": [1.5]}, "tokens.0"),
    ],
)
def test_wrong_words_are_refused(shared: Any, path: str, asked: dict[str, Any], param: str) -> None:
    answer = shared.post(path, **asked)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_the_version_is_told(shared: Any) -> None:
    assert shared.http.get("/version").json() == {"version": "0.0.test"}


def test_probes_may_ask_for_the_status_alone(shared: Any) -> None:
    answer = shared.http.head("/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_what_is_not_honoured_is_told(shared: Any) -> None:
    asked = {"user": "me", "metadata": {"a": 1}, "store": True, "tempurature": 0.5, "seed": None}
    body = shared.chat(max_tokens=1, **asked).json()
    told = {warning["param"]: warning["message"] for warning in body["octavo"]["warnings"]}
    assert set(told) == {"user", "metadata", "store", "tempurature"}
    assert "unknown" in told["tempurature"]


def test_values_that_ask_for_nothing_are_no_trouble(shared: Any) -> None:
    asked = {
        "n": 1,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "store": False,
        "logprobs": False,
        "modalities": ["text"],
        "parallel_tool_calls": True,
        "audio": None,
        "nonsense": None,
    }
    assert shared.chat(max_tokens=1, **asked).json()["octavo"]["warnings"] == []


def test_a_flood_of_unknown_parameters_is_summed_up(shared: Any) -> None:
    asked = {f"x{index}": index for index in range(100)}
    warnings = shared.chat(max_tokens=1, **asked).json()["octavo"]["warnings"]
    assert len(warnings) == 65
    assert "36 more" in warnings[-1]["message"]


@pytest.mark.parametrize(
    ("table", "request_type"),
    [(params.CHAT, schemas.ChatRequest), (params.COMPLETION, schemas.CompletionRequest)],
)
def test_a_parameter_is_honoured_or_judged_but_not_both(
    table: dict[str, params.Unsupported], request_type: type[Request]
) -> None:
    assert not table.keys() & request_type.model_fields.keys()
    for name, known in table.items():
        [neutral, *_] = [*known.neutral, None]
        assert params.judge({name: neutral}, table) == []


@pytest.mark.parametrize("has_logprobs", [False, True])
@pytest.mark.parametrize("has_usage", [False, True])
def test_responses_are_as_documented(shared: Any, has_logprobs: bool, has_usage: bool) -> None:
    options = {"stream": True, "stream_options": {"include_usage": has_usage}}
    chat = {"max_tokens": 9, "logprobs": has_logprobs}
    TypeAdapter(response_models.ChatCompletion).validate_json(shared.chat(**chat).content)
    for chunk in chunks_of(shared.chat(**chat, **options).content):
        TypeAdapter(response_models.ChatChunk).validate_python(chunk)
    text = {"prompt": "x", "logprobs": 1 if has_logprobs else None}
    TypeAdapter(response_models.Completion).validate_json(
        shared.post("/v1/completions", **text).content
    )
    for chunk in chunks_of(shared.post("/v1/completions", **text, **options).content):
        TypeAdapter(response_models.Completion).validate_python(chunk)


def test_the_other_answers_are_as_documented(shared: Any) -> None:
    for path, document in (
        ("/v1/models", response_models.ModelList),
        ("/v1/models/fake", response_models.ModelCard),
        ("/v1/models/other", answer_types.ErrorBody),
        ("/health", response_models.Health),
        ("/ready", response_models.Health),
        ("/version", response_models.Version),
    ):
        TypeAdapter(document).validate_json(shared.http.get(path).content)
    TypeAdapter(response_models.Tokenized).validate_json(
        shared.post("/tokenize", prompt="x").content
    )
    TypeAdapter(response_models.Detokenized).validate_json(
        shared.post("/detokenize", tokens=[1]).content
    )


def test_openapi_knows_every_route_its_body_and_its_errors(shared: Any) -> None:
    document = shared.http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/input_items",
        "/tokenize",
        "/tokenizer_info",
        "/detokenize",
        "/health",
        "/ready",
        "/metrics",
        "/version",
    }
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert ("requestBody" in operation) == (method == "post"), path
            assert "422" not in operation["responses"], path
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(chat) == {"200", "400", "401", "404", "408", "413", "429", "500", "503"}
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
    text = json.dumps(document)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in document["components"]["schemas"], f"{name} is not defined"


@pytest.mark.parametrize(
    ("model", "field", "types"),
    [
        ("ChatRequest", "stop", {"string", "array", "null"}),
        ("ChatRequest", "temperature", {"number", "null"}),
        ("Message", "content", {"string", "array", "null"}),
        ("CompletionRequest", "prompt", {"string", "array"}),
        ("ResponsesRequest", "input", {"string", "array"}),
        ("TokenizeRequest", "messages", {"array", "null"}),
    ],
)
def test_openapi_tells_the_types_that_are_taken(
    shared: Any, model: str, field: str, types: set[str]
) -> None:
    document = shared.http.get("/openapi.json").json()
    schema = document["components"]["schemas"][model]
    assert {kind["type"] for kind in schema["properties"][field]["anyOf"]} == types


def test_the_tokenizers_settings_are_those_of_an_exported_folder(
    shared: Any, tmp_path: Path
) -> None:
    export_tokenizer(shared.text, tmp_path)
    told = shared.http.get("/tokenizer_info").json()
    assert told == json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert told["chat_template"] == shared.text.template.sources["default"]


def test_the_cache_is_reset_where_the_operator_allows_it(start_server: Callable[..., Any]) -> None:
    live = start_server(dev_endpoints=True)
    prompt = "x" * 100
    live.post("/v1/completions", prompt=prompt, max_tokens=1)
    cached = live.metric('octavo_kv_cache_pages{state="cached"}')
    assert cached > 10
    assert live.http.post("/reset_prefix_cache").json() == {"freed_pages": cached}
    usage = live.post("/v1/completions", prompt=prompt, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert live.http.get("/reset_prefix_cache").status_code == 405


def test_the_cache_is_not_reset_elsewhere_nor_without_an_engine(
    shared: Any, start_server: Callable[..., Any], absent: Any
) -> None:
    assert shared.http.post("/reset_prefix_cache").status_code == 404
    live = start_server(type(absent.client)(), dev_endpoints=True)
    answer = live.http.post("/reset_prefix_cache")
    assert answer.status_code == 503
    assert "retry-after" in answer.headers
