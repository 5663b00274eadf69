"""Values on the command line; the `ArgumentTypeError` of each reader names the valid form."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import orjson

from loadtest.compare import Contestant
from loadtest.figures import parse_duration_s, parse_slo
from loadtest.launch import Command
from loadtest.wire import Pool

ValueT = TypeVar("ValueT")

_MOST_CONCURRENCY = 4096


def add(
    group: argparse._ArgumentGroup,
    flag: str,
    read: Callable[[str], Any],
    metavar: str,
    text: str,
    default: object = None,
) -> None:
    """Add an option with a value."""
    group.add_argument(flag, type=read, metavar=metavar, default=default, help=text)


def typed(read: Callable[[str], ValueT]) -> Callable[[str], ValueT]:
    """Keep the message of a `ValueError`: argparse would print "invalid value"."""

    @wraps(read)
    def reading(text: str) -> ValueT:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return reading


@typed
def seconds(text: str) -> float:
    """Read a time, as `parse_duration_s` does."""
    return parse_duration_s(text)


@typed
def bounds(text: str) -> dict[str, float]:
    """Read an SLO, as `parse_slo` does."""
    return parse_slo(text)


@typed
def whole(text: str) -> int:
    """Read a whole number from 0."""
    if not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"{text!r} is no whole number from 0")
    return int(text)


@typed
def count(text: str) -> int:
    """Read a whole number from 1."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) == 0:
        raise ValueError(f"{text!r} is no whole number from 1")
    return int(text)


@typed
def concurrencies(text: str) -> list[int]:
    """Read whole numbers with commas between them."""
    found = [count(part) for part in text.split(",")]
    if max(found) > _MOST_CONCURRENCY:
        raise ValueError(f"at most {_MOST_CONCURRENCY} at a time")
    return found


@typed
def positive(text: str) -> float:
    """Read a number above 0."""
    number = float(text)
    if not 0 < number < 1e6:
        raise ValueError(f"{text!r} is no number above 0")
    return number


@typed
def rates(text: str) -> list[float]:
    """Read numbers above 0 with commas between them."""
    return [positive(part) for part in text.split(",")]


@typed
def json_object(text: str) -> dict[str, Any]:
    """Read a JSON object."""
    found = orjson.loads(text)
    if not isinstance(found, dict):
        raise ValueError("must be a JSON object")  # noqa: TRY004 - for argparse
    return found


@typed
def url(text: str) -> str:
    """Read the URL of a server."""
    Pool(text, lambda: 0.0)
    return text


@typed
def command(text: str) -> Command:
    """Read how a server is started."""
    return Command.parse(text)


@typed
def running(text: str) -> Contestant:
    """Read `NAME=URL`."""
    name, where = _named(text)
    return Contestant(name, url(where))


@typed
def startable(text: str) -> Contestant:
    """Read `NAME=COMMAND`."""
    name, words = _named(text)
    return Contestant(name, command(words))


def _named(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not value or not re.fullmatch(r"[\w.+-]{1,40}", name):
        raise ValueError(f"{text!r} must look like NAME=..., with letters, digits, . + - in NAME")
    return name, value
