"""Our OpenAPI document is true: schemathesis sends valid and invalid requests to all its routes.

As a program of its own: its plugin for pytest does not work with the version used here. Routes are
taken from the document, so a new one is tested without a line here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from server import answer_types
from server.generation import request_fields
from server.messages import response_models as messages_response_models
from server.messages import schemas as messages_schemas
from server.openai import chat_messages
from server.openai import response_models as openai_response_models
from server.openai import schemas as openai_schemas
from server.openapi import answers, generation_answers
from server.responses import items
from server.responses import response_models as responses_response_models
from server.responses import schemas as responses_schemas
from server.responses import tools as responses_tools
from server.structured import schemas as structured_schemas
from server.text.load import ModelText
from server.text.template import ChatTemplate
from server.tools import schemas as tool_schemas
from waiting import TIMEOUT_S

#: Of one with tools and reasoning, so that chats go every way there is.
TEMPLATE = """\
{%- if tools %}{{ tools | tojson }} <tool_call>{% endif %}
{%- for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{# </think> #}<think>
"""
#: `positive_data_acceptance` is not among them: a schema cannot express which tokens there
#: are, that a prompt must fit, or that of two fields one is needed.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)
#: A body that violates the schema may be too large before it is wrong.
CONFIG = """\
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 413, 429]
"""
#: Random bodies for each route; the limits of each field are always tested.
_MAX_EXAMPLES = 2


@pytest.fixture
def talkative(start_server: Callable[..., Any], text: ModelText) -> Any:
    template = ChatTemplate(
        {"default": TEMPLATE}, special_tokens={}, now=lambda: datetime.now(tz=UTC)
    )
    return start_server(words=replace(text, template=template))


def _run(
    folder: Path, location: str, *more: str, max_examples: int = _MAX_EXAMPLES
) -> subprocess.CompletedProcess[str]:
    (folder / "schemathesis.toml").write_text(CONFIG)
    options = {
        "--phases": "coverage,fuzzing",
        "--checks": ",".join(CHECKS),
        "--max-examples": str(max_examples),
        "--request-timeout": str(TIMEOUT_S),
        "--suppress-health-check": "all",
        "--warnings": "off",
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", location, *more),
            *(word for option in options.items() for word in option),
            *("--generation-deterministic", "--continue-on-failure", "--no-color"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize("max_examples", [_MAX_EXAMPLES, pytest.param(100, marks=pytest.mark.slow)])
def test_every_route_keeps_to_the_document(
    talkative: Any, tmp_path: Path, max_examples: int
) -> None:
    document = talkative.http.get("/openapi.json").json()
    done = _run(tmp_path, f"{talkative.url}/openapi.json", max_examples=max_examples)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Tested: {sum(map(len, document['paths'].values()))}" in done.stdout, done.stdout
    talkative.wait_idle()
    assert "failed by a bug" not in talkative.log.getvalue()


@pytest.mark.parametrize(
    ("path", "model", "field"),
    [("/v1/models", "ModelCard", "max_model_len"), ("/v1/completions", "Usage", "total_tokens")],
)
def test_a_promise_that_is_not_kept_is_found(
    talkative: Any, tmp_path: Path, path: str, model: str, field: str
) -> None:
    document = talkative.http.get("/openapi.json").json()
    document["components"]["schemas"][model]["properties"][field] = {"type": "string"}
    document["paths"] = {path: document["paths"][path]}
    (tmp_path / "document.json").write_text(json.dumps(document))
    done = _run(tmp_path, "document.json", "--url", talkative.url)
    assert done.returncode == 1, done.stdout + done.stderr
    assert field in done.stdout


def test_no_route_builds_the_schemas_of_its_answers() -> None:
    """FastAPI would build those under "model" once for each route and status, at every start."""
    model = openai_response_models.Completion
    for held in (answers(None), answers(model, 503), generation_answers(model, model)):
        assert [status for status, answer in held.items() if "model" in answer] == []


#: Modules with the types of bodies and answers.
_TYPES = (
    *(answer_types, request_fields, structured_schemas, tool_schemas),
    *(chat_messages, openai_schemas, openai_response_models),
    *(messages_schemas, messages_response_models),
    *(items, responses_tools, responses_schemas, responses_response_models),
)


def test_each_type_has_a_name_of_its_own(live: Any) -> None:
    """Types of one name would overwrite each other."""
    held = live.http.get("/openapi.json").json()["components"]["schemas"]
    types = [
        (name, kind)
        for module in _TYPES
        for name, kind in vars(module).items()
        if isinstance(kind, type) and kind.__module__ == module.__name__ and name in held
    ]
    assert len(types) == len(dict(types)) > len(held) / 2
    for name, kind in types:
        schema = TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}")
        schema = schema.get("$defs", {}).get(name, schema)
        schema.pop("$defs", None)
        assert held[name] == schema, name
