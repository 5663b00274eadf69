"""Engines with a disk tier, one after another on one folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from store_faults import open_store
from tier_drive import TierDrive

from scheduler.tier.store import DiskStore


@pytest.fixture
def make_tier(tmp_path: Path) -> Iterator[Callable[..., TierDrive]]:
    """Open tiers on one folder, each after the one before is closed."""
    opened: list[TierDrive] = []

    def make(**how: Any) -> TierDrive:
        for one in opened[-1:]:
            one.close()
        opened.append(TierDrive(tmp_path, **how))
        return opened[-1]

    yield make
    for one in opened[-1:]:
        one.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    opened = open_store(tmp_path)
    yield opened
    opened.check()
    opened.close()
