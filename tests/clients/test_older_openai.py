"""OpenAI's client, by the major version before the one in the project's environment."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.e2e


def test_suite(run_suite: Callable[..., None]) -> None:
    run_suite("test_openai.py")
