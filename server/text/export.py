"""A model's tokenizer as the files of a folder that `transformers` reads.

They are made from the loaded tokenizer, so that `AutoTokenizer` encodes, decodes and renders as the
server does. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from server.text.load import ModelText
from server.text.token_bytes import TextError


def tokenizer_config(text: ModelText) -> dict[str, Any]:
    """Return the content of tokenizer_config.json, with the chat template."""
    found: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **text.special_tokens,
    }
    sources = {} if text.template is None else text.template.sources
    if len(sources) > 1:
        found["chat_template"] = [
            {"name": name, "template": source} for name, source in sources.items()
        ]
    elif sources:
        found["chat_template"] = sources["default"]
    return found


def export_tokenizer(text: ModelText, folder: Path) -> list[Path]:
    """Write the files and return their paths. Raises `TextError` if one is there, or `OSError`."""
    contents = {
        "tokenizer.json": text.tokenizer.to_json(),
        "tokenizer_config.json": _json(tokenizer_config(text)),
        "special_tokens_map.json": _json(dict(text.special_tokens)),
    }
    paths = {folder / name: content for name, content in contents.items()}
    for path in paths:
        if path.exists():
            raise TextError(f"{path} is there already; give a folder without one")
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in paths.items():
        path.write_text(content, encoding="utf-8")
    return [*paths]


def _json(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
