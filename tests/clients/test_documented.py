"""docs/clients.md names the clients that are tested, in the versions that are installed."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NODE = ROOT / "tests" / "clients" / "node"


def _pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.MULTILINE))


def _node_pins() -> dict[str, str]:
    package = json.loads((NODE / "package.json").read_text())
    pins: dict[str, str] = package["dependencies"] | package["optionalDependencies"]
    return pins


def _rows() -> list[tuple[str, list[str], Path]]:
    row = re.compile(r"^\| (\S+)(?: \((\w+)\))? \| ([\d., ]+) \| `(tests/.+)` \|$", re.MULTILINE)
    return [
        (f"{name} {kind}".strip(), versions.split(", "), ROOT / suite)
        for name, kind, versions, suite in row.findall((ROOT / "docs" / "clients.md").read_text())
    ]


def test_the_versions_are_those_that_are_installed() -> None:
    clients = _pins(ROOT / "tests" / "clients" / "requirements.txt")
    project = _pins(ROOT / "constraints.txt")
    node = _node_pins()
    assert {name: versions for name, versions, _ in _rows()} == {
        "openai Python": [project["openai"], clients["openai"]],
        "langchain-openai": [clients["langchain-openai"]],
        "litellm": [clients["litellm"]],
        "openai npm": [node["openai"]],
        "ai npm": [node["ai"]],
        "@ai-sdk/openai-compatible": [node["@ai-sdk/openai-compatible"]],
        "@ai-sdk/openai": [node["@ai-sdk/openai"]],
        "@openai/codex": [node["@openai/codex"]],
        "opencode-linux-x64": [node["opencode-linux-x64"]],
    }


def test_each_has_a_suite_that_is_run() -> None:
    run = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    for name, _, suite in _rows():
        assert suite.is_file(), name
        assert suite.name.startswith("test_") or f'"{suite.name}"' in run, name


def test_the_lock_names_versions_and_no_registry() -> None:
    lock = json.loads((NODE / "package-lock.json").read_text())
    for name, version in _node_pins().items():
        assert lock["packages"][f"node_modules/{name}"]["version"] == version
    for name, package in lock["packages"].items():
        assert "resolved" not in package, name
        assert "integrity" in package or name == "", name
