"""Tokenizer, chat templates and special tokens from a model folder's files.

The files are those `transformers` writes: tokenizer.json, tokenizer_config.json, config.json,
generation_config.json, chat_template.jinja. Only the first must be there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import orjson
from tokenizers import Tokenizer as Core

from server.text.pieces import TextError
from server.text.tokenizer import SpecialIds, Tokenizer

_TOKENIZER_FILE = "tokenizer.json"
#: Seen beside or instead of it; none of them can be read without another library.
_OTHER_TOKENIZER_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "tekken.json")


#: Those of generation_config.json that vLLM takes, too.
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class ModelFolder:
    """The text side of a model folder. `config` may be another file than its config.json."""

    def __init__(self, folder: Path, config: Path | None = None) -> None:
        """Read the small files. Raises `TextError` that names the file if one is no JSON."""
        self._folder = folder
        self._tokenizer_config = read_json(folder / "tokenizer_config.json")
        self._config = read_json(config or folder / "config.json")
        self._generation = read_json(folder / "generation_config.json")

    def tokenizer(self) -> Tokenizer:
        """Load tokenizer.json. Raises `TextError` that says which files were looked for."""
        path = self._folder / _TOKENIZER_FILE
        if not path.is_file():
            present = [n for n in _OTHER_TOKENIZER_FILES if (self._folder / n).is_file()]
            found = f" (there is {', '.join(present)}; convert it)" if present else ""
            raise TextError(f"looked for {path} and found no such file{found}")
        try:
            core = Core.from_file(str(path))
        # `tokenizers` raises plain Exception for whatever it cannot read.
        except Exception as error:
            raise TextError(f"{path} is not a readable tokenizer: {error}") from error
        return Tokenizer(core, self._special_ids(core))

    def special_tokens(self) -> dict[str, str]:
        """Return the text of `bos_token`, `eos_token` and whichever others the files name."""
        stated = self._tokenizer_config or read_json(self._folder / "special_tokens_map.json")
        extra = stated.get("extra_special_tokens")
        named = {**stated, **(extra if isinstance(extra, dict) else {})}
        texts = ((name, _token_text(value)) for name, value in named.items())
        return {name: text for name, text in texts if name.endswith("_token") and text is not None}

    def template_sources(self) -> dict[str, str]:
        """Chat templates by name; empty if there is none. A .jinja file goes before the JSON."""
        sources = dict(_named_templates(self._tokenizer_config.get("chat_template")))
        if not sources:
            legacy = read_json(self._folder / "chat_template.json")
            sources.update(_named_templates(legacy.get("chat_template")))
        main = self._folder / "chat_template.jinja"
        if main.is_file():
            sources["default"] = main.read_text(encoding="utf-8")
        for path in sorted((self._folder / "additional_chat_templates").glob("*.jinja")):
            sources[path.stem] = path.read_text(encoding="utf-8")
        return sources

    def sampling_defaults(self) -> dict[str, float]:
        """Return the sampling that the model's makers ask for, by vLLM's names of parameters."""
        stated = {name: self._generation.get(name) for name in _SAMPLING_DEFAULTS}
        return {
            name: value
            for name, value in stated.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }

    def _special_ids(self, core: Core) -> SpecialIds:
        tokens = self.special_tokens()
        bos = core.token_to_id(tokens.get("bos_token", ""))
        eos = core.token_to_id(tokens.get("eos_token", ""))
        ends = [*([] if eos is None else [eos])]
        for source in (self._generation, self._config):
            ends += eos_token_ids(source)
        return SpecialIds(
            bos_token_id=bos,
            eos_token_ids=tuple(dict.fromkeys(ends)),
            adds_bos=_flag(self._tokenizer_config.get("add_bos_token")),
            adds_eos=_flag(self._tokenizer_config.get("add_eos_token")),
        )


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file, empty if there is no file. Raises `TextError`."""
    try:
        content = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except orjson.JSONDecodeError as error:
        raise TextError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TextError(f"{path} must hold a JSON object")
    return content


def eos_token_ids(config: Mapping[str, object]) -> list[int]:
    """Ids under `eos_token_id`, which may be one, a list, or null."""
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return [token_id for token_id in ids if isinstance(token_id, int)]


def _flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _token_text(value: object) -> str | None:
    """Tokens stand there as their text or as an object around it."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _named_templates(value: object) -> Iterator[tuple[str, str]]:
    """One template, or a list of objects with a name and a template."""
    if isinstance(value, str):
        yield "default", value
    elif isinstance(value, list):
        for entry in value:
            match entry:
                case {"name": str(name), "template": str(template)}:
                    yield name, template
                case _:
                    raise TextError(f"chat_template: an entry must have name and template: {entry}")
