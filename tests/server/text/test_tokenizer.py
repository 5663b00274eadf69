from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Core
from tokenizers import decoders, processors

from server.text.load import ModelText
from server.text.token_bytes import BYTE_LEVEL_ALPHABET, TextError, TokenForm, read_form
from server.text.tokenizer import SpecialIds, Tokenizer

BOS, EOS = 1, 2
DATA = Path(__file__).parent / "data"

#: SmolLM2's vocabulary lacks the tokens of a few bytes, so their characters are lost in encoding.
SMOLLM2_CHARACTERS = st.characters(
    max_codepoint=0x3FFFF,
    exclude_categories=["Cs"],
    exclude_characters="\x04\x06\x13\x14\x16\x1d",
)


def test_smollm2_tokenises_as_llama_cpp_does(smollm2: ModelText) -> None:
    recorded = json.loads((DATA / "smollm2_llama_cpp.json").read_text(encoding="utf-8"))
    assert len(recorded) > 60
    for entry in recorded:
        token_ids = smollm2.tokenizer.encode(entry["text"], add_special_tokens=True)
        assert token_ids == entry["token_ids"], entry["text"]


@given(text=st.text(alphabet=SMOLLM2_CHARACTERS))
def test_byte_level_text_comes_back_exactly(smollm2: ModelText, text: str) -> None:
    token_ids = smollm2.tokenizer.encode(text, add_special_tokens=False)
    assert smollm2.tokenizer.decode(token_ids, skip_special_tokens=False) == text
    pieces = [smollm2.tokenizer.token_bytes(token_id) for token_id in token_ids]
    assert b"".join(pieces) == text.encode()


@given(data=st.data(), skips=st.booleans())
def test_any_byte_level_tokens_decode_as_the_library_decodes_them(
    smollm2: ModelText, data: st.DataObject, skips: bool
) -> None:
    tokenizer = smollm2.tokenizer
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    expected = tokenizer._core.decode(token_ids, skip_special_tokens=skips)
    assert tokenizer.decode(token_ids, skip_special_tokens=skips) == expected


@given(text=st.text(alphabet="helo wrdé🦊<s>"), skips=st.booleans())
def test_sentencepiece_text_decodes_as_the_library_decodes_it(
    sentencepiece: Tokenizer, text: str, skips: bool
) -> None:
    token_ids = sentencepiece.encode(text, add_special_tokens=True)
    expected = sentencepiece._core.decode(token_ids, skip_special_tokens=skips)
    assert sentencepiece.decode(token_ids, skip_special_tokens=skips) == expected


def test_bos_and_eos_go_around_as_stated(byte_level_core: Core) -> None:
    def encode(ids: SpecialIds) -> list[int]:
        tokenizer = Tokenizer(byte_level_core, ids)
        assert tokenizer.encode("he", add_special_tokens=False) == [256]
        return tokenizer.encode("he", add_special_tokens=True)

    assert encode(SpecialIds(BOS, (EOS,), adds_bos=True, adds_eos=True)) == [BOS, 256, EOS]
    assert encode(SpecialIds(BOS, (EOS,), adds_bos=True)) == [BOS, 256]
    assert encode(SpecialIds(BOS, (EOS,), adds_bos=False)) == [256]
    assert encode(SpecialIds(None, (), adds_bos=True, adds_eos=True)) == [256]
    assert encode(SpecialIds(BOS, (EOS,))) == [256]
    byte_level_core.post_processor = processors.TemplateProcessing(
        single="<|end|> $0", special_tokens=[("<|end|>", 257)]
    )
    assert encode(SpecialIds(BOS, (EOS,))) == [257, 256]
    assert encode(SpecialIds(BOS, (EOS,), adds_bos=False)) == [256]


def test_special_tokens_are_recognised_in_text_and_skipped_on_request(
    byte_level_core: Core,
) -> None:
    tokenizer = Tokenizer(byte_level_core, SpecialIds(eos_token_ids=(ord("~"), 257)))
    token_ids = tokenizer.encode("he<|end|>", add_special_tokens=False)
    assert token_ids == [256, 257]
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "he<|end|>"
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "he"
    assert tokenizer.special_token_ids == {ord("~"), 257}


def test_lengths_written_into_a_tokenizer_do_not_cut_or_pad_text(byte_level_core: Core) -> None:
    byte_level_core.enable_truncation(2)
    byte_level_core.enable_padding(length=5)
    tokenizer = Tokenizer(byte_level_core, SpecialIds())
    assert len(tokenizer.encode("abc", add_special_tokens=True)) == 3


def test_one_token_is_shown_as_openai_shows_it(smollm2: ModelText) -> None:
    tokenizer = smollm2.tokenizer
    (hello,) = tokenizer.encode(" hello", add_special_tokens=False)
    assert (tokenizer.token_text(hello), tokenizer.token_bytes(hello)) == (" hello", b" hello")
    assert tokenizer.token_text(2) == "<|im_end|>"
    first = tokenizer.encode("🦩", add_special_tokens=False)[0]
    escaped = "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(first))
    assert tokenizer.token_text(first) == f"bytes:{escaped}"


def test_sentencepiece_tokens_are_shown_with_spaces_and_bytes(sentencepiece: Tokenizer) -> None:
    (hello,) = sentencepiece.encode("hello", add_special_tokens=False)
    assert sentencepiece.token_text(hello) == " hello"
    assert sentencepiece.token_text(3 + 0x0A) == "\n"
    assert sentencepiece.token_text(3 + 0xE2) == "bytes:\\xe2"


@pytest.mark.parametrize("token_id", [-1, 49_152, 10**12])
def test_ids_outside_the_vocabulary_stand_for_nothing(smollm2: ModelText, token_id: int) -> None:
    assert smollm2.tokenizer.vocab_size == 49_152
    assert smollm2.tokenizer.decode([token_id], skip_special_tokens=False) == ""
    assert smollm2.tokenizer.token_text(token_id) == ""
    assert token_id not in smollm2.tokenizer.bytes_by_id(skip_special_tokens=False)


def test_text_that_is_not_unicode_is_refused(smollm2: ModelText) -> None:
    with pytest.raises(TextError, match="lone surrogate"):
        smollm2.tokenizer.encode("a\ud800b", add_special_tokens=False)


def test_many_threads_may_encode_at_once(smollm2: ModelText) -> None:
    texts = [f"number {i}: {'wörds ' * (i % 50)}🦊" for i in range(300)]

    def there_and_back(text: str) -> str:
        token_ids = smollm2.tokenizer.encode(text, add_special_tokens=False)
        return smollm2.tokenizer.decode(token_ids, skip_special_tokens=False)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(there_and_back, texts)) == texts


def test_the_byte_alphabet_is_the_librarys() -> None:
    decoder = decoders.ByteLevel()
    decoded = "".join(decoder.decode([letter]) for letter in BYTE_LEVEL_ALPHABET[:128])
    assert decoded == bytes(range(128)).decode()
    assert len(set(BYTE_LEVEL_ALPHABET)) == 256


def test_decoders_are_read_as_what_they_do() -> None:
    assert read_form(decoders.ByteLevel()) == TokenForm(is_byte_level=True)
    assert read_form(decoders.Metaspace()) == TokenForm(
        replacements=(("▁", " "),), leading_spaces=1
    )
    never = decoders.Metaspace(prepend_scheme="never")
    assert read_form(never) == TokenForm(replacements=(("▁", " "),))


@pytest.mark.parametrize(
    ("decoder", "name"),
    [
        (None, "has no decoder"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.ByteFallback(), decoders.CTC()]), "CTC"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0), decoders.Fuse()]), "Strip"),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_named(
    byte_level_core: Core, decoder: decoders.Decoder | None, name: str
) -> None:
    byte_level_core.decoder = decoder
    with pytest.raises(TextError, match=f"{name}.*; supported: ByteLevel"):
        Tokenizer(byte_level_core, SpecialIds())
