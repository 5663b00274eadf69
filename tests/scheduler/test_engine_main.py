"""The engine's end of the pipe, without a client around it."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from configs.schema import SchedulerSection
from model.fake import FakeRunner
from model.interface import SamplingParams, StepInput
from scheduler.messages import Submit
from scheduler.process import engine_main

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
    engine = context.Process(target=engine_main, args=(theirs, _HeldRunner, _CONFIG))
    engine.start()
    theirs.close()
    ours.recv()
    ours.send(Submit(0, (1, 2, 3), SamplingParams(max_tokens=5)))
    while not marker.exists():
        pass
    ours.close()
    marker.unlink()
    engine.join(20)
    assert engine.exitcode == 0
