"""The real daemon for an operator; tests/clients has it for clients."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from event_streams import chunks_of
from waiting import TIMEOUT_S, wait_until

pytestmark = pytest.mark.e2e

_MODEL = "SmolLM2-135M-Instruct"


def _stream(url: str, prompt: str, max_tokens: int) -> list[int]:
    """Return the tokens. Pieces are not exact: on a busy machine several tokens become one."""
    body = {
        "model": _MODEL,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=TIMEOUT_S)
    assert answer.status_code == 200, answer.text
    choices = [chunk["choices"][0] for chunk in chunks_of(answer.content)]
    return [token for choice in choices for token in choice.get("token_ids", ())]


def test_a_long_prompt_is_served_beside_streams(daemon: Any) -> None:
    told: list[list[int]] = []
    streams = [
        threading.Thread(target=lambda i=i: told.append(_stream(daemon.url, f"{i} is", 40)))
        for i in range(4)
    ]
    for stream in streams:
        stream.start()
    long = _stream(daemon.url, "word " * 3000, 2)
    for stream in streams:
        stream.join()
    assert len(long) == 2
    assert [len(tokens) for tokens in told] == [40] * 4


def test_thirty_two_with_one_system_prompt_compute_it_once(daemon: Any) -> None:
    system = "You are a patient librarian who answers in few words. " * 90
    before = daemon.metric("octavo_prefix_cache_hits_total")
    asked_before = daemon.metric("octavo_prefix_cache_queries_total")

    async def ask_all() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{daemon.url}/v1", api_key="none") as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=_MODEL,
                        messages=[
                            {"role": "system", "content": system},
                            {"role": "user", "content": f"{i}: where are the atlases?"},
                        ],
                        max_tokens=4,
                    )
                    for i in range(32)
                )
            )
        return [answer.usage.prompt_tokens for answer in answers if answer.usage]

    prompt_tokens = asyncio.run(ask_all())
    assert min(prompt_tokens) > 1000
    hits = daemon.metric("octavo_prefix_cache_hits_total") - before
    asked = daemon.metric("octavo_prefix_cache_queries_total") - asked_before
    assert asked == sum(prompt_tokens)
    # One computes it all; of the 31 others each computes the question, and a page at the most.
    assert asked - hits < prompt_tokens[0] + 31 * (16 + 40)


def test_clients_that_go_away_leave_nothing_behind(daemon: Any) -> None:
    host, port = daemon.url.removeprefix("http://").split(":")
    body = (
        b'{"model": "SmolLM2-135M-Instruct", "prompt": "Once", "max_tokens": 900, '
        b'"ignore_eos": true, "stream": true}'
    )
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    for i in range(200):
        with socket.create_connection((host, int(port)), timeout=TIMEOUT_S) as connection:
            connection.sendall(head + body)
            if i % 2:
                assert connection.recv(16)
    counts = ("octavo_num_requests_running", "octavo_num_requests_waiting")
    wait_until(lambda: not any(map(daemon.metric, counts)), daemon.log)
    pages = daemon.metrics()
    assert "octavo_kv_cache_pages{" in pages
    for state in ("private", "leased"):
        line = next(x for x in pages.splitlines() if f'state="{state}"' in x and "_pages{" in x)
        assert float(line.split()[-1]) == 0


def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_0(
    start_daemon: Callable[..., Any],
) -> None:
    limits = ("--kv-cache-memory", "64MiB", "--drain-timeout-s", str(TIMEOUT_S))
    with start_daemon(*limits) as daemon:
        tokens: list[int] = []
        stream = threading.Thread(
            target=lambda: tokens.extend(_stream(daemon.url, "Once upon a time", 200))
        )
        stream.start()
        wait_until(lambda: daemon.metric("octavo_generation_tokens_total") >= 3, daemon.log)
        with httpx.Client(timeout=TIMEOUT_S) as kept:
            assert kept.get(f"{daemon.url}/ready").status_code == 200
            assert daemon.stop() == 0
        stream.join()
        assert len(tokens) == 200


def test_a_port_in_use_and_a_missing_model_are_one_line(daemon: Any) -> None:
    import subprocess  # noqa: PLC0415 - only here
    import sys  # noqa: PLC0415 - only here

    port = daemon.url.rsplit(":", 1)[1]
    for flags, said in (
        (["--port", port], f"cannot listen on 127.0.0.1:{port}"),
        (["--port", "0", "./no-such-model"], "no such file or folder"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "server", "serve", *flags],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 1
        assert said in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
