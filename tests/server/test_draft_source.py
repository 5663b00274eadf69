"""The draft model of `--speculation draft:MODEL`, found, and refused where its tokens differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.schema import OctavoConfig, SchedulerSection
from server.daemon import _draft_source
from server.start_errors import StartError
from server.text.load import load_text
from server.text.tokenizer import Tokenizer

MakeModel = Callable[[str, int], Path]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    def make(name: str, vocab_size: int) -> Path:
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"vocab_size": vocab_size, "eos_token_id": 0}))
        return path

    return make


def _config(speculation: str) -> OctavoConfig:
    return OctavoConfig(scheduler=SchedulerSection(speculation=speculation))


def _tokenizer(path: Path) -> Tokenizer:
    return load_text(path).tokenizer


def test_there_is_none_without_a_name(make_model: MakeModel) -> None:
    assert _draft_source(_config("auto"), _tokenizer(make_model("large", 300))) is None


def test_one_with_the_same_tokens_is_found(make_model: MakeModel) -> None:
    large, small = make_model("large", 300), make_model("small", 300)
    source = _draft_source(_config(f"draft:dummy:{small}"), _tokenizer(large))
    assert source is not None
    assert source.path == small


def test_one_with_other_tokens_is_refused(make_model: MakeModel) -> None:
    large, small = make_model("large", 300), make_model("small", 290)
    for served, draft in ((large, small), (small, large)):
        with pytest.raises(StartError) as caught:
            _draft_source(_config(f"draft:dummy:{draft}"), _tokenizer(served))
        message = (
            f"speculation: the draft model dummy-{draft.stem} has another vocabulary: token 290"
        )
        assert str(caught.value).startswith(message)


def test_special_tokens_may_have_other_names(make_model: MakeModel) -> None:
    one = _tokenizer(make_model("large", 300))
    other = _tokenizer(make_model("small", 290))
    other.special_token_ids |= frozenset(range(290, 300))
    assert one.first_difference(other) is None
    assert other.first_difference(one) is None


def test_one_that_is_not_there_is_named(make_model: MakeModel) -> None:
    with pytest.raises(StartError, match=r"^speculation: model 'nowhere'"):
        _draft_source(_config("draft:nowhere"), _tokenizer(make_model("large", 300)))
