"""A folder of a family that Octavo has no code for, from its tokenizer to the stream."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from waiting import TIMEOUT_S

pytestmark = pytest.mark.e2e

_TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
_NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma-2 in small, over bytes: capped scores, a window of 16, a chat template."""
    import transformers  # noqa: PLC0415 - takes seconds, and only here

    path = tmp_path_factory.mktemp("models") / "tiny-gemma2"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    config = transformers.AutoConfig.for_model(
        "gemma2",
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=16,
        max_position_embeddings=256,
        attn_logit_softcapping=3.0,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"chat_template": _TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def _expected(folder: Path, prompt: str) -> str:
    import transformers  # noqa: PLC0415 - as above

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(prompt).ids
    whole = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=_NUM_TOKENS,
        eos_token_id=None,
    )
    found: str = tokenizer.decode(whole[0, len(ids) :].tolist())
    return found


def test_a_folder_is_served_as_transformers_would(
    start_daemon: Callable[..., Any], folder: Path
) -> None:
    question = "What is the weight of a page that nobody has read?"
    chat = {
        "model": "tiny-gemma2",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": _NUM_TOKENS,
        "ignore_eos": True,
    }
    settings = ("--max-model-len", "128", "--model-impl", "transformers")
    with start_daemon(str(folder), *settings) as daemon:
        first, second = (
            httpx.post(f"{daemon.url}/v1/chat/completions", json=chat, timeout=TIMEOUT_S).json()
            for _ in range(2)
        )
        assert daemon.stop() == 0
    answer = first["choices"][0]["message"]["content"]
    assert answer == _expected(folder, f"<s>user: {question}\n<s>assistant: ")
    assert second["choices"][0]["message"]["content"] == answer
    assert first["usage"]["completion_tokens"] == _NUM_TOKENS
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] > len(question)
    log = "".join(daemon.log)
    assert "computed by transformers" in log
    assert "the model caps its attention scores" in log
    assert "Loading weights" not in log, "no bars in a log"


def test_what_cannot_be_served_ends_the_start_in_a_line(
    start_daemon: Callable[..., Any], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "mamba", "vocab_size": 300}))
    with (
        pytest.raises(AssertionError, match="model_type 'mamba': it keeps a recurrent state"),
        start_daemon(f"dummy:{config}"),
    ):
        pass
