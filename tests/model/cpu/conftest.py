from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated_arm import NEON_ISAS, EmulatedArm, build, emulated, why_not


@pytest.fixture(scope="module")
def arm_programs(pytestconfig: pytest.Config) -> Path:
    """A folder that keeps the programs for the next run."""
    if reason := why_not():
        pytest.skip(reason)
    return pytestconfig.cache.mkdir("emulated_arm")


@pytest.fixture(params=[*NEON_ISAS, pytest.param("scalar", marks=pytest.mark.slow)])
def arm(arm_programs: Path, request: pytest.FixtureRequest) -> Iterator[EmulatedArm]:
    isas = NEON_ISAS if request.param in NEON_ISAS else [request.param]
    with emulated(build(arm_programs, isas), request.param) as found:
        yield found
