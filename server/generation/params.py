"""One table of the parameters that are not honoured, so that none is ignored silently.

Fields of the models in `server/openai/schemas.py` are honoured. All other fields of a request are
looked up here: refused by name unless its value asks for nothing, or answered in `octavo.warnings`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import BaseModel

from server.answer_types import ParamWarning
from server.http.errors import Path, dotted, invalid, shortened

#: More are summed up.
MAX_WARNINGS = 64
_MAX_EXTRAS = 1024


#: One entry of `octavo.warnings`.
Warned: TypeAlias = ParamWarning


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A known parameter without effect here; harmless with one of the `neutral` values."""

    neutral: tuple[object, ...]
    #: Whether other values are refused; else they are warned of.
    is_refused: bool
    reason: str


#: Named, for the table below holds them as values, not as switches.
_TRUE, _FALSE = True, False


def refused(*neutral: object, because: str = "is not supported") -> Unsupported:
    """Return the entry of a parameter that is refused."""
    return Unsupported(neutral, is_refused=True, reason=because)


def warned(because: str, *neutral: object) -> Unsupported:
    """Return the entry of a parameter that is warned of."""
    return Unsupported(neutral, is_refused=False, reason=because)


_COMMON = {
    "use_beam_search": refused(_FALSE),
    "length_penalty": refused(1.0),
    "early_stopping": refused(_FALSE),
    "logits_processors": refused([]),
    "kv_transfer_params": refused(),
    "return_tokens_as_token_ids": refused(_FALSE),
    "spaces_between_special_tokens": refused(_TRUE),
    "detokenize": refused(_TRUE),
    "user": warned("it does not distinguish callers"),
    "metadata": warned("is not stored", {}),
    "store": warned("nothing is stored here", _FALSE),
    "service_tier": warned("there is one tier", "auto", "default"),
    "safety_identifier": warned("is not used"),
    "request_id": warned("send the header X-Request-Id instead"),
}
CHAT = {
    **_COMMON,
    "functions": refused([], because="are not supported"),
    "function_call": refused("none"),
    "audio": refused(),
    "modalities": refused(["text"], because="can only be ['text']"),
    "web_search_options": refused(),
    "chat_template": refused(because="of a request is not used: the model's own is"),
    "documents": refused([]),
    "mm_processor_kwargs": refused({}),
    "echo": refused(_FALSE),
    "verbosity": warned("has no effect on this model", "medium"),
}
COMPLETION = {
    **_COMMON,
    "suffix": refused("", because="is not supported: text cannot be inserted"),
    "prompt_embeds": refused(),
    "prompt_cache_key": warned("equal prefixes are shared without it; cache_salt keeps apart"),
    "prompt_cache_retention": warned("it is a field of chats and responses"),
}
TOKENIZE = {
    **{name: known for name, known in CHAT.items() if known.is_refused},
    "add_special": warned("it is called add_special_tokens here"),
    "parse_special": warned("special tokens in a prompt are always read as such", _TRUE),
    "with_pieces": warned("it is called return_token_strs here", _FALSE),
}
STREAM_OPTIONS = {"include_obfuscation": warned("chunks are not padded", _FALSE)}


def warning(at: Path | str, text: str) -> Warned:
    """Return the warning about a part of a request; `text` follows the part's name."""
    param = at if isinstance(at, str) else dotted(at)
    return {"param": param, "message": f"{param} {text}"}


def ignored(at: Path | str, because: str) -> Warned:
    """Return the warning of a part without effect."""
    return warning(at, f"was ignored: {because}")


def judge(
    extras: Mapping[str, Any] | None, table: Mapping[str, Unsupported], prefix: str = ""
) -> list[Warned]:
    """Return a warning for each parameter without effect. Raises `ApiError` for a refused one."""
    extras = extras or {}
    if len(extras) > _MAX_EXTRAS:
        raise invalid(f"{len(extras)} parameters are unknown here", prefix.rstrip(".") or None)
    warnings: list[Warned] = []
    for name, value in extras.items():
        known = table.get(name)
        if value is None or (known and _is_neutral(value, known.neutral)):
            continue
        param = prefix + shortened(name)
        if known is None:
            warnings.append(warning(param, "is unknown here and was ignored"))
        elif known.is_refused:
            raise invalid(f"{param} {known.reason}", param, code="unsupported_parameter")
        else:
            warnings.append(ignored(param, known.reason))
    return summed_up(warnings)


def summed_up(warnings: list[Warned]) -> list[Warned]:
    """Return at most `MAX_WARNINGS` of them, and one for the rest."""
    left = len(warnings) - MAX_WARNINGS
    message = f"and {left} more parameters were ignored"
    more: list[Warned] = [{"param": "*", "message": message}] if left > 0 else []
    return warnings[:MAX_WARNINGS] + more


def nested(part: BaseModel, at: str = "") -> Iterator[tuple[str, BaseModel]]:
    """Yield an object of a request and those within it, each with its path."""
    yield at, part
    prefix = at and at + "."
    for name in type(part).model_fields:
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            yield from nested(value, prefix + name)
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                if isinstance(inner, BaseModel):
                    yield from nested(inner, f"{prefix}{name}.{index}")


def _is_neutral(value: object, neutral: tuple[object, ...]) -> bool:
    """Compare types too: `True` is not 1."""
    return any(
        value == allowed and isinstance(value, bool) == isinstance(allowed, bool)
        for allowed in neutral
    )
