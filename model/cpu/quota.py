"""Reads the CPU quota of this process's control groups, in whole cores.

A container on a host of 64 cores may have a quota of two. 64 threads would use it up in a fraction
of each period, and stand still for the rest of the period. Knows nothing of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

#: Returns the text of a file, or None where it cannot be read.
ReadText = Callable[[str], str | None]

_GROUPS = "/proc/self/cgroup"
_ROOTS_V1 = ("/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpuacct,cpu")
_ROOTS_V2 = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")


def read_text(path: str) -> str | None:
    """Read a file of the system; None where it is missing or not readable."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def quota_cores(read: ReadText = read_text) -> float | None:
    """Return the cores whose time this process may use, such as 1.5; None: no quota.

    The smallest quota of the process's group and the groups above it holds. A container often has
    no view of its own path, and its group is mounted as the root: so the root is read, too.
    """
    quotas = [
        quota
        for line in (read(_GROUPS) or "").splitlines()
        for quota in _quotas(line, read)
        if quota is not None
    ]
    return min(quotas, default=None)


def num_usable_cores(num_cores: int, quota: float | None) -> int:
    """Return how many threads can compute at once: a quota counts in whole cores, at least one."""
    return num_cores if quota is None else max(1, min(num_cores, math.ceil(quota)))


def _quotas(line: str, read: ReadText) -> Iterator[float | None]:
    """Yield the quotas of one line of /proc/self/cgroup: `number:controllers:path`."""
    number, _, rest = line.partition(":")
    controllers, _, path = rest.partition(":")
    folders = ["", *map(str, _with_parents(path))]
    if number == "0" and not controllers:
        for root in _ROOTS_V2:
            for folder in folders:
                yield _quota_v2(read(f"{root}{folder}/cpu.max"))
    elif "cpu" in controllers.split(","):
        for root in _ROOTS_V1:
            for folder in folders:
                group = f"{root}{folder}"
                period = read(f"{group}/cpu.cfs_period_us")
                yield _quota_v1(read(f"{group}/cpu.cfs_quota_us"), period)


def _with_parents(path: str) -> Iterator[PurePosixPath]:
    folder = PurePosixPath(path)
    while folder.parent != folder and folder.is_absolute():
        yield folder
        folder = folder.parent


def _quota_v2(text: str | None) -> float | None:
    """Read cgroup v2's `cpu.max`: quota and period in microseconds, or `max` and a period."""
    words = (text or "").split()
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _quota_v1(quota: str | None, period: str | None) -> float | None:
    """Read cgroup v1's quota, which is -1 where there is none."""
    return _ratio(quota or "", period or "")


def _ratio(quota: str, period: str) -> float | None:
    try:
        quota_us, period_us = int(quota), int(period)
    except ValueError:
        return None
    return quota_us / period_us if quota_us > 0 and period_us > 0 else None
