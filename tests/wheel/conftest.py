"""The built wheel in an environment of run-time dependencies alone, and a small hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parents[2]

# ---- the environment -----------------------------------------------------------------------------


def _asked_for(lines: list[str] | None, extra: str = "") -> list[Requirement]:
    """Return the requirements that hold here, without an extra or with it."""
    found = map(Requirement, lines or ())
    return [one for one in found if not one.marker or one.marker.evaluate({"extra": extra})]


def _closure(waiting: list[Requirement]) -> set[str]:
    """Return the names of these distributions and of all that they require in turn."""
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) not in seen:
                seen.add((name, extra))
                waiting += _asked_for(metadata.requires(name), extra)
    return {name for name, _ in seen}


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel and its run-time requirements."""

    python: Path
    #: The names of all distributions that are there.
    distributions: set[str]

    @property
    def octavo(self) -> Path:
        return self.python.with_name("octavo")

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run the environment's python away from the checkout, with nothing of ours in its way."""
        return subprocess.run(
            [self.python, *words],
            env=self.environ(**variables),
            cwd=self.python.parent,
            capture_output=True,
            text=True,
            check=False,
        )

    def environ(self, **variables: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        # The addresses are this machine's own, whatever proxy is set.
        return {**kept, "NO_PROXY": "127.0.0.1,localhost", **variables}


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Link the requirements from the environment of these tests: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("installed")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    [wheel] = folder.glob("octavo-*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], check=True)
    python = folder / "env/bin/python"
    [packages] = (folder / "env/lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", wheel], check=True)
    [octavo] = metadata.distributions(path=[str(packages)])
    names = _closure(_asked_for(octavo.requires))
    for name in names:
        for file in metadata.files(name) or ():
            link = packages / file.parts[0]
            if link.name not in {"..", "__pycache__"} and not link.exists():
                link.symlink_to(Path(sysconfig.get_path("purelib")) / link.name)
    return Installed(python, names | {"octavo"})


# ---- the hub -------------------------------------------------------------------------------------


@dataclass
class Repository:
    """A model of the hub, of one revision."""

    files: dict[str, bytes] = field(default_factory=dict)
    #: Instead of an answer about the model: status and headers.
    listing: tuple[int, dict[str, str]] | None = None
    #: Instead of each of its files.
    denied: tuple[int, dict[str, str]] | None = None
    #: Connections that are cut in the middle of a large file before one is left whole.
    num_cuts: int = 0
    #: Files that are refused with a 503 before one is given.
    num_faults: int = 0

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(self.files).encode(), usedforsecurity=False).hexdigest()


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface by which models are loaded.

    Large files (safetensors) are redirected to another host, as to the network that keeps them.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.repositories: dict[str, Repository] = {}
        #: Method, path and `Range` of each request.
        self.requests: list[tuple[str, str, str]] = []

    def add(self, repo_id: str, files: dict[str, bytes] | None = None, **options: Any) -> None:
        self.repositories[repo_id] = Repository(files or {}, **options)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> set[str]:
        """Return the names of the requested files."""
        return {
            path.rpartition("/")[2]
            for method, path, _ in self.requests
            if method == "GET" and not path.startswith("/api/")
        }


def _is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Write nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        if parts[0] == "api":
            self._describe("/".join(parts[2:4]), *parts[4:6])
        elif parts[0] == "content":
            self._send_content(self.server.repositories["/".join(parts[1:3])], "/".join(parts[3:]))
        else:
            self._resolve("/".join(parts[:2]), "/".join(parts[4:]))

    def _describe(self, repo_id: str, kind: str = "revision", revision: str = "main") -> None:
        found = self.server.repositories.get(repo_id)
        if found is None:
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif found.listing:
            self._send(*found.listing)
        elif revision not in {"main", "v1", found.commit}:
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            files = [
                {"rfilename": name, "size": len(content)} for name, content in found.files.items()
            ]
            told = {"id": repo_id, "modelId": repo_id, "sha": found.commit, "siblings": files}
            self._send(200, {}, json.dumps(told).encode())
        else:
            self._send(200, {}, json.dumps([*map(_entry, found.files.items())]).encode())

    def _resolve(self, repo_id: str, name: str) -> None:
        found = self.server.repositories[repo_id]
        content = found.files[name]
        headers = {"X-Repo-Commit": found.commit, "ETag": f'"{_etag(content)}"'}
        if found.denied:
            self._send(*found.denied)
        elif found.num_faults:
            found.num_faults -= 1
            self._send(503, {})
        elif _is_large(name):
            headers |= {"X-Linked-Etag": headers.pop("ETag"), "X-Linked-Size": str(len(content))}
            elsewhere = self.server.url.replace("127.0.0.1", "localhost")
            headers["Location"] = f"{elsewhere}/content/{repo_id}/{name}?Signature=secret"
            self._send(302, headers)
        else:
            self._send(200, headers, content)

    def _send_content(self, repository: Repository, name: str) -> None:
        content = repository.files[name]
        wanted = self.headers.get("Range", "")
        first = int(wanted.removeprefix("bytes=").partition("-")[0]) if wanted else 0
        headers = {"ETag": f'"{_etag(content)}"'}
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        is_cut = self.command == "GET" and repository.num_cuts > 0
        repository.num_cuts -= is_cut
        self._send(206 if first else 200, headers, content[first:], is_cut=is_cut)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes = b"", *, is_cut: bool = False
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
        self.close_connection |= is_cut


def _entry(file: tuple[str, bytes]) -> dict[str, object]:
    name, content = file
    entry: dict[str, object] = {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": hashlib.sha1(content, usedforsecurity=False).hexdigest(),
    }
    if _is_large(name):
        entry["lfs"] = {"oid": _etag(content), "size": len(content), "pointerSize": 134}
    return entry


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


# ---- a model -------------------------------------------------------------------------------------

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_TEMPLATE = "{% for message in messages %}<s>{{ message.content }}{% endfor %}<s>"


def _shards(vocab_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield random weights, a layer a shard; the first one with the embedding."""
    torch.manual_seed(0)
    heads = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
    mlp = {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
    outer = {"model.embed_tokens.weight": torch.randn(vocab_size, 64)}
    outer["model.norm.weight"] = torch.ones(64)
    for index in range(2):
        layer = {f"self_attn.{name}.weight": torch.randn(shape) for name, shape in heads.items()}
        layer |= {f"mlp.{name}.weight": torch.randn(shape) for name, shape in mlp.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        layer |= {f"{name}.weight": torch.ones(64) for name in norms}
        yield {f"model.layers.{index}.{name}": one for name, one in layer.items()} | outer
        outer = {}


@pytest.fixture(scope="session")
def model_files() -> dict[str, bytes]:
    """A Llama in small over bytes, in two shards, beside files that are not part of it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    files = {
        "config.json": json.dumps(_CONFIG | {"vocab_size": len(vocabulary)}).encode(),
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "</s>"}).encode(),
        "additional_chat_templates/default.jinja": _TEMPLATE.encode(),
        "README.md": b"# Tiny",
        "pytorch_model.bin": b"a pickle",
        "consolidated.safetensors": b"the same once more",
        "adapter_model.safetensors": b"of another model",
        "original/model.safetensors": b"the same once more",
        "onnx/config.json": b"{}",
    }
    places: dict[str, str] = {}
    for index, shard in enumerate(_shards(len(vocabulary)), 1):
        name = f"model-0000{index}-of-00002.safetensors"
        files[name] = save(shard)
        places |= dict.fromkeys(shard, name)
    files["model.safetensors.index.json"] = json.dumps(
        {"metadata": {}, "weight_map": places}
    ).encode()
    return files


#: The `model_files` that are part of the model.
NEEDED = {
    *("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "default.jinja"),
}


@pytest.fixture
def needed_files() -> set[str]:
    return NEEDED


Resolve = Callable[..., list[dict[str, Any]]]

_RESOLVE = """
import json, logging, sys
from pathlib import Path
from model.weights.source import ModelSourceError, resolve
logging.basicConfig(format="LOG %(message)s")
logging.getLogger("octavo").setLevel("INFO")
for model in sys.argv[1:]:
    try:
        found = resolve(model, home=Path("home"), progress=True)
        told = {"path": str(found.path), "name": found.name, "notes": found.notes}
    except ModelSourceError as error:
        told = {"error": str(error)}
    print(json.dumps(told))
"""


@pytest.fixture
def resolve(installed: Installed, hub: Hub, tmp_path: Path) -> Resolve:
    """Resolve models in a process: the hub's library reads its variables when it is imported."""

    def run(*names: str, **variables: str) -> list[dict[str, Any]]:
        variables = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), **variables}
        done = installed.run("-c", _RESOLVE, *names, **variables)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(found) == len(names), done.stderr
        return [one | {"log": done.stderr} for one in found]

    return run
