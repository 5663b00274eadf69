"""The suites of clients that live in an environment of their own, or in JavaScript."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.e2e


def test_python(run_suite: Callable[..., None]) -> None:
    # In one go, for to import these takes half as long as to use them. The official client too, by
    # the major version before the one that the project has.
    langchain = "langchain_suite.py", "langchain_structured_suite.py"
    litellm = "litellm_suite.py", "litellm_structured_suite.py"
    run_suite("test_openai.py", *langchain, *litellm)


@pytest.mark.parametrize("name", ["openai.mjs", "ai.mjs"])
def test_node(name: str, run_suite: Callable[..., None]) -> None:
    run_suite(name)
