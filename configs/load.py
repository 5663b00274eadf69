"""One configuration out of four sources: flag over environment over file over default.

Every error is found before anything starts, as one line that names the key, its source and the
allowed values. Knows nothing of argparse (`server/cli.py`) and never prints.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from configs.fields import ENV_PREFIX, ConfigField, config_fields, sections
from configs.schema import OctavoConfig

CONFIG_VARIABLE = "OCTAVO_CONFIG"

#: Variables with our prefix that are not fields, and their meaning.
RESERVED_VARIABLES: Mapping[str, str] = {
    CONFIG_VARIABLE: "a config file or preset, as --config",
    "OCTAVO_HOME": "where models and compiled code are kept (default: ~/.cache/octavo)",
    "OCTAVO_CPU_OPS": "a prebuilt CPU op to load instead of compiling one",
    "OCTAVO_CPU_ISA": "the widest vector instructions the CPU op may use",
}

_PRESETS_FOLDER = Path(__file__).parent

#: Kubernetes sets `NAME_SERVICE_HOST`, `NAME_PORT=tcp://...` and the like in every container for a
#: Service of that name. For a Service named octavo they have the form of settings.
_KUBERNETES_LINK = re.compile(r"OCTAVO_(SERVICE_(HOST|PORT)|PORT_\d+_).*")

MASK = "***"


class ConfigError(ValueError):
    """The errors of a configuration, one line each in `problems`."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(slots=True)
class _Gathered:
    """Values by field name, each with the name of its source, and the problems found so far."""

    fields: Mapping[str, ConfigField]
    values: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, known: ConfigField, value: object, source: str) -> None:
        """Set a value; it replaces one from a weaker source."""
        self.values[known.name] = value
        self.sources[known.name] = source

    def refuse(self, known: ConfigField, value: object) -> None:
        """Record that the field's value is not allowed."""
        shown = "this value" if known.is_secret else repr(value)
        self.problems.append(
            f"{known.name} ({self.sources[known.name]}): {shown} is not allowed; "
            f"expected {known.allowed}"
        )

    def read_file(self, file: Path) -> None:
        """Put the values of a TOML file."""
        source = f"file {file}"
        try:
            content = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            self.problems.append(
                f"config ({source}): cannot be read: {error.strerror}; "
                f"expected a TOML file or a preset: {', '.join(presets())}"
            )
            return
        except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are both
            self.problems.append(f"config ({source}): is not TOML in UTF-8: {error}")
            return
        for key, value in content.items():
            name = key.replace("-", "_")
            if name not in self.fields:
                self.problems.append(_unknown(key, source, self.fields, name))
            elif name in self.values:
                self.problems.append(f"{name} ({source}): is given twice, with - and with _")
            else:
                self.put(self.fields[name], value, source)

    def read_environ(self, environ: Mapping[str, str]) -> None:
        """Put the values of the `OCTAVO_*` variables."""
        by_variable = {known.variable: known for known in self.fields.values()}
        for variable, value in sorted(environ.items()):
            if not variable.startswith(ENV_PREFIX) or variable in RESERVED_VARIABLES:
                continue
            source = f"environment {variable}"
            known = by_variable.get(variable)
            if known is not None:
                self.put(known, _split(value) if known.kind == "list" else value, source)
            elif _KUBERNETES_LINK.fullmatch(variable):
                self.problems.append(
                    f"{variable} ({source}): comes from a Kubernetes Service named octavo; "
                    "set enableServiceLinks: false in the pod, or rename the Service"
                )
            else:
                allowed = [*by_variable, *RESERVED_VARIABLES]
                self.problems.append(_unknown(variable, source, allowed, variable))

    def read_flags(self, flags: Mapping[str, object]) -> None:
        """Put the values of the command line."""
        for name, value in flags.items():
            if value is None:
                continue
            if name in self.fields:
                word = "flag" if self.fields[name].flag.startswith("-") else "argument"
                self.put(self.fields[name], value, f"{word} {self.fields[name].flag}")
            else:
                self.problems.append(_unknown(name, "flags", self.fields, name))

    def section(self, section_name: str) -> object:
        """Return the section; None where a value is wrong, which is then in `problems`."""
        values = {
            name: value
            for name, value in self.values.items()
            if self.fields[name].section == section_name
        }
        try:
            return sections()[section_name].model_validate(values)
        except ValidationError as error:
            for fault in error.errors(include_url=False, include_context=False):
                name = str(fault["loc"][0]) if fault["loc"] else ""
                if name in self.fields:
                    self.refuse(self.fields[name], self.values[name])
                else:
                    message = fault["msg"].removeprefix("Value error, ")
                    self.problems.append(f"{section_name}: {message}")
            return None


def presets() -> dict[str, Path]:
    """Return the presets shipped with Octavo, by name."""
    return {path.stem: path for path in sorted(_PRESETS_FOLDER.glob("*.toml"))}


def config_file(name: str) -> Path:
    """Return the file of `--config NAME`: the preset of that name, else that path."""
    return presets().get(name) or Path(name)


def load_config(
    flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None
) -> OctavoConfig:
    """Resolve the configuration once, at start.

    `flags` are field names with the values given on the command line (None: not given). `file` is
    TOML with the flat field names as keys, in snake_case or kebab-case; where it is None, the
    file that `OCTAVO_CONFIG` names is read. Raises `ConfigError` with every fault found.
    """
    gathered = _Gathered(config_fields())
    if file is None and environ.get(CONFIG_VARIABLE):
        file = config_file(environ[CONFIG_VARIABLE])
    if file is not None:
        gathered.read_file(file)
    gathered.read_environ(environ)
    gathered.read_flags(flags)
    for name, value in list(gathered.values.items()):
        if not _has_plain_sense(gathered.fields[name], value):
            gathered.refuse(gathered.fields[name], value)
            del gathered.values[name]
    validated = {name: gathered.section(name) for name in sections()}
    if gathered.problems:
        raise ConfigError(gathered.problems)
    return OctavoConfig.model_validate(validated)


def describe(config: OctavoConfig) -> dict[str, object]:
    """Return every field by its flat name as plain JSON types, secrets masked: for logs."""
    dump = config.model_dump(mode="json")
    return {
        known.name: _masked(value) if known.is_secret else value
        for known in config_fields().values()
        for value in [dump[known.section][known.name]]
    }


def describe_changes(config: OctavoConfig) -> dict[str, object]:
    """Return the fields that differ from the defaults, as `describe` does."""
    defaults = describe(OctavoConfig())
    return {name: value for name, value in describe(config).items() if value != defaults[name]}


def _masked(value: object) -> object:
    """Replace secrets, but keep their number."""
    return [MASK for _ in value] if isinstance(value, list) else value and MASK


def _split(text: str) -> list[str] | str:
    """Split at commas and spaces; an empty variable stays an (invalid) empty text."""
    return [item for item in re.split(r"[\s,]+", text) if item] or ""


def _has_plain_sense(known: ConfigField, value: object) -> bool:
    """Return whether pydantic would read the value as it was meant.

    `port = true` is not port 1, and an empty `OCTAVO_API_KEY` does not open the server.
    """
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list | tuple):
        return known.kind == "list" and all(
            isinstance(item, str) and item.strip() for item in value
        )
    return known.kind == "bool" or not isinstance(value, bool)


def _unknown(key: str, source: str, allowed: Iterable[str], spelled: str) -> str:
    near = difflib.get_close_matches(spelled, allowed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(allowed)}"
    return f"{key} ({source}): is not a known key; {hint}"
