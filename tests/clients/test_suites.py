"""The suites of clients that live in an environment of their own, or in JavaScript."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.e2e


def test_python(run_suite: Callable[..., None]) -> None:
    # The official client too, by the major version before the one that the project has.
    run_suite("test_openai.py", "langchain_suite.py", "litellm_suite.py")


@pytest.mark.parametrize("name", ["openai.mjs", "ai.mjs"])
def test_node(name: str, run_suite: Callable[..., None]) -> None:
    run_suite(name)
