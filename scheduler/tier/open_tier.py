"""Puts the disk tier around an engine, or refuses a folder in words for an operator."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from configs.kv_disk import KVDisk
from configs.sizes import format_size
from scheduler.engine import Engine
from scheduler.messages import Loaded
from scheduler.tier.folder import StoreError, StoreFolder, check_is_on_disk
from scheduler.tier.store import Contents, DiskStore
from scheduler.tier.tiered_engine import TieredEngine

_log = logging.getLogger("octavo.cache")


def open_tier(engine: Engine, disk: KVDisk, post: Callable[[Loaded], None]) -> TieredEngine:
    """Return the engine with its pages on this disk, too. Raises `ValueError` naming the setting.

    `post`: brings a message from any thread to `handle`, in the engine's own.
    """
    info, path = engine.runner.info, disk.path.expanduser()
    stored = info.stored_pages
    assert stored is not None, "a model is built for the disk tier, or refuses it"
    contents = Contents(bytes.fromhex(stored.digest), info.page_size, stored.num_bytes)
    try:
        check_is_on_disk(path)
        folder = StoreFolder(path)
    except StoreError as error:
        raise ValueError(f"kv_disk_path: {error}") from error
    try:
        store = DiskStore(folder, contents, disk.max_bytes)
    except StoreError as error:
        folder.close()
        raise ValueError(f"kv_disk_size: {error}") from error
    stats = store.stats()
    held, tokens = format_size(stats.num_bytes), stats.num_pages * info.page_size
    _log.info("%s of pages are on the disk, with %d tokens of this model", held, tokens)
    return TieredEngine(engine, store, time.monotonic, post)
