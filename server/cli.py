"""The command line, built from the schema: a field added there is a flag here at once.

Values stay as they were typed: `configs/load.py` validates them together with those of the
environment and the file, so that a bad value reads the same whatever its source.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, cast

from configs.fields import ENV_PREFIX, POSITIONAL, ConfigField, config_fields, sections
from configs.load import RESERVED_VARIABLES, config_file, presets

_METAVARS = {
    "bool": "",
    "size": "SIZE",
    "path": "FILE",
    "text": "TEXT",
    "integer": "N",
    "number": "N",
}


class CommandLine(NamedTuple):
    """What was asked for."""

    command: Literal["serve", "version"]
    #: Field name to value, only those given: for `configs.load.load_config`.
    flags: dict[str, object]
    #: `--config`, a preset's name resolved to its file.
    config: Path | None


def parse(argv: Sequence[str]) -> CommandLine:
    """Read the arguments after the program's name.

    Exits 2 with one line on a wrong one, 0 after `--help`.
    """
    parsed = vars(_parser().parse_args(argv))
    command = cast("Literal['serve', 'version']", parsed.pop("command"))
    config = parsed.pop("config", None)
    flags = {name: value for name, value in parsed.items() if value is not None}
    return CommandLine(command, flags, None if config is None else config_file(config))


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would print the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        hint = f"see {self.prog} --help"
        unknown = message.partition("unrecognized arguments: ")[2].split()
        if unknown:
            flags = ["--config", *(known.flag for known in config_fields().values())]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
            hint = f"did you mean {near[0]}?" if near else hint
        self.exit(2, f"{self.prog}: {message}; {hint}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="octavo",
        description="An OpenAI-compatible serving daemon for language models.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser("version", help="print the version", allow_abbrev=False)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="octavo serve [MODEL] [--config FILE] [--FLAG VALUE ...]",
        description="Serve a model over HTTP until SIGTERM or SIGINT.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    serve.add_argument(
        "--config",
        metavar="FILE",
        help=f"a TOML file, or one of the presets {', '.join(presets())}",
    )
    by_section = {
        name: serve.add_argument_group(name, section.__doc__)
        for name, section in sections().items()
    }
    for known in config_fields().values():
        _add_field(by_section[known.section], known)
    return parser


def _add_field(group: argparse._ArgumentGroup, known: ConfigField) -> None:
    help_text = _help(known).replace("%", "%%")
    metavar = "{" + ",".join(known.choices) + "}" if known.choices else _metavar(known)
    if known.name == POSITIONAL:
        group.add_argument(known.name, nargs="?", metavar=known.flag, help=help_text)
    elif known.kind == "bool":
        group.add_argument(
            known.flag, action=argparse.BooleanOptionalAction, default=None, help=help_text
        )
    elif known.kind == "list":
        group.add_argument(known.flag, action="extend", nargs="+", metavar=metavar, help=help_text)
    else:
        group.add_argument(known.flag, metavar=metavar, help=help_text)


def _metavar(known: ConfigField) -> str:
    """Say what goes behind the flag; in a list, its name's last word: cors_origins, ORIGIN."""
    if known.kind == "list":
        return known.name.rpartition("_")[2].removesuffix("s").upper()
    return _METAVARS[known.kind]


def _help(known: ConfigField) -> str:
    text = known.description or known.allowed
    return text if known.default_text is None else f"{text} (default: {known.default_text})"


def _epilog() -> str:
    reserved = "\n".join(f"  {name:<16} {text}" for name, text in RESERVED_VARIABLES.items())
    return (
        "Each flag is also a key of the file (max_model_len) and a variable of the environment\n"
        f"({ENV_PREFIX}MAX_MODEL_LEN). A flag wins over the environment, that over the file, that "
        "over\nthe default. Sizes are written 512MiB or 2GiB. Secrets are safer in --api-key-file: "
        "others\ncan read a running program's flags.\n\n"
        f"Other variables:\n{reserved}"
    )
