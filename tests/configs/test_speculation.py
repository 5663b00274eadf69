"""`--speculation`, and vLLM's `--speculative-config` in its place."""

from __future__ import annotations

import pytest

from configs.load import ConfigError, load_config
from configs.schema import SchedulerSection
from configs.speculation import Drafting


def test_there_are_no_drafts_by_default() -> None:
    assert SchedulerSection().drafting == Drafting("none", 16)


def test_our_own_names() -> None:
    config = load_config({"speculation": "suffix", "speculative_tokens": "5"}, {}, None)
    assert config.scheduler.drafting == Drafting("suffix", 5)


@pytest.mark.parametrize(
    ("text", "drafting"),
    [
        ('{"method":"suffix"}', Drafting("suffix", 16)),
        ('{"method":"suffix","num_speculative_tokens":32}', Drafting("suffix", 32)),
        ('{"method":"ngram","num_speculative_tokens":5}', Drafting("ngram", 5)),
        ('{"method":"ngram","prompt_lookup_max":4}', Drafting("ngram", 16, 4, 4)),
        ('{"method":"ngram","prompt_lookup_min":2}', Drafting("ngram", 16, 2, None)),
        (
            '{"method":"ngram","prompt_lookup_min":2,"prompt_lookup_max":6}',
            Drafting("ngram", 16, 2, 6),
        ),
    ],
)
def test_what_vllm_users_have(text: str, drafting: Drafting) -> None:
    assert load_config({"speculative_config": text}, {}, None).scheduler.drafting == drafting


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ({"speculation": "draft:some/model"}, "expected one of none, auto, ngram, suffix"),
        ({"speculative_tokens": "0"}, "speculative_tokens (flag --speculative-tokens)"),
        ({"speculative_config": "ngram"}, "speculative_config: must be JSON"),
        ({"speculative_config": "{}"}, "method: field required"),
        ({"speculative_config": '{"method":"eagle"}'}, "method: input should be 'ngram' or"),
        (
            {"speculative_config": '{"method":"ngram","model":"x"}'},
            "speculative_config: model is not supported",
        ),
        ({"speculative_config": '{"method":"ngram","num_speculative_tokens":0}'}, "num_spec"),
        (
            {"speculative_config": '{"method":"suffix","prompt_lookup_min":2}'},
            "are of the method ngram",
        ),
        (
            {
                "speculative_config": '{"method":"ngram","prompt_lookup_min":3,'
                '"prompt_lookup_max":2}'
            },
            "prompt_lookup_min is above prompt_lookup_max",
        ),
        (
            {"speculative_config": '{"method":"ngram"}', "speculation": "ngram"},
            "speculative_config and speculation exclude each other",
        ),
    ],
)
def test_what_is_wrong_is_named(flags: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags, {}, None)
    assert len(caught.value.problems) == 1
    assert problem in caught.value.problems[0]
