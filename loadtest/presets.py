"""All workloads by name."""

from __future__ import annotations

from loadtest.agents import AGENTS
from loadtest.repeating import REPEATING
from loadtest.workloads import WORDS_ALONE, Preset

#: Name to description and constructor.
PRESETS: dict[str, Preset] = {**WORDS_ALONE, **REPEATING, **AGENTS}
