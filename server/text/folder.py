"""Tokenizer, chat templates and special tokens from a model folder's files.

The files are those `transformers` writes: tokenizer.json, tokenizer_config.json, config.json,
generation_config.json, chat_template.jinja, and special_tokens_map.json and added_tokens.json of
its older releases. Only the first is required. Where two of them differ, the one that
`AutoTokenizer` reads is used, and a note reports it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

from tokenizers import AddedToken
from tokenizers import Tokenizer as Core

from model.formats import FormatError
from model.formats.json_file import read_json_object, shown
from server.text.token_bytes import TextError
from server.text.tokenizer import SpecialIds, Tokenizer

_TOKENIZER_FILE = "tokenizer.json"
#: Found beside or instead of it; reading them takes another library.
_OTHER_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "tekken.json")
#: In the order in which `transformers` adds the tokens that the vocabulary lacks.
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
#: The start of normalizer and pre-tokenizer in classes of `transformers` 5 that build their own.
_STEPS_OF_CLASSES = {
    "GPT2Tokenizer": ("None", "ByteLevel(add_prefix_space=False"),
    "LlamaTokenizer": ("None", 'Metaspace(replacement="▁", prepend_scheme=first, split=False'),
    "GemmaTokenizer": ('Replace(pattern=String(" "), content="▁")', 'Split(pattern=String(" "), b'),
    "Qwen2Tokenizer": ("NFC()", "Sequence(pretokenizers=[Split(pattern=Regex(\"(?i:'s|'t|'re|'ve|"),
}
#: Ten times as many as models have; each costs 30 microseconds and 1.5 KB.
_MAX_LISTED = 65_536
_EXTRA, _EXTRA_BEFORE = "extra_special_tokens", "additional_special_tokens"


class ModelFolder:
    """The text side of a model folder. `config` may be another file than its config.json."""

    def __init__(self, folder: Path, config: Path | None = None) -> None:
        """Read the small files. Raises `TextError` that names the file if one cannot be used."""
        self._folder = folder
        self._tokenizer_config = read_json(folder / "tokenizer_config.json")
        self._config_path = config or folder / "config.json"
        self._config = read_json(self._config_path)
        #: The sampling that the model's makers suggest, among others.
        self.generation_config = read_json(folder / "generation_config.json")
        #: Choices between two readings of the files, one line each.
        self.notes: list[str] = []
        self._special = self._special_tokens()

    def tokenizer(self, turn_end: str | None = None) -> Tokenizer:
        """Load tokenizer.json. Raises `TextError` that names the missing file.

        `turn_end`: the chat template's text behind an answer; a token of that text ends answers.
        """
        path = self._folder / _TOKENIZER_FILE
        if not path.is_file():
            present = [n for n in _OTHER_TOKENIZER_FILES if (self._folder / n).is_file()]
            found = f" (there is {', '.join(present)}; convert it)" if present else ""
            raise TextError(f"looked for {path} and found no such file{found}")
        try:
            core = Core.from_file(str(path))
        except KeyboardInterrupt:
            raise
        # `tokenizers` raises plain Exception for an unreadable file; a panic of Rust is not even an
        # Exception.
        except BaseException as error:
            raise TextError(f"{path} is not a readable tokenizer: {error}") from error
        self._add_tokens(core)
        tokenizer = Tokenizer(core, self._special_ids(core, turn_end))
        self._note_differences(core, tokenizer.encode("", add_special_tokens=True))
        return tokenizer

    def special_tokens(self) -> dict[str, str]:
        """Return the text of `bos_token`, `eos_token` and whichever others the files name."""
        return {name: token.content for name, token in self._special if name}

    def template_sources(self) -> dict[str, str]:
        """Return the chat templates by name. .jinja files take precedence over the JSON."""
        where = self._folder / "tokenizer_config.json"
        stated = dict(_named_templates(self._tokenizer_config.get("chat_template"), where))
        if not stated:
            where = self._folder / "chat_template.json"
            stated = dict(_named_templates(read_json(where).get("chat_template"), where))
        others = sorted((self._folder / "additional_chat_templates").glob("*.jinja"))
        files = {"default": self._folder / "chat_template.jinja", **{p.stem: p for p in others}}
        sources = {name: _read_text(path) for name, path in files.items() if path.is_file()}
        if stated and sources and stated != sources:
            self.notes.append(f"the chat templates of .jinja files are taken, not those in {where}")
        return sources or stated

    def _special_tokens(self) -> list[tuple[str, AddedToken]]:
        """Return special tokens, their names or "" first, in the order `transformers` adds them."""
        here, there = self._tokenizer_config, read_json(self._folder / "special_tokens_map.json")
        is_newer = "added_tokens_decoder" in here
        if any(_text(there[name]) != _text(here.get(name, there[name])) for name in there):
            taken = "tokenizer_config.json" if is_newer else "special_tokens_map.json"
            self.notes.append(f"special tokens are named in two ways; those of {taken} are taken")
        stated, own = dict(here), dict[str, object]()
        if not stated.get(_EXTRA) and _EXTRA_BEFORE in stated:
            stated[_EXTRA] = stated.pop(_EXTRA_BEFORE)
        for more in ({}, {} if is_newer else there):
            first, found = stated.get(_EXTRA), more.get(_EXTRA)
            stated |= more
            if isinstance(first, list) and isinstance(found, list):
                stated[_EXTRA] = [*first, *found]
            elif isinstance(stated.get(_EXTRA), dict):
                own |= cast("dict[str, object]", stated.pop(_EXTRA))
        unnamed = stated.get(_EXTRA, stated.get(_EXTRA_BEFORE)) or []
        if not isinstance(unnamed, list):
            raise TextError(f"{self._folder}: {_EXTRA} must be a list or an object")
        # Of a model's own names, the ones that are plain text in tokenizer_config.json come first.
        names = {n: v for n, v in stated.items() if n.endswith("_token") and _text(v) is not None}
        names |= {n: v for n, v in here.items() if n in names and isinstance(v, str)}
        named = {name: stated.get(name) for name in _NAMES}
        named = {**named, **names, **{n: v for n, v in named.items() if v is not None}, **own}
        pairs = [*named.items(), *(("", value) for value in unnamed)]
        return [
            (name, self._added_token(name or _EXTRA, value, normalized=False, special=True))
            for name, value in pairs
            if value is not None
        ]

    def _added_token(self, name: str, value: object, **flags: bool) -> AddedToken:
        """Create a token from its text or the object around it. `flags`: its defaults."""
        stated = {"content": value} if isinstance(value, str) else value
        if not isinstance(stated, dict) or _text(stated) is None:
            where = "tokenizer_config.json or special_tokens_map.json"
            raise TextError(f"{self._folder}: {name} in {where} is no token: {shown(value)}")
        stated = {key: flag for key, flag in stated.items() if key != "__type"}
        try:
            return AddedToken(**{**flags, **stated})
        except TypeError as error:
            raise TextError(f"{self._folder}: {name}: {error}") from None

    def _listed_tokens(self, core: Core) -> dict[int, AddedToken]:
        """Return the tokens by id that do not come from merges, as `transformers` does."""
        listed = self._tokenizer_config.get("added_tokens_decoder")
        present = core.get_added_tokens_decoder() if listed is None else {}
        if listed is None:
            added = read_json(self._folder / "added_tokens.json")
            special = {token.content for _, token in self._special}
            listed = {
                str(i): {
                    "content": text,
                    "special": text in special,
                    "normalized": text not in special,
                }
                for text, i in added.items()
            }
        if not isinstance(listed, dict) or not all(i.isdecimal() for i in listed):
            raise TextError(
                f"{self._folder}: ids of added tokens must be numbers of tokens "
                "(added_tokens_decoder of tokenizer_config.json, or added_tokens.json)"
            )
        if (count := len(listed) + len(present)) > _MAX_LISTED:
            raise TextError(f"{self._folder}: {count} added tokens, at most {_MAX_LISTED} are read")
        name = "added_tokens_decoder"
        return {int(i): self._added_token(name, listed[i]) for i in listed} | present

    def _add_tokens(self, core: Core) -> None:
        """Add the tokens that only other files than tokenizer.json name, as `transformers` does."""
        listed, present = self._listed_tokens(core), core.get_added_tokens_decoder().values()
        adding = [listed[i] for i in sorted(listed)]
        texts = {token.content for token in (*present, *adding)}
        others = [token for _, token in self._special if token.content not in texts]
        adding += {repr(token): token for token in others}.values()
        special = {token.content for token in present if token.special}
        special |= {token.content for name, token in self._special if name}
        for token in adding:
            token.special = token.special or token.content in special
        core.add_tokens(adding)
        moved = [t.content for i, t in listed.items() if core.token_to_id(t.content) != i]
        if moved:
            self.notes.append(f"tokenizer.json's ids are taken, not others for: {moved[:9]}")

    def _special_ids(self, core: Core, turn_end: str | None) -> SpecialIds:
        named = self.special_tokens()
        eos = core.token_to_id(named.get("eos_token", ""))
        stated = [
            eos,
            *eos_token_ids(self.generation_config, self._folder / "generation_config.json"),
        ]
        stated += eos_token_ids(self._config, self._config_path)
        end = core.token_to_id(turn_end or "")
        if end is not None and end not in stated:
            core.add_tokens([AddedToken(turn_end, special=True, normalized=False)])
            self.notes.append(f"{turn_end} ends answers: the chat template writes it behind them")
        ids = [i for i in dict.fromkeys((*stated, end)) if i is not None]
        present = set(core.get_vocab().values())
        unknown = [i for i in ids if i not in present]
        if unknown:
            self.notes.append(f"eos_token_id: the vocabulary has no {unknown[:9]}; left out")
        return SpecialIds(
            bos_token_id=core.token_to_id(named.get("bos_token", "")),
            eos_token_ids=tuple(i for i in ids if i in present),
        )

    def _note_differences(self, core: Core, added: list[int]) -> None:
        """Note where tokenizer.json, which is used, differs from other files."""
        for name in ("bos_token", "eos_token"):
            adds = core.token_to_id(self.special_tokens().get(name, "")) in added
            if self._tokenizer_config.get(f"add_{name}", adds) is not adds:
                done = "adds it all the same" if adds else "does not add it"
                self.notes.append(f"add_{name} says otherwise, but tokenizer.json {done}")
        name = str(self._tokenizer_config.get("tokenizer_class")).removesuffix("Fast")
        steps = _STEPS_OF_CLASSES.get(name)
        found = (repr(core.normalizer), repr(core.pre_tokenizer))
        if steps and not all(one.startswith(step) for one, step in zip(found, steps, strict=True)):
            note = f"{name} in transformers 5 normalises or cuts text otherwise"
            self.notes.append(f"{note}; tokenizer.json is taken as it is")


def _text(token: object) -> str | None:
    """Return the text of a token, which is a text or an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file, empty if there is no file. Raises `TextError`."""
    try:
        return read_json_object(path)
    except FileNotFoundError:
        return {}
    except FormatError as error:
        raise TextError(str(error)) from error


def eos_token_ids(config: Mapping[str, object], path: Path) -> list[int]:
    """Return the ids under `eos_token_id`: one, a list, or null. Raises `TextError`."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise TextError(
            f"{path}: eos_token_id must be a number or a list of them, got {shown(value)}"
        )
    return [*ids]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8: {error}") from error


def _named_templates(value: object, path: Path) -> Iterator[tuple[str, str]]:
    """Yield names and templates of a text, an object by name, or a list of named templates."""
    if isinstance(value, str):
        yield "default", value
    elif isinstance(value, dict) and all(isinstance(one, str) for one in value.values()):
        yield from value.items()
    elif isinstance(value, list):
        for entry in value:
            match entry:
                case {"name": str(name), "template": str(template)}:
                    yield name, template
                case _:
                    wanted = "an entry of chat_template must have name and template"
                    raise TextError(f"{path}: {wanted}: {shown(entry)}")
    elif value is not None:
        raise TextError(f"{path}: chat_template must be a text or a list of named ones")
