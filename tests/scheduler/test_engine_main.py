"""The engine's end of the pipe, without a client around it."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner
from model.interface import SamplingParams, StepInput
from scheduler.engine_main import engine_main
from scheduler.messages import (
    Build,
    Failed,
    GenerateRequest,
    Ping,
    Pong,
    Ready,
    Shutdown,
    StepResult,
    Submit,
)
from waiting import TIMEOUT_S

_CONFIG = SchedulerSection(max_num_seqs=8, max_num_batched_tokens=32)


class _HeldRunner(FakeRunner):
    """Computes only once it is let go."""

    def launch(self, step: StepInput) -> Any:
        marker = Path(os.environ["HANGING_MARKER"])
        marker.touch()
        while marker.exists():
            pass
        return FakeRunner.launch(self, step)


def test_an_engine_whose_api_is_gone_ends_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "held"
    monkeypatch.setenv("HANGING_MARKER", str(marker))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    engine = context.Process(target=engine_main, args=(theirs,))
    engine.start()
    theirs.close()
    ours.send(Build(_HeldRunner, _CONFIG))
    ours.recv()
    ours.send(Submit(0, GenerateRequest((1, 2, 3), SamplingParams(max_tokens=5))))
    while not marker.exists():
        pass
    ours.close()
    marker.unlink()
    engine.join(TIMEOUT_S)
    assert engine.exitcode == 0


def _import_engine() -> None:
    if gc.isenabled():
        raise ValueError("imported objects are walked")


def _make_runner() -> FakeRunner:
    if not (gc.isenabled() and gc.get_freeze_count()):
        raise ValueError("no collections while the model is built, or those of imported objects")
    return FakeRunner()


def test_no_collection_walks_the_objects_of_imports() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    engine = context.Process(target=engine_main, args=(theirs, _import_engine))
    engine.start()
    theirs.close()
    ours.send(Build(_make_runner, _CONFIG))
    assert isinstance(ours.recv(), Ready)
    ours.close()
    engine.join(TIMEOUT_S)
    assert engine.exitcode == 0


@pytest.fixture
def started() -> Iterator[tuple[Connection, BaseProcess]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    engine = context.Process(target=engine_main, args=(theirs,))
    engine.start()
    theirs.close()
    yield ours, engine
    ours.close()
    engine.join(TIMEOUT_S)


def test_an_engine_that_is_never_told_what_to_build_ends_quietly(
    started: tuple[Connection, BaseProcess],
) -> None:
    ours, engine = started
    ours.close()
    engine.join(TIMEOUT_S)
    assert engine.exitcode == 0


def test_an_engine_that_cannot_read_what_it_is_told_says_so(
    started: tuple[Connection, BaseProcess],
) -> None:
    ours, engine = started
    ours.send(Build(FakeRunner, _CONFIG))
    assert isinstance(ours.recv(), Ready)
    ours.send_bytes(b"no message")
    failed = ours.recv()
    assert isinstance(failed, Failed)
    assert "UnpicklingError" in failed.message
    engine.join(TIMEOUT_S)
    assert engine.exitcode == 1


def _raise(fault: Exception) -> FakeRunner:
    raise fault


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            ValueError("kv_cache_memory: 1 KiB is too little"),
            "kv_cache_memory: 1 KiB is too little",
        ),
        (FileNotFoundError(2, "No such file", "x"), "[Errno 2] No such file: 'x'"),
        (UnicodeEncodeError("utf-8", "x", 0, 1, "no"), "'utf-8' codec can't encode"),
        (KeyError("wq"), "KeyError: 'wq'"),
        (ValueError(), "ValueError: "),
    ],
)
def test_a_fault_is_told_in_its_words_if_it_has_a_sentence(
    started: tuple[Connection, BaseProcess], fault: Exception, told: str
) -> None:
    ours, engine = started
    ours.send(Build(partial(_raise, fault), _CONFIG))
    failed = ours.recv()
    assert isinstance(failed, Failed)
    assert failed.message.startswith(told)
    engine.join(TIMEOUT_S)


def _build_behind(marker: Path) -> FakeRunner:
    assert marker.exists()
    return FakeRunner()


def test_the_process_is_prepared_before_the_model_is_built(
    started: tuple[Connection, BaseProcess], tmp_path: Path
) -> None:
    ours, engine = started
    marker = tmp_path / "prepared"
    ours.send(Build(partial(_build_behind, marker), _CONFIG, partial(marker.touch)))
    assert isinstance(ours.recv(), Ready)
    ours.send(Shutdown())
    engine.join(TIMEOUT_S)


def test_an_idle_engine_answers_a_ping(started: tuple[Connection, BaseProcess]) -> None:
    ours, engine = started
    ours.send(Build(FakeRunner, _CONFIG))
    assert isinstance(ours.recv(), Ready)
    for _ in range(3):
        ours.send(Ping())
        assert ours.recv() == Pong()
        assert isinstance(ours.recv(), StepResult)
    ours.send(Shutdown())
    engine.join(TIMEOUT_S)
    assert engine.exitcode == 0


def test_an_idle_engine_whose_api_is_gone_ends_quietly(
    started: tuple[Connection, BaseProcess],
) -> None:
    ours, engine = started
    ours.send(Build(FakeRunner, _CONFIG))
    assert isinstance(ours.recv(), Ready)
    ours.close()
    engine.join(TIMEOUT_S)
    assert engine.exitcode == 0
