"""A vocabulary for models of random weights: the ids 0 to 255 are the bytes.

So a benchmark can send any text, and the tokens of an answer can be told apart.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from model.formats.json_file import shown
from server.text.folder import eos_token_ids, read_json
from server.text.token_bytes import BYTE_LEVEL_ALPHABET, TextError
from server.text.tokenizer import SpecialIds, Tokenizer

DUMMY_TEMPLATE = """\
{% for message in messages %}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

_NUM_BYTES = 256
#: Ten times as many as models have. Each is created.
_MAX_TOKENS = 2**22


def dummy_tokenizer(config_path: Path) -> Tokenizer:
    """Return the tokenizer for `dummy:CONFIG.json`: an id above 255 is a space and its number.

    Raises `TextError` that names the key if the config's `vocab_size` cannot hold the bytes.
    """
    config = read_json(config_path)
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or not _NUM_BYTES <= vocab_size <= _MAX_TOKENS:
        raise TextError(
            f"{config_path}: vocab_size must be at least {_NUM_BYTES} for text, and at most "
            f"{_MAX_TOKENS}, got {shown(vocab_size)}"
        )
    ends = eos_token_ids(config, config_path)
    tokens = [*BYTE_LEVEL_ALPHABET, *(f"Ġ{i}" for i in range(_NUM_BYTES, vocab_size))]
    special = {end: f"<|end{end}|>" for end in ends if _NUM_BYTES <= end < vocab_size}
    for end, text in special.items():
        tokens[end] = text
    core = Core(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, normalized=False) for text in special.values()])
    return Tokenizer(core, SpecialIds(eos_token_ids=tuple(ends)))
