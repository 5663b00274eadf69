"""The command line: what can be asked, checked before anything is sent.

`python -m loadtest run | compare | report`. A command is a function that adds its arguments and
returns a value object; `loadtest/__main__.py` carries it out.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

import orjson

from loadtest.arrivals import PROCESSES
from loadtest.compare import Contestant
from loadtest.figures import SLO_KEYS, parse_duration_s, parse_slo
from loadtest.launch import Command
from loadtest.plan import TRACE, Load, Plan
from loadtest.wire import Pool
from loadtest.workloads import PRESETS

ValueT = TypeVar("ValueT")

DEFAULT_URL = "http://127.0.0.1:8000"
#: Read in this order where no --api-key is given: others can see a program's flags.
KEY_VARIABLES = ("LOADTEST_API_KEY", "OPENAI_API_KEY")
_MOST_CONCURRENCY = 4096


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
    """`report`: a page from what was recorded."""

    records: tuple[Path, ...]
    page: Path


Asked: TypeAlias = LoadCommand | ReportCommand


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would print the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Asked:
    """Read the arguments. Exits 2 with one line on a wrong one, 0 after `--help`."""
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
    server.add_argument("--url", default=DEFAULT_URL, help=f"default: {DEFAULT_URL}")
    server.add_argument(
        "--start", metavar='"COMMAND {port}"', type=_typed(Command.parse), help="instead of --url"
    )
    server.add_argument("--name", help="what to call it in results (default: its URL)")
    _add_start(server)
    _add_load(parser)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    servers = parser.add_argument_group("servers, the first being what others are compared with")
    servers.add_argument(
        "--server", metavar="NAME=URL", action="append", dest="servers", type=_typed(_running)
    )
    servers.add_argument(
        "--start",
        metavar='"NAME=COMMAND {port}"',
        action="append",
        dest="servers",
        type=_typed(_startable),
        help="started for each of its turns and stopped after it, so that only one runs at a time",
    )
    servers.add_argument("--rounds", type=_count, default=3, help="turns of each (default: 3)")
    _add_start(servers)
    _add_load(parser)


def _add_start(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--start-timeout", type=_seconds, default=600.0, metavar="TIME")
    group.add_argument("--log-folder", type=Path, help="for the output of started servers")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", type=Path, nargs="+", metavar="FILE", help="what --out wrote")
    parser.add_argument("--html", type=Path, default=Path("report.html"), help="the page to write")


def _add_load(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument("--workload", choices=[*PRESETS, TRACE], default=None, metavar="NAME")
    load.add_argument("--trace", type=Path, metavar="FILE", help="replay JSON lines; see docs")
    load.add_argument("--speed", type=_positive, default=1.0, help="of a trace (default: 1)")
    load.add_argument(
        "--concurrency", type=_counts, metavar="N[,N...]", help="closed loop: so many at a time"
    )
    load.add_argument(
        "--rate", type=_positives, metavar="R[,R...]", help="open loop: so many begin a second"
    )
    load.add_argument("--arrivals", choices=PROCESSES, default="poisson", help="of an open loop")
    load.add_argument("--burst", type=_count, default=8, help="how many begin at once (default: 8)")
    load.add_argument("--requests", type=_count, help="or conversations; default: 4 a worker")
    load.add_argument("--duration", type=_seconds, metavar="TIME", help="begin none after that")
    load.add_argument("--warmup", type=_whole, help="requests before the clock starts")
    load.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="TIME", help="of a request"
    )
    load.add_argument("--seed", type=_whole, default=0, help="other words (default: 0)")
    shape = parser.add_argument_group("requests")
    shape.add_argument("--model", help="default: the first the server lists")
    shape.add_argument("--api-key", default="")
    shape.add_argument("--prompt-tokens", type=_count)
    shape.add_argument("--max-tokens", type=_count)
    shape.add_argument("--endpoint", choices=["completions", "chat"])
    shape.add_argument(
        "--prompts",
        choices=["auto", "ids", "text"],
        default="auto",
        help="token ids are exact and need /tokenize (default: ids where possible)",
    )
    shape.add_argument("--response-format", choices=["schema", "none"], default="schema")
    shape.add_argument("--continuous-usage", action="store_true", help="exact tokens of each piece")
    shape.add_argument(
        "--extra", type=_typed(_object), default={}, metavar="JSON", help="more fields"
    )
    results = parser.add_argument_group("results")
    results.add_argument("--slo", type=_typed(parse_slo), default={}, metavar="ttft=500ms,itl=50ms")
    results.add_argument("--out", type=Path, metavar="FILE", help="append records, as JSON lines")
    results.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    results.add_argument("--no-progress", action="store_true")


# ---- from options to commands --------------------------------------------------------------------


def _run_command(options: argparse.Namespace, environ: Mapping[str, str]) -> LoadCommand:
    start: Command | None = options.start
    name = options.url if start is None else Path(start.words[0]).name
    where = _checked_url(options.url) if start is None else start
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
        _plans(options),
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


def _plans(options: argparse.Namespace) -> tuple[Plan, ...]:
    if options.workload == TRACE and options.trace is None:
        raise ValueError("--workload trace needs --trace FILE")
    if options.trace is not None and options.workload not in (None, TRACE):
        raise ValueError("--trace is a workload of its own; leave --workload out")
    if options.concurrency and options.rate:
        raise ValueError("--concurrency is a closed loop and --rate an open one: give one of them")
    if options.trace is not None and options.rate:
        raise ValueError("a trace says itself when its requests are due; --speed changes that")
    loads = [Load(concurrency=one) for one in options.concurrency or ()]
    loads += [Load(rate_per_s=one) for one in options.rate or ()]
    plan = Plan(
        workload=options.workload or "c8",
        trace=options.trace,
        speed=options.speed,
        arrivals=options.arrivals,
        burst=options.burst,
        seed=options.seed,
        num_requests=options.requests,
        duration_s=options.duration,
        timeout_s=options.timeout,
        warm_up=options.warmup,
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        endpoint=options.endpoint,
        prompt_form=options.prompts,
        has_schema=options.response_format == "schema",
        has_continuous_usage=options.continuous_usage,
        slo=options.slo,
        extra=options.extra,
    )
    plans = tuple(replace(plan, load=load) for load in loads or [Load()])
    for one in plans:
        one.make_workload()
    return plans


def _api_key(options: argparse.Namespace, environ: Mapping[str, str]) -> str:
    found: str = options.api_key or next(
        (environ[name] for name in KEY_VARIABLES if environ.get(name)), ""
    )
    if not found.isascii() or not found.isprintable():
        raise ValueError("the API key must be printable ASCII")
    return found


# ---- values --------------------------------------------------------------------------------------


def _typed(read: Callable[[str], ValueT]) -> Callable[[str], ValueT]:
    """Keep the message of a `ValueError`: argparse would say "invalid value"."""

    def reading(text: str) -> ValueT:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return reading


_seconds = _typed(parse_duration_s)


@_typed
def _whole(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"{text!r} is no whole number from 0")
    return int(text)


@_typed
def _count(text: str) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) == 0:
        raise ValueError(f"{text!r} is no whole number from 1")
    return int(text)


@_typed
def _counts(text: str) -> list[int]:
    counts = [_count(part) for part in text.split(",")]
    if max(counts) > _MOST_CONCURRENCY:
        raise ValueError(f"at most {_MOST_CONCURRENCY} at a time")
    return counts


@_typed
def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise ValueError(f"{text!r} is no number above 0")
    return number


@_typed
def _positives(text: str) -> list[float]:
    return [_positive(part) for part in text.split(",")]


def _object(text: str) -> dict[str, Any]:
    found = orjson.loads(text)
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object")  # noqa: TRY004 - for argparse
    return found


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not value or not re.fullmatch(r"[\w.+-]{1,40}", name):
        raise ValueError(f"{text!r} must look like NAME=..., with letters, digits, . + - in NAME")
    return name, value


def _checked_url(url: str) -> str:
    Pool(url, lambda: 0.0)
    return url


def _running(text: str) -> Contestant:
    name, url = _named(text)
    return Contestant(name, _checked_url(url))


def _startable(text: str) -> Contestant:
    name, command = _named(text)
    return Contestant(name, Command.parse(command))


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
