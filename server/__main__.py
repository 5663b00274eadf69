"""The start of the `octavo` command, which signals may stop at any moment.

Imports here are fast. The engine's process imports this module too.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings


def main() -> int:
    """Run the command line and return the exit code."""
    _exit_on_signals()
    _silence_warnings()
    from server.command import run  # noqa: PLC0415 - takes a while, in which a signal may come

    try:
        return run()
    finally:
        # The event loop removed its handlers.
        _exit_on_signals()


def _silence_warnings() -> None:
    """Ignore Python's warnings, which are for developers, here and in child processes.

    `python -W` or `PYTHONWARNINGS` enables them.
    """
    if not sys.warnoptions:
        sys.warnoptions.append("ignore")
        warnings.simplefilter("ignore")


def _exit_on_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))


if __name__ == "__main__":
    raise SystemExit(main())
