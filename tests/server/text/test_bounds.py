"""Bounds of a text hold once it is encoded, and its pieces have the tokens of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, normalizers, pre_tokenizers

from server.text import bounds, tokenizer
from server.text.load import ModelText
from server.text.token_bytes import BYTE_LEVEL_ALPHABET, TextError
from server.text.tokenizer import SpecialIds, Tokenizer

KINDS = ("byte-level", "stripping", "sentencepiece", "metaspace", "unigram", "smollm2")
Kinds = dict[str, Tokenizer]

WORDS = ["he", "hello", "im", "s", "<", "|", "</s>", "<|im_end|>", "<|im_end|>x", "<think>", "it's"]
WORDS += [" ", "  ", "\n", "\n\n", " \n ", "\t", ".", ",", "'", "'s", '"', "_", "1", "23", "12345"]
WORDS += [
    "\u65e5",
    "\uff0c",
    "\u3002",
    "\u00e9",
    "e\u0301",
    "\u0301",
    "\u00a0",
    "\x04",
    "\U0001f98a",
]
TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=60).map("".join),
    st.text(max_size=40),
    st.sampled_from(WORDS).flatmap(lambda word: st.integers(1, 80).map(lambda n: word * n)),
)


def of_kind(kinds: Kinds, smollm2: ModelText, name: str) -> Tokenizer:
    return smollm2.tokenizer if name == "smollm2" else kinds[name]


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of some characters are as long as others of megabytes."""
    for module in (bounds, tokenizer):
        monkeypatch.setattr(module, "PIECE_CHARS", 6)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("quotes", [False, True], ids=["plain", "quoted"])
@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=200)
@given(text=TEXTS, adds=st.booleans())
def test_pieces_have_the_tokens_of_the_whole(
    smollm2: ModelText, kinds: Kinds, name: str, text: str, adds: bool, quotes: bool
) -> None:
    words = of_kind(kinds, smollm2, name)
    text = "<s>" + (words.quote(text) if quotes else text)
    core, whole = words._core, text
    if quotes and words._quoting.needs(text):
        core, whole = words._quoting.core, words._quoting.respelled(text)
    expected = core.encode(whole, add_special_tokens=False).ids
    if core is not words._core:
        expected = words._quoting.token_ids(expected)
    expected = [*words._prefix, *expected, *words._suffix] if adds else expected
    assert words.encode(text, add_special_tokens=adds, is_quoted=quotes) == expected


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=300)
@given(text=TEXTS, quotes=st.booleans())
def test_no_text_has_fewer_tokens_than_it_is_said_to(
    smollm2: ModelText, kinds: Kinds, name: str, text: str, quotes: bool
) -> None:
    words = of_kind(kinds, smollm2, name)
    given_text = words.quote(text) if quotes else text
    token_ids = words.encode(given_text, add_special_tokens=False, is_quoted=quotes)
    assert words.least_tokens(given_text) <= len(token_ids)


def test_every_token_of_a_vocabulary_is_long_enough(smollm2: ModelText) -> None:
    words = smollm2.tokenizer
    for token_id in range(words.vocab_size):
        text = words.token_text(token_id)
        if not text.startswith("bytes:"):
            assert words.least_tokens(text) <= 1


def test_the_estimate_is_of_use(smollm2: ModelText, kinds: Kinds) -> None:
    for words in (smollm2.tokenizer, kinds["byte-level"], kinds["sentencepiece"]):
        for text in ("a", "hello world ", "=", "a1"):
            assert words.least_tokens(text * 100_000) > 1000
    assert smollm2.tokenizer.least_tokens(" " * 100_000) > 1000


@pytest.mark.usefixtures("short_pieces")
def test_texts_of_all_sorts_are_cut(smollm2: ModelText, kinds: Kinds) -> None:
    samples = (
        "hello world ",
        "line\n\n" * 3,
        "aGVsbG8gd29ybGQ",
        '{"ab":[1,"c"]}',
        "def f(x):\n  a",
    )
    for text in samples:
        for words in (smollm2.tokenizer, kinds["byte-level"]):
            assert len([*words._bounds.pieces(text * 20)]) > 10, text


@pytest.mark.usefixtures("short_pieces")
def test_a_space_in_front_of_each_text_is_not_put_in_front_of_each_piece(
    sentencepiece: Tokenizer,
) -> None:
    text = "hello world " * 20
    assert len([*sentencepiece._bounds.pieces(text)]) > 10
    expected = sentencepiece._core.encode(text, add_special_tokens=False).ids
    assert sentencepiece.encode(text, add_special_tokens=False) == expected


def test_what_cannot_be_cut_is_refused_where_it_would_take_too_much(smollm2: ModelText) -> None:
    with pytest.raises(TextError, match="without a border between words; at most 524288"):
        smollm2.tokenizer.encode("=" * 2_000_000, add_special_tokens=False)


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "model"])
def test_of_a_tokenizer_with_unknown_parts_nothing_is_said(part: str) -> None:
    """Each of these makes few tokens, or none, of texts of any length."""
    model: models.Model = models.BPE(
        vocab={letter: i for i, letter in enumerate(BYTE_LEVEL_ALPHABET)}, merges=[]
    )
    if part == "model":
        model = models.WordLevel({"[UNK]": 0}, unk_token="[UNK]")  # noqa: S106 - no password
    core = Core(model)
    core.decoder = decoders.ByteLevel()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    text = "a " * 50_000
    if part == "normalizer":
        core.normalizer = normalizers.Replace("a", "")
    elif part == "pre_tokenizer":
        core.pre_tokenizer = pre_tokenizers.Split("a ", behavior="removed")
    words = Tokenizer(core, SpecialIds())
    assert words.least_tokens(text) == 0
    assert [*words._bounds.pieces(text)] == [text]
    assert words.encode(text, add_special_tokens=False) == core.encode(text).ids
