"""The engine of a real daemon under faults, and clients of it meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import psutil
from plain_http import NO_AUTHORITIES

from waiting import TIMEOUT_S, wait_until


def engine_of(daemon: Any) -> psutil.Process:
    """Return the engine process, a child of the daemon."""
    children = psutil.Process(daemon.process.pid).children()
    [engine] = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    return engine


def status_of(daemon: Any, path: str) -> int:
    """Call a probe, which must answer in any state of the engine."""
    return httpx.get(f"{daemon.url}{path}", timeout=TIMEOUT_S, verify=NO_AUTHORITIES).status_code


def wait_until_ready_is(status: int, daemon: Any) -> None:
    """Wait for a status of /ready; /health must be 200 meanwhile."""

    def is_so() -> bool:
        assert status_of(daemon, "/health") == 200
        return status_of(daemon, "/ready") == status

    wait_until(is_so, daemon.log)


def complete(daemon: Any, prompt: list[int], max_tokens: int) -> httpx.Response:
    """Request exactly `max_tokens` tokens, greedily."""
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    return httpx.post(
        f"{daemon.url}/v1/completions", json=body, timeout=TIMEOUT_S, verify=NO_AUTHORITIES
    )


class Crowd:
    """Requests side by side, each in a thread of its own."""

    def __init__(self, daemon: Any, prompts: list[list[int]], max_tokens: int) -> None:
        self.answers: list[httpx.Response | Exception | None] = [None] * len(prompts)

        def ask(index: int) -> None:
            try:
                self.answers[index] = complete(daemon, prompts[index], max_tokens)
            except httpx.HTTPError as error:
                self.answers[index] = error

        self._threads = [
            threading.Thread(target=ask, args=(index,), daemon=True)
            for index in range(len(prompts))
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> list[Any]:
        """Wait for all requests and return their answers or errors."""
        for thread in self._threads:
            thread.join(TIMEOUT_S)
        return self.answers
