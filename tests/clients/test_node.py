"""The clients in JavaScript."""

from __future__ import annotations

from collections.abc import Callable

import pytest

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("name", ["openai.mjs", "ai.mjs"])
def test_suite(name: str, run_suite: Callable[..., None]) -> None:
    run_suite(name)
