"""`octavo cache`: the contents of a store of pages on a disk, its soundness, and its removal.

Works beside a running server but for `clear`. Starts no engine.
"""

# ruff: noqa: T201 - the answers to a command

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from configs.sizes import format_size
from scheduler.tier.folder import StoreError
from scheduler.tier.survey import SegmentSurvey, clear, groups, survey

CacheAction = Literal["ls", "stats", "verify", "clear"]
#: By action, the help.
CACHE_ACTIONS: dict[CacheAction, str] = {
    "ls": "list the segments: size, pages, last use",
    "stats": "count the pages of each model and format",
    "verify": "read all pages and compare their checksums; exit code 1 if one is damaged",
    "clear": "remove all pages",
}


def run_cache(action: CacheAction, folder: Path) -> int:
    """Print the answer and return the exit code."""
    try:
        if action == "clear":
            print(f"{format_size(clear(folder))} removed")
            return 0
        if action == "stats":
            _print_stats(folder)
            return 0
        return _print_segments(folder, verify=action == "verify")
    except (StoreError, OSError) as error:
        print(f"octavo: {error}", file=sys.stderr)
        return 1


def _print_segments(folder: Path, *, verify: bool) -> int:
    num_damaged = 0
    for one in survey(folder, verify=verify):
        state = _state(one) if verify else f"used {_time(one.used_at_s)}"
        print(f"{one.name}  {format_size(one.num_bytes):>9}  {len(one.pages):>6} pages  {state}")
        num_damaged += one.num_damaged
    if num_damaged:
        print(
            f"octavo: {num_damaged} pages are damaged; none of them is ever used", file=sys.stderr
        )
    return 1 if num_damaged else 0


def _state(one: SegmentSurvey) -> str:
    faults = [f"{one.num_damaged} damaged"] if one.num_damaged else []
    if one.num_lost_bytes:
        faults.append(f"{format_size(one.num_lost_bytes)} unreadable at the end")
    return ", ".join(faults) or "sound"


def _print_stats(folder: Path) -> None:
    for variant, group in groups(survey(folder)).items():
        print(
            f"model {variant.hex()[:12]}  {format_size(group.num_bytes):>9}  "
            f"{group.num_pages:>6} pages of {group.page_tokens} tokens  "
            f"{len(group.namespaces)} namespaces  newest {_time(group.newest_s)}"
        )


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
