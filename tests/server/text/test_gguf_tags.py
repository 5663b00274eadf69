"""Which tokens of a GGUF file are tags, and which of them end an answer.

The rules are those of llama.cpp's `src/llama-vocab.cpp`: ends are known by their text, a tag that
the file calls text is one all the same. The exceptions are tested by name.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from server.text.load import ModelText, load_text
from server.text.token_bytes import BYTE_LEVEL_ALPHABET, TextError

WriteGGUF = Callable[..., Path]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
#: The bytes, and then `<|endoftext|>` 256, `<|im_start|>` 257, `<|im_end|>` 258, `</s>` 259.
TAGS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "</s>"]
END_OF_TEXT, IM_START, IM_END, CLOSING_S = range(256, 260)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDS_KNOWN_BY_TEXT = [
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "<|call|>"),
    *("<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>"),
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
]


def write_tags(write_gguf: WriteGGUF, tags: list[str], types: list[int], **keys: object) -> Path:
    tokens = [*BYTE_LEVEL_ALPHABET, *tags]
    known: dict[str, object] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "merges": ["a b"],
    }
    known["tokens"] = [*tokens, "ab"]
    known["token_type"] = [*[NORMAL] * 256, *types, NORMAL]
    return write_gguf(**(known | keys))


def encoded(text: ModelText, written: str) -> list[int]:
    return text.tokenizer.encode(written, add_special_tokens=False)


def notes(text: ModelText) -> str:
    return "\n".join(text.notes)


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED, UNUSED])
@pytest.mark.parametrize("start_kind", [NORMAL, CONTROL, USER_DEFINED])
def test_what_the_template_writes_behind_an_answer_ends_it(
    write_gguf: WriteGGUF, kind: int, start_kind: int
) -> None:
    types = [CONTROL, start_kind, kind, NORMAL]
    path = write_tags(write_gguf, TAGS, types, eos_token_id=END_OF_TEXT, chat_template=CHATML)
    text = load_text(path)
    assert text.tokenizer.eos_token_ids == (END_OF_TEXT, IM_END)
    letter = BYTE_LEVEL_ALPHABET.index("a")
    assert encoded(text, "<|im_start|>a<|im_end|>") == [IM_START, letter, IM_END]
    assert text.tokenizer.decode([IM_END], skip_special_tokens=True) == ""
    assert text.tokenizer.decode([IM_END], skip_special_tokens=False) == "<|im_end|>"
    assert ("token_type is corrected" in notes(text)) is (kind != CONTROL or start_kind == NORMAL)
    assert "no key says so: <|im_end|>" in notes(text)


def test_any_tag_behind_an_answer_ends_it(write_gguf: WriteGGUF) -> None:
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} <over>{% endfor %}"
    path = write_tags(write_gguf, ["<eos>", "<over>"], [CONTROL, NORMAL], chat_template=template)
    text = load_text(path)
    assert set(text.tokenizer.eos_token_ids) == {256, 257}
    assert encoded(text, "<over>") == [257]


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages[0].content }}",
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ m.content }} and then <over>{% endfor %}",
        "{% for m in messages %}<over>{{ m.role }}{% endfor %}",
    ],
)
def test_templates_that_tell_no_end_add_none(write_gguf: WriteGGUF, template: str | None) -> None:
    keys: dict[str, object] = {} if template is None else {"chat_template": template}
    path = write_tags(write_gguf, ["<a>", "<over>"], [CONTROL, NORMAL], eos_token_id=256, **keys)
    text = load_text(path)
    assert text.tokenizer.eos_token_ids == (256,)
    assert len(encoded(text, "<over>")) == len("<over>")


@pytest.mark.parametrize("kind", [NORMAL, CONTROL, USER_DEFINED])
@pytest.mark.parametrize("tag", ENDS_KNOWN_BY_TEXT)
def test_ends_are_known_by_their_text(write_gguf: WriteGGUF, tag: str, kind: int) -> None:
    text = load_text(write_tags(write_gguf, ["<s>", tag], [CONTROL, kind], bos_token_id=256))
    assert text.tokenizer.eos_token_ids == (257,)
    assert encoded(text, f"{tag}{tag}") == [257, 257]
    assert text.tokenizer.decode([257], skip_special_tokens=True) == ""


@pytest.mark.parametrize("tag", ["</s>", "<eos>", "<EOT>", "[EOT]", "[EOS]"])
def test_what_may_be_text_is_an_end_only_as_a_control_token(
    write_gguf: WriteGGUF, tag: str
) -> None:
    assert load_text(write_tags(write_gguf, [tag], [CONTROL])).tokenizer.eos_token_ids == (256,)
    for kind in (NORMAL, USER_DEFINED):
        text = load_text(write_tags(write_gguf, [tag], [kind]))
        assert text.tokenizer.eos_token_ids == ()
        assert text.tokenizer.decode([256], skip_special_tokens=True) == tag


@pytest.mark.parametrize("eot", [{}, {"eot_token_id": 258}])
def test_harmony_has_several_messages_in_an_answer(
    write_gguf: WriteGGUF, eot: dict[str, int]
) -> None:
    tags = ["<|return|>", "<|call|>", "<|end|>"]
    text = load_text(write_tags(write_gguf, tags, [CONTROL] * 3, eos_token_id=256, **eot))
    assert text.tokenizer.eos_token_ids == (256, 257)


def test_named_ends_come_first_and_once(write_gguf: WriteGGUF) -> None:
    keys = {"eos_token_id": 258, "eot_token_id": 256, "eom_token_id": 258}
    text = load_text(write_tags(write_gguf, TAGS, [CONTROL] * 4, **keys))
    assert text.tokenizer.eos_token_ids == (258, 256, 259)


@pytest.mark.parametrize("name", ["bos", "eos", "eot", "eom", "unknown", "padding"])
@pytest.mark.parametrize("wrong", [-1, 261, 2**31 - 1])
def test_ids_outside_the_vocabulary_are_left_out(
    write_gguf: WriteGGUF, name: str, wrong: int
) -> None:
    keys: dict[str, object] = {"add_bos_token": True, "add_eos_token": True}
    keys |= {f"{name}_token_id": wrong}
    keys |= {"chat_template": "{{ bos_token }}{{ eos_token }}{{ messages[0].content }}"}
    text = load_text(write_tags(write_gguf, TAGS, [CONTROL] * 4, **keys))
    assert wrong not in text.tokenizer.eos_token_ids
    assert text.tokenizer.bos_token_id is None
    assert text.tokenizer.encode("ab", add_special_tokens=True) == [260]
    assert f"{name}_token_id {wrong} is no token's; it is left out" in notes(text)
    assert "should get a bos token, but the file names none" in notes(text)


def test_a_bos_that_is_text_stays_text(write_gguf: WriteGGUF) -> None:
    comma = BYTE_LEVEL_ALPHABET.index(",")
    path = write_tags(write_gguf, TAGS, [CONTROL] * 4, bos_token_id=comma, eos_token_id=258)
    text = load_text(path)
    assert text.tokenizer.decode(encoded(text, "a,b"), skip_special_tokens=True) == "a,b"


def test_types_are_what_llama_cpp_makes_of_them(write_gguf: WriteGGUF) -> None:
    tags = [f"<t{kind}>" for kind in range(1, 7)]
    text = load_text(write_tags(write_gguf, tags, [1, 2, 3, 4, 5, 6]))
    whole = {kind for kind in range(1, 7) if encoded(text, f"<t{kind}>") == [255 + kind]}
    assert whole == {UNKNOWN, CONTROL, USER_DEFINED}
    shown = text.tokenizer.decode(list(range(256, 262)), skip_special_tokens=True)
    assert shown == "<t1><t4><t5><t6>"


def test_a_file_without_types_has_the_tags_that_it_names(write_gguf: WriteGGUF) -> None:
    tokens = [*BYTE_LEVEL_ALPHABET, "<s>", "<|im_start|>", "<|im_end|>", "<tool>"]
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": []}
    text = load_text(write_gguf(**keys, bos_token_id=256, chat_template=CHATML))
    assert encoded(text, "<s><|im_start|><|im_end|>") == [256, 257, 258]
    assert len(encoded(text, "<tool>")) == len("<tool>")
    assert "has no token_type" in notes(text)


def test_a_file_that_names_no_words_is_a_guess(write_gguf: WriteGGUF) -> None:
    tokens = [*BYTE_LEVEL_ALPHABET, "12", "123"]
    keys = {"model": "gpt2", "tokens": tokens, "token_type": [NORMAL] * 258}
    text = load_text(write_gguf(**keys, merges=["1 2", "12 3"]))
    assert encoded(text, "1234") == [257, BYTE_LEVEL_ALPHABET.index("4")]
    assert "no tokenizer.ggml.pre: how words are cut is a guess" in notes(text)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2", "tekken"])
def test_tokens_are_those_of_transformers(write_gguf: WriteGGUF, pre: str) -> None:
    tokens = [*BYTE_LEVEL_ALPHABET, "12", "123", "he", "\u0120he", "<s>", "<|im_end|>", "<tool>"]
    types = [NORMAL] * (len(tokens) - 3) + [CONTROL, CONTROL, USER_DEFINED]
    keys: dict[str, object] = {"tokens": tokens, "token_type": types, "add_bos_token": True}
    keys |= {"merges": ["1 2", "12 3", "h e", "\u0120 he"], "bos_token_id": 260}
    path = write_gguf(model="gpt2", pre=pre, eos_token_id=261, **keys)
    ours = load_text(path).tokenizer
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # Qwen's own tokenizer composes characters; from a GGUF file, transformers does not.
    composed = [] if pre == "qwen2" else ["e\u0301"]
    texts = ["hello  1234 he<|im_end|>he <tool>x", "a\n\n b 12345 It's HE'S  ", "🦊 ß\x00\u00a0 ½"]
    for one in (*texts, *composed):
        for adds in (False, True):
            token_ids = ours.encode(one, add_special_tokens=adds)
            assert token_ids == theirs.encode(one, add_special_tokens=adds), one
            assert ours.decode(token_ids, skip_special_tokens=True) == theirs.decode(
                token_ids, skip_special_tokens=True
            )
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_token_id, (theirs.eos_token_id,))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"token_type": [NORMAL] * 260}, "tokens and token_type differ in length"),
        ({"token_type": [NORMAL] * 262}, "tokens and token_type differ in length"),
        ({"token_type": ["1"] * 261}, "token_type is not an array of numbers"),
        ({"tokens": ["a", "b", "a"]}, "tokens: 'a' is there 2 times"),
        ({"tokens": [1, 2]}, "tokens is not an array of strings"),
        ({"eot_token_id": "258"}, "eot_token_id is not a whole number"),
        ({"add_eos_token": "yes"}, "add_eos_token is not a truth value"),
        ({"merges": ["ab"]}, "merges: "),
        ({"merges": [""]}, "merges: "),
        ({"chat_template": 5}, "chat_template is not a string"),
    ],
)
def test_a_hostile_file_is_one_line(
    write_gguf: WriteGGUF, keys: dict[str, object], problem: str
) -> None:
    with pytest.raises(TextError, match=problem) as caught:
        load_text(write_tags(write_gguf, TAGS, [CONTROL] * 4, **keys))
    assert "\n" not in str(caught.value)
    assert "model.gguf" in str(caught.value)


@settings(max_examples=60)
@given(
    types=st.lists(st.integers(0, 7), min_size=4, max_size=4),
    ids=st.dictionaries(
        st.sampled_from(["bos", "eos", "eot", "eom", "unknown", "padding"]),
        st.integers(-1, 262),
    ),
    adds=st.dictionaries(st.sampled_from(["add_bos_token", "add_eos_token"]), st.booleans()),
    has_template=st.booleans(),
)
def test_every_end_is_one_token_and_is_not_shown(
    write_gguf: WriteGGUF,
    types: list[int],
    ids: dict[str, int],
    adds: dict[str, bool],
    has_template: bool,
) -> None:
    keys: dict[str, object] = {**{f"{name}_token_id": i for name, i in ids.items()}, **adds}
    if has_template:
        keys["chat_template"] = CHATML
    text = load_text(write_tags(write_gguf, TAGS, types, **keys))
    ends = text.tokenizer.eos_token_ids
    assert {END_OF_TEXT, IM_END} <= set(ends)
    assert (CLOSING_S in ends) is (
        types[3] == CONTROL or CLOSING_S in {ids.get(name) for name in ("eos", "eot", "eom")}
    )
    assert all(0 <= end <= 260 for end in ends)
    for end in ends:
        assert text.tokenizer.decode([end], skip_special_tokens=True) == ""
        if end in range(256, 260):
            assert encoded(text, f"a{TAGS[end - 256]}a")[1] == end
    bos, eos = ids.get("bos", -1), ids.get("eos", -1)
    before = [bos] if adds.get("add_bos_token") and 0 <= bos <= 260 else []
    after = [eos] if adds.get("add_eos_token") and 0 <= eos <= 260 else []
    assert text.tokenizer.encode("ab", add_special_tokens=True) == [*before, 260, *after]
