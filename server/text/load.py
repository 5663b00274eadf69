"""Loads the tokenizer and the chat template of a model from its path."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from server.text.dummy import DUMMY_TEMPLATE, dummy_tokenizer
from server.text.folder import ModelFolder
from server.text.gguf_tokenizer import GGUFMetadata, gguf_tokenizer, named_ids
from server.text.template import ChatTemplate, TemplateError
from server.text.token_bytes import TextError
from server.text.tokenizer import Tokenizer

Clock = Callable[[], datetime]

#: Chat templates that an operator may choose by name if a model has none or a wrong one.
NAMED_TEMPLATES: Mapping[str, str] = {
    path.stem: path.read_text(encoding="utf-8").removesuffix("\n")
    for path in sorted(Path(__file__).with_name("templates").glob("*.jinja"))
}
_PROBE = "octavo"
_TURN_END = re.compile(r"\s*(<[^<>\s]+>|\[\w+\])")
_MARK = re.compile(r"<[|\uff5c][^<>\s]+[|\uff5c]>|<\w+_of_turn>")


@dataclass(frozen=True, slots=True)
class ModelText:
    """The text side of a model: its tokenizer and its chat template."""

    tokenizer: Tokenizer
    #: None for a model that completes text and does not chat.
    template: ChatTemplate | None
    #: The sampling that the model's makers suggest; unchecked
    #: (`server/generation/sampling.py`).
    sampling_defaults: Mapping[str, object] = field(default_factory=dict)
    #: Choices between two readings of the model's files, for the log of the start.
    notes: tuple[str, ...] = ()
    #: By their names in `transformers`, such as `bos_token`.
    special_tokens: Mapping[str, str] = field(default_factory=dict)


def local_time() -> datetime:
    """Return the time in the server's time zone, for `strftime_now` of templates."""
    return datetime.now(tz=UTC).astimezone()


def chosen_template(chosen: str) -> str:
    """Return the source of the template in a file or of a built-in name. Raises `ValueError`."""
    if chosen in NAMED_TEMPLATES:
        return NAMED_TEMPLATES[chosen]
    names = ", ".join(NAMED_TEMPLATES)
    try:
        return Path(chosen).read_text(encoding="utf-8")
    except FileNotFoundError:
        message = f"is neither a file nor the name of a built-in template ({names})"
    except (OSError, UnicodeDecodeError) as error:
        message = f"cannot be read: {error}"
    raise ValueError(f"chat_template: {chosen!r} {message}")


def load_text(
    path: Path, *, now: Clock = local_time, chat_template: str | None = None
) -> ModelText:
    """Load the text side of a model: a folder, a .gguf file, or a dummy's CONFIG.json.

    A tokenizer.json beside CONFIG.json is used, else the dummy's own bytes. Takes 0.1 s for a
    vocabulary of 49k tokens, 0.4 s for 128k, so nothing is cached on disk. `chat_template`: a
    source to use instead of the model's own.
    Raises `TextError` that names the file at fault.
    """
    if path.is_dir():
        return _from_folder(ModelFolder(path), path, now, chat_template)
    if path.suffix == ".gguf":
        return _from_gguf(path, now, chat_template)
    if path.suffix != ".json" or not path.is_file():
        raise TextError(f"{path} is neither a model folder, nor a .gguf file, nor a CONFIG.json")
    if (path.parent / "tokenizer.json").is_file():
        return _from_folder(ModelFolder(path.parent, config=path), path, now, chat_template)
    template = _template({"default": chat_template or DUMMY_TEMPLATE}, {}, path, now)
    return ModelText(dummy_tokenizer(path), template)


def _from_folder(
    folder: ModelFolder, path: Path, now: Clock, chat_template: str | None
) -> ModelText:
    sources = {"default": chat_template} if chat_template else folder.template_sources()
    special = folder.special_tokens()
    template = _template(_with_default(sources, folder.notes), special, path, now)
    tokenizer = folder.tokenizer(_turn_end(template))
    return ModelText(tokenizer, template, folder.generation_config, tuple(folder.notes), special)


def _from_gguf(path: Path, now: Clock, chat_template: str | None) -> ModelText:
    metadata = GGUFMetadata(path)
    tokens, ids = metadata.texts("tokenizer.ggml.tokens"), named_ids(metadata)
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[ids[key]] for name, key in named.items() if key in ids}
    names = metadata.texts("tokenizer.chat_templates")
    keys = {"default": "tokenizer.chat_template"}
    keys |= {name: f"tokenizer.chat_template.{name}" for name in names}
    found = {name: metadata.text(key) for name, key in keys.items()}
    sources = {name: source for name, source in found.items() if source is not None}
    if chat_template:
        sources = {"default": chat_template}
    sources = _with_default(sources, metadata.notes)
    template = _template(sources, special, path, now)
    marks = {mark for source in sources.values() for mark in _MARK.findall(source)}
    tokenizer = gguf_tokenizer(metadata, _turn_end(template), marks)
    notes = tuple(dict.fromkeys(metadata.notes))
    return ModelText(tokenizer, template, notes=notes, special_tokens=special)


def _with_default(sources: Mapping[str, str], notes: list[str]) -> dict[str, str]:
    """Return the templates with one named `default`: the one for tools, if there is no other."""
    if "default" in sources or "tool_use" not in sources:
        return dict(sources)
    notes.append("the chat template tool_use is used for all chats: there is none named default")
    return {"default": sources["tool_use"], **sources}


def _turn_end(template: ChatTemplate | None) -> str | None:
    """Return the tag that a template writes directly behind an assistant's message, or None."""
    if template is None:
        return None
    turns = [{"role": "user", "content": "-"}, {"role": "assistant", "content": _PROBE}]
    try:
        _, seen, behind = template.render(turns, add_generation_prompt=False).rpartition(_PROBE)
    except TemplateError:
        return None
    found = _TURN_END.match(behind) if seen else None
    return found and found[1]


def _template(
    sources: Mapping[str, str], special_tokens: Mapping[str, str], path: Path, now: Clock
) -> ChatTemplate | None:
    if not sources:
        return None
    try:
        return ChatTemplate(sources, special_tokens=special_tokens, now=now)
    except TemplateError as error:
        raise TextError(f"{path}: chat template: {error}") from error
