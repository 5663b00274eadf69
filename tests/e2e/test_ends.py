"""A daemon ends an answer where the chat template would, despite config.json."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from waiting import TIMEOUT_S

pytestmark = pytest.mark.e2e

_CHATML = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"


def test_a_turn_ends_where_the_template_ends_it(
    start_daemon: Callable[..., Any], tiny_config: Path, tmp_path: Path
) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    end = core.token_to_id("<|im_end|>")
    config = tmp_path / "config.json"
    config.write_bytes(tiny_config.read_bytes())
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(_CHATML)
    asked = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "logit_bias": {str(end): 100},
    }
    with start_daemon(f"dummy:{config}", "--kv-cache-memory", "64MiB") as daemon:

        def ask(**more: Any) -> httpx.Response:
            url = f"{daemon.url}/v1/chat/completions"
            return httpx.post(url, json=asked | more, timeout=TIMEOUT_S)

        [choice] = ask().json()["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")
        [choice] = ask(ignore_eos=True).json()["choices"]
        assert choice["finish_reason"] == "length"
        assert any("<|im_end|> ends answers: the chat template" in line for line in daemon.log)
