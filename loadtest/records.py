"""The record of a run: a header, a record of each request, a summary; and their file.

A file holds one JSON object a line, each with its `kind`. Runs follow each other in one file: a
header begins one. Times are seconds since the run began unless a name states otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import orjson

FORMAT_VERSION = 1
_MAX_DIGITS = 7


class RecordsError(Exception):
    """A file that cannot be read as records; the message has the place and the reason."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason for a missing answer. Failures are counted by `kind`."""

    kind: str
    message: str
    #: Whether we ended it ourselves (Ctrl-C): then it is not the server's failure.
    is_ours: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """One request and its answer. A failed one is not part of any latency."""

    lane: str
    conversation: int
    turn: int
    #: When it was due; in a closed loop, when it was sent.
    due_s: float
    sent_s: float
    ended_s: float
    max_tokens: int
    #: Moments at which text arrived, and how many tokens came at each (see `Answer.arrivals`).
    arrival_s: tuple[float, ...] = ()
    arrival_tokens: tuple[float, ...] = ()
    #: From the server's usage; None if it has none.
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    #: Whether the text is JSON, if JSON was requested.
    is_json: bool | None = None
    failure: Failure | None = None

    @property
    def num_output_tokens(self) -> float:
        """Tokens of the answer: the usage's, else as many as pieces of text came."""
        return sum(self.arrival_tokens) if self.output_tokens is None else self.output_tokens

    @property
    def ttft_s(self) -> float | None:
        """From when it was due to the first text: a late generator does not flatter a server."""
        return self.arrival_s[0] - self.due_s if self.arrival_s else None

    @property
    def e2e_s(self) -> float:
        """From when it was due to the end of the answer."""
        return self.ended_s - self.due_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first arrival; None if all came at once."""
        later_tokens = sum(self.arrival_tokens[1:])
        return (self.arrival_s[-1] - self.arrival_s[0]) / later_tokens if later_tokens else None

    def gaps_s(self) -> list[float]:
        """Return the waits between one arrival of text and the next."""
        return [after - before for before, after in pairwise(self.arrival_s)]

    def itl_s(self) -> list[float]:
        """Return the inter-token latencies: each gap, shared by the tokens that ended it."""
        shared: list[float] = []
        for gap_s, tokens in zip(self.gaps_s(), self.arrival_tokens[1:], strict=True):
            # A piece of text may hold part of a token's count where counts are means.
            shared += [gap_s / max(tokens, 1.0)] * max(1, round(tokens))
        return shared


@dataclass(frozen=True, slots=True)
class Header:
    """The load, the machine and the server of a run: enough to repeat it."""

    name: str
    url: str
    model: str
    server_version: str | None
    date: str
    workload: str
    #: Everything that shapes the load: see `plan.describe`.
    load: dict[str, Any]
    seed: int
    host: dict[str, Any]
    commit: str | None = None
    #: Bounds of the latencies in seconds, for the goodput.
    slo: dict[str, float] = field(default_factory=dict)
    #: Which turn of a comparison; None outside of one.
    round: int | None = None
    notes: tuple[str, ...] = ()
    format: int = FORMAT_VERSION


@dataclass(frozen=True, slots=True)
class Run:
    """A header, its results, and the resources of load generator and server."""

    header: Header
    records: tuple[Record, ...]
    #: From the first request's sending to the last one's end.
    duration_s: float
    #: CPU time of this generator; how late it sent at worst; of a server that was started here also
    #: `ready_s` and `rss_bytes`.
    measures: dict[str, float] = field(default_factory=dict)


def lines_of(run: Run) -> Iterator[bytes]:
    """Yield the run's lines."""
    yield _line("header", dataclasses.asdict(run.header))
    for record in run.records:
        filled = {k: v for k, v in dataclasses.asdict(record).items() if v not in (None, ())}
        yield _line("request", filled)
    yield _line("end", {"duration_s": run.duration_s, "measures": run.measures})


def _line(kind: str, content: dict[str, Any]) -> bytes:
    return orjson.dumps({"kind": kind} | _rounded(content)) + b"\n"


def _rounded(value: Any) -> Any:  # noqa: ANN401 - any JSON
    """Leave out digits below the microsecond: they are noise, and half of a file."""
    if isinstance(value, float):
        return round(value, _MAX_DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value


def append(path: Path, runs: Iterable[Run]) -> None:
    """Write the runs to the end of a file."""
    with path.open("ab") as file:
        for run in runs:
            file.writelines(lines_of(run))


def read(path: Path) -> list[Run]:
    """Return the runs in a file. A run without an end is one that was cut off, and is left out.

    Raises `RecordsError`.
    """
    runs: list[Run] = []
    header: Header | None = None
    records: list[Record] = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise RecordsError(f"{path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            content = orjson.loads(line)
            kind = content.pop("kind")
            if kind == "header":
                header, records = _header(content), []
            elif kind == "request":
                records.append(_record(content))
            elif kind == "end" and header is not None:
                runs.append(Run(header, tuple(records), content["duration_s"], content["measures"]))
                header = None
            else:
                _refuse(kind)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecordsError(f"{path}:{number}: not a line of a load test: {error}") from error
    return runs


def _refuse(kind: str) -> NoReturn:
    raise ValueError(f"a {kind} has no place here")


def _header(content: dict[str, Any]) -> Header:
    if content.get("format") != FORMAT_VERSION:
        raise ValueError(f"format {content.get('format')} instead of {FORMAT_VERSION}")
    return Header(**content | {"notes": tuple(content["notes"])})


def _record(content: dict[str, Any]) -> Record:
    failure = content.pop("failure", None)
    return Record(
        arrival_s=tuple(content.pop("arrival_s", ())),
        arrival_tokens=tuple(content.pop("arrival_tokens", ())),
        failure=Failure(**failure) if failure else None,
        **content,
    )


def answered(records: Sequence[Record]) -> list[Record]:
    """Return the answered requests."""
    return [record for record in records if record.failure is None]
