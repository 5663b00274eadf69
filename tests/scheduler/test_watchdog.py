from __future__ import annotations

import asyncio
import time

from scheduler.watchdog import Watchdog
from waiting import TIMEOUT_S


class Kennel:
    """A watchdog, how often it asked, and how often it bit."""

    def __init__(self, timeout_s: float = 8.0) -> None:
        self.num_questions = self.num_timeouts = 0
        self.dog = Watchdog(timeout_s, self._ask, self._on_timeout)

    def _ask(self) -> None:
        self.num_questions += 1

    def _on_timeout(self) -> None:
        self.num_timeouts += 1

    def look(self, times: int) -> tuple[int, int, bool]:
        for _ in range(times):
            self.dog.look()
        return self.num_questions, self.num_timeouts, self.dog.is_silent


def test_silence_is_asked_then_doubted_then_bitten_and_all_begins_anew() -> None:
    kennel = Kennel()
    assert kennel.look(1) == (0, 0, False)
    assert kennel.look(1) == (1, 0, False)
    assert kennel.look(4) == (1, 0, False)
    # After seven checks, of an eighth of the timeout each: before the timeout.
    assert kennel.look(1) == (1, 0, True)
    assert kennel.look(2) == (1, 0, True)
    # Eight checks after the question.
    assert kennel.look(1) == (1, 1, False)
    assert kennel.look(9) == (2, 1, True)


def test_a_sign_of_life_calms_it() -> None:
    kennel = Kennel()
    for _ in range(50):
        kennel.dog.heard()
        assert kennel.look(9)[1:] == (0, True)
    kennel.dog.heard()
    assert not kennel.dog.is_silent


def test_it_asks_no_one_who_talks() -> None:
    kennel = Kennel()
    for _ in range(50):
        kennel.look(1)
        kennel.dog.heard()
    assert kennel.num_questions == 0


def test_it_looks_by_itself_until_it_is_stopped() -> None:
    async def test() -> None:
        kennel = Kennel(timeout_s=0.04)
        kennel.dog.stop()
        kennel.dog.start()
        while not kennel.num_timeouts:  # noqa: ASYNC110 - it sets no event
            await asyncio.sleep(0.001)
        kennel.dog.stop()
        was = kennel.look(0)
        await asyncio.sleep(0.05)
        assert kennel.look(0) == was

    asyncio.run(asyncio.wait_for(test(), TIMEOUT_S))


def test_a_loop_that_stood_still_has_not_waited() -> None:
    """Answers that came meanwhile are still unread."""

    async def test() -> None:
        kennel = Kennel(timeout_s=0.08)
        kennel.dog.start()
        time.sleep(0.3)  # noqa: ASYNC251 - that the loop stands still is the point
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert kennel.look(0) == (0, 0, False)
        kennel.dog.stop()

    asyncio.run(test())
