"""The command line, built from the schema: a field added there is also a flag.

Values stay as they were typed. `configs/load.py` validates them together with those of the
environment and the file, so that the error for a bad value does not depend on its source.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn, cast

from configs.fields import ENV_PREFIX, POSITIONAL, ConfigField, config_fields, sections
from configs.load import RESERVED_VARIABLES, config_file, presets
from server import __version__
from server.cache_command import CACHE_ACTIONS, CacheAction

_METAVARS = {
    "bool": "",
    "size": "SIZE",
    "path": "FILE",
    "text": "TEXT",
    "integer": "N",
    "number": "N",
}

#: argparse's message; its quotes differ between versions of Python.
_WRONG_CHOICE = re.compile(r"invalid choice: '([^']+)' \(choose from (.+)\)")


class CommandLine(NamedTuple):
    """A parsed command line."""

    command: Literal["serve", "version", "export", "cache"]
    #: Field name to value, if given: for `configs.load.load_config`.
    flags: dict[str, object]
    #: `--config`, a preset's name resolved to its file.
    config: Path | None
    #: Where `tokenizer export` writes, or the one that `cache` reads.
    folder: Path | None = None
    #: Of `cache`.
    action: CacheAction | None = None


def parse(argv: Sequence[str]) -> CommandLine:
    """Parse the arguments after the program's name.

    Exits with 2 and one line for a wrong one, with 2 and the help if there is none, and with 0
    after `--help`.
    """
    parser = _parser()
    if not argv:
        parser.exit(2, parser.format_help())
    parsed = vars(parser.parse_args(argv))
    if parsed["command"] is None:
        parser.error("a COMMAND is needed")
    if parsed["command"] == "help":
        parser.parse_args([*parsed["words"], "--help"])
    command = cast("Literal['serve', 'version', 'export', 'cache']", parsed.pop("command"))
    config, folder = parsed.pop("config", None), parsed.pop("folder", None)
    action = parsed.pop("action", None)
    flags = {name: value for name, value in parsed.items() if value is not None}
    file = None if config is None else config_file(config)
    return CommandLine(command, flags, file, folder, action)


class _Parser(argparse.ArgumentParser):
    """Reports errors in one line; argparse would print the whole usage before it."""

    def error(self, message: str) -> NoReturn:
        hint = f"see {self.prog} --help"
        near: list[str] = []
        if unknown := message.partition("unrecognized arguments: ")[2].split():
            flags = ["--config", "--help", "--version"]
            flags += [known.flag for known in config_fields().values()]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        elif wrong := _WRONG_CHOICE.search(message):
            near = difflib.get_close_matches(wrong[1], re.findall(r"\w+", wrong[2]), n=1)
        hint = f"did you mean {near[0]}?" if near else hint
        self.exit(2, f"{self.prog}: {message}; {hint}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="octavo",
        description="An OpenAI-compatible serving daemon for language models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("version", help="print the version", allow_abbrev=False)
    shown = commands.add_parser("help", help="print this, or a command's help", allow_abbrev=False)
    shown.add_argument("words", nargs="*", metavar="COMMAND")
    _add_tokenizer(commands)
    _add_cache(commands)
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


def _add_tokenizer(commands: argparse._SubParsersAction[_Parser]) -> None:
    tokenizer = commands.add_parser(
        "tokenizer", help="write a model's tokenizer to a folder", allow_abbrev=False
    )
    actions = tokenizer.add_subparsers(metavar="ACTION", required=True)
    export = actions.add_parser(
        "export",
        help="write the files that AutoTokenizer of transformers reads",
        description="Write tokenizer.json, tokenizer_config.json with the chat template, and"
        " special_tokens_map.json, for programs that want a folder.",
        allow_abbrev=False,
    )
    export.set_defaults(command="export")
    export.add_argument("folder", metavar="DIR", type=Path, help="made if it is not there")
    export.add_argument(
        POSITIONAL, nargs="?", metavar="MODEL", help=_help(config_fields()[POSITIONAL])
    )


def _add_cache(commands: argparse._SubParsersAction[_Parser]) -> None:
    cache = commands.add_parser(
        "cache", help="inspect the pages on a disk (--kv-disk-path)", allow_abbrev=False
    )
    actions = cache.add_subparsers(dest="action", metavar="ACTION", required=True)
    for action, text in CACHE_ACTIONS.items():
        one = actions.add_parser(action, help=text, description=text, allow_abbrev=False)
        one.set_defaults(command="cache")
        one.add_argument("folder", metavar="DIR", type=Path, help="that of --kv-disk-path")


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
    """Return the name of a flag's value; for a list its last word: cors_origins, ORIGIN."""
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
