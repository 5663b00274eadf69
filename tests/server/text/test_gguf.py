from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from server.text.gguf_tokenizer import GGUFMetadata, gguf_tokenizer
from server.text.load import ModelText, load_text
from server.text.token_bytes import BYTE_LEVEL_ALPHABET, TextError
from server.text.tokenizer import Tokenizer

WriteGGUF = Callable[..., Path]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
MERGES = ["1 2", "12 3", "123 4", "e Ì", "Ã ©"]


@pytest.fixture
def write_bpe(write_gguf: WriteGGUF) -> WriteGGUF:
    """Write the bytes, the digits 12, 123 and 1234, é, a word without merges, and two special."""
    tokens = [*BYTE_LEVEL_ALPHABET, "12", "123", "1234", "eÌ", "Ã©", "xyz", "<|end|>", "<tool>"]

    def write(**keys: object) -> Path:
        kinds = [NORMAL] * (len(tokens) - 2) + [CONTROL, USER_DEFINED]
        known = {"model": "gpt2", "tokens": tokens, "token_type": kinds, "merges": MERGES}
        return write_gguf(**(known | keys))

    return write


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.token_text(token_id) for token_id in token_ids]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["1234"]),
        ("default", ["123", "4"]),
        ("smollm", ["1", "2", "3", "4"]),
        ("qwen2", ["1", "2", "3", "4"]),
        ("tekken", ["1", "2", "3", "4"]),
        ("llama-bpe", ["123", "4"]),
    ],
)
def test_each_pre_tokenizer_cuts_digits_its_own_way(
    write_bpe: WriteGGUF, pre: str, expected: list[str]
) -> None:
    assert words(load_text(write_bpe(pre=pre)).tokenizer, "1234") == expected


def test_only_some_take_words_that_no_merges_make(write_bpe: WriteGGUF) -> None:
    assert words(load_text(write_bpe(pre="llama-bpe")).tokenizer, "xyz") == ["xyz"]
    assert words(load_text(write_bpe(pre="gpt-2")).tokenizer, "xyz") == ["x", "y", "z"]


def test_qwen_composes_characters(write_bpe: WriteGGUF) -> None:
    assert words(load_text(write_bpe(pre="qwen2")).tokenizer, "e\u0301") == ["é"]
    assert "é" not in words(load_text(write_bpe(pre="gpt-2")).tokenizer, "e\u0301")


def test_control_and_user_defined_tokens_are_recognised_in_text(write_bpe: WriteGGUF) -> None:
    tokenizer = load_text(write_bpe()).tokenizer
    assert words(tokenizer, "12<|end|>12<tool>") == ["12", "<|end|>", "12", "<tool>"]
    (end,) = tokenizer.encode("<|end|>", add_special_tokens=False)
    assert tokenizer.special_token_ids == {end}


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("gpt-2", {}, []),
        ("gpt-2", {"add_bos_token": True}, [1]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, [1, 2]),
        ("llama-bpe", {}, [1]),
        ("llama-bpe", {"add_bos_token": False}, []),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(
    write_bpe: WriteGGUF, pre: str, flags: dict[str, bool], expected: list[int]
) -> None:
    tokenizer = load_text(write_bpe(pre=pre, bos_token_id=1, eos_token_id=2, **flags)).tokenizer
    assert tokenizer.encode("", add_special_tokens=True) == expected
    assert tokenizer.encode("", add_special_tokens=False) == []


def test_every_token_that_ends_a_text_is_told_once(write_bpe: WriteGGUF) -> None:
    path = write_bpe(bos_token_id=1, eos_token_id=7, eot_token_id=9, eom_token_id=7)
    tokenizer = load_text(path).tokenizer
    assert tokenizer.bos_token_id == 1
    # The last of them is `<|end|>`.
    assert tokenizer.eos_token_ids == (7, 9, 262)
    assert {7, 9} <= tokenizer.special_token_ids


def test_the_real_file_says_what_smollm2_is(smollm2: ModelText) -> None:
    tokenizer = smollm2.tokenizer
    # `<|endoftext|>` ends an answer by its text, as in llama.cpp.
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (1, (2, 0))
    assert tokenizer.special_token_ids == set(range(17))
    assert smollm2.template is not None


# ---- SentencePiece -------------------------------------------------------------------------------


@pytest.fixture
def write_spm(write_gguf: WriteGGUF) -> WriteGGUF:
    """Write a, b, c and joins of them: `bc` scores better than `ab`, and `abc` worst."""
    scored = {"▁": -9.0, "a": -8.0, "b": -7.0, "c": -6.0, "ab": -2.0, "bc": -1.0, "abc": -3.0}
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *scored]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(scored)]
    scores = [*[0.0] * 259, *scored.values()]

    def write(**keys: object) -> Path:
        known: dict[str, object] = {"model": "llama", "tokens": tokens, "token_type": kinds}
        known |= {"scores": scores, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
        return write_gguf(**(known | keys))

    return write


def test_the_best_scored_join_comes_first(write_spm: WriteGGUF) -> None:
    tokenizer = load_text(write_spm(add_space_prefix=False)).tokenizer
    assert words(tokenizer, "abc") == ["abc"]
    assert words(tokenizer, "aab") == ["a", "ab"]
    assert words(tokenizer, "bcbc") == ["bc", "bc"]
    # `bc` is joined before `ab` could be, and `a` + `bc` make `abc`.
    assert words(tokenizer, "ababc") == ["ab", "abc"]


def test_the_space_in_front_goes_by_the_file(write_spm: WriteGGUF) -> None:
    with_space = load_text(write_spm()).tokenizer
    token_ids = with_space.encode("a", add_special_tokens=False)
    assert words(with_space, "a") == [" ", "a"]
    assert with_space.decode(token_ids, skip_special_tokens=True) == "a"
    without = load_text(write_spm(add_space_prefix=False)).tokenizer
    assert words(without, " a") == [" ", "a"]
    assert without.decode(token_ids, skip_special_tokens=True) == " a"


def test_characters_outside_the_vocabulary_become_bytes(write_spm: WriteGGUF) -> None:
    tokenizer = load_text(write_spm(add_space_prefix=False)).tokenizer
    token_ids = tokenizer.encode("a🦊</s>", add_special_tokens=True)
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == "<s>a🦊</s>".encode()
    assert len(token_ids) == 1 + 1 + 4 + 1
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "a🦊"


# ---- files that cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"pre": "martian"}, "tokenizer.ggml.pre 'martian' is not supported; supported: default"),
        ({"model": "t5"}, "tokenizer.ggml.model 't5' is not supported; supported: 'gpt2'"),
        ({"tokens": []}, "has no tokenizer"),
        ({"merges": ["no such"]}, "tokenizer.ggml.merges: .*out of vocabulary"),
        ({"merges": [1, 2]}, "tokenizer.ggml.merges is not an array of strings"),
        ({"token_type": "x"}, "tokenizer.ggml.token_type is not an array of numbers"),
        ({"eos_token_id": "x"}, "tokenizer.ggml.eos_token_id is not a whole number"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token is not a truth value"),
        ({"pre": 1}, "tokenizer.ggml.pre is not a string"),
        ({"chat_template": "{% for"}, "chat template: template default, line 1"),
    ],
)
def test_what_cannot_be_used_is_named(
    write_bpe: WriteGGUF, keys: dict[str, object], problem: str
) -> None:
    path = write_bpe(**keys)
    with pytest.raises(TextError, match=f"^{re.escape(str(path))}.*{problem}"):
        load_text(path)


def test_lists_of_different_length_are_refused(write_spm: WriteGGUF) -> None:
    with pytest.raises(TextError, match="differ in length"):
        load_text(write_spm(scores=[1.0]))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 and so on, long enough", "is not a GGUF file"),
        (b"GGUF\x01\0\0\0" + bytes(16), "has GGUF version 1; 2 and 3"),
        (
            b"GGUF\x03\0\0\0" + bytes(8) + b"\x01",
            "is cut off or damaged: its header should have 20 bytes",
        ),
        (
            b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7) + b"\xff" * 9,
            "is cut off or damaged: its header",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(TextError, match=f"broken.gguf .*{problem}"):
        GGUFMetadata(path)


def test_a_file_cut_off_anywhere_is_refused_or_has_no_tokenizer(write_bpe: WriteGGUF) -> None:
    path = write_bpe(bos_token_id=1)
    whole = path.read_bytes()
    for end in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:end])
        with pytest.raises(TextError, match=r"model\.gguf"):
            gguf_tokenizer(GGUFMetadata(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"nowhere\.gguf cannot be read: No such"):
        load_text(tmp_path / "nowhere.gguf")
