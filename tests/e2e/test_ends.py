"""A daemon ends an answer where the chat template would, whatever config.json says."""

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
    start_tiny: Callable[..., Any], tiny_config: Path
) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
    end = core.token_to_id("<|im_end|>")
    core.save(str(tiny_config.with_name("tokenizer.json")))
    tiny_config.with_name("chat_template.jinja").write_text(_CHATML)
    asked = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 5,
        "logit_bias": {str(end): 100},
    }
    with start_tiny() as daemon:

        def ask(**more: Any) -> httpx.Response:
            url = f"{daemon.url}/v1/chat/completions"
            return httpx.post(url, json=asked | more, timeout=TIMEOUT_S)

        [choice] = ask().json()["choices"]
        assert (choice["finish_reason"], choice["message"]["content"]) == ("stop", "")
        [choice] = ask(ignore_eos=True).json()["choices"]
        assert choice["finish_reason"] == "length"
        assert any("<|im_end|> ends answers: the chat template" in line for line in daemon.log)
