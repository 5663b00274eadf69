"""One configuration out of four sources: flag over environment over file over default.

Everything wrong is found before anything starts, and each fault is one line that names the key,
its source and what is allowed. Knows nothing of argparse (`server/cli.py`) and never prints.
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

#: Variables of our prefix that are no fields, and what they do.
RESERVED_VARIABLES: Mapping[str, str] = {
    CONFIG_VARIABLE: "a config file or preset, as --config",
    "OCTAVO_HOME": "where models and compiled code are kept (default: ~/.cache/octavo)",
    "OCTAVO_CPU_OPS": "a prebuilt CPU op to load instead of compiling one",
    "OCTAVO_CPU_ISA": "the widest vector instructions the CPU op may use",
}

_PRESETS_FOLDER = Path(__file__).parent

#: Kubernetes gives every container `NAME_SERVICE_HOST`, `NAME_PORT=tcp://...` and the like for a
#: Service of that name; one that is called octavo looks like settings of ours.
_KUBERNETES_LINK = re.compile(r"OCTAVO_(SERVICE_(HOST|PORT)|PORT_\d+_).*")

MASK = "***"


class ConfigError(ValueError):
    """What is wrong with the configuration: one line a fault, in `problems`."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(slots=True)
class _Gathered:
    """Values by field name, each with the words for its source, and what was wrong on the way."""

    values: dict[str, object] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def put(self, known: ConfigField, value: object, source: str) -> None:
        """Take a value; what was there came from a weaker source."""
        self.values[known.name] = value
        self.sources[known.name] = source

    def refuse(self, known: ConfigField, value: object) -> None:
        """Note that the field's value will not do."""
        shown = "this value" if known.is_secret else repr(value)
        self.problems.append(
            f"{known.name} ({self.sources[known.name]}): {shown} is not allowed; "
            f"expected {known.allowed}"
        )


def presets() -> dict[str, Path]:
    """Return the presets shipped with Octavo, by name."""
    return {path.stem: path for path in sorted(_PRESETS_FOLDER.glob("*.toml"))}


def config_file(name: str) -> Path:
    """Return the file meant by `--config NAME`: the preset of that name, else that path."""
    return presets().get(name) or Path(name)


def load_config(
    flags: Mapping[str, object], environ: Mapping[str, str], file: Path | None
) -> OctavoConfig:
    """Resolve the configuration once, at start.

    `flags` are field names with the values given on the command line (None: not given). `file` is
    TOML with the flat field names as keys, in snake_case or kebab-case; where it is None, the
    file that `OCTAVO_CONFIG` names is read. Raises `ConfigError` with every fault found.
    """
    fields = config_fields()
    gathered = _Gathered()
    if file is None and environ.get(CONFIG_VARIABLE):
        file = config_file(environ[CONFIG_VARIABLE])
    if file is not None:
        _gather_file(gathered, fields, file)
    _gather_environ(gathered, fields, environ)
    _gather_flags(gathered, fields, flags)
    for name, value in list(gathered.values.items()):
        if not _has_plain_sense(fields[name], value):
            gathered.refuse(fields[name], value)
            del gathered.values[name]
    validated = {
        section_name: _validate_section(section_name, gathered, fields)
        for section_name in sections()
    }
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
    """Show how many secrets there are, and whether there is one."""
    return [MASK for _ in value] if isinstance(value, list) else value and MASK


def _gather_file(gathered: _Gathered, fields: Mapping[str, ConfigField], file: Path) -> None:
    source = f"file {file}"
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        gathered.problems.append(
            f"config ({source}): cannot be read: {error.strerror}; "
            f"expected a TOML file or a preset: {', '.join(presets())}"
        )
        return
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are both
        gathered.problems.append(f"config ({source}): is not TOML in UTF-8: {error}")
        return
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in fields:
            gathered.problems.append(_unknown(key, source, fields, name))
        elif name in gathered.values:
            gathered.problems.append(f"{name} ({source}): is given twice, with - and with _")
        else:
            gathered.put(fields[name], value, source)


def _gather_environ(
    gathered: _Gathered, fields: Mapping[str, ConfigField], environ: Mapping[str, str]
) -> None:
    by_variable = {known.variable: known for known in fields.values()}
    for variable, value in sorted(environ.items()):
        if not variable.startswith(ENV_PREFIX) or variable in RESERVED_VARIABLES:
            continue
        source = f"environment {variable}"
        known = by_variable.get(variable)
        if known is not None:
            gathered.put(known, _split(value) if known.kind == "list" else value, source)
        elif _KUBERNETES_LINK.fullmatch(variable):
            gathered.problems.append(
                f"{variable} ({source}): comes from a Kubernetes Service named octavo; "
                "set enableServiceLinks: false in the pod, or rename the Service"
            )
        else:
            allowed = [*by_variable, *RESERVED_VARIABLES]
            gathered.problems.append(_unknown(variable, source, allowed, variable))


def _gather_flags(
    gathered: _Gathered, fields: Mapping[str, ConfigField], flags: Mapping[str, object]
) -> None:
    for name, value in flags.items():
        if value is None:
            continue
        if name in fields:
            word = "flag" if fields[name].flag.startswith("-") else "argument"
            gathered.put(fields[name], value, f"{word} {fields[name].flag}")
        else:
            gathered.problems.append(_unknown(name, "flags", fields, name))


def _split(text: str) -> list[str] | str:
    """Comma- or space-separated items; an empty variable stays an (invalid) empty text."""
    return [item for item in re.split(r"[\s,]+", text) if item] or ""


def _has_plain_sense(known: ConfigField, value: object) -> bool:
    """Whether a value is free of what pydantic would take in a sense nobody meant.

    `port = true` is not port 1, and an empty `OCTAVO_API_KEY` is not a wish for an open server.
    """
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, list | tuple):
        return known.kind == "list" and all(
            isinstance(item, str) and item.strip() for item in value
        )
    return known.kind == "bool" or not isinstance(value, bool)


def _validate_section(
    section_name: str, gathered: _Gathered, fields: Mapping[str, ConfigField]
) -> object:
    """Return the section; None where a value is wrong, which then stands in `problems`."""
    values = {
        name: value
        for name, value in gathered.values.items()
        if fields[name].section == section_name
    }
    try:
        return sections()[section_name].model_validate(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_context=False):
            name = str(fault["loc"][0]) if fault["loc"] else ""
            if name in fields:
                gathered.refuse(fields[name], gathered.values[name])
            else:
                told = fault["msg"].removeprefix("Value error, ")
                gathered.problems.append(f"{section_name}: {told}")
        return None


def _unknown(key: str, source: str, allowed: Iterable[str], spelled: str) -> str:
    near = difflib.get_close_matches(spelled, allowed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(allowed)}"
    return f"{key} ({source}): is not a known key; {hint}"
