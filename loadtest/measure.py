"""One run from beginning to end: probe the server, warm up, drive, record the measurements."""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from loadtest.drive import Driver
from loadtest.plan import Plan
from loadtest.probe import Learnt, learn
from loadtest.progress import Progress
from loadtest.records import Header, Run
from loadtest.target import Target, TargetError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Ctrl-C: while requests are driven, the first ends the run and keeps its results so far.

    At any other time, and the second time, it ends the program.
    """

    def __init__(self) -> None:
        self.has_come = False
        self._driver: Driver | None = None
        self._task: asyncio.Task[Any] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over; the current task is the program."""
        self._task = asyncio.current_task()
        for number in _SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self.come)
        try:
            yield
        finally:
            self._let_go()

    @contextmanager
    def ends(self, driver: Driver) -> Iterator[None]:
        """Let an interruption within the block end this driver's run."""
        self._driver = driver
        try:
            yield
        finally:
            self._driver = None

    def come(self) -> None:
        """End the run."""
        self.has_come = True
        self._let_go()
        if self._driver is not None:
            self._driver.stop()
        elif self._task is not None:
            self._task.cancel()

    def _let_go(self) -> None:
        for number in _SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)


async def measure(
    target: Target,
    plan: Plan,
    *,
    model: str | None,
    interruption: Interruption,
    screen: TextIO | None,
    round_number: int | None = None,
) -> Run:
    """Run a plan against a server that answers. Raises `TargetError`, or `ValueError` of the plan.

    `screen` is where a progress bar is drawn; None draws none.
    """
    workload = plan.make_workload()
    learnt = await learn(
        target,
        model or (await target.models())[0],
        workload,
        form=plan.prompt_form,
        wants_continuous_usage=plan.has_continuous_usage,
        extra=plan.extra,
    )
    driver = Driver(target, learnt.composer, plan.bounds(workload))
    header = _header(target, await target.version(), plan, learnt, round_number)
    failure = await driver.warm_up(plan.num_warm_ups(workload))
    if failure is not None:
        raise TargetError(f"{target.name}: the warm-up failed: {failure.kind}: {failure.message}")
    cpu_s = await _drive(driver, plan, interruption, screen)
    records = sorted(driver.records, key=lambda one: (one.sent_s, one.conversation))
    began_s = records[0].sent_s if records else 0.0
    return Run(
        header,
        tuple(records),
        max((one.ended_s for one in records), default=0.0) - began_s,
        {"generator_cpu_s": cpu_s, "generator_lateness_s": driver.worst_lateness_s},
    )


async def _drive(
    driver: Driver, plan: Plan, interruption: Interruption, screen: TextIO | None
) -> float:
    """Drive to the end and return the CPU time it took."""
    due_s = plan.due_s(driver.composer.workload)
    cpu_before_s = time.process_time()
    with interruption.ends(driver):
        async with Progress(driver, screen):
            if due_s is None:
                await driver.run_closed()
            else:
                await driver.run_open(due_s)
    return time.process_time() - cpu_before_s


def _header(
    target: Target, version: str | None, plan: Plan, learnt: Learnt, round_number: int | None
) -> Header:
    workload = learnt.composer.workload
    has_ids = learnt.composer.spelling.token_ids is not None
    return Header(
        name=target.name,
        url=target.url,
        model=learnt.composer.model,
        server_version=version,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        workload=workload.name,
        load=plan.describe(workload) | {"prompts": "token ids" if has_ids else "text"},
        seed=plan.seed,
        host=host(),
        commit=commit(),
        slo=dict(plan.slo),
        round=round_number,
        notes=learnt.notes,
    )


def host() -> dict[str, Any]:
    """Describe this machine."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(terse=True),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


@cache
def commit() -> str | None:
    """Return the commit that is checked out here, with a + if files differ from it; else None."""
    git = shutil.which("git")
    if git is None:
        return None
    asked = [git, "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)  # noqa: S603 - fixed arguments
    return done.stdout.strip() or None
