"""A daemon ends an answer where the chat template would, whatever config.json says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

pytestmark = pytest.mark.e2e

_MODEL = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}
_CHATML = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_turn_ends_where_the_template_ends_it(
    start_daemon: Callable[..., Any], tmp_path: Path
) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    end = core.token_to_id("<|im_end|>")
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(_CHATML)
    (tmp_path / "model.json").write_text(json.dumps(_MODEL))
    asked = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "logit_bias": {str(end): 100},
    }
    with start_daemon(f"dummy:{tmp_path / 'model.json'}", "--kv-cache-memory", "64MiB") as daemon:
        url = f"{daemon.url}/v1/chat/completions"
        [choice] = httpx.post(url, json=asked, timeout=60).json()["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")
        [choice] = httpx.post(url, json=asked | {"ignore_eos": True}, timeout=60).json()["choices"]
        assert choice["finish_reason"] == "length"
        assert any("<|im_end|> ends answers: the chat template" in line for line in daemon.log)
