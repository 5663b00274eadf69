"""The command line, and its messages for typing errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.fields import config_fields, sections
from configs.load import RESERVED_VARIABLES, load_config, presets
from server import __version__
from server.cli import CommandLine, parse


def said(argv: list[str], capsys: pytest.CaptureFixture[str], *, code: int) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == code
    captured = capsys.readouterr()
    assert not (captured.out if code else captured.err)
    return captured.err if code else captured.out


def test_only_what_was_given_is_returned() -> None:
    assert parse(["serve"]) == CommandLine("serve", {}, None)
    assert parse(["version"]) == CommandLine("version", {}, None)


def test_a_tokenizer_is_exported_to_a_folder() -> None:
    assert parse(["tokenizer", "export", "out"]) == CommandLine("export", {}, None, Path("out"))
    assert parse(["tokenizer", "export", "out", "m.gguf"]).flags == {"model": "m.gguf"}


@pytest.mark.parametrize("action", ["ls", "stats", "verify", "clear"])
def test_a_store_of_pages_is_inspected(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    parsed = parse(["cache", action, "there"])
    assert (parsed.command, parsed.action, parsed.folder) == ("cache", action, Path("there"))
    assert "the following arguments are required: DIR" in said(["cache", action], capsys, code=2)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "usage: octavo [-h] [--version] COMMAND"),
        (["help"], 0, "usage: octavo [-h] [--version] COMMAND"),
        (["help", "serve"], 0, "usage: octavo serve [MODEL]"),
        (["help", "tokenizer", "export"], 0, "DIR"),
        (["--help"], 0, "usage: octavo [-h] [--version] COMMAND"),
        (["--version"], 0, f"octavo {__version__}\n"),
    ],
)
def test_help_and_version(
    argv: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in said(argv, capsys, code=code)


def test_model_is_positional_wherever_it_stands() -> None:
    assert parse(["serve", "smollm2", "--port", "1"]).flags == {"model": "smollm2", "port": "1"}
    assert parse(["serve", "--port", "1", "smollm2"]).flags == {"model": "smollm2", "port": "1"}


def test_flags_of_every_kind() -> None:
    argv = ["serve", "--api-key", "a", "b", "--api-key", "c", "--debug", "--no-protect-metrics"]
    argv += ["--kv-cache-memory=2GiB", "--dtype", "float32", "--api-key-file", "keys.txt"]
    assert parse(argv).flags == {
        "api_key": ["a", "b", "c"],
        "debug": True,
        "protect_metrics": False,
        "kv_cache_memory": "2GiB",
        "dtype": "float32",
        "api_key_file": "keys.txt",
    }


def test_config_is_a_path_or_a_preset() -> None:
    assert parse(["serve", "--config", "my.toml"]).config == Path("my.toml")
    assert parse(["serve", "--config", "cpu"]).config == presets()["cpu"]


def test_every_field_can_be_typed_and_loaded() -> None:
    argv = ["serve"]
    fields = config_fields()
    # In place of two others: tests/configs/test_speculation.py.
    del fields["speculative_config"]
    named = {"cors_origins": "*", "kv_policy": "window:64", "cache_pin_share": "0.5"}
    for known in fields.values():
        value = (
            known.choices[-1]
            if known.choices
            else {"size": "1MiB", "number": "2.5"}.get(known.kind, "7")
        )
        value = named.get(known.name, value)
        flag = [] if known.name == "model" else [known.flag]
        argv += flag if known.kind == "bool" else [*flag, value]
    flags = parse(argv).flags
    assert set(flags) == set(fields)
    assert load_config(flags, {}, None).server.port == 7


def test_help_shows_every_flag_section_default_and_variable(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(["serve", "--help"], capsys, code=0)
    for known in config_fields().values():
        assert re.search(rf"^  {known.flag}\b", text, re.MULTILINE), known.flag
        if known.default_text is not None:
            assert known.default_text in text
    for name, section in sections().items():
        assert f"\n{name}:\n  {section.__doc__}" in text
    assert all(name in text for name in RESERVED_VARIABLES)
    assert "(default: 8 MiB)" in text
    assert "cpu, default, h100" in text


def test_top_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(["--help"], capsys, code=0)
    assert re.findall(r"^    (\w+)\b", text, re.MULTILINE) == [
        "version",
        "help",
        "tokenizer",
        "cache",
        "serve",
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--"], "unrecognized arguments: --"),
        (["sing"], "invalid choice: 'sing'"),
        (["serv"], "did you mean serve?"),
        (["verson"], "did you mean version?"),
        (["--verison"], "unrecognized arguments: --verison; did you mean --version?"),
        (["tokenizer"], "the following arguments are required: ACTION"),
        (["tokenizer", "exprot"], "did you mean export?"),
        (["tokenizer", "export"], "the following arguments are required: DIR"),
        (["serve", "--port"], "argument --port: expected one argument"),
        (["serve", "--prot", "1"], "unrecognized arguments: --prot; did you mean --port?"),
        (["serve", "--max-num=1"], "did you mean --max-num-seqs?"),
        (["serve", "--zzz"], "unrecognized arguments: --zzz; see octavo --help"),
        (["serve", "a", "b"], "unrecognized arguments: b"),
        (["version", "--port", "1"], "unrecognized arguments: --port 1"),
    ],
)
def test_a_slip_is_one_line_and_exit_code_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(argv, capsys, code=2)
    assert text.startswith("octavo")
    assert text.count("\n") == 1
    assert words in text
