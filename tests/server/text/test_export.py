"""An exported folder is read by `AutoTokenizer` to the tokens, texts and prompts of the server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from server.text.export import export_tokenizer, tokenizer_config
from server.text.load import ModelText, load_text
from server.text.token_bytes import BYTE_LEVEL_ALPHABET, TextError

TEXTS = (
    "",
    " ",
    "hello world",
    "  hello   world  \n\n\tworld\r\n ",
    "0 7 42 1234567890 3.14159 1/2 12,345.67",
    "year2024 x1y22z333 ½ ²",
    "<|im_start|>user\nhi<|im_end|>\n",
    "héllo e\u0301 \u00a0 \u3000 ﬁ 🦊🦊 日本語",
    "def f(x): return x+1  # don't I'll we've",
)
CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42"},
    {"role": "user", "content": "And 1234567 ?"},
]


def _check(text: ModelText, folder: Path) -> Any:
    export_tokenizer(text, folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for one in TEXTS:
        for adds in (False, True):
            ours = text.tokenizer.encode(one, add_special_tokens=adds)
            assert theirs.encode(one, add_special_tokens=adds) == ours, (one, adds)
            for skips in (False, True):
                decoded = text.tokenizer.decode(ours, skip_special_tokens=skips)
                assert theirs.decode(ours, skip_special_tokens=skips) == decoded, one
    for prompt in (True, False):
        if text.template is not None:
            rendered = theirs.apply_chat_template(
                CHAT, tokenize=False, add_generation_prompt=prompt
            )
            assert rendered == text.template.render(CHAT, add_generation_prompt=prompt)
    for name, token in text.special_tokens.items():
        assert getattr(theirs, name) == token
    return theirs


def test_the_default_models_gguf_file(smollm2: ModelText, tmp_path: Path) -> None:
    theirs = _check(smollm2, tmp_path / "made" / "for it")
    assert theirs.eos_token_id in smollm2.tokenizer.eos_token_ids


def test_a_gguf_file_that_puts_tokens_around_a_prompt(
    write_gguf: Callable[..., Path], tmp_path: Path
) -> None:
    tokens = [*BYTE_LEVEL_ALPHABET, "<s>", "</s>", "he"]
    path = write_gguf(
        model="gpt2",
        pre="gpt-2",
        tokens=tokens,
        token_type=[1] * 256 + [3, 3, 1],
        merges=["h e"],
        bos_token_id=256,
        eos_token_id=257,
        add_bos_token=True,
        add_eos_token=True,
        chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    text = load_text(path)
    assert text.tokenizer.encode("he", add_special_tokens=True) == [256, 258, 257]
    _check(text, tmp_path / "out")


def test_an_exported_folder_is_loaded_and_exported_to_the_same(
    smollm2: ModelText, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    export_tokenizer(smollm2, first)
    again = load_text(first)
    _check(again, second)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((second / name).read_text()) == json.loads((first / name).read_text())


def test_several_templates_are_named(smollm2: ModelText, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    export_tokenizer(smollm2, folder)
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("with tools")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    text = load_text(folder)
    named = {one["name"]: one["template"] for one in tokenizer_config(text)["chat_template"]}
    assert named == {"default": "{{ messages[0].content }}", "tool_use": "with tools"}
    _check(text, tmp_path / "out")


def test_nothing_is_overwritten(smollm2: ModelText, tmp_path: Path) -> None:
    export_tokenizer(smollm2, tmp_path)
    with pytest.raises(TextError, match="is there already"):
        export_tokenizer(smollm2, tmp_path)
