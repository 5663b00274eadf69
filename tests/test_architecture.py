"""Which folder may import which, and rules for every file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Folder to our packages or modules that it may import besides itself.
MAY_IMPORT = {
    "configs": set[str](),
    "cache": set[str](),
    "loadtest": set[str](),
    "model": {"cache.moves", "cache.selection", "cache.view", "configs"},
    "scheduler": {"cache", "configs", "model.interface"},
    "server": {"scheduler", "configs", "model.formats", "model.splitmix64"},
}
#: The composition roots: single files that know more than their folder.
EXCEPTIONS = {
    "server/command.py": {"model.build"},
    "server/daemon.py": {"model.build", "model.weights.source"},
}

#: Room to the rooms and modules of its own folder that it may import besides itself. Files outside
#: the rooms may import all of their folder, but for the leaves below.
ROOMS = {
    "model.formats": set[str](),
    "model.kv": set[str](),
    "model.grammar": {"model.interface"},
    "model.weights": {"model.architectures", "model.cpu.instruction_sets", "model.cpu.library"}
    | {"model.formats", "model.kv.arena", "model.ops"},
    "model.architectures": {"model.attention.interface", "model.formats", "model.kv.format"}
    | {"model.ops", "model.weights"},
    "model.attention": {"model.cpu.library", "model.cuda.ops", "model.extras", "model.kv"},
    "model.cpu": {"model.architectures", "model.attention", "model.ops", "model.weights"},
    "model.cuda": {"model.architectures", "model.attention", "model.extras", "model.interface"}
    | {"model.group_plan", "model.kv", "model.ops", "model.packing", "model.runner"}
    | {"model.sampling"}
    | {"model.weights.checkpoints"},
    "model.sampling": {"model.grammar", "model.interface", "model.packing", "model.splitmix64"},
    "model.hf": {"model.architectures", "model.attention", "model.formats", "model.kv"}
    | {"model.weights"},
    "scheduler.drafters": {"scheduler.sequence"},
    "scheduler.tier": {"scheduler.engine", "scheduler.messages", "scheduler.stats"},
    "server.text": set[str](),
    "server.http": {"server.answer_types", "server.logs", "server.metrics", "server.service"},
    "server.tools": {"server.generation.generation_spec", "server.http.errors", "server.text"}
    | {"server.structured.schemas"},
    "server.structured": {"server.generation", "server.http", "server.service", "server.text"}
    | {"server.tools"},
    "server.generation": {"server.answer_types", "server.http", "server.logs", "server.service"}
    | {"server.structured", "server.text", "server.tools"},
}
#: The three APIs: each may import all rooms of `server`, but none of the others.
APIS = {"server.openai", "server.messages", "server.responses"}
#: Heavy packages, for `model/` alone.
ONLY_IN_MODEL = {"torch", "transformers", "triton", "flash_attn", "flash_attn_interface"}

#: The modules of `model/` that other folders and the API process load.
LIGHT_IN_MODEL = {
    f"model/{name}.py"
    for name in (
        *("__init__", "interface", "fake", "fake_answers", "fake_pages", "sampling_params"),
        *("splitmix64", "stored_pages"),
        *("weights/__init__", "weights/source", "weights/hub", "weights/weight_files"),
        *("grammar/__init__", "grammar/grammars", "grammar/check", "grammar/json_patterns"),
        *("grammar/json_schema", "grammar/matchers"),
        *("formats/__init__", "formats/gguf", "formats/json_file", "formats/safetensors"),
    )
}

#: Modules that a pure folder must not import; these files of it may.
IMPURE = {"asyncio", "multiprocessing", "os", "random", "socket", "subprocess", "threading", "time"}
WORLDLY = {
    f"scheduler/{name}.py"
    for name in (
        *("engine", "engine_main", "engine_process", "process", "channel"),
        *("client", "streams", "watchdog"),
        *("tier/folder", "tier/segment", "tier/store", "tier/threads", "tier/open_tier"),
    )
}

BAD_NAMES = {"utils", "util", "helpers", "helper", "manager", "common", "misc"}

MAX_LINES = 400

#: Paths of single machines, put together so that this file does not contain them.
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
    """Yield the files that git would track, without git."""
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
    """Yield modules and names imported in the file, also inside functions: `model.build`."""
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
def test_a_room_imports_only_the_rooms_that_it_may(path: Path) -> None:
    """An API has no list of its own: it may import every room, but no other API."""
    room = ".".join(path.relative_to(ROOT).parts[:2])
    ours = {one for one in imports(path) if one.partition(".")[0] == room.partition(".")[0]}
    if room in APIS:
        assert not [one for one in ours if is_within(one, APIS - {room})]
    elif room in ROOMS:
        assert sorted(one for one in ours if not is_within(one, {room} | ROOMS[room])) == []


def test_every_room_has_a_rule() -> None:
    folders = {
        ".".join(path.relative_to(ROOT).parts[:2])
        for path in SOURCES
        if len(path.relative_to(ROOT).parts) > 2
    }
    assert folders == set(ROOMS) | APIS


def test_the_rooms_are_documented() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+\.\w+)` \|[^|]*\| (.*) \|$", text, re.MULTILINE)
    assert {room: set(re.findall(r"`([\w.]+)`", imported)) for room, imported in rows} == ROOMS


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_model_imports_heavy_packages(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] != "model" or name_of(path) in LIGHT_IN_MODEL:
        assert {module.partition(".")[0] for module in imports(path)}.isdisjoint(ONLY_IN_MODEL)


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_cache_and_scheduler_are_pure(path: Path) -> None:
    if path.relative_to(ROOT).parts[0] in ("cache", "scheduler") and name_of(path) not in WORLDLY:
        assert {module.partition(".")[0] for module in imports(path)}.isdisjoint(IMPURE)


def module_of(path: Path) -> str:
    return name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_no_module_imports_itself_through_others() -> None:
    """Imports inside functions and for type checkers alone count, too."""
    modules = {module_of(path): path for path in SOURCES}
    graph = {
        module: {
            imported if imported in modules else imported.rpartition(".")[0]
            for imported in imports(path)
        }
        for module, path in modules.items()
    }
    # `from package import module` is an import of the module alone.
    reached = {module: graph[module] & modules.keys() - {module} for module in modules}
    cycle: list[str] = []
    try:
        TopologicalSorter(reached).prepare()
    except CycleError as error:
        cycle = error.args[1]
    assert cycle == []


def test_the_api_process_does_not_load_torch() -> None:
    """The API process pays for every import of `server/daemon.py`."""
    modules = sorted(
        module_of(path)
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
