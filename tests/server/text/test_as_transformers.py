"""Generated tokenizer folders: tokens, text and special tokens are those of `AutoTokenizer`.

Ours differs by design, as tests below prove. Tokens that end texts, and special tokens that are
matched after normalising, are left out when special tokens are skipped. Text is not cleaned up
after decoding. Byte tokens are text however they are joined (see `Tokenizer`): a row that is not
UTF-8 keeps its valid parts. A space at the start of a text is dropped. tokenizer.json is not built
anew by the rules of a class.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Core
from transformers import AutoTokenizer

from server.text.folder import ModelFolder
from server.text.load import ModelText, load_text
from server.text.token_bytes import BYTE_LEVEL_ALPHABET

SPECIAL = ("<s>", "</s>", "<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<image>")
#: Added as text, not as special tokens; `he` and `wor` are in the vocabularies already.
PLAIN = ("<tool>", "he", "wor", "Ab", "ß", "🦊🦊", "\u200b", "12")
WORDS = ("he", "ll", "or", "12")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")

TEXTS = (
    "",
    " ",
    "hello world",
    "  hello   world  ",
    "hello\n\n\tworld\r\n ",
    "<s>hello</s>",
    "<s> he <|im_end|> he<|im_end|>",
    " <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<image><tool> he<tool>she",
    "1234 12 1 ½ ²",
    "a\x00b\x07c\x7f",
    "héllo e\u0301 \u00a0 \u3000 ﬁ",
    "🦊🦊🦊 日本語 ß ẞ",
    "ab Ab AB wor Wor sword",
    "<S> <unk> <pad> < s > <|im_end|",
)


def byte_level(*, adds_space: bool) -> Core:
    tokens = [*BYTE_LEVEL_ALPHABET, *WORDS, "wor"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("h", "e"), ("l", "l"), ("o", "r"), ("1", "2"), ("w", "or")]
    core = Core(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    core.decoder = decoders.ByteLevel()
    return core


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
LETTERS = ["▁", *"helowrdabAs123.<>|_/im", *WORDS, "▁he", "▁▁", "▁w", "wor", "▁wor"]


def with_bytes() -> Core:
    vocab = {token: i for i, token in enumerate([*PIECES, *LETTERS])}
    merges = [("h", "e"), ("l", "l"), ("o", "r"), ("1", "2"), ("▁", "he"), ("▁", "▁"), ("▁", "w")]
    merges += [("w", "or"), ("▁w", "or")]
    unknown = "<unk>"
    return Core(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )


def sentencepiece(*, adds_space: bool) -> Core:
    core = with_bytes()
    prepend = [normalizers.Prepend("▁")] if adds_space else []
    core.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    core.decoder = decoders.Sequence(steps)
    return core


def metaspace(*, adds_space: bool) -> Core:
    core = with_bytes()
    scheme = "first" if adds_space else "never"
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    strip = [decoders.Strip(" ", 1, 0)] if adds_space else []
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    core.decoder = decoders.Sequence(steps)
    return core


def unigram(*, adds_space: bool) -> Core:
    scores = [(token, -float(i % 17) - 1) for i, token in enumerate([*PIECES, *LETTERS])]
    core = Core(models.Unigram(scores, unk_id=0, byte_fallback=True))
    scheme = "always" if adds_space else "never"
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    metaspace = decoders.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    return core


FAMILIES: Sequence[Callable[..., Core]] = (byte_level, sentencepiece, metaspace, unigram)


@st.composite
def flags_of(draw: st.DrawFn, content: str) -> dict[str, Any]:
    flags = {name: draw(st.booleans()) for name in FLAGS}
    return {"content": content, **flags, "special": draw(st.booleans())}


@st.composite
def cores(draw: st.DrawFn) -> Core:
    core: Core = draw(st.sampled_from(FAMILIES))(adds_space=draw(st.booleans()))
    for text in draw(st.lists(st.sampled_from([*SPECIAL, *PLAIN]), unique=True, max_size=8)):
        core.add_tokens([AddedToken(**draw(flags_of(text)))])
    special = [text for text in ("<s>", "</s>") if core.token_to_id(text) is not None]
    around = draw(st.sampled_from(["$0", "<s> $0", "$0 </s>", "<s> $0 </s>", None]))
    if around is not None and all(text in special for text in around.split() if text != "$0"):
        ids = [(text, core.token_to_id(text)) for text in special]
        core.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    elif draw(st.booleans()):
        core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core


def spelled(*, in_map: bool) -> st.SearchStrategy[object]:
    """Return a special token as its text, or as the object that the file would hold."""
    mark = {} if in_map else {"__type": "AddedToken"}
    # One without other fields than its text would be the same token in two ways.
    flags = (
        st.sampled_from(SPECIAL).flatmap(flags_of).filter(lambda one: sum(one[f] for f in FLAGS))
    )
    return st.sampled_from(SPECIAL) | flags.map(lambda one: {**one, **mark})


def named_tokens(*, in_map: bool) -> st.SearchStrategy[dict[str, Any]]:
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "image_token")
    extra = st.lists(st.sampled_from([*SPECIAL, "<x>", "<y>"]), unique=True, max_size=3)
    own = st.dictionaries(st.sampled_from(["x_token", "y"]), st.sampled_from(["<x>", "<y>"]))
    more = {"extra_special_tokens": extra | own, "additional_special_tokens": extra}
    return st.fixed_dictionaries(
        {}, optional={**dict.fromkeys(names, spelled(in_map=in_map)), **more}
    )


@st.composite
def folders(draw: st.DrawFn) -> dict[str, dict[str, Any]]:
    """Draw the files of a folder, by name."""
    core = draw(cores())
    size = core.get_vocab_size()
    config = draw(named_tokens(in_map=False))
    config["tokenizer_class"] = draw(st.sampled_from(["PreTrainedTokenizerFast", "NoSuchClass"]))
    flags = {"add_bos_token": st.booleans(), "add_eos_token": st.booleans()}
    config |= draw(st.fixed_dictionaries({}, optional=flags))
    files = {"tokenizer.json": json.loads(core.to_str()), "tokenizer_config.json": config}
    if draw(st.booleans()):
        listed = {i: token.content for i, token in core.get_added_tokens_decoder().items()}
        more = draw(st.lists(st.sampled_from(["<x>", "<tool>", "zz"]), unique=True, max_size=3))
        lacking = [text for text in more if text not in listed.values()]
        listed |= {size + i: text for i, text in enumerate(lacking)}
        config["added_tokens_decoder"] = {str(i): draw(flags_of(t)) for i, t in listed.items()}
    if draw(st.booleans()):
        files["special_tokens_map.json"] = draw(named_tokens(in_map=True))
    if draw(st.booleans()):
        texts = draw(st.lists(st.sampled_from(["<z>", "zz"]), unique=True))
        files["added_tokens.json"] = {text: size + i for i, text in enumerate(texts)}
    if draw(st.integers(0, 9)) == 0:
        del files["tokenizer_config.json"]
    return files


def write_folder(folder: Path, files: Mapping[str, object]) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def both(files: Mapping[str, object]) -> tuple[ModelText, Any]:
    """Load the folder with ours and with `AutoTokenizer`."""
    with tempfile.TemporaryDirectory() as name:
        write_folder(Path(name), files)
        theirs = AutoTokenizer.from_pretrained(name)
        assert ModelFolder(Path(name)).special_tokens() == theirs.special_tokens_map
        return load_text(Path(name)), theirs


def encodes_alike(text: ModelText, theirs: Any, *texts: str) -> bool:
    return all(
        text.tokenizer.encode(one, add_special_tokens=adds)
        == theirs.encode(one, add_special_tokens=adds)
        for one in (*TEXTS, *texts)
        for adds in (False, True)
    )


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    files=folders(),
    more=st.text(alphabet="helowr 1<>|sé🦊\n▁", max_size=12),
    drawn=st.lists(st.integers(0, 300), max_size=8),
)
def test_folders_are_read_as_transformers_reads_them(
    files: dict[str, dict[str, Any]], more: str, drawn: list[int]
) -> None:
    text, theirs = both(files)
    ours = text.tokenizer
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if theirs.eos_token_id is None else (theirs.eos_token_id,))
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
    assert encodes_alike(text, theirs, more)
    special = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    # A token stays special where added_tokens_decoder takes that back.
    called = {token["id"] for token in files["tokenizer.json"]["added_tokens"] if token["special"]}
    assert ours.special_token_ids == special | called | set(ours.eos_token_ids)
    whole = [i for i in drawn if i < ours.vocab_size and "bytes:" not in ours.token_text(i)]
    whole = [i for i in whole if theirs.convert_ids_to_tokens(i) != "<0x20>"]
    for token_ids in (whole, *(ours.encode(one, add_special_tokens=True) for one in TEXTS)):
        decoded = ours.decode(token_ids, skip_special_tokens=False)
        assert decoded == theirs.decode(token_ids, skip_special_tokens=False)
        kept = [i for i in token_ids if i not in ours.special_token_ids]
        assert ours.decode(token_ids, skip_special_tokens=True) == shown(theirs, kept)


def shown(theirs: Any, token_ids: list[int]) -> str:
    return str(theirs.decode(token_ids, skip_special_tokens=True))


# ---- what differs --------------------------------------------------------------------------------


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def like_qwen2() -> Core:
    core = byte_level(adds_space=False)
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    return core


def like_smollm2() -> Core:
    core = byte_level(adds_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, core.pre_tokenizer])
    return core


def like_gemma() -> Core:
    core = sentencepiece(adds_space=False)
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    return core


CLASSES = (
    "PreTrainedTokenizer",
    "LlamaTokenizer",
    "GPT2Tokenizer",
    "Qwen2Tokenizer",
    "GemmaTokenizer",
)
CORES: dict[str, Callable[[], Core]] = {
    "gpt2": lambda: byte_level(adds_space=False),
    "smollm2": like_smollm2,
    "qwen2": like_qwen2,
    "llama2": lambda: sentencepiece(adds_space=True),
    "llama": lambda: metaspace(adds_space=True),
    "gemma": like_gemma,
}
#: Classes, as named in tokenizer_config.json, and files whose rules are those of the class.
SAME = {("GPT2Tokenizer", "gpt2"), ("Qwen2Tokenizer", "qwen2"), ("GemmaTokenizer", "gemma")}
SAME |= {("LlamaTokenizer", "llama")}


@pytest.mark.parametrize("suffix", ["", "Fast"])
@pytest.mark.parametrize("kind", CORES)
@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_would_read_the_file_otherwise_is_noted(
    name: str, kind: str, suffix: str
) -> None:
    core = CORES[kind]()
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {"tokenizer_class": name + suffix, "bos_token": "<s>", "eos_token": "</s>"}
    config |= dict.fromkeys(("unk_token", "pad_token", "mask_token"), "<unk>")
    files = {"tokenizer.json": json.loads(core.to_str()), "tokenizer_config.json": config}
    text, theirs = both(files)
    noted = any(f"{name} in transformers 5" in note for note in text.notes)
    assert noted or encodes_alike(text, theirs)
    if (name, kind) in SAME:
        assert not noted
        assert text.tokenizer.eos_token_ids == (theirs.eos_token_id,)
    plain = {**files, "tokenizer_config.json": {**config, "tokenizer_class": "NoSuchClass"}}
    assert encodes_alike(text, both(plain)[1])


def test_text_is_not_cleaned_up_after_decoding() -> None:
    core = unigram(adds_space=False)
    config = {"tokenizer_class": "NoSuchClass", "clean_up_tokenization_spaces": True}
    files = {"tokenizer.json": json.loads(core.to_str()), "tokenizer_config.json": config}
    text, theirs = both(files)
    token_ids = text.tokenizer.encode("he ll .", add_special_tokens=False)
    assert text.tokenizer.decode(token_ids, skip_special_tokens=True) == "he ll ."
    assert shown(theirs, token_ids) == "he ll."


def test_an_end_is_not_shown_though_it_is_not_called_special() -> None:
    core = byte_level(adds_space=False)
    core.add_tokens([AddedToken("<over>", special=False)])
    over = core.get_vocab_size() - 1
    files = {"tokenizer.json": json.loads(core.to_str()), "generation_config.json": {}}
    files["generation_config.json"] = {"eos_token_id": [over]}
    text, theirs = both({**files, "tokenizer_config.json": {"tokenizer_class": "NoSuchClass"}})
    assert text.tokenizer.eos_token_ids == (over,)
    assert shown(theirs, [over]) == "<over>"
    assert text.tokenizer.decode([over], skip_special_tokens=True) == ""
