"""The `octavo` command: from its arguments to an exit code.

Exit codes: 0 stopped, 1 failed, 2 wrong usage. The engine's process is started here, before the
daemon is imported: the one imports torch while the other imports the HTTP server.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.load import ConfigError, load_config
from configs.schema import OctavoConfig
from model import build
from scheduler.client import EngineUnavailableError
from scheduler.engine_process import spawn
from server import __version__, cli
from server.cache_command import run_cache
from server.generation.relay import Relay
from server.logs import LOGGER_NAME, configure, fields
from server.start_errors import StartError, UsageError

_log = logging.getLogger(LOGGER_NAME)

#: At the exit, for a reader of the log that takes no line; one that takes some gets more time.
_FLUSH_TIMEOUT_S = 1.0


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    command = cli.parse(sys.argv[1:] if argv is None else argv)
    if command.command == "version":
        print(f"octavo {__version__}")  # noqa: T201 - the answer to a command
        return 0
    if command.action is not None and command.folder is not None:
        return run_cache(command.action, command.folder)
    try:
        config = load_config(command.flags, os.environ, command.config)
    except ConfigError as error:
        print(error, file=sys.stderr)  # noqa: T201 - before there is a log
        return 2
    if command.folder is not None:
        return _export_tokenizer(config, command.folder)
    return _serve(config)


def _serve(config: OctavoConfig) -> int:
    # Before the log and the engine use them.
    streams = [stream for stream in (sys.stdout, sys.stderr) if stream]  # None: it is closed.
    relays = [Relay(stream.fileno(), _note_dropped) for stream in streams]
    for relay in relays:
        atexit.register(relay.flush, _FLUSH_TIMEOUT_S)
    configure(config.server.log_format)
    spawned = None
    try:
        spawned = spawn(build.import_engine)
        from server.daemon import serve  # noqa: PLC0415 - takes most of a second, see above

        serve(config, lambda: sum(relay.num_dropped for relay in relays), spawned)
    except (StartError, UsageError, EngineUnavailableError) as error:
        if config.server.log_format == "json":
            _log.error("failed", extra=fields(reason=str(error)))
        else:
            print(f"octavo: {error}", file=sys.stderr)  # noqa: T201 - the answer to a command
        return 2 if isinstance(error, UsageError) else 1
    finally:
        if spawned is not None:
            spawned.discard()
    return 0


def _export_tokenizer(config: OctavoConfig, folder: Path) -> int:
    """Write the tokenizer's files and return the exit code."""
    from server.text.export import export_tokenizer  # noqa: PLC0415 - for this command alone
    from server.text.load import load_text  # noqa: PLC0415 - for this command alone
    from server.text.token_bytes import TextError  # noqa: PLC0415 - for this command alone

    try:
        text = load_text(build.resolve_source(config.model.model).path)
        paths = export_tokenizer(text, folder)
    except (build.ModelSourceError, TextError, OSError) as error:
        print(f"octavo: {error}", file=sys.stderr)  # noqa: T201 - the answer to a command
        return 1
    print("\n".join(map(str, paths)))  # noqa: T201 - the answer to a command
    return 0


def _note_dropped(count: int) -> None:
    _log.warning("%d log lines were dropped: nobody read them in time", count)
