"""The schema's fields as one flat list, for flags, file keys and `OCTAVO_*` variables.

Everything is derived from `configs/schema.py`, so a field added there is a flag, a key and a
variable at once. Knows nothing of values or their sources (`configs/load.py`), nor of argparse
(`server/cli.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic.fields import FieldInfo

from configs.schema import OctavoConfig, Section
from configs.sizes import format_size

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

#: By type, or by format where there is one, in JSON Schema.
_KINDS: Mapping[str, Kind] = {
    "size": "size",
    "boolean": "bool",
    "array": "list",
    "path": "path",
    "string": "text",
    "integer": "integer",
    "number": "number",
}
_BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
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
        name: _config_field(name, section_name, info, schema["properties"][name])
        for section_name, section in sections().items()
        for schema in [section.model_json_schema()]
        for name, info in section.model_fields.items()
    }


def _config_field(
    name: str, section: str, info: FieldInfo, schema: Mapping[str, Any]
) -> ConfigField:
    """Return the field of this JSON Schema, in which a type that may be None is the first."""
    value = schema.get("anyOf", [schema])[0]
    choices = tuple(value.get("enum", ()))
    kind: Kind = "choice" if choices else _KINDS[value.get("format", value["type"])]
    return ConfigField(
        name=name,
        section=section,
        description=info.description or "",
        default=info.default,
        choices=choices,
        kind=kind,
        allowed="one of " + ", ".join(choices) if choices else _allowed(value, kind),
    )


def _allowed(schema: Mapping[str, Any], kind: Kind) -> str:
    shown: Callable[[Any], str] = format_size if kind == "size" else str
    bounds = [f"{words} {shown(schema[key])}" for key, words in _BOUNDS.items() if key in schema]
    return " ".join([_ALLOWED[kind], " and ".join(bounds)]).rstrip()
