"""A built-in text in plain English, for measurements of a model's quality."""

from __future__ import annotations

from pathlib import Path

from server.text.tokenizer import Tokenizer

PROSE = Path(__file__).with_name("prose.txt").read_text(encoding="utf-8")
#: Enough for a perplexity, and few enough for each start.
_MAX_TOKENS = 512


def prose_token_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the first tokens of the text, as the model expects those of a prompt."""
    return tuple(tokenizer.encode(PROSE, add_special_tokens=True)[:_MAX_TOKENS])
