"""The settings of the disk tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.kv_disk import KVDisk
from configs.load import ConfigError, load_config


def test_there_is_none_by_default() -> None:
    assert load_config({}, {}, None).cache.disk is None


def test_a_path_is_enough() -> None:
    assert load_config({"kv_disk_path": "there"}, {}, None).cache.disk == KVDisk(
        Path("there"), 16 * 2**30
    )
    flags = {"kv_disk_path": "there", "kv_disk_size": "2GiB"}
    assert load_config(flags, {}, None).cache.disk == KVDisk(Path("there"), 2 * 2**30)


def test_a_size_needs_a_path() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"kv_disk_size": "2GiB"}, {}, None)
    assert caught.value.problems == ("cache: kv_disk_size needs kv_disk_path",)
    with pytest.raises(ConfigError, match="kv_disk_size"):
        load_config({"kv_disk_path": "there", "kv_disk_size": "0"}, {}, None)
