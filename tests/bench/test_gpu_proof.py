"""The proof of the code for CUDA compares runs of equal steps, on a machine of any load."""

from __future__ import annotations

import runpy
import time
from pathlib import Path
from typing import Any

import pytest

from model import build

FOLDER = Path(__file__).parents[2] / "bench" / "gpu"


class Slowed:
    """A runner whose steps take longer, by a constant and by an amount for each token."""

    def __init__(self, runner: Any, *, step_s: float, token_s: float) -> None:
        self._runner = runner
        self._step_s, self._token_s = step_s, token_s
        #: The position and the number of tokens of each step's rows.
        self.steps: list[list[tuple[int, int]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def launch(self, step: Any) -> Any:
        rows = [(row.position, row.count) for row in step.rows]
        self.steps.append(rows)
        time.sleep(self._step_s + self._token_s * sum(count for _, count in rows))
        return self._runner.launch(step)


def test_the_steps_of_two_runs_do_not_depend_on_their_times(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    make_runner, runs = build.make_runner, list[Slowed]()

    def make_slowed(*arguments: Any) -> Slowed:
        times = {"step_s": 0.0, "token_s": 1e-3} if runs else {"step_s": 0.02, "token_s": 0.0}
        runs.append(Slowed(make_runner(*arguments), **times))
        return runs[-1]

    monkeypatch.setattr(build, "make_runner", make_slowed)
    tokens_of = runpy.run_path(str(FOLDER / "prove.py"))["tokens_of"]
    first, second = (tokens_of("cpu", "torch") for _ in range(2))
    assert runs[0].steps == runs[1].steps
    assert first == second
