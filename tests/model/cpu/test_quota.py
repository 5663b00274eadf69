"""The number of threads follows the quota of the control groups, from the text of their files."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.cpu.quota import num_usable_cores, quota_cores, read_text

_V2 = {"/proc/self/cgroup": "0::/\n"}
_V1 = {"/proc/self/cgroup": "11:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n"}
_BOTH = {"/proc/self/cgroup": "3:cpu:/a\n2:cpuacct:/a\n0::/a\n"}
_SLICE = {"/proc/self/cgroup": "0::/system.slice/octavo.service\n"}
_CPU = "/sys/fs/cgroup/cpu"


def _v1(folder: str, quota: str, period: str = "100000\n") -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": period}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        (_V2, None),
        (_V2 | {"/sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (_V2 | {"/sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (_V2 | {"/sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        (_V2 | {"/sys/fs/cgroup/cpu.max": "400000\n"}, None),
        (_V2 | {"/sys/fs/cgroup/cpu.max": "nonsense 100000\n"}, None),
        (_V2 | {"/sys/fs/cgroup/cpu.max": "100000 0\n"}, None),
        (_V2 | {"/sys/fs/cgroup/unified/cpu.max": "200000 100000\n"}, 2.0),
        (_SLICE | {"/sys/fs/cgroup/system.slice/cpu.max": "300000 100000\n"}, 3.0),
        (
            _SLICE
            | {
                "/sys/fs/cgroup/system.slice/cpu.max": "300000 100000\n",
                "/sys/fs/cgroup/system.slice/octavo.service/cpu.max": "400000 100000\n",
            },
            3.0,
        ),
        (_V1, None),
        (_V1 | _v1("/sys/fs/cgroup/cpu,cpuacct", "-1\n"), None),
        (_V1 | _v1("/sys/fs/cgroup/cpu,cpuacct", "250000\n"), 2.5),
        (_V1 | _v1("/sys/fs/cgroup/cpu,cpuacct/docker/ab", "50000\n", "50000\n"), 1.0),
        (_V1 | {"/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000"}, None),
        (_BOTH | _v1(f"{_CPU}/a", "120000\n") | {"/sys/fs/cgroup/a/cpu.max": "max 1\n"}, 1.2),
        ({"/proc/self/cgroup": "5:cpuset:/\n"} | _v1(_CPU, "100000\n"), None),
        ({"/proc/self/cgroup": "gibberish\n\n0::relative\n"}, None),
    ],
)
def test_the_smallest_quota_of_all_groups_holds(
    files: dict[str, str], expected: float | None
) -> None:
    assert quota_cores(files.get) == expected


@pytest.mark.parametrize(
    ("num_cores", "quota", "expected"),
    [(8, None, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 0.2, 1), (2, 64.0, 2), (1, 1.01, 1)],
)
def test_a_quota_is_rounded_up_to_cores(num_cores: int, quota: float | None, expected: int) -> None:
    assert num_usable_cores(num_cores, quota) == expected


def test_files_that_cannot_be_read_are_no_quota(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    assert read_text(str(tmp_path / "absent")) is None
    assert read_text(str(tmp_path)) is None
    assert read_text(str(binary)) is None
    # This machine's own files, whatever they hold.
    quota = quota_cores()
    assert quota is None or quota > 0
