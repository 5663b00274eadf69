"""No test may bet on a machine's speed: it waits for an event until that happens."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
#: Where time is measured, and suites of an environment that does not have the tests' own modules.
_EXEMPT_FOLDERS = {"bench", "support", "node_modules"}
#: Calls that wait, and the place of the seconds among their arguments; None: only by name.
_WAITS = {
    "timeout": 0,
    "wait_for": 1,
    "join": 0,
    "result": 0,
    "wait": 0,
    "run": None,
    "communicate": None,
    "create_connection": None,
}
_HTTPX = {"get", "post", "stream", "request", "Client", "AsyncClient"}
#: Seconds that a machine ten times slower keeps, whatever it waits for; those of one look of many.
_LEAST_S, _LOOK_S = 120, 0.01


def files() -> list[Path]:
    return sorted(
        path
        for path in TESTS.rglob("*.py")
        if not _EXEMPT_FOLDERS & set(path.parts) and not path.name.endswith("_suite.py")
    )


def name_of(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


def _seconds(call: ast.Call, place: int | None) -> object:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "timeout"]
    placed = call.args[place : place + 1] if place is not None else []
    for value in [*named, *placed]:
        if isinstance(value, ast.Constant):
            return value.value
    return None


def bets(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield each place where a test would fail only because the machine is slow."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            clocks = {"monotonic", "perf_counter", "time"}
            names = {one.attr for one in ast.walk(node) if isinstance(one, ast.Attribute)}
            if names & clocks:
                yield node.lineno, "asserts a time; see wait_until"
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner, name = node.func.value, node.func.attr
        is_httpx = isinstance(owner, ast.Name) and owner.id == "httpx" and name in _HTTPX
        by_name = {keyword.arg for keyword in node.keywords}
        if is_httpx and not by_name & {"timeout", "transport"}:
            yield node.lineno, "httpx gives up after 5 s of its own"
        if name in _WAITS or is_httpx:
            seconds = _seconds(node, None if is_httpx else _WAITS[name])
            if isinstance(seconds, int | float) and _LOOK_S < seconds < _LEAST_S:
                yield node.lineno, f"waits no longer than {seconds} s"


def test_no_test_bets_on_a_machines_speed() -> None:
    found = {name_of(path): list(bets(ast.parse(path.read_text()))) for path in files()}
    assert {name: places for name, places in found.items() if places} == {}


def test_streams_are_read_by_one_parser() -> None:
    """A parser that takes each line for data fails on the comments of a slow server."""
    by_hand = 'removeprefix("' + "data"
    assert [name_of(path) for path in files() if by_hand in path.read_text()] == []


@pytest.mark.parametrize(
    "code",
    [
        "httpx.get(url)",
        "httpx.Client(base_url=url)",
        "httpx.post(url, timeout=30)",
        "assert time.monotonic() < end_s",
        "assert time.monotonic() - began_s < 2",
        "asyncio.timeout(20)",
        "asyncio.wait_for(work, 60)",
        "thread.join(20)",
        "process.communicate(timeout=60)",
        "subprocess.run(command, timeout=60)",
        "socket.create_connection(address, timeout=2)",
    ],
)
def test_a_bet_is_found(code: str) -> None:
    assert len(list(bets(ast.parse(code)))) == 1
