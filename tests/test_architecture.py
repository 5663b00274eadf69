"""Which folder may know which, and what every file keeps to."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Folder to what of ours it may import besides itself: whole packages, or single modules.
MAY_IMPORT = {
    "configs": set[str](),
    "cache": set[str](),
    "loadtest": set[str](),
    "model": {"configs"},
    "scheduler": {"cache", "configs", "model.interface"},
    "server": {"scheduler", "configs", "model.formats"},
}
#: The composition roots: single files that know more than their folder.
EXCEPTIONS = {"server/daemon.py": {"model.build", "model.weights.source"}}

#: The modules that write one API's answers.
APIS = {
    "openai": {
        f"server.{room}{name}"
        for room in ("", "openai.")
        for name in ("chat", "chat_choice", "completions", "routes")
    },
    "messages": {"server.messages"},
    "responses": {"server.responses"},
}

#: Heavy packages, for `model/` alone.
ONLY_IN_MODEL = {"torch", "transformers", "triton", "flash_attn", "flash_attn_interface"}

#: Of `model/`, what other folders and the API process load.
LIGHT_IN_MODEL = {
    f"model/{name}.py"
    for name in (
        *("__init__", "interface", "fake", "source", "hub", "weight_files"),
        *("grammar", "grammar_check", "json_patterns", "json_schema", "matchers"),
        *("formats/__init__", "formats/gguf", "formats/json_file"),
    )
}

#: What would make a pure folder depend on the world; these files of it talk to the world.
IMPURE = {"asyncio", "multiprocessing", "os", "random", "socket", "subprocess", "threading", "time"}
WORLDLY = {
    f"scheduler/{name}.py"
    for name in (
        *("engine", "engine_main", "engine_process", "process", "channel"),
        *("inline", "client", "resets", "streams", "watchdog"),
    )
}

BAD_NAMES = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}

MAX_LINES = 400

#: What only this or that machine has, put together so that this file does not contain them.
MACHINE_PATHS = ["/" + name + "/" for name in ("root", "work", "home")]
REGISTRY_HOSTS = [
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("deb", "debian", "org"),
        ("download", "pytorch", "org"),
    )
]

SKIPPED_FOLDERS = {"__pycache__", "dist", "build", "htmlcov", "node_modules"}


def files(folder: Path = ROOT) -> Iterator[Path]:
    """All files of the project: what git would track, found without git."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if name not in SKIPPED_FOLDERS and (not name.startswith(".") or name == ".ci")
        ]
        yield from (Path(parent, name) for name in names if not name.startswith(".coverage"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


SOURCES = sorted(
    path for folder in MAY_IMPORT for path in files(ROOT / folder) if path.suffix == ".py"
)
TESTS = sorted(path for path in files(ROOT / "tests") if path.suffix == ".py")


def imports(path: Path) -> Iterator[str]:
    """Modules and names imported anywhere in the file, also inside functions: `model.build`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_within(module: str, allowed: set[str]) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in allowed)


def test_there_is_something_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(MAY_IMPORT)
    assert len(TESTS) > 10


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_folder_imports_only_what_it_may(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    allowed = {folder} | MAY_IMPORT[folder] | EXCEPTIONS.get(name_of(path), set())
    ours = {module for module in imports(path) if module.partition(".")[0] in MAY_IMPORT}
    assert sorted(module for module in ours if not is_within(module, allowed)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_apis_do_not_import_each_others_answers(path: Path) -> None:
    """Chat and completions, messages, and responses have no more in common than what all share."""
    name = name_of(path).removesuffix(".py").replace("/", ".")
    own = [api for api, modules in APIS.items() if is_within(name, modules)]
    others = [modules for api, modules in APIS.items() if api not in own]
    if own:
        assert not [one for one in imports(path) if any(is_within(one, of) for of in others)]


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_model_imports_heavy_packages(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] != "model" or name_of(path) in LIGHT_IN_MODEL:
        assert {module.partition(".")[0] for module in imports(path)}.isdisjoint(ONLY_IN_MODEL)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_cache_and_scheduler_are_pure(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] in ("cache", "scheduler") and name_of(path) not in WORLDLY:
        assert {module.partition(".")[0] for module in imports(path)}.isdisjoint(IMPURE)


def test_the_api_process_does_not_load_torch() -> None:
    """What `server/daemon.py` imports, the API process pays for."""
    modules = sorted(
        name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in SOURCES
        if path.relative_to(ROOT).parts[0] in ("server", "scheduler", "cache", "configs")
    )
    code = (
        f"import importlib, sys; [importlib.import_module(name) for name in {modules}]; "
        f"print(sorted(set({sorted(ONLY_IN_MODEL)}) & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr.strip()) == ("[]", "")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "no header docstring"


def test_every_source_folder_is_a_package() -> None:
    folders = {path.parent for path in SOURCES}
    assert [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_package_under_tests() -> None:
    """A `tests/scheduler/__init__.py` would hide the real `scheduler`."""
    assert [name_of(path) for path in TESTS if path.name == "__init__.py"] == []


def test_file_names_say_what_is_inside() -> None:
    assert [name_of(path) for path in SOURCES + TESTS if path.stem in BAD_NAMES] == []


def test_files_are_short() -> None:
    suffixes = {".py", ".cpp", ".h", ".cu"}
    lengths = {
        name_of(path): len(path.read_text().splitlines())
        for path in files()
        if path.suffix in suffixes
    }
    assert {name: length for name, length in lengths.items() if length >= MAX_LINES} == {}


def test_no_file_knows_one_machine() -> None:
    found = [
        f"{name_of(path)}: {needle}"
        for path in files()
        for text in [path.read_bytes().decode(errors="replace")]
        for needle in MACHINE_PATHS + REGISTRY_HOSTS
        if needle in text
    ]
    assert found == []
