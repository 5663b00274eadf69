"""The schema's fields as one flat list, for flags, file keys and `OCTAVO_*` variables.

Everything is derived from `configs/schema.py`, so a field added there is a flag, a key and a
variable at once. Knows nothing of values or their sources (`configs/load.py`), nor of argparse
(`server/cli.py`).
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from configs.schema import OctavoConfig, Section
from configs.sizes import format_size, parse_size_bytes

ENV_PREFIX = "OCTAVO_"

#: The one field that is a positional argument instead of a flag.
POSITIONAL = "model"

#: Fields whose values appear in no message and no log.
SECRETS = frozenset({"api_key", "ssl_keyfile_password"})


Kind = Literal["choice", "size", "bool", "list", "path", "text", "integer", "number"]

_ALLOWED: Mapping[Kind, str] = {
    "size": "a size such as 512MiB or 2GiB",
    "bool": "true or false",
    "list": "a list of non-empty texts",
    "path": "a path",
    "text": "a text",
    "integer": "a whole number",
    "number": "a number",
}

_KINDS: Mapping[object, Kind] = {
    bool: "bool",
    tuple: "list",
    Path: "path",
    str: "text",
    int: "integer",
    float: "number",
}


@dataclass(frozen=True, slots=True)
class ConfigField:
    """A setting."""

    #: As in the schema and in files: `max_model_len`.
    name: str
    #: Its attribute of `OctavoConfig`.
    section: str
    description: str
    default: object
    #: The values of a `Literal`; empty where any value of the type will do.
    choices: tuple[str, ...]
    kind: Kind
    #: The allowed values, as the end of the sentence "expected ...".
    allowed: str

    @property
    def flag(self) -> str:
        """As typed: `--max-model-len`; the positional argument is `MODEL`."""
        return "MODEL" if self.name == POSITIONAL else "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """As exported: `OCTAVO_MAX_MODEL_LEN`."""
        return ENV_PREFIX + self.name.upper()

    @property
    def is_secret(self) -> bool:
        """Whether values must be masked."""
        return self.name in SECRETS

    @property
    def default_text(self) -> str | None:
        """The default as an operator would type it; None where the program decides."""
        if self.default is None or self.default == ():
            return None
        if self.kind == "size" and isinstance(self.default, int):
            return format_size(self.default)
        return str(self.default).lower() if self.kind == "bool" else str(self.default)


def sections() -> dict[str, type[Section]]:
    """Return the sections by attribute name, in the schema's order."""
    return {
        name: section
        for name, info in OctavoConfig.model_fields.items()
        if isinstance(section := info.annotation, type) and issubclass(section, Section)
    }


def config_fields() -> dict[str, ConfigField]:
    """Return all fields by name, in the schema's order. Names are unique across sections."""
    return {
        name: _config_field(name, section_name, info)
        for section_name, section in sections().items()
        for name, info in section.model_fields.items()
    }


def _config_field(name: str, section: str, info: FieldInfo) -> ConfigField:
    leaves = [*_leaves(info.annotation), *_leaves_of_metadata(info.metadata)]
    choices = tuple(leaf for leaf in leaves if isinstance(leaf, str))
    kind = _kind(leaves, choices)
    return ConfigField(
        name=name,
        section=section,
        description=info.description or "",
        default=info.default,
        choices=choices,
        kind=kind,
        allowed="one of " + ", ".join(choices) if choices else _allowed(leaves, kind),
    )


def _kind(leaves: list[object], choices: tuple[str, ...]) -> Kind:
    if choices:
        return "choice"
    if parse_size_bytes in leaves:
        return "size"
    return next(kind for leaf, kind in _KINDS.items() if leaf in leaves)


def _leaves(annotation: object) -> Iterator[object]:
    """Yield the types, `Literal` values and constraints that an annotation is made of."""
    origin = get_origin(annotation)
    if origin is Literal:
        yield from get_args(annotation)
    elif origin is Annotated:
        inner, *metadata = get_args(annotation)
        yield from _leaves(inner)
        yield from _leaves_of_metadata(metadata)
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _leaves(member)
    else:
        yield origin or annotation


def _leaves_of_metadata(metadata: list[object]) -> Iterator[object]:
    for item in metadata:
        yield getattr(item, "func", item)


def _allowed(leaves: list[object], kind: Kind) -> str:
    bounds = [text for leaf in leaves if (text := _bound(leaf, is_size=kind == "size"))]
    return " ".join([_ALLOWED[kind], " and ".join(bounds)]).rstrip()


def _bound(leaf: object, *, is_size: bool) -> str | None:
    def shown(limit: object) -> str:
        return format_size(limit) if is_size and isinstance(limit, int) else str(limit)

    match leaf:
        case Ge(ge=limit):
            return f"of at least {shown(limit)}"
        case Gt(gt=limit):
            return f"above {shown(limit)}"
        case Le(le=limit):
            return f"at most {shown(limit)}"
        case Lt(lt=limit):
            return f"below {shown(limit)}"
        case _:
            return None
