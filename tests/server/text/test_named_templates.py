"""The built-in templates, and templates from an operator's file."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from server.text.load import NAMED_TEMPLATES, chosen_template, load_text
from server.text.template import ChatTemplate
from server.tools.declared import call_syntax
from server.tools.syntaxes import HERMES

_CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Bye"},
]
_SHOWN = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n"
    "<start_of_turn>model\nYes?<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
    "<start_of_turn>model\n",
    "llama2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Yes? </s><s>[INST] Bye [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST] Yes?</s>[INST] Bye [/INST]",
    "zephyr": "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nYes?</s>\n"
    "<|user|>\nBye</s>\n<|assistant|>\n",
}
_SHOWN["hermes"] = _SHOWN["chatml"]


def _template(name: str) -> ChatTemplate:
    return ChatTemplate(
        {"default": chosen_template(name)},
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        now=lambda: datetime.now(tz=UTC),
    )


@pytest.mark.parametrize("name", NAMED_TEMPLATES)
def test_each_shows_a_chat_as_its_family_does(name: str) -> None:
    template = _template(name)
    assert template.render(_CHAT) == _SHOWN[name]
    assert template.shows_system
    without = template.render(_CHAT[1:2])
    assert "Be kind." not in without
    assert "Hi" in without


def test_hermes_shows_tools_calls_and_results() -> None:
    template = _template("hermes")
    assert template.shows_tools
    assert call_syntax(template.sources) is HERMES
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    result = {"role": "tool", "tool_call_id": "1", "content": "7"}
    messages: list[dict[str, Any]] = [
        *_CHAT[:2],
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        result,
        result,
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    shown = template.render(messages, tools=tools)
    system, _, rest = shown.partition("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\nBe kind.\n\n# Tools\n\nYou can call")
    assert f"<tools>\n{json.dumps(tools[0])}\n</tools>" in system
    called = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    answered = "<tool_response>\n7\n</tool_response>"
    assert rest == (
        "<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n{called}\n{called}<|im_end|>\n"
        f"<|im_start|>user\n{answered}\n{answered}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_file_is_taken_instead_of_the_models_own(tmp_path: Path) -> None:
    config, file = tmp_path / "config.json", tmp_path / "own.jinja"
    config.write_text(json.dumps({"vocab_size": 300}))
    file.write_text("{{ messages[0].content }}!")
    template = load_text(config, chat_template=chosen_template(str(file))).template
    assert template is not None
    assert template.render(_CHAT[1:]) == "Hi!"


def test_a_name_is_taken_for_a_gguf_file(smollm2_gguf: Path) -> None:
    template = load_text(smollm2_gguf, chat_template=NAMED_TEMPLATES["hermes"]).template
    assert template is not None
    assert template.shows_tools


@pytest.mark.parametrize("chosen", ["chat-ml", "/nowhere/x.jinja"])
def test_an_unknown_name_is_told_with_those_there_are(chosen: str) -> None:
    with pytest.raises(ValueError, match="chatml, gemma, hermes, llama2") as caught:
        chosen_template(chosen)
    assert "\n" not in str(caught.value)
    assert repr(chosen) in str(caught.value)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff")
    for path in (tmp_path, tmp_path / "x"):
        with pytest.raises(ValueError, match="cannot be read"):
            chosen_template(str(path))
