"""`--speculation`, and vLLM's `--speculative-config` in its place."""

from __future__ import annotations

import pytest

from configs.load import ConfigError, load_config
from configs.schema import SchedulerSection
from configs.speculation import Drafting


@pytest.mark.parametrize(
    ("stated", "on_cpu", "on_cuda"),
    [
        ({}, "auto", "none"),
        ({"speculation": "none"}, "none", "none"),
        ({"speculation": "suffix"}, "suffix", "suffix"),
    ],
)
def test_the_default_depends_on_the_device(
    stated: dict[str, str], on_cpu: str, on_cuda: str
) -> None:
    drafting = SchedulerSection.model_validate(stated).drafting
    assert (drafting.kind("cpu"), drafting.kind("cuda")) == (on_cpu, on_cuda)
    assert (drafting.max_tokens, drafting.draft_model) == (16, None)


def test_our_own_names() -> None:
    config = load_config({"speculation": "suffix", "speculative_tokens": "5"}, {}, None)
    assert config.scheduler.drafting == Drafting("suffix", 5)


def test_a_draft_model_has_a_name() -> None:
    drafting = load_config({"speculation": "draft:org/small"}, {}, None).scheduler.drafting
    assert drafting == Drafting("draft:org/small", 16)
    assert drafting.draft_model == "org/small"
    assert Drafting("auto", 16).draft_model is None


@pytest.mark.parametrize("method", ["", '"method":"draft_model",'])
def test_a_draft_model_in_the_words_of_vllm(method: str) -> None:
    text = f'{{{method}"model":"draft:x","num_speculative_tokens":4}}'
    drafting = load_config({"speculative_config": text}, {}, None).scheduler.drafting
    assert (drafting.draft_model, drafting.max_tokens) == ("draft:x", 4)


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
        ({"speculation": "model"}, "one of none, auto, ngram, suffix, draft:MODEL"),
        ({"speculation": "draft:"}, "one of none, auto, ngram, suffix, draft:MODEL"),
        ({"speculative_tokens": "0"}, "speculative_tokens (flag --speculative-tokens)"),
        ({"speculative_config": "ngram"}, "speculative_config: must be JSON"),
        ({"speculative_config": "{}"}, "method: field required"),
        ({"speculative_config": '{"method":"eagle"}'}, "input should be 'ngram', 'suffix' or"),
        (
            {"speculative_config": '{"method":"ngram","model":"x"}'},
            "speculative_config: model and the method draft_model need each other",
        ),
        ({"speculative_config": '{"method":"draft_model"}'}, "draft_model need each other"),
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
