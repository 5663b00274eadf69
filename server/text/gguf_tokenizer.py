"""A tokenizer from a GGUF file's metadata.

What the file does not hold, how text is cut into words, goes by the name in `tokenizer.ggml.pre`,
as in llama.cpp (`src/llama-vocab.cpp`); its results are what the tests compare with. Knows nothing
of chat templates or weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Core
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer

from server.text.gguf_metadata import GGUFMetadata
from server.text.pieces import TextError
from server.text.tokenizer import SpecialIds, Tokenizer

# Values of `tokenizer.ggml.token_type`.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_PUNCTUATION_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_PUNCTUATION_AND_SPACES}"
)
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_PUNCTUATION_AND_SPACES}"
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _WordRules:
    """How one family of byte-level BPE vocabularies cuts text into words."""

    make_splitter: Callable[[], PreTokenizer]
    #: A word that is itself a token is taken whole, even if no merges lead there.
    ignores_merges: bool = False
    #: Where the file does not say whether bos goes in front.
    adds_bos: bool = False
    make_normalizer: Callable[[], Normalizer] | None = None


def _gpt2_words() -> PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _single_digits_then_gpt2_words() -> PreTokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, _gpt2_words()])


def _words_by(pattern: str) -> Callable[[], PreTokenizer]:
    def make() -> PreTokenizer:
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([split, letters])

    return make


_GPT2_RULES = _WordRules(_gpt2_words)
_SMOLLM_RULES = _WordRules(_single_digits_then_gpt2_words)
_LLAMA3_RULES = _WordRules(_words_by(_LLAMA3), ignores_merges=True, adds_bos=True)
# Qwen's own tokenizer composes characters first; llama.cpp leaves this out.
_QWEN2_RULES = _WordRules(_words_by(_QWEN2), make_normalizer=normalizers.NFC)

_RULES_BY_PRE = {
    "default": _GPT2_RULES,
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


def gguf_tokenizer(metadata: GGUFMetadata) -> Tokenizer:
    """Build the tokenizer a GGUF file describes.

    Raises `TextError` that names the file for a kind of tokenizer that is not supported.
    """
    kind = metadata.text("tokenizer.ggml.model")
    if not metadata.texts("tokenizer.ggml.tokens"):
        raise TextError(f"{metadata.path} has no tokenizer (no tokenizer.ggml.tokens)")
    if kind == "gpt2":
        core, adds_bos = _byte_level_bpe(metadata)
    elif kind == "llama":
        core, adds_bos = _sentencepiece_bpe(metadata), True
    else:
        raise TextError(
            f"{metadata.path}: tokenizer.ggml.model {kind!r} is not supported; supported: "
            "'gpt2' (byte-level BPE), 'llama' (SentencePiece BPE)"
        )
    _add_special_tokens(core, metadata)
    return Tokenizer(core, _special_ids(metadata, adds_bos=adds_bos))


def _special_ids(metadata: GGUFMetadata, *, adds_bos: bool) -> SpecialIds:
    ends = (metadata.integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    stated_bos = metadata.flag("tokenizer.ggml.add_bos_token")
    return SpecialIds(
        bos_token_id=metadata.integer("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        adds_bos=adds_bos if stated_bos is None else stated_bos,
        adds_eos=metadata.flag("tokenizer.ggml.add_eos_token") or False,
    )


def _byte_level_bpe(metadata: GGUFMetadata) -> tuple[Core, bool]:
    """Return the tokenizer, and whether such ones put bos in front unless told otherwise."""
    pre = metadata.text("tokenizer.ggml.pre") or "default"
    rules = _RULES_BY_PRE.get(pre)
    if rules is None:
        raise TextError(
            f"{metadata.path}: tokenizer.ggml.pre {pre!r} is not supported; supported: "
            + ", ".join(_RULES_BY_PRE)
        )
    ids = {token: i for i, token in enumerate(metadata.texts("tokenizer.ggml.tokens"))}
    merges = metadata.texts("tokenizer.ggml.merges")
    # From the second character on: a token may begin with a space.
    pairs = [_cut_at(merge, merge.find(" ", 1)) for merge in merges]
    core = Core(_bpe_model(metadata, ids, pairs, ignore_merges=rules.ignores_merges))
    if rules.make_normalizer is not None:
        core.normalizer = rules.make_normalizer()
    core.pre_tokenizer = rules.make_splitter()
    core.decoder = decoders.ByteLevel()
    return core, rules.adds_bos


def _cut_at(merge: str, at: int) -> tuple[str, str]:
    return merge[:at], merge[at + 1 :]


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
    """Pairs of tokens that join to a token, best first.

    SentencePiece joins whichever neighbours give the token with the highest score; a list of
    merges by the score of their result does the same (so does `transformers`' converter).
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


def _add_special_tokens(core: Core, metadata: GGUFMetadata) -> None:
    """Have control and user-defined tokens recognised in text before it is cut into words."""
    control, user_defined = [], []
    types = metadata.numbers("tokenizer.ggml.token_type")
    for token, kind in zip(metadata.texts("tokenizer.ggml.tokens"), types, strict=False):
        if kind == _CONTROL:
            control.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            user_defined.append(AddedToken(token, special=False, normalized=False))
    core.add_special_tokens(control)
    core.add_tokens(user_defined)
