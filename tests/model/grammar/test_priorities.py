"""Threads that follow grammars leave cores to the steps, but not all of them."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from model.grammar.grammars import Grammars, lower_priority
from model.grammar.matchers import Matchers
from waiting import TIMEOUT_S


def _niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.parametrize(("more", "most"), [(0, 19), (3, 19), (40, 19)])
def test_a_priority_is_relative_to_that_of_the_process(more: int, most: int) -> None:
    before = _niceness()
    with ThreadPoolExecutor(1, initializer=lower_priority, initargs=(more,)) as pool:
        assert pool.submit(_niceness).result(TIMEOUT_S) == min(before + more, most)
    assert _niceness() == before


def test_grammars_do_not_starve() -> None:
    """Regression: at the lowest priority they got no core beside steps that leave none idle."""
    grammars, matchers, before = Grammars(), Matchers(64), _niceness()
    found = [
        pool.submit(_niceness).result(TIMEOUT_S)
        for pool in (matchers._quick, grammars._thread, matchers._slow)
    ]
    grammars.close()
    matchers.close()
    assert found == [before, min(before + 5, 19), min(before + 10, 19)]
