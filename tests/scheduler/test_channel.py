"""Messages over a socket: whole, in order, and never at the cost of the event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from multiprocessing.connection import Connection

import pytest
import uvloop

from model.interface import SamplingParams
from scheduler.channel import Channel
from scheduler.messages import (
    Cancel,
    FromEngine,
    GenerateRequest,
    Ping,
    Pong,
    StepResult,
    Submit,
    ToEngine,
)
from waiting import TIMEOUT_S

Run = Callable[[Callable[["Ends"], Awaitable[None]]], None]


class Ends:
    """A channel and, at its other end, the engine's connection."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.raw = os.dup(theirs.fileno())
        self.peer = Connection(theirs.detach())
        self.received: list[FromEngine] = []
        self.num_losses = 0
        self.channel = Channel(ours, self.received.append, self._lose)

    def _lose(self) -> None:
        self.num_losses += 1

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():  # noqa: ASYNC110 - nothing sets an event
                await asyncio.sleep(0.001)

    def close(self) -> None:
        self.channel.close()
        self.peer.close()
        os.close(self.raw)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run(test: Callable[[Ends], Awaitable[None]]) -> None:
        async def bounded() -> None:
            ends = Ends()
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await test(ends)
            finally:
                ends.close()

        {"asyncio": asyncio.run, "uvloop": uvloop.run}[request.param](bounded())

    return run


def _submit(request_id: int, num_tokens: int = 4000) -> Submit:
    return Submit(
        request_id, GenerateRequest(tuple(range(num_tokens)), SamplingParams(max_tokens=1))
    )


def test_what_the_peer_does_not_take_waits_and_arrives_whole_and_in_order(run: Run) -> None:
    async def test(ends: Ends) -> None:
        messages: list[ToEngine] = [_submit(i) for i in range(60)]
        messages += [Ping(), Cancel(3), _submit(60, 300_000), Ping()]
        for message in messages:
            ends.channel.send(message)
        assert not ends.channel.is_drained
        taken: list[ToEngine] = []
        thread = threading.Thread(
            target=lambda: taken.extend(ends.peer.recv() for _ in range(len(messages)))
        )
        thread.start()
        await ends.until(lambda: ends.channel.is_drained)
        thread.join(TIMEOUT_S)
        assert taken == messages

    run(test)


def test_a_request_that_is_cancelled_before_it_was_sent_is_forgotten(run: Run) -> None:
    async def test(ends: Ends) -> None:
        # The first is being sent, the second waits.
        ends.channel.send(_submit(0, 1_000_000))
        for i in range(1, 1000):
            ends.channel.send(_submit(i, 10))
            ends.channel.send(Cancel(i))
        ends.channel.send(Cancel(0))
        assert len(ends.channel._unsent) == 1
        taken: list[ToEngine] = []
        thread = threading.Thread(target=lambda: taken.extend(ends.peer.recv() for _ in range(2)))
        thread.start()
        await ends.until(lambda: ends.channel.is_drained)
        thread.join(TIMEOUT_S)
        assert taken == [_submit(0, 1_000_000), Cancel(0)]

    run(test)


def test_a_message_that_comes_in_pieces_is_taken_in_when_it_is_whole(run: Run) -> None:
    async def test(ends: Ends) -> None:
        result = StepResult(token_ids=list(range(100_000)))
        ends.peer.send(Pong())
        await ends.until(lambda: len(ends.received) == 1)
        thread = threading.Thread(target=ends.peer.send, args=(result,))
        thread.start()
        await ends.until(lambda: len(ends.received) == 2)
        thread.join(TIMEOUT_S)
        # A frame as the engine writes it, a byte at a time.
        reader, writer = os.pipe()
        with Connection(writer, readable=False) as frame:
            frame.send(replace(result, token_ids=[1, 2]))
        pieces = os.read(reader, 10_000)
        os.close(reader)
        for byte in pieces:
            os.write(ends.raw, bytes([byte]))
            await asyncio.sleep(0)
        await ends.until(lambda: len(ends.received) == 3)
        assert ends.received == [Pong(), result, replace(result, token_ids=[1, 2])]

    run(test)


def test_a_false_alarm_of_the_loop_is_no_end(run: Run) -> None:
    async def test(ends: Ends) -> None:
        ends.channel._read()
        ends.peer.send(Pong())
        await ends.until(lambda: ends.received == [Pong()])
        assert ends.num_losses == 0

    run(test)


def test_the_peers_end_is_told_once_after_all_it_said(run: Run) -> None:
    async def test(ends: Ends) -> None:
        ends.peer.send(Pong())
        ends.peer.close()
        os.close(ends.raw)
        ends.channel.send(_submit(0))
        ends.channel.send(_submit(1))
        await ends.until(lambda: ends.num_losses == 1)
        assert ends.received == [Pong()]
        ends.channel.close()
        ends.raw = os.open(os.devnull, os.O_RDONLY)

    run(test)


def test_a_peer_that_goes_with_something_unread_is_gone(run: Run) -> None:
    async def test(ends: Ends) -> None:
        ends.channel.send(_submit(0))
        ends.peer.close()
        os.close(ends.raw)
        await ends.until(lambda: ends.num_losses == 1)
        ends.raw = os.open(os.devnull, os.O_RDONLY)

    run(test)


@pytest.mark.parametrize(
    "garbage",
    [b"\x00\x00\x00\x05hello", b"\xff\xff\xff\xff" + bytes(8)],
    ids=["no message", "longer than any"],
)
def test_what_cannot_be_read_ends_the_channel_and_is_logged(
    run: Run, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(ends: Ends) -> None:
        os.write(ends.raw, garbage)
        await ends.until(lambda: ends.num_losses == 1)

    with caplog.at_level(logging.ERROR):
        run(test)
    assert "cannot be used" in caplog.text
