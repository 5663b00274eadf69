"""A tokenizer from a GGUF file's metadata.

`tokenizer.ggml.pre` names the rules that cut text into words, and tokens that end an answer are
known by their text, as in llama.cpp (`src/llama-vocab.cpp`). The tests compare with its results.
Knows nothing of chat templates or weights.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from model.formats import FormatError
from model.formats.gguf import read_gguf_header
from server.text.token_bytes import TextError
from server.text.tokenizer import SpecialIds, Tokenizer

ValueT = TypeVar("ValueT")

# Values of `tokenizer.ggml.token_type`.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
#: By each type that is recognised in text: whether its tokens are special.
_SPECIAL_BY_TYPE: dict[float, bool] = {_UNKNOWN: True, _CONTROL: True, _USER_DEFINED: False}

#: Tokens that end an answer: the first of any type, the others only as control tokens.
_TURN_END = re.compile(
    r"<\|(im_end|eot_id|eom_id|end|return|call|endoftext|end_of_text)\|>|<end_of_(turn|utterance)>"
    "|<\uff5cend\u2581of\u2581sentence\uff5c>"
)
_TEXT_END = re.compile(r"</s>|<eos>|<EOT>|\[EO[TS]\]")
#: Of OpenAI's harmony, where `<|end|>` is between the messages of one answer.
_HARMONY_ENDS = frozenset(("<|return|>", "<|call|>"))
_TAG = re.compile(r"<[^<>\s]+>|\[\w+\]")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACES}"
)
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION_AND_SPACES}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
#: For files that name no rules: punctuation apart, digits by threes.
_DEFAULT = (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class GGUFMetadata:
    """Typed access to the keys of a file. A value of another type raises `TextError`."""

    def __init__(self, path: Path) -> None:
        """Read the file's keys. Raises `TextError` that names the file if it cannot be read."""
        self.path = path
        #: Decisions that the file leaves open, a line each.
        self.notes: list[str] = []
        try:
            self._values = read_gguf_header(path).metadata
        except FormatError as error:
            raise TextError(str(error)) from error
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror or error}") from error

    def text(self, key: str) -> str | None:
        """Return a string, or None where there is no such key."""
        return self._value(key, str, "a string")

    def integer(self, key: str) -> int | None:
        """Return a whole number, or None where there is no such key."""
        return self._value(key, int, "a whole number")

    def flag(self, key: str) -> bool | None:
        """Return a truth value, or None where there is no such key."""
        return self._value(key, bool, "a truth value")

    def texts(self, key: str) -> list[str]:
        """Return an array of strings; empty where there is no such key."""
        return self._value(key, list, "an array of strings") or []

    def numbers(self, key: str) -> tuple[float, ...]:
        """Return an array of numbers; empty where there is no such key."""
        return self._value(key, tuple, "an array of numbers") or ()

    def _value(self, key: str, kind: type[ValueT], kind_name: str) -> ValueT | None:
        value = self._values.get(key)
        if value is None or isinstance(value, kind):
            return value
        raise TextError(f"{self.path}: {key} is not {kind_name}")


@dataclass(frozen=True, slots=True)
class _WordRules:
    """The rules by which a family of byte-level BPE vocabularies cuts text into words."""

    splitter: PreTokenizer
    #: A word that is a token is taken whole, even if no merges produce it.
    ignores_merges: bool = False
    #: Whether bos goes in front where the file has no such key.
    adds_bos: bool = False
    normalizer: Normalizer | None = None


def _words_by(*patterns: str) -> PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in patterns]
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*splits, letters])


_GPT2_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
_GPT2_RULES = _WordRules(_GPT2_WORDS)
_SMOLLM_RULES = _WordRules(pre_tokenizers.Sequence([_DIGITS, _GPT2_WORDS]))
_LLAMA3_RULES = _WordRules(_words_by(_LLAMA3), ignores_merges=True, adds_bos=True)
# Qwen's own tokenizer composes characters first; llama.cpp does not.
_QWEN2_RULES = _WordRules(_words_by(_QWEN2), normalizer=normalizers.NFC())

_RULES_BY_PRE = {
    "default": _WordRules(_words_by(*_DEFAULT)),
    "gpt-2": _GPT2_RULES,
    "phi-2": _GPT2_RULES,
    "smollm": _SMOLLM_RULES,
    "starcoder": _SMOLLM_RULES,
    "llama-bpe": _LLAMA3_RULES,
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
    "qwen2": _QWEN2_RULES,
    "deepseek-r1-qwen": _QWEN2_RULES,
    "tekken": _WordRules(_words_by(_TEKKEN), ignores_merges=True, adds_bos=True),
}


def gguf_tokenizer(
    metadata: GGUFMetadata, turn_end: str | None = None, marks: Collection[str] = ()
) -> Tokenizer:
    """Build the tokenizer of a GGUF file; decisions that the file leaves open go to its `notes`.

    `turn_end`: the text behind an answer in the chat template, which ends texts if it is a token.
    `marks`: tokens in the template, which are recognised in text even if the file types them as
    text. Raises `TextError` that names the file for a kind of tokenizer that is not supported.
    """
    kind = metadata.text("tokenizer.ggml.model")
    tokens = metadata.texts("tokenizer.ggml.tokens")
    if not tokens:
        raise TextError(f"{metadata.path} has no tokenizer (no tokenizer.ggml.tokens)")
    [(token, count)] = Counter(tokens).most_common(1)
    if count > 1:
        raise TextError(f"{metadata.path}: tokenizer.ggml.tokens: {token!r} is there {count} times")
    if kind == "gpt2":
        core, adds_bos = _byte_level_bpe(metadata)
    elif kind == "llama":
        core, adds_bos = _sentencepiece_bpe(metadata), True
    else:
        raise TextError(
            f"{metadata.path}: tokenizer.ggml.model {kind!r} is not supported; supported: "
            "'gpt2' (byte-level BPE), 'llama' (SentencePiece BPE)"
        )
    types, named = _types(metadata, tokens), named_ids(metadata)
    ends = _ends(metadata, tokens, types, named, turn_end)
    core.add_tokens(_tags(metadata, tokens, types, {*ends, *named.values()}, marks))
    return Tokenizer(core, _special_ids(metadata, named, ends, adds_bos=adds_bos))


def named_ids(metadata: GGUFMetadata) -> dict[str, int]:
    """Return the file's ids of bos, eos and others, if the vocabulary has them."""
    size, named = len(metadata.texts("tokenizer.ggml.tokens")), {}
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        token_id = metadata.integer(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None and token_id in range(size):
            named[name] = token_id
        elif token_id is not None:
            metadata.notes.append(f"{name}_token_id {token_id} is no token's; it is left out")
    return named


def _special_ids(
    metadata: GGUFMetadata, named: dict[str, int], ends: Sequence[int], *, adds_bos: bool
) -> SpecialIds:
    adds = {}
    for name, default in (("bos", adds_bos), ("eos", False)):
        stated = metadata.flag(f"tokenizer.ggml.add_{name}_token")
        wanted = default if stated is None else stated
        if wanted and name not in named:
            metadata.notes.append(f"texts should get a {name} token, but the file names none")
        adds[name] = wanted and name in named
    return SpecialIds(named.get("bos"), tuple(ends), adds_bos=adds["bos"], adds_eos=adds["eos"])


def _types(metadata: GGUFMetadata, tokens: Sequence[str]) -> Sequence[float]:
    types = metadata.numbers("tokenizer.ggml.token_type")
    if not types:
        metadata.notes.append("the file has no token_type: tokens that it does not name are text")
    elif len(types) != len(tokens):
        raise TextError(f"{metadata.path}: tokens and token_type differ in length")
    return types or (_NORMAL,) * len(tokens)


def _ends(
    metadata: GGUFMetadata,
    tokens: Sequence[str],
    types: Sequence[float],
    named: dict[str, int],
    turn_end: str | None,
) -> list[int]:
    """Return the ids of the tokens that end an answer, `eos` first."""
    stated = [named[name] for name in ("eos", "eot", "eom") if name in named]
    found = [
        i
        for i, token in enumerate(tokens)
        if token == turn_end
        or _TURN_END.fullmatch(token)
        or (types[i] == _CONTROL and _TEXT_END.fullmatch(token))
    ]
    is_harmony = {*tokens} >= _HARMONY_ENDS
    ends = dict.fromkeys(i for i in (*stated, *found) if not is_harmony or tokens[i] != "<|end|>")
    more = ", ".join(tokens[i] for i in ends if i not in stated)
    if more:
        metadata.notes.append(f"these end an answer, too, though no key says so: {more}")
    return [*ends]


def _tags(
    metadata: GGUFMetadata,
    tokens: Sequence[str],
    types: Sequence[float],
    special: Collection[int],
    marks: Collection[str],
) -> list[AddedToken]:
    """Return the tokens that are recognised in text before it is cut into words."""
    tags, corrected = [], []
    for i, token in enumerate(tokens):
        acts = i in special and _TAG.fullmatch(token) is not None
        stated = _SPECIAL_BY_TYPE.get(types[i])
        if acts or token in marks or stated is not None:
            tags.append(AddedToken(token, special=acts or stated is True, normalized=False))
        if (acts and not stated) or (token in marks and stated is None):
            corrected.append(token)
    if corrected:
        metadata.notes.append(f"token_type is corrected for {', '.join(corrected)}")
    return tags


def _byte_level_bpe(metadata: GGUFMetadata) -> tuple[Core, bool]:
    """Return the tokenizer, and whether its family adds bos by default."""
    pre = metadata.text("tokenizer.ggml.pre")
    if pre is None:
        pre = "default"
        metadata.notes.append("the file has no tokenizer.ggml.pre: how words are cut is a guess")
    rules = _RULES_BY_PRE.get(pre)
    if rules is None:
        raise TextError(
            f"{metadata.path}: tokenizer.ggml.pre {pre!r} is not supported; supported: "
            + ", ".join(_RULES_BY_PRE)
        )
    ids = {token: i for i, token in enumerate(metadata.texts("tokenizer.ggml.tokens"))}
    merges = metadata.texts("tokenizer.ggml.merges")
    # From the second character on: a token may begin with a space.
    cuts = (merge.find(" ", 1) for merge in merges)
    pairs = [(merge[:at], merge[at + 1 :]) for merge, at in zip(merges, cuts, strict=True)]
    core = Core(_bpe_model(metadata, ids, pairs, ignore_merges=rules.ignores_merges))
    if rules.normalizer is not None:
        core.normalizer = rules.normalizer
    core.pre_tokenizer = rules.splitter
    core.decoder = decoders.ByteLevel()
    return core, rules.adds_bos


def _sentencepiece_bpe(metadata: GGUFMetadata) -> Core:
    tokens = metadata.texts("tokenizer.ggml.tokens")
    unknown = metadata.integer("tokenizer.ggml.unknown_token_id") or 0
    core = Core(
        _bpe_model(
            metadata,
            {token: i for i, token in enumerate(tokens)},
            _merges_from_scores(metadata, tokens),
            unk_token=tokens[unknown] if unknown in range(len(tokens)) else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = metadata.flag("tokenizer.ggml.add_space_prefix") is not False
    prepend = [normalizers.Prepend("▁")] if has_prefix else []
    core.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return core


def _bpe_model(
    metadata: GGUFMetadata, ids: dict[str, int], pairs: list[tuple[str, str]], **options: object
) -> models.BPE:
    try:
        return models.BPE(vocab=ids, merges=pairs, **options)
    # `tokenizers` raises plain Exception for a merge of tokens that do not exist.
    except Exception as error:
        raise TextError(f"{metadata.path}: tokenizer.ggml.merges: {error}") from error


def _merges_from_scores(metadata: GGUFMetadata, tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of tokens that join to a token, best first.

    SentencePiece joins the neighbours that give the token with the highest score. A list of merges
    by the score of their result is equivalent (`transformers`' converter makes the same list).
    """
    scores = metadata.numbers("tokenizer.ggml.scores")
    types = metadata.numbers("tokenizer.ggml.token_type") or (_NORMAL,) * len(tokens)
    if not len(tokens) == len(scores) == len(types):
        raise TextError(f"{metadata.path}: tokens, scores and token_type differ in length")
    textual = (_NORMAL, _USER_DEFINED)
    id_of = {tokens[i]: i for i, kind in enumerate(types) if kind in textual}
    merges: list[tuple[float, int, int]] = []
    for token, whole in id_of.items():
        for cut in range(1, len(token)):
            left = id_of.get(token[:cut])
            right = None if left is None else id_of.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[whole], left, right))
    merges.sort()
    return [(tokens[left], tokens[right]) for _, left, right in merges]
