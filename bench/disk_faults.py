"""Faults in the files of the disk tier, and the wrong answers that they cause: there must be none.

`python bench/disk_faults.py [--faults 100000] [--kills 200] [--seed 0]`: injects faults into a
store, then kills a process that writes one at random moments and reads all that it left. Prints
counts by kind; the exit code is 1 if an answer was wrong.
"""

# ruff: noqa: T201 - printing is all a benchmark is for

from __future__ import annotations

import argparse
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from store_faults import PAGE_TOKENS, Faults, contents_of, open_store

_VICTIM = Path(__file__).resolve().parents[1] / "tests" / "support" / "store_victim.py"
_MAX_LIFE_S = 0.05


def kill_writers(folder: Path, num_kills: int, seed: int) -> Counter[str]:
    """Kill one writer after another at random moments; count the answers after each kill."""
    chance, counts = random.Random(seed), Counter[str]()
    for _ in range(num_kills):
        command = [sys.executable, str(_VICTIM), str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as victim:
            assert victim.stdout is not None
            victim.stdout.readline()
            time.sleep(chance.random() * _MAX_LIFE_S)
            victim.kill()
        counts += read_all(folder)
    return counts


def read_all(folder: Path) -> Counter[str]:
    """Read all pages that a writer may have stored."""
    store, counts = open_store(folder), Counter[str]()
    for text in range(50):
        for key in store.keys([text, *range(11 * PAGE_TOKENS)], ""):
            found = store.get(key)
            kind = "missed" if found is None else "right"
            counts["wrong" if found is not None and found != contents_of(key) else kind] += 1
    counts["damaged"] = store.stats().corrupt_pages_total
    store.close()
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # Damaged pages and full disks are logged.
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        began_s = time.monotonic()
        faults = Faults(Path(name) / "faults", arguments.seed)
        faults.inject(arguments.faults)
        for kind, count in sorted(faults.injected.items()):
            print(f"{count:8d} {kind}")
        answers = f"{faults.right} right answers, {faults.missed} misses, {faults.wrong} wrong"
        took_s = time.monotonic() - began_s
        print(f"{sum(faults.injected.values())} faults in {took_s:.0f} s: {answers}")
        counts = kill_writers(Path(name) / "kills", arguments.kills, arguments.seed)
        print(f"{arguments.kills} killed writers: {dict(sorted(counts.items()))}")
    return 1 if faults.wrong or counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
