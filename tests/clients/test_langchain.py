"""LangChain, in an environment of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.e2e


def test_suite(run_suite: Callable[..., None]) -> None:
    run_suite("langchain_suite.py", "langchain_structured_suite.py")
