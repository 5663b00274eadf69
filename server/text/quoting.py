"""Text that stays text: special tokens written in it are encoded letter by letter.

A message gets marks before the template sees it, and the rendered text loses them again. So tokens
that the template writes differ from text of a message that looks the same. Knows nothing of
templates.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Collection, Iterable
from functools import cached_property
from secrets import randbits
from typing import TypeAlias

import tokenizers
from tokenizers import AddedToken

#: Noncharacters, which no text needs: one breaks a special token up; the other escapes both of them
#: in a text that contains them all the same.
BREAK, ESCAPE = "\ufdd0", "\ufdd1"
_NAMES = {BREAK: "0", ESCAPE: "1"}
_MEANT = {name: char for char, name in _NAMES.items()}
_ESCAPED = re.compile(f"{ESCAPE}.?", re.DOTALL)
_IN_ASCII = re.compile(r"\\\\|\\ufdd(0|1[01]?)")
_MARKS = {"0": BREAK, "1": ESCAPE, "10": r"\ufdd0", "11": r"\ufdd1"}
#: Texts by their letters; `_END` marks the end of one.
_Tree: TypeAlias = "dict[str, _Tree]"
_END = ""


class Quoting:
    """Marks texts, and encodes texts with marks. May be used from any thread."""

    def __init__(self, core: tokenizers.Tokenizer, special_ids: Collection[int]) -> None:
        """`special_ids`: tokens that texts must not become; other added tokens stay tokens."""
        self._core = core
        self._added = core.get_added_tokens_decoder()
        self._special = {
            token.content: token_id
            for token_id, token in self._added.items()
            if token_id in special_ids and token.content
        }
        secret = randbits(128)  # in digits: no text is cut within them
        self._spellings = {text: f"<{secret}:{one}>" for text, one in self._special.items()}
        single = "".join(re.escape(text) for text in self._special if len(text) == 1)
        self._reserved = re.compile(f"[{BREAK}{ESCAPE}{single}]")
        self._marks = f"{BREAK}|{ESCAPE}([01{single}]?)"
        self._found = re.compile(_any_of([BREAK, ESCAPE, *self._special]))
        self._sorted = sorted(self._special)
        self._longest = max(map(len, self._sorted), default=0)
        self._firsts = {BREAK, ESCAPE, *(text[0] for text in self._sorted)}
        self._first = re.compile(f"[{''.join(map(re.escape, self._firsts))}]")
        longer = [text for text in self._special if len(text) > 1]
        self._longer = re.compile(_any_of(longer) if longer else "(?!)")

    def quote(self, text: str) -> str:
        """Return `text` with the marks it needs. Costs only a search where it needs none."""
        if not any(map(text.__contains__, self._firsts)):
            return text
        end = len(text.rstrip())
        if self._begins_at_end(text, end):
            return self._marked(text[:end]) + BREAK + text[end:]
        return self._marked(text) if self._found.search(text) else text

    def needs(self, text: str) -> bool:
        """Return whether a rendered text must be `respelled` before the model's tokenizer."""
        return BREAK in text or ESCAPE in text or self._is_folded

    def respelled(self, text: str) -> str:
        """Return a rendered text for `core`, without marks."""

        def meant(found: re.Match[str]) -> str:
            mark, token = found[1], found[2]
            if token is not None:
                return self._spellings.get(token, token)
            return _MEANT.get(mark, mark) if mark else ""

        return self._parts.sub(meant, text)

    def token_ids(self, token_ids: Iterable[int]) -> list[int]:
        """Return the model's ids for the ids that `core` gave to a respelled text."""
        meant = self._meant_ids
        return [one for token_id in token_ids for one in meant.get(token_id, (token_id,))]

    @cached_property
    def core(self) -> tokenizers.Tokenizer:
        """The model's tokenizer, except that special tokens have secret spellings.

        It shares the vocabulary: a copy of it takes a second and a hundred megabytes.
        """
        core = tokenizers.Tokenizer(self._core.model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(self._core, part) is not None:
                setattr(core, part, getattr(self._core, part))
        core.add_tokens(
            [
                AddedToken(
                    self._spellings.get(token.content, token.content),
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
                for token in self._added.values()
            ]
        )
        return core

    def _marked(self, text: str) -> str:
        text = self._reserved.sub(lambda at: ESCAPE + _NAMES.get(at[0], at[0]), text)
        while self._longer.search(text):  # again, for overlaps
            text = self._longer.sub(lambda at: at[0][0] + BREAK + at[0][1:], text)
        return text

    def _begins_at_end(self, text: str, end: int) -> bool:
        """Return whether a special token begins before `end` that later text might complete."""
        for at in self._first.finditer(text, max(0, end - self._longest), end):
            begun = text[at.start() : end]
            following = bisect(self._sorted, begun)
            if following < len(self._sorted) and self._sorted[following].startswith(begun):
                return True
        return False

    @cached_property
    def _parts(self) -> re.Pattern[str]:
        added = _any_of(token.content for token in self._added.values() if token.content)
        return re.compile(f"{self._marks}|({added})" if added else f"{self._marks}|((?!))")

    @cached_property
    def _meant_ids(self) -> dict[int, list[int]]:
        """The model's ids by the ids of `core`, where they differ."""
        spelled = (
            (self.core.token_to_id(self._spellings.get(token.content, token.content)), token_id)
            for token_id, token in self._added.items()
        )
        return self._letters | {own: [token_id] for own, token_id in spelled if own is not None}

    @cached_property
    def _letters(self) -> dict[int, list[int]]:
        """Other tokens for the special tokens that the vocabulary makes from text (Unigram)."""
        tokenize = self._core.model.tokenize
        return {
            token_id: [token.id for half in (text[:1], text[1:]) for token in tokenize(half)]
            for text, token_id in self._special.items()
            if len(text) > 1 and token_id in {token.id for token in tokenize(text)}
        }

    @cached_property
    def _is_folded(self) -> bool:
        """Whether normalised text can become a special token that it does not spell."""
        normalized = any(token.normalized for token in self._added.values() if token.special)
        return self._core.normalizer is not None and (normalized or bool(self._letters))


def without_marks(text: str) -> str:
    """Return `text` without marks and the characters they escape."""
    text = text.replace(BREAK, "")
    return _ESCAPED.sub("", text) if ESCAPE in text else text


def with_marks(ascii_json: str) -> str:
    """Return JSON in ASCII, but with the marks unescaped."""
    return _IN_ASCII.sub(lambda at: _MARKS.get(at[1], at[0]), ascii_json)


def _any_of(texts: Iterable[str]) -> str:
    """Return a pattern for the longest of `texts` at a position; its speed is the same for many."""
    tree: _Tree = {}
    for text in texts:
        node = tree
        for char in text:
            node = node.setdefault(char, {})
        node[_END] = {}
    return _written(tree)


def _written(tree: _Tree) -> str:
    stem = ""
    while len(tree) == 1 and _END not in tree:
        [(char, tree)] = tree.items()
        stem += re.escape(char)
    branches = [re.escape(char) + _written(below) for char, below in tree.items() if char != _END]
    return f"{stem}(?:{'|'.join(branches)}){'?' * (_END in tree)}" if branches else stem
