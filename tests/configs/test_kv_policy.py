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
    ],
)
def test_a_policy_is_read_and_written(text: str, policy: KVPolicy) -> None:
    assert parse_kv_policy(text) == policy
    assert str(policy) == text
    assert load_config({"kv_policy": text}, {}, None).cache.policy == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("window", "must be full, window:TOKENS or sinks:TOKENS+TOKENS"),
        ("sinks:4", "must be full"),
        ("window:-5", "must be full"),
        ("window:63", "window must be at least 64, got 63"),
        ("sinks:0+64", "sinks must be at least 1, got 0"),
        ("morph", "morph is not served: MorphKV drops keys by their scores"),
        ("h2o:64", "h2o is not served"),
    ],
)
def test_a_wrong_policy_names_the_setting(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as fault:
        load_config({"kv_policy": text}, {}, None)
    [problem] = fault.value.problems
    assert problem.startswith("cache: kv_policy: ")
    assert message in problem
