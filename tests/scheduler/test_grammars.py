"""Requests with a grammar, over both clients: held back, refused, cancelled, and taken up again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from array import array
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import pytest
from inline_client import InlineClient

from configs.schema import SchedulerSection
from model.fake import FAKE_EOS_TOKEN_ID, FakeRunner
from model.interface import (
    Constraint,
    SamplingParams,
    StepInput,
    StepOutput,
    Vocabulary,
)
from scheduler.client import (
    EngineClient,
    EngineFaultError,
    GenerateRequest,
    RejectKind,
    RequestRefusedError,
)
from scheduler.engine import Engine
from scheduler.messages import Cancel, FinishReason, Prepared, SetVocabulary, Submit
from scheduler.process import ProcessClient
from waiting import TIMEOUT_S

_CONFIG = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=32, debug=True)
#: Token 0 ends the text, the others are the letters from "A" on.
VOCABULARY = Vocabulary(
    bytes(range(64, 128)), array("I", range(1, 65)), (FAKE_EOS_TOKEN_ID,), (FAKE_EOS_TOKEN_ID,)
)
_HEAD = '%llguidance {"no_forcing": true}\n'
FORTY = _HEAD + "start: /[A-H]{20}[a-h]{20}/"


def _text(token_ids: list[int]) -> str:
    return "".join(chr(64 + token) for token in token_ids if token != FAKE_EOS_TOKEN_ID)


def _request(grammar: str | None, prompt: tuple[int, ...] = (1, 2, 3)) -> GenerateRequest:
    return GenerateRequest(prompt, SamplingParams(max_tokens=100, grammar=grammar))


async def _collect(client: EngineClient, request: GenerateRequest) -> list[int]:
    return [token async for delta in client.generate(request) for token in delta.token_ids]


@pytest.fixture(params=["inline", "process"])
def run(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Run a test with a client that knows the vocabulary."""

    def start(test: Callable[[Any], Awaitable[None]]) -> None:
        async def bounded() -> None:
            client: InlineClient | ProcessClient
            if request.param == "inline":
                client = InlineClient(FakeRunner(), _CONFIG, time.monotonic)
            else:
                client = ProcessClient(FakeRunner, _CONFIG)
            async with asyncio.timeout(TIMEOUT_S):
                await client.start()
                try:
                    client.set_vocabulary(VOCABULARY)
                    await test(client)
                    client.check()
                finally:
                    await client.close()

        asyncio.run(bounded())

    return start


def test_outputs_follow_their_grammars_side_by_side(run: Callable[..., None]) -> None:
    async def test(client: EngineClient) -> None:
        grammars = [FORTY, None, _HEAD + 'start: "Ab"', _HEAD + "start: /[x-z]{5}/"] * 3
        requests = [_request(one, (5, i)) for i, one in enumerate(grammars)]
        outputs = await asyncio.gather(*(_collect(client, one) for one in requests))
        for i in range(0, len(grammars), 4):
            assert re.fullmatch("[A-H]{20}[a-h]{20}", _text(outputs[i]))
            assert _text(outputs[i + 2]) == "Ab"
            assert re.fullmatch("[x-z]{5}", _text(outputs[i + 3]))

    run(test)


def test_a_bad_grammar_is_refused_and_others_live(run: Callable[..., None]) -> None:
    async def test(client: EngineClient) -> None:
        with pytest.raises(RequestRefusedError, match="unknown name") as refused:
            await _collect(client, _request("start: nothing"))
        assert (refused.value.kind, refused.value.param) == (RejectKind.INVALID, "grammar")
        assert _text(await _collect(client, _request(_HEAD + 'start: "Ab"'))) == "Ab"

    run(test)


def test_an_engine_that_is_killed_is_replaced_and_the_grammar_goes_on() -> None:
    async def test() -> None:
        client = ProcessClient(FakeRunner, _CONFIG)
        await client.start()
        try:
            client.set_vocabulary(VOCABULARY)
            undisturbed = await _collect(client, _request(FORTY))
            tokens: list[int] = []
            has_killed = False
            async for delta in client.generate(_request(FORTY)):
                tokens += delta.token_ids
                if len(tokens) >= 10 and not has_killed:
                    has_killed = True
                    assert client.engine_pid is not None
                    os.kill(client.engine_pid, signal.SIGKILL)
            assert client.num_restarts == 1
            assert tokens == undisturbed
            client.check()
        finally:
            await client.close()

    asyncio.run(asyncio.wait_for(test(), TIMEOUT_S))


def test_who_is_preempted_goes_on_as_undisturbed() -> None:
    def outputs(num_pages: int) -> tuple[list[list[int]], int]:
        async def test() -> tuple[list[list[int]], int]:
            client = InlineClient(FakeRunner(num_pages=num_pages), _CONFIG, time.monotonic)
            await client.start()
            client.set_vocabulary(VOCABULARY)
            # Then no request waits for the grammar, so all four run side by side.
            await _collect(client, _request(FORTY))
            requests = [_request(FORTY, (7, i)) for i in range(4)]
            told = await asyncio.gather(*(_collect(client, one) for one in requests))
            preemptions = client.stats().scheduler.preemptions_total
            client.check()
            await client.close()
            return list(told), preemptions

        return asyncio.run(asyncio.wait_for(test(), TIMEOUT_S))

    roomy, none = outputs(64)
    tight, some = outputs(16)
    assert none == 0 < some
    assert tight == roomy


class _SlowToPrepare(FakeRunner):
    """Finishes a grammar when the test sets its result."""

    prepared: Future[Constraint]

    def prepare(self, grammar: str) -> Future[Constraint]:
        self.prepared = Future()
        self.really = super().prepare(grammar)
        return self.prepared

    def finish(self) -> None:
        self.prepared.set_result(self.really.result(TIMEOUT_S))


def _engine() -> tuple[_SlowToPrepare, Engine, list[Prepared]]:
    runner, posted = _SlowToPrepare(), list[Prepared]()
    engine = Engine(runner, _CONFIG, lambda: 0.0, posted.append)
    engine.handle(SetVocabulary(VOCABULARY))
    engine.handle(Submit(1, GenerateRequest((1, 2), SamplingParams(max_tokens=9, grammar=FORTY))))
    return runner, engine, posted


def test_a_request_waits_outside_and_nobody_waits_with_it() -> None:
    runner, engine, posted = _engine()
    engine.handle(Submit(2, GenerateRequest((1, 2), SamplingParams(max_tokens=2, ignore_eos=True))))
    assert engine.step().request_ids == [2]
    assert engine.stats().num_waiting == 1
    engine.check()
    assert engine.step().finished == [(2, FinishReason.LENGTH)]
    assert not engine.has_work
    runner.finish()
    assert posted == [Prepared(1)]
    engine.handle(posted[0])
    assert [one.request_id for one in engine.step().started] == [1]
    engine.check()
    engine.close()


def test_who_leaves_while_the_grammar_is_prepared_is_forgotten() -> None:
    runner, engine, posted = _engine()
    engine.handle(Cancel(1))
    engine.step()
    runner.finish()
    engine.handle(posted[0])
    engine.step()
    assert not engine.has_work
    assert engine.stats().num_waiting == 0
    engine.check()
    engine.close()


def test_a_grammar_that_is_ready_holds_nobody_back() -> None:
    runner, posted = FakeRunner(), list[Prepared]()
    engine = Engine(runner, _CONFIG, lambda: 0.0, posted.append)
    engine.handle(SetVocabulary(VOCABULARY))
    runner.prepare(FORTY).result(TIMEOUT_S)
    engine.handle(Submit(1, GenerateRequest((1, 2), SamplingParams(max_tokens=9, grammar=FORTY))))
    assert [one.request_id for one in engine.step().started] == [1]
    assert posted == []
    engine.check()
    engine.close()


class _Hesitates(FakeRunner):
    """Gives no token in some steps, as if a mask were late, or fails one row."""

    fails = False
    num_late = 0

    def launch(self, step: StepInput) -> Any:
        in_flight_step = super().launch(step)
        rows = range(len(in_flight_step.output.token_ids))
        if self.num_steps % 3:
            return in_flight_step
        failures = dict.fromkeys(rows, "it broke") if self.fails else {}
        token_ids: list[list[int]] = [[] for _ in rows]
        self.num_late += len(rows)
        object.__setattr__(in_flight_step, "output", StepOutput(token_ids, [], failures))
        return in_flight_step


@pytest.mark.parametrize("length", [1, 4, 37])
def test_a_row_without_a_token_is_computed_again_and_counted(length: int) -> None:
    def output(runner: FakeRunner) -> tuple[list[int], int]:
        async def test() -> tuple[list[int], int]:
            client = InlineClient(runner, _CONFIG, lambda: 0.0)
            await client.start()
            params = SamplingParams(max_tokens=20, ignore_eos=True)
            tokens = await _collect(client, GenerateRequest(tuple(range(length)), params))
            client.check()
            await client.close()
            return tokens, client.stats().scheduler.late_rows_total

        return asyncio.run(asyncio.wait_for(test(), TIMEOUT_S))

    tokens, num_late = output(FakeRunner())
    assert num_late == 0
    hesitant = _Hesitates()
    assert output(hesitant) == (tokens, hesitant.num_late)
    assert hesitant.num_late > 0


def test_a_row_that_fails_ends_with_the_reason() -> None:
    async def test() -> None:
        runner = _Hesitates()
        runner.fails = True
        client = InlineClient(runner, _CONFIG, lambda: 0.0)
        await client.start()
        with pytest.raises(EngineFaultError, match="it broke"):
            await _collect(client, _request(None))
        assert client.stats().scheduler.late_rows_total == 0
        client.check()
        await client.close()

    asyncio.run(asyncio.wait_for(test(), TIMEOUT_S))


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    runner, engine, _ = _engine()
    runner.finish()
    engine.close()
    assert threading.active_count() == before
