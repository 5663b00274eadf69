"""The suites of clients that live in an environment of their own, or in JavaScript."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(
    "name",
    [
        "test_openai.py",  # by the major version before the one that the project has
        "langchain_suite.py",
        "litellm_suite.py",
        "openai.mjs",
        "ai.mjs",
    ],
)
def test_suite(name: str, run_suite: Callable[[str], None]) -> None:
    run_suite(name)
