"""The files, links and names in the documents exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("bench", "cache", "configs", "loadtest", "model", "scheduler", "server", "tools")
SKIPPED_FOLDERS = {"__pycache__", "node_modules", "dist", "build"}

DOCS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md")
    for path in ROOT.glob(pattern)
)
#: The documents whose names of classes, functions and attributes are checked.
DESIGN = [name for name in DOCS if name == "docs/architecture.md" or name.startswith("docs/adr/")]

#: Files of users, of models and of other programs.
FOREIGN_FILES = {
    "NAME-00001-of-00003.gguf": "a user's file",
    "gpu-PART.txt": "written by `make bench-gpu`",
    "gpu.json": "written by `make bench-gpu`",
    "gpu-http.jsonl": "written by `make bench-gpu`",
    "gpu.md": "written by `make bench-gpu`",
    "opencode.json": "a client's file",
    "tests/clients/node/node_modules": "written by `make clients`",
    "tests/scheduler/__init__.py": "a file that must not exist",
}
#: Names of other programs.
FOREIGN_NAMES = {
    "AutoConfig": "of transformers",
    "AutoModelForCausalLM": "of transformers",
    "len": "of Python",
}

FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SUFFIXES = "cpp|gguf|h|jinja|json|md|py|sh|toml|txt|yml"
FILE = re.compile(rf"[\w.*-]+(?:/[\w.*-]+)*(?:/|\.(?:{SUFFIXES}))|[\w.-]+(?:/[\w.*-]+)+")
NAME = re.compile(r"(\w+(?:\.\w+)*)(\(.*\))?")


def text_of(document: str) -> str:
    """Return a document without its blocks of code."""
    return FENCE.sub("", (ROOT / document).read_text())


@cache
def tree() -> frozenset[str]:
    """Return the paths of all files and folders."""
    paths = {
        path.relative_to(ROOT)
        for path in ROOT.rglob("*")
        if not any(
            part in SKIPPED_FOLDERS or (part.startswith(".") and part != ".ci")
            for part in path.relative_to(ROOT).parts
        )
    }
    return frozenset(path.as_posix() for path in paths)


def is_there(quoted: str) -> bool:
    """Check for a path from the root, or the end of one: `products.h`, `csrc/products.h`."""
    pattern = quoted.rstrip("/")
    if PurePosixPath(quoted).parts[0] in FOLDERS or "*" in pattern:
        return any(ROOT.glob(pattern))
    return any(path == pattern or path.endswith(f"/{pattern}") for path in tree())


def quoted_files(document: str) -> Iterator[str]:
    top = {path.partition("/")[0] for path in tree()}
    for quoted in QUOTED.findall(text_of(document)):
        if FILE.fullmatch(quoted) and quoted not in FOREIGN_FILES:
            has_suffix = re.search(rf"\.(?:{SUFFIXES})$", quoted)
            if has_suffix or quoted.partition("/")[0] in top:
                yield quoted


@pytest.mark.parametrize("document", DOCS)
def test_files_exist(document: str) -> None:
    assert [quoted for quoted in quoted_files(document) if not is_there(quoted)] == []


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCS)
def test_links_resolve(document: str) -> None:
    broken = []
    for link in LINK.findall(text_of(document)):
        target, _, anchor = link.partition("#")
        if "://" in link or link.startswith("mailto:"):
            continue
        path = (ROOT / document).parent / target if target else ROOT / document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(link)
    assert broken == []


class Names(ast.NodeVisitor):
    """The names of the source: all identifiers, and the members and bases of each class."""

    def __init__(self) -> None:
        self.all: set[str] = set()
        self.members: dict[str, set[str]] = {}
        self._classes: list[str] = []

    def add(self, name: str) -> None:
        self.all.add(name)
        if self._classes:
            self.members[self._classes[-1]].add(name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.add(node.name)
        self._classes.append(node.name)
        members = self.members.setdefault(node.name, set())
        members |= {base.id for base in node.bases if isinstance(base, ast.Name)}
        self.generic_visit(node)
        self._classes.pop()

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.add(node.name)
        self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815 - ast's name

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Store):
            self.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Store):
            self.add(node.attr)
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        self.all.add(node.arg)

    def has(self, name: str) -> bool:
        """Return whether `name`, or the member and the class of `Class.member`, are defined."""
        owner, _, member = name.rpartition(".")
        if not owner:
            return name in self.all
        bases, seen = {owner}, set[str]()
        while bases - seen:
            one = (bases - seen).pop()
            seen.add(one)
            if member in self.members.get(one, ()):
                return True
            bases |= self.members.get(one, set()) & self.members.keys()
        return False


@cache
def names() -> Names:
    found = Names()
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            found.visit(ast.parse(path.read_text()))
    return found


def exists(name: str) -> bool:
    """Return whether it is a name of the source, or a module: `model.runner`."""
    if "." in name and name.partition(".")[0] in FOLDERS:
        path = name.replace(".", "/")
        return path in tree() or f"{path}.py" in tree()
    return names().has(name)


def quoted_names(document: str) -> Iterator[str]:
    """Yield `Class`, `CONSTANT`, `Class.member`, `name()` and `a.module.of_ours`."""
    for quoted in QUOTED.findall(text_of(document)):
        match = NAME.fullmatch(quoted)
        if match is None or quoted in FOREIGN_NAMES or FILE.fullmatch(quoted):
            continue
        name = match[1]
        is_camel = re.match(r"[A-Z]+[a-z]\w+|[A-Z]\w*\.\w", name)
        is_constant = re.fullmatch(r"[A-Z]+(?:_[A-Z]+)+", name)
        is_module = "." in name and name.partition(".")[0] in FOLDERS
        if (is_camel or is_constant or is_module or match[2]) and name not in FOREIGN_NAMES:
            yield name


@pytest.mark.parametrize("document", DESIGN)
def test_names_exist(document: str) -> None:
    assert [name for name in quoted_names(document) if not exists(name)] == []


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_a_foreign_name_is_used_and_not_ours(name: str) -> None:
    quoted = [one for document in DESIGN for one in QUOTED.findall(text_of(document))]
    assert not exists(name)
    assert any(re.match(rf"{name}\b", one) for one in quoted)


@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_a_foreign_file_is_named(name: str) -> None:
    assert any(name in QUOTED.findall(text_of(document)) for document in DOCS)
