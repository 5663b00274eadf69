"""How a policy of keys is written on the command line."""

from __future__ import annotations

import pytest

from configs.kv_policy import KVPolicy, parse_kv_policy
from configs.load import ConfigError, load_config


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", KVPolicy()),
        ("window:4096", KVPolicy("window", 4096)),
        ("sinks:4+1020", KVPolicy("sinks", 1020, 4)),
        ("morph:32/1024", KVPolicy("morph", 32, capacity=1024)),
        ("h2o:32/1024", KVPolicy("h2o", 32, capacity=1024)),
        ("morph:32/1024:max", KVPolicy("morph", 32, capacity=1024, fusion="max")),
    ],
)
def test_a_policy_is_read_and_written(text: str, policy: KVPolicy) -> None:
    assert parse_kv_policy(text) == policy
    assert str(policy) == text
    assert load_config({"kv_policy": text}, {}, None).cache.policy == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("window", "must be full, window:TOKENS, sinks:TOKENS+TOKENS, morph:WINDOW/CAPACITY"),
        ("sinks:4", "must be full"),
        ("window:-5", "must be full"),
        ("window:63", "window must be at least 64, got 63"),
        ("sinks:0+64", "sinks must be at least 1, got 0"),
        ("morph:32", "must be full"),
        ("morph:32+1024", "must be full"),
        ("morph:32/1024:min", "must be full"),
        ("morph:15/64", "window must be from 16 to 256 with type morph, got 15"),
        ("morph:257/1024", "window must be from 16 to 256 with type morph, got 257"),
        ("morph:16/63", "capacity must be at least 64 and above the window of 16, got 63"),
        ("morph:70/70", "capacity must be at least 64 and above the window of 70, got 70"),
        ("h2o:64/1024:max", "fusion must be left out with type h2o"),
        ("h2o:15/1024", "window must be from 16 to 256 with type h2o, got 15"),
    ],
)
def test_a_wrong_policy_names_the_setting(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as fault:
        load_config({"kv_policy": text}, {}, None)
    [problem] = fault.value.problems
    assert problem.startswith("cache: kv_policy: ")
    assert message in problem
