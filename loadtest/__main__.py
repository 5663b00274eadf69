"""`python -m loadtest`: carries a command out.

Exit codes: 0 done, 1 failed (also when a run got no answer at all), 2 wrong usage, 130 cut off.
"""

# ruff: noqa: T201 - the report is printed on the terminal

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import uvloop

from loadtest import cli, compare
from loadtest.compare import Conditions, compared, compete
from loadtest.figures import figures
from loadtest.measure import Interruption
from loadtest.page import page
from loadtest.records import RecordsError, Run, append, read
from loadtest.summary import lines
from loadtest.target import TargetError

_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    asked = cli.parse(sys.argv[1:] if argv is None else argv)
    try:
        if isinstance(asked, cli.ReportCommand):
            return _report(asked)
        return uvloop.run(_load(asked))
    except (TargetError, RecordsError, OSError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _INTERRUPTED


async def _load(asked: cli.LoadCommand) -> int:
    interruption = Interruption()
    has_screen = asked.outputs.has_progress and sys.stderr.isatty()
    conditions = Conditions(
        plans=asked.plans,
        num_rounds=asked.num_rounds,
        model=asked.model,
        api_key=asked.api_key,
        log_folder=_log_folder(asked),
        start_timeout_s=asked.start_timeout_s,
        screen=sys.stderr if has_screen else None,
    )
    runs: list[Run] = []
    try:
        with interruption.listening():
            async with aclosing(compete(asked.contestants, conditions, interruption)) as ended:
                async for run in ended:
                    runs.append(run)
                    _tell(run, asked.outputs)
    finally:
        # Also after a run that failed or was interrupted: the results of the others are valid.
        _conclude(runs, asked.outputs)
    if interruption.has_come:
        return _INTERRUPTED
    return 0 if all(figures(run).num_answered for run in runs) else 1


def _log_folder(asked: cli.LoadCommand) -> Path:
    if asked.log_folder is not None:
        asked.log_folder.mkdir(parents=True, exist_ok=True)
        return asked.log_folder
    has_logs = any(not isinstance(one.where, str) for one in asked.contestants)
    return Path(tempfile.mkdtemp(prefix="loadtest-")) if has_logs else Path()


def _tell(run: Run, outputs: cli.Outputs) -> None:
    if outputs.records is not None:
        append(outputs.records, [run])
    print("\n".join(lines(run, figures(run))), end="\n\n", flush=True)


def _conclude(runs: Sequence[Run], outputs: cli.Outputs) -> None:
    for comparison in compared(runs):
        print("\n".join(compare.lines(comparison)), end="\n\n", flush=True)
    if outputs.page is not None and runs:
        outputs.page.write_text(page(runs), encoding="utf-8")
        print(f"written: {outputs.page}")


def _report(asked: cli.ReportCommand) -> int:
    runs = [run for path in asked.records for run in read(path)]
    if not runs:
        raise RecordsError("there is no run in these files")
    for comparison in compared(runs):
        print("\n".join(compare.lines(comparison)), end="\n\n")
    asked.page.write_text(page(runs), encoding="utf-8")
    print(f"written: {asked.page}, from {len(runs)} runs")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
