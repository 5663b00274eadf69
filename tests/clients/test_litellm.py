"""LiteLLM, in an environment of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.e2e


def test_suite(run_suite: Callable[..., None]) -> None:
    run_suite("litellm_suite.py", "litellm_structured_suite.py")
