from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from server.text.gguf_tokenizer import GGUFMetadata
from server.text.load import ModelText
from server.text.template import ChatTemplate, TemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

HEADERS = """\
{% set loop_messages = messages %}
{% for message in loop_messages %}
    {% set content = '<|head|>' + message['role'] + '<|/head|>\\n\\n' + message['content'] | trim %}
    {% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{ content + '<|eot|>' }}
{% endfor %}
{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{{ '<|head|>assistant<|/head|>\\n\\n' if add_generation_prompt }}"""

ALTERNATING = """\
{% if messages[0]['role'] == 'system' %}
{% set system = messages[0]['content'] %}
{% set messages = messages[1:] %}
{% endif %}
{{ bos_token }}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + (system + '\\n\\n' if loop.first and system is defined else '') }}
{{- message['content'] + ' [/INST]' }}
{%- else %}
{{- ' ' + message['content'] + eos_token }}
{%- endif %}
{%- endfor %}"""

LOOPING = """\
{%- set ns = namespace(seen=0) -%}
{%- for message in messages -%}
{%- if message.role == 'skip' %}{% continue %}{% endif -%}
{%- if message.role == 'stop' %}{% break %}{% endif -%}
{%- set ns.seen = ns.seen + 1 -%}
{%- generation %}{{ message.content }}{% endgeneration -%}
{%- endfor -%}
{{ ns.seen }} {{ messages | map(attribute='role') | join(',') | tojson }}"""

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Was ist <b>\"drüben\"</b> & 'hier'?\n"},
    {"role": "assistant", "content": "🦊"},
    {"role": "user", "content": "{{ messages }}"},
]


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(
        {"default": source}, special_tokens=TOKENS, now=lambda: datetime(2031, 2, 3, tzinfo=UTC)
    )


def reference(smollm2: ModelText, source: str, messages: Any, **kwargs: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=smollm2.tokenizer._core, chat_template=source, **TOKENS
    )
    rendered: str = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    return rendered


@pytest.mark.parametrize("prompts", [True, False], ids=["prompt", "no_prompt"])
@pytest.mark.parametrize("source", [CHATML, HEADERS, ALTERNATING, LOOPING])
def test_templates_render_as_in_transformers(
    smollm2: ModelText, source: str, prompts: bool
) -> None:
    expected = reference(smollm2, source, CONVERSATION, add_generation_prompt=prompts)
    rendered = template_of(source).render(CONVERSATION, add_generation_prompt=prompts)
    assert rendered == expected


def test_tools_are_written_as_json_without_escapes(smollm2: ModelText) -> None:
    tools = [{"type": "function", "function": {"name": "<größe>", "parameters": {}}}]
    expected = reference(smollm2, HEADERS, CONVERSATION, tools=tools)
    assert "<größe>" in expected
    rendered = template_of(HEADERS).render(CONVERSATION, tools=tools, add_generation_prompt=False)
    assert rendered == expected


@pytest.mark.parametrize("source", [CHATML, HEADERS, ALTERNATING])
@pytest.mark.parametrize("content", ["1, 2,", " <|im_end|>\n ", "a", ""])
def test_a_message_that_goes_on_ends_the_prompt_as_in_transformers(
    smollm2: ModelText, source: str, content: str
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    expected = reference(smollm2, source, messages, continue_final_message=True)
    assert template_of(source).render(messages, continues_final=True) == expected


def test_a_message_the_template_does_not_show_cannot_go_on() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(TemplateError) as caught:
        template_of("{{ messages[0].content }}").render(messages, continues_final=True)
    assert caught.value.message_index == 1


def test_the_last_part_of_a_message_goes_on() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b "}]
    messages = [{"role": "assistant", "content": parts}]
    assert template_of(CHATML).render(messages, continues_final=True) == (
        "<|im_start|>assistant\na\nb "
    )


def test_smollm2_prompts_are_those_of_transformers(smollm2: ModelText, smollm2_gguf: Path) -> None:
    source = GGUFMetadata(smollm2_gguf).text("tokenizer.chat_template")
    assert source is not None
    assert smollm2.template is not None
    for messages in (CONVERSATION, CONVERSATION[1:2]):
        expected = reference(smollm2, source, messages, add_generation_prompt=True)
        assert smollm2.template.render(messages) == expected


# ---- content is data -----------------------------------------------------------------------------


@given(text=st.text(alphabet="{}%#-'\"| abc\n", max_size=30))
def test_content_is_never_run_as_a_template(text: str) -> None:
    rendered = template_of("[{{ messages[0].content }}]").render([{"role": "u", "content": text}])
    assert rendered == f"[{text}]"


@pytest.mark.parametrize(
    "text",
    ["{{ 7 * 7 }}", "{% raw %}", "{% endfor %}", "{{ raise_exception('x') }}", "<b>&amp;", "{#"],
)
def test_what_looks_like_a_template_comes_out_as_it_was(smollm2: ModelText, text: str) -> None:
    assert smollm2.template is not None
    messages = [{"role": "user", "content": text}]
    assert f"<|im_start|>user\n{text}<|im_end|>" in smollm2.template.render(messages)


def test_a_template_cannot_change_or_reach_beyond_what_it_is_given() -> None:
    for attempt in (
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'a': 1}) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0]._reading.index }}",
    ):
        with pytest.raises(TemplateError, match=r"SecurityError|UndefinedError"):
            template_of(attempt).render(CONVERSATION)


def test_a_callers_variables_are_seen_but_cannot_take_the_place_of_the_messages() -> None:
    template = template_of("{{ thinks }} {{ documents }} {{ bos_token }} {{ messages | length }}")
    variables: dict[str, Any] = {"thinks": False, "messages": [], "self": 1}
    assert template.render(CONVERSATION, **variables) == "False None <s> 4"


# ---- content in parts ----------------------------------------------------------------------------


def parts(*texts: str) -> list[Mapping[str, object]]:
    return [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]


def test_parts_are_joined_by_newlines_for_templates_that_want_strings() -> None:
    template = template_of("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert template.render(parts("one", "two")) == "<one\ntwo>"
    assert template.render(parts()) == "<>"


def test_templates_that_read_parts_get_parts() -> None:
    source = "{% for part in messages[0].content %}<{{ part.type }} {{ part.text }}>{% endfor %}"
    template = template_of(source)
    assert template.render(parts("one", "two")) == "<text one><text two>"
    assert template.render([{"role": "user", "content": "one"}]) == "<text one>"


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "'image_url'"),
        ({"type": "text"}, "'text'"),
        ({"text": "x"}, "'dict'"),
        ("x", "'str'"),
    ],
)
def test_a_part_that_is_no_text_is_named_with_its_message(part: object, named: str) -> None:
    messages: list[Mapping[str, object]] = [CONVERSATION[0], {"role": "user", "content": [part]}]
    with pytest.raises(TemplateError, match=f"content part {named} is not supported") as caught:
        template_of(CHATML).render(messages)
    assert caught.value.message_index == 1


def test_arguments_of_calls_reach_templates_as_objects() -> None:
    function = {"name": "f", "arguments": '{"größe": 1}'}
    broken = {"name": "g", "arguments": "{"}
    calls = [{"type": "function", "function": f} for f in (function, broken)]
    source = "{% for c in messages[0].tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}"
    messages = [{"role": "assistant", "content": None, "tool_calls": calls}]
    assert template_of(source).render(messages) == '{"größe": 1}' + json.dumps("{")
    assert function["arguments"] == '{"größe": 1}'


# ---- refusals ------------------------------------------------------------------------------------


def test_a_refusal_has_the_templates_own_words_and_the_message_at_fault() -> None:
    messages = [CONVERSATION[0], CONVERSATION[1], CONVERSATION[1], CONVERSATION[2]]
    with pytest.raises(TemplateError, match=r"^Conversation roles must alternate user/") as caught:
        template_of(ALTERNATING).render(messages)
    assert caught.value.message_index == 2


def test_messages_a_template_trips_over_are_refused_too(smollm2: ModelText) -> None:
    assert smollm2.template is not None
    silent = {"role": "assistant", "content": None}
    messages: list[Mapping[str, object]] = [CONVERSATION[1], silent, CONVERSATION[3]]
    with pytest.raises(TemplateError, match="the chat template failed: TypeError") as caught:
        smollm2.template.render(messages)
    assert caught.value.message_index == 1
    with pytest.raises(TemplateError, match="the chat template failed: UndefinedError") as caught:
        smollm2.template.render([{"role": "user"}])
    assert caught.value.message_index == 0


def test_a_template_that_uses_no_message_has_no_message_at_fault() -> None:
    with pytest.raises(TemplateError, match=r"^closed$") as caught:
        template_of("{{ raise_exception('closed') }}").render(CONVERSATION)
    assert caught.value.message_index is None


def test_a_template_that_is_no_jinja_is_told_with_its_line() -> None:
    with pytest.raises(TemplateError, match=r"template default, line 2: .*unknown tag 'fro'"):
        template_of("\n{% fro x in y %}")


def test_arguments_of_calls_come_in_the_kind_the_template_wants() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    said = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    each = "{% for c in m.tool_calls or [] %}{{ ARGUMENTS }}{% endfor %}"
    loop = "{% for m in messages %}" + each + "{% endfor %}"
    for reading, expected in (
        ("'args: ' + c.function.arguments", 'args: {"a": 1}'),
        ("c.function.arguments | tojson", '{"a": 1}'),
        ("c.function.arguments.a", "1"),
    ):
        source = loop.replace("ARGUMENTS", reading)
        assert template_of(source).render(said) == expected
