"""The command line, checked before anything is sent.

`python -m loadtest run | compare | report`. A command is a function that adds its arguments and
returns a value object; `loadtest/__main__.py` carries it out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeAlias

from loadtest import arguments as values
from loadtest import load_options
from loadtest.compare import Contestant
from loadtest.figures import SLO_KEYS
from loadtest.launch import Command
from loadtest.plan import TRACE, Plan
from loadtest.presets import PRESETS

DEFAULT_URL = "http://127.0.0.1:8000"
#: Read in this order where no --api-key is given: others can see a program's flags.
KEY_VARIABLES = ("LOADTEST_API_KEY", "OPENAI_API_KEY")


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where results go besides the terminal."""

    records: Path | None
    page: Path | None
    has_progress: bool


@dataclass(frozen=True, slots=True)
class LoadCommand:
    """`run` with one server, or `compare` with several in turns."""

    contestants: tuple[Contestant, ...]
    plans: tuple[Plan, ...]
    num_rounds: int
    model: str | None
    api_key: str
    outputs: Outputs
    #: For the output of servers that are started; None leaves it to the system's temporary folder.
    log_folder: Path | None
    start_timeout_s: float


@dataclass(frozen=True, slots=True)
class ReportCommand:
    """`report`: a page from recorded runs."""

    records: tuple[Path, ...]
    page: Path


Asked: TypeAlias = LoadCommand | ReportCommand


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line; argparse would print the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Asked:
    """Read the values. Exits 2 with one line on a wrong one, 0 after `--help`."""
    parser = _Parser(
        prog="loadtest",
        description="Measures any OpenAI-compatible server.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (text, add, make) in _COMMANDS.items():
        own = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=None if name == "report" else _epilog(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add(own)
        own.set_defaults(parser=own, build=make)
    options = parser.parse_args(argv)
    build: Callable[[argparse.Namespace, Mapping[str, str]], Asked] = options.build
    try:
        return build(options, environ)
    except ValueError as error:
        options.parser.exit(2, f"{options.parser.prog}: {error}\n")
        raise


def _epilog() -> str:
    presets = "\n".join(f"  {name:<20}{text}" for name, (text, _) in PRESETS.items())
    bounds = "\n".join(f"  {name:<20}{text}" for name, text in SLO_KEYS.items())
    return (
        f"workloads:\n{presets}\n  {TRACE:<20}what --trace FILE holds\n\n"
        f"bounds of --slo, for each request:\n{bounds}\n\n"
        f"environment: {' or '.join(KEY_VARIABLES)} instead of --api-key, which others can see"
    )


# ---- arguments -----------------------------------------------------------------------------------


def _add_run(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--url", type=values.url, default=DEFAULT_URL, help=f"default: {DEFAULT_URL}"
    )
    values.add(server, "--start", values.command, '"COMMAND {port}"', "instead of --url")
    values.add(server, "--name", str, "NAME", "what to call it in results (default: its URL)")
    _add_start(server)
    load_options.add_to(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    servers = parser.add_argument_group("servers, the first being what others are compared with")
    servers.add_argument(
        "--server",
        metavar="NAME=URL",
        action="append",
        dest="servers",
        type=values.running,
    )
    servers.add_argument(
        "--start",
        metavar='"NAME=COMMAND {port}"',
        action="append",
        dest="servers",
        type=values.startable,
        help="started for each of its turns and stopped after it, so that only one runs at a time",
    )
    values.add(servers, "--rounds", values.count, "N", "turns of each (default: 3)", 3)
    _add_start(servers)
    load_options.add_to(parser)


def _add_start(group: argparse._ArgumentGroup) -> None:
    values.add(
        group,
        "--start-timeout",
        values.seconds,
        "TIME",
        "until it must serve (default: 10m)",
        600.0,
    )
    values.add(group, "--log-folder", Path, "DIR", "for its output")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE", help="what --out wrote")
    parser.add_argument("--html", type=Path, default=Path("report.html"), help="the page to write")


# ---- from options to commands --------------------------------------------------------------------


def _run_command(options: argparse.Namespace, environ: Mapping[str, str]) -> LoadCommand:
    start: Command | None = options.start
    name = options.url if start is None else Path(start.words[0]).name
    where = options.url if start is None else start
    return _load_command(options, environ, (Contestant(options.name or name, where),), 1)


def _compare_command(options: argparse.Namespace, environ: Mapping[str, str]) -> LoadCommand:
    servers: list[Contestant] = options.servers or []
    if len({server.name for server in servers}) < max(2, len(servers)):
        raise ValueError("needs at least two servers of different names (--server, --start)")
    return _load_command(options, environ, tuple(servers), options.rounds)


def _load_command(
    options: argparse.Namespace,
    environ: Mapping[str, str],
    contestants: tuple[Contestant, ...],
    num_rounds: int,
) -> LoadCommand:
    return LoadCommand(
        contestants,
        load_options.plans(options),
        num_rounds,
        options.model,
        _api_key(options, environ),
        Outputs(options.out, options.html, not options.no_progress),
        options.log_folder,
        options.start_timeout,
    )


def _report_command(options: argparse.Namespace, environ: Mapping[str, str]) -> ReportCommand:
    del environ
    return ReportCommand(tuple(options.records), options.html)


def _api_key(options: argparse.Namespace, environ: Mapping[str, str]) -> str:
    found: str = options.api_key or next(
        (environ[name] for name in KEY_VARIABLES if environ.get(name)), ""
    )
    if not found.isascii() or not found.isprintable():
        raise ValueError("the API key must be printable ASCII")
    return found


_COMMANDS: dict[
    str,
    tuple[
        str,
        Callable[[argparse.ArgumentParser], None],
        Callable[[argparse.Namespace, Mapping[str, str]], Asked],
    ],
] = {
    "run": ("put one server under load", _add_run, _run_command),
    "compare": (
        "put several servers under the same load, in turns",
        _add_compare,
        _compare_command,
    ),
    "report": ("draw a page from recorded runs", _add_report, _report_command),
}
