"""Special tokens that a message spells are text; everything else is encoded as ever."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Core
from transformers import PreTrainedTokenizerFast

from server.text.load import ModelText
from server.text.quoting import BREAK, ESCAPE
from server.text.template import ChatTemplate
from server.text.token_bytes import BYTE_LEVEL_ALPHABET
from server.text.tokenizer import SpecialIds, Tokenizer

SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|im_end|>x")
#: Tokens, but not special: a model writes them itself, and gets them back.
ADDED = ("<think>", "</think>", "<tool_call>")

#: Reads contents as templates do: searches, cuts and trims them, and writes JSON.
TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}{{ tool.function | tojson(ensure_ascii=True) }}
{% endfor %}<|im_end|>
{% endif %}
{%- for document in documents or [] %}{{ document.title | upper }}{{ document.text }}{% endfor %}
{%- for m in messages %}
{%- set content = m.content %}
{%- if m.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_' + 'start|>' + m.role + '\\n' + content | trim }}{{ m.name }}{{ m.tool_call_id }}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{%- for name, value in call.function.arguments | items %}{{ name }}={{ value }}{% endfor %}
{%- endfor %}<|im_end|>{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}{{ mood }}"""


KINDS = ("byte-level", "stripping", "sentencepiece", "metaspace", "unigram")
Kinds = dict[str, Tokenizer]
LETTERS = "he lo<|im_s/>é\n{}\"\\'日" + BREAK + ESCAPE + "e\u0301"


def template(eos_token: str) -> ChatTemplate:
    return ChatTemplate(
        {"default": TEMPLATE},
        special_tokens={"eos_token": eos_token},
        now=lambda: datetime.now(tz=UTC),
    )


RENDERER = template("</s>")


def prompt(
    tokenizer: Tokenizer, chat: Mapping[str, Any], renderer: ChatTemplate = RENDERER
) -> list[int]:
    text = renderer.render(chat["messages"], quote=tokenizer.quote, **_rest(chat))
    return tokenizer.encode(text, add_special_tokens=False, is_quoted=True)


def _rest(chat: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in chat.items() if name != "messages"}


def chats(texts: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    arguments = st.dictionaries(texts, st.one_of(texts, st.lists(texts, max_size=2)), max_size=2)
    function = st.fixed_dictionaries({"name": texts, "arguments": arguments.map(json.dumps)})
    calls = st.lists(st.fixed_dictionaries({"id": texts, "function": function}), max_size=2)
    content = st.one_of(texts, st.lists(_part(texts), min_size=1, max_size=2))
    message = st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": content},
        optional={"name": texts, "tool_call_id": texts, "tool_calls": calls},
    )
    described = st.fixed_dictionaries(
        {"name": texts, "description": texts, "parameters": arguments}
    )
    tool = st.fixed_dictionaries({"type": st.just("function"), "function": described})
    document = st.fixed_dictionaries({"title": texts, "text": texts})
    return st.fixed_dictionaries(
        {"messages": st.lists(message, min_size=1, max_size=3)},
        optional={
            "tools": st.lists(tool, min_size=1, max_size=2),
            "mood": texts,
            "documents": st.lists(document, max_size=2),
        },
    )


def _part(texts: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, str]]:
    return st.fixed_dictionaries({"type": st.just("text"), "text": texts})


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_mapped(key, change): _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value]


def _harmless(text: str) -> str:
    """Return the text without characters that could be a token of the template's."""
    return text.translate({ord(char): "-" for char in "<|/>\uff1c"})


PIECES = st.sampled_from([*SPECIAL, *(text[1:] for text in SPECIAL), *(t[:-1] for t in SPECIAL)])
INJECTED = st.lists(st.one_of(PIECES, st.text(LETTERS, max_size=4)), max_size=4).map("".join)


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=60)
@given(chat=chats(INJECTED))
def test_no_message_can_spell_a_special_token(
    kinds: Kinds, name: str, chat: dict[str, Any]
) -> None:
    tokenizer = kinds[name]
    special = tokenizer.special_token_ids
    counts, expected = (
        Counter(token for token in prompt(tokenizer, one) if token in special)
        for one in (chat, _mapped(chat, _harmless))
    )
    assert counts == expected


@pytest.mark.parametrize("name", ["byte-level", "sentencepiece", "metaspace"])
@settings(max_examples=60)
@given(text=st.lists(st.one_of(PIECES, st.text(LETTERS[:-2], max_size=4))).map("".join))
def test_what_a_message_says_comes_back_from_its_tokens(kinds: Kinds, name: str, text: str) -> None:
    tokenizer = kinds[name]
    token_ids = prompt(tokenizer, {"messages": [{"role": "user", "content": text}]})
    decoded = tokenizer.decode(token_ids, skip_special_tokens=False)
    assert f"user\n{text.strip()}<|im_end|>" in decoded


PLAIN = st.lists(
    st.one_of(st.sampled_from(ADDED), st.text("he lo<|im/>é\n{}\"'日" + BREAK, max_size=5)),
    max_size=3,
).map("".join)


@pytest.mark.parametrize("name", [*KINDS, "smollm2"])
@settings(max_examples=40)
@given(chat=chats(PLAIN), prompts=st.booleans())
def test_texts_without_special_tokens_are_encoded_as_in_transformers(
    smollm2: ModelText, kinds: Kinds, name: str, chat: dict[str, Any], prompts: bool
) -> None:
    tokenizer = smollm2.tokenizer if name == "smollm2" else kinds[name]
    eos_token = "<|im_end|>" if name == "smollm2" else "</s>"
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._core,
        chat_template=TEMPLATE,
        eos_token=eos_token,
    )
    chat["messages"] = [message for message in chat["messages"] if "tool_calls" not in message]
    chat["messages"].append({"role": "user", "content": "he"})
    for message in chat["messages"]:
        if isinstance(message["content"], list):
            message["content"] = "\n".join(part["text"] for part in message["content"])
    expected = theirs.apply_chat_template(
        **{"conversation": chat["messages"], **_rest(chat)},
        add_generation_prompt=prompts,
        return_dict=False,
    )
    asked = {**chat, "add_generation_prompt": prompts}
    assert prompt(tokenizer, asked, template(eos_token)) == expected


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=100)
@given(
    text=st.lists(st.one_of(st.text(LETTERS, max_size=6), st.sampled_from(SPECIAL))).map("".join)
)
def test_a_templates_own_tokens_are_found_as_the_library_finds_them(
    kinds: Kinds, name: str, text: str
) -> None:
    """The text is all the template's, and takes the other way only because of a mark behind it."""
    tokenizer = kinds[name]
    text = text.replace(BREAK, "").replace(ESCAPE, "") + "<s>"
    plain = tokenizer.encode(text, add_special_tokens=True)
    assert tokenizer.encode(text + BREAK, add_special_tokens=True, is_quoted=True) == plain


def test_wide_letters_that_are_folded_into_a_special_token_are_text(kinds: Kinds) -> None:
    tokenizer = kinds["unigram"]
    wide = "\uff1c/s\uff1e"
    [end] = tokenizer.encode("</s>", add_special_tokens=False)
    token_ids = prompt(tokenizer, {"messages": [{"role": "user", "content": wide}]})
    assert token_ids.count(end) == 1


def test_a_text_without_them_is_not_even_copied(kinds: Kinds) -> None:
    for text in ("", "plain", "<|im_ end", "</think>", "x" * 100_000):
        assert kinds["byte-level"].quote(text) is text


def test_plain_prompts_recognise_them(kinds: Kinds) -> None:
    tokenizer = kinds["byte-level"]
    assert len(tokenizer.encode("<|im_start|>", add_special_tokens=False)) == 1


def test_what_a_tokenizer_puts_around_a_text_is_put_around_quoted_ones(
    byte_level: Callable[..., Core],
) -> None:
    core = byte_level()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $0 </s>",
        special_tokens=[(text, core.token_to_id(text)) for text in ("<s>", "</s>")],
    )
    tokenizer = Tokenizer(core, SpecialIds())
    for text in ("he", tokenizer.quote("<s>he")):
        first, *inner, last = tokenizer.encode(text, add_special_tokens=True, is_quoted=True)
        assert [first, last] == [core.token_to_id("<s>"), core.token_to_id("</s>")]
        assert not tokenizer.special_token_ids & set(inner)


@pytest.mark.parametrize("count", [2, 6000])
def test_many_special_tokens_are_told_apart(count: int) -> None:
    core = Core(models.BPE(vocab={c: i for i, c in enumerate(BYTE_LEVEL_ALPHABET)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(f"<unused{i}>", normalized=False) for i in range(count)])
    core.add_special_tokens([AddedToken("~", normalized=False), AddedToken("x" * 3000)])
    tokenizer = Tokenizer(core, SpecialIds())
    for text in ("<unused1>", f"<unused{count - 1}>", "~", "x" * 3000):
        quoted = tokenizer.quote(text)
        assert quoted != text
        assert tokenizer.encode(quoted, add_special_tokens=False, is_quoted=True) == list(
            text.encode()
        ), text[:20]
        assert len(tokenizer.encode(text, add_special_tokens=False, is_quoted=True)) == 1
