"""Vocabularies the text tests share: the real one, and tiny ones of each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core

from model.weights.source import octavo_home, resolve
from server.text.load import ModelText, load_text
from server.text.token_bytes import BYTE_LEVEL_ALPHABET
from server.text.tokenizer import SpecialIds, Tokenizer

WriteGGUF = Callable[..., Path]


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    return resolve("smollm2", home=octavo_home(), progress=False).path


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf: Path) -> ModelText:
    return load_text(smollm2_gguf)


def _sentencepiece_core() -> Core:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", *"helowrdé", "he", "ll", "hell", "hello", "▁hello", "▁▁", "▁w", "or", "▁wor"]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *words]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "hello"), ("▁", "▁")]
    merges += [("▁", "w"), ("o", "r"), ("▁w", "or")]
    core = Core(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",  # noqa: S106 - no password
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    special = [AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")]
    core.add_special_tokens(special)
    return core


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    """As in Llama 2: a space in front of the text, lost again when decoding."""
    core = _sentencepiece_core()
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(core, SpecialIds(bos_token_id=1, eos_token_ids=(2,), adds_bos=True))


@pytest.fixture(scope="session")
def metaspace() -> Tokenizer:
    core = _sentencepiece_core()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return Tokenizer(core, SpecialIds())


@pytest.fixture(params=["smollm2", "sentencepiece", "metaspace"], scope="session")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = request.getfixturevalue(request.param)
    return found.tokenizer if isinstance(found, ModelText) else found


@pytest.fixture
def byte_level_core() -> Core:
    """Bytes, and `he` and `<|end|>` (257), which is special."""
    tokens = [*BYTE_LEVEL_ALPHABET, "he"]
    vocab = {token: i for i, token in enumerate(tokens)}
    core = Core(models.BPE(vocab=vocab, merges=[("h", "e")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return core


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGGUF:
    """Write a GGUF file of `tokenizer.ggml.*` keys alone (a dot in a name stands for itself)."""

    def write(**keys: object) -> Path:
        path = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for name, value in keys.items():
            key = f"tokenizer.{name}" if name.startswith("chat_") else f"tokenizer.ggml.{name}"
            key = key.replace("chat_template_", "chat_template.")
            match value:
                case bool():
                    writer.add_bool(key, value)
                case int():
                    (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
                case str():
                    writer.add_string(key, value)
                case _:
                    writer.add_array(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return write


# ---- one of each kind, with special tokens and others that are added -----------------------------

SPECIAL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|im_end|>x")
#: Tokens, but not special: a model writes them itself, and gets them back.
ADDED = ("<think>", "</think>", "<tool_call>")


def _core(model: models.Model, **flags: bool) -> Core:
    core = Core(model)
    core.add_special_tokens([AddedToken(text, normalized=False, **flags) for text in SPECIAL])
    core.add_tokens([AddedToken(text, normalized=False) for text in ADDED])
    return core


def _byte_level(**flags: bool) -> Core:
    tokens = [*BYTE_LEVEL_ALPHABET, "he", "ll", "im", "_end", "_e", "nd", "|>", "<|", "Ġhe", "s>"]
    tokens += ["<|im_end|>"]
    merges = [("h", "e"), ("l", "l"), ("i", "m"), ("n", "d"), ("_", "e"), ("_e", "nd")]
    merges += [("<", "|"), ("|", ">"), ("Ġ", "he"), ("s", ">")]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(["_end", "nd", *tokens]))}
    core = _core(models.BPE(vocab=vocab, merges=merges), **flags)
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _sentencepiece(*, prepends: bool) -> Core:
    words = ["▁", "▁▁", "he", "ll", "▁he", "s>", "</", "im", "<s>", "</s>", "<unk>"]
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + [*"helo<>/s|im_"] + words
    merges = [("▁", "▁"), ("h", "e"), ("l", "l"), ("▁", "he"), ("s", ">"), ("<", "/"), ("i", "m")]
    merges += [("<", "s>"), ("</", "s>")]  # as a converter would write them that knows no better
    model = models.BPE(
        vocab={token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        byte_fallback=True,
        fuse_unk=True,
        unk_token="<unk>",  # noqa: S106 - no password
    )
    core = _core(model)
    if prepends:
        replace = normalizers.Replace(" ", "▁")
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    strip = [decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return core


def _unigram() -> Core:
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("▁he", -2.0), ("ll", -2.5)]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces += [(char, -4.0) for char in "abcdefghijklmnopqrstuvwxyz<>/|_"]
    core = _core(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return core


@pytest.fixture(scope="session")
def byte_level() -> Callable[..., Core]:
    """Make a byte-level vocabulary; `flags` are those of its special tokens."""
    return _byte_level


@pytest.fixture(scope="session")
def kinds() -> dict[str, Tokenizer]:
    cores = {
        "byte-level": _byte_level(),
        "stripping": _byte_level(lstrip=True, rstrip=True),
        "sentencepiece": _sentencepiece(prepends=True),
        "metaspace": _sentencepiece(prepends=False),
        "unigram": _unigram(),
    }
    return {
        name: Tokenizer(core, SpecialIds(bos_token_id=core.token_to_id("<s>")))
        for name, core in cores.items()
    }
