"""docs/api.md agrees with the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tools import api_table

DOCUMENT = Path(__file__).parents[2] / "docs" / "api.md"
USER = {"role": "user", "content": "x"}


def test_the_committed_page_is_the_generated_one() -> None:
    assert DOCUMENT.read_text() == api_table.page(), "run: python -m tools.api_table > docs/api.md"


@pytest.mark.parametrize(("path", "column"), [("/v1/chat/completions", 0), ("/v1/completions", 1)])
def test_what_the_page_says_is_refused_or_warned_of_is(shared: Any, path: str, column: int) -> None:
    """With a value that no parameter takes as neutral."""
    body = {"messages": [USER], "prompt": "x", "max_tokens": 1}
    names = {"honoured": 0, "refused": 0, "warned": 0, "-": 0}
    for name, *said, _ in api_table.entries():
        names[said[column]] += 1
        if name.startswith("stream_options.") or said[column] == "honoured":
            continue
        answer = shared.post(path, **(body | {name: ["no", {"such": "value"}]}))
        if said[column] == "refused":
            assert answer.status_code == 400, name
            assert answer.json()["error"]["param"] == name
            assert answer.json()["error"]["code"] == "unsupported_parameter"
        else:
            warned = [entry["param"] for entry in answer.json()["octavo"]["warnings"]]
            assert name in warned
    assert all(names.values()), names


def test_what_the_page_says_of_responses_is_so(shared: Any) -> None:
    names = {"honoured": 0, "refused": 0, "warned": 0}
    for name, said, _ in api_table.responses_entries():
        names[said] += 1
        outer, _, inner = name.partition(".")
        if said == "honoured" or inner in {"effort", "verbosity"}:
            continue
        value: Any = ["no", {"such": "value"}]
        asked = {outer: {inner: value} if inner else value}
        answer = shared.post("/v1/responses", input="x", max_output_tokens=1, **asked)
        if said == "refused":
            assert answer.status_code == 400, name
            assert answer.json()["error"]["param"] == name
        else:
            warned = [entry["param"] for entry in answer.json()["octavo"]["warnings"]]
            assert name in warned
    assert all(names.values()), names
