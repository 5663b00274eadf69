"""A process that stores pages until it is killed: `python store_victim.py FOLDER`.

It prints a line when the store is open.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

from store_faults import PAGE_TOKENS, contents_of, open_store


def main() -> None:
    store = open_store(Path(sys.argv[1]))
    print("open", flush=True)  # noqa: T201 - read by the parent
    for text in itertools.count():
        for key in store.keys([text % 50, *range(11 * PAGE_TOKENS)], ""):
            store.put(key, contents_of(key))
        store.forget(store.keys([text % 7, *range(5 * PAGE_TOKENS)], ""))


if __name__ == "__main__":
    main()
