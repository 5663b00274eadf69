from __future__ import annotations

import codecs
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.detokenize import StreamDecoder
from server.text.load import ModelText
from server.text.tokenizer import Tokenizer


def broken_ids(tokenizer: Tokenizer) -> list[int]:
    """Return special tokens, and parts of characters: where streams go wrong."""
    odd = []
    for token_id in range(tokenizer.vocab_size):
        try:
            tokenizer.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            odd.append(token_id)
    return [*odd, *sorted(tokenizer.special_token_ids)]


def streamed(decoder: StreamDecoder, pushes: Sequence[Sequence[int]]) -> list[str]:
    texts = []
    for token_ids in pushes:
        texts.append(decoder.push(token_ids))
        decoder.check()
    return [*texts, decoder.finish()]


@given(data=st.data(), skips=st.booleans())
def test_any_split_of_any_tokens_gives_the_text_of_all(
    tokenizer: Tokenizer, data: st.DataObject, skips: bool
) -> None:
    any_id = st.integers(0, tokenizer.vocab_size + 3)
    token_id = st.one_of(any_id, st.sampled_from(broken_ids(tokenizer)))
    pushes = data.draw(st.lists(st.lists(token_id, max_size=5), max_size=12))
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skips)
    texts = streamed(decoder, pushes)
    together = [token_id for token_ids in pushes for token_id in token_ids]
    assert "".join(texts) == tokenizer.decode(together, skip_special_tokens=skips)


@given(text=st.text(alphabet="he lo\n🦊🏳\u200d\u0301é你한<|im_end|>"), size=st.integers(1, 4))
def test_text_that_was_encoded_comes_back_without_broken_characters(
    tokenizer: Tokenizer, text: str, size: int
) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    pushes = [token_ids[i : i + size] for i in range(0, len(token_ids), size)]
    texts = streamed(StreamDecoder(tokenizer, skip_special_tokens=False), pushes)
    assert "\ufffd" not in "".join(texts)
    assert texts[-1] == ""
    # SentencePiece with a space in front of everything cannot distinguish one space from none.
    assert "".join(texts).lstrip(" ") == text.lstrip(" ")


def test_a_character_comes_with_its_last_byte(smollm2: ModelText) -> None:
    tokenizer = smollm2.tokenizer
    token_ids = tokenizer.encode("🦩", add_special_tokens=False)
    assert len(token_ids) > 1
    decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
    assert [decoder.push([token_id]) for token_id in token_ids[:-1]] == [""] * (len(token_ids) - 1)
    assert decoder.push(token_ids[-1:]) == "🦩"
    assert decoder.finish() == ""


def test_bytes_that_never_become_a_character_do_not_block_the_stream(
    sentencepiece: Tokenizer,
) -> None:
    def byte(value: int) -> int:
        return 3 + value

    decoder = StreamDecoder(sentencepiece, skip_special_tokens=True)
    assert decoder.push([byte(0xE2)]) == ""
    assert decoder.push([byte(0x82)]) == ""
    assert decoder.push([byte(ord("a"))]) == "\ufffda"
    assert decoder.push([byte(0xE2)]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.finish() == ""


def test_a_skipped_special_token_does_not_part_a_character(sentencepiece: Tokenizer) -> None:
    e_acute = [3 + byte for byte in "é".encode()]
    pushes = [[e_acute[0]], [2], [e_acute[1]]]
    skipping = StreamDecoder(sentencepiece, skip_special_tokens=True)
    assert streamed(skipping, pushes) == ["", "", "é", ""]
    showing = StreamDecoder(sentencepiece, skip_special_tokens=False)
    assert streamed(showing, pushes) == ["", "\ufffd</s>", "\ufffd", ""]


@pytest.mark.parametrize("continues", [False, True])
def test_the_first_space_stays_only_where_a_text_goes_on(
    sentencepiece: Tokenizer, continues: bool
) -> None:
    token_ids = sentencepiece.encode("hello hello", add_special_tokens=False)
    decoder = StreamDecoder(sentencepiece, skip_special_tokens=True, continues=continues)
    pushes = [[], *([token_id] for token_id in token_ids)]
    expected = [" hello" if continues else "hello", " hello"]
    assert streamed(decoder, pushes) == ["", *expected, ""]


@given(data=st.binary(), cut=st.integers(0, 40))
def test_python_gives_broken_bytes_out_the_same_in_pieces(data: bytes, cut: int) -> None:
    """Check the function that the decoder is built on."""
    text, num_used = codecs.utf_8_decode(data[:cut], "replace", False)
    rest = (data[:cut][num_used:] + data[cut:]).decode(errors="replace")
    assert text + rest == data.decode(errors="replace")
