"""Keeps packed weights on disk, so that the next start reads them instead of packing again.

The folder holds one file for each content of weights files and each way of packing them, and
records of the states of weights files whose content is known. All of it may be removed at any time.
Knows nothing of layers and of the meaning of parts.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from configs.sizes import format_size
from model.weights.file_content import FilesState, sha256_of
from model.weights.mapped_file import map_file
from model.weights.packed_file import PackedError, PackedFile, Part, num_bytes_of, write_packed

_log = logging.getLogger("octavo.weights")

#: Packing less takes no longer than finding it.
_MIN_BYTES = 32 * 2**20
#: Without a stated size: the share of the disk's free space, files of the cache counted as free.
_DISK_SHARE = 4
_SUFFIX, _TEMPORARY_PREFIX = ".weights", ".saving-"
_FILE_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.weights")
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_LOWEST_PRIORITY = 19


@dataclass(frozen=True, slots=True)
class Recipe:
    """The inputs of packed weights."""

    #: Digest of everything but the content of the weights files: the architecture, the linear
    #: format, the code.
    packing: str
    files: FilesState
    #: When the reading of these files began.
    began_ns: int

    @property
    def prefix(self) -> str:
        """The beginning of the name of each file with this packing."""
        return self.packing[:16]

    def file_name(self, digests: object) -> str:
        """Return the name of the file for this content."""
        return f"{self.prefix}-{sha256_of(digests)[:32]}{_SUFFIX}"

    def check(self, packed: PackedFile) -> None:
        """Raise `PackedError` unless a file has this packing, and the content of its name."""
        packing, digests = packed.facts.get("packing"), packed.facts.get("files")
        if packing != self.packing or self.file_name(digests) != packed.path.name:
            raise PackedError(f"{packed.path} has other weights")


@dataclass(frozen=True, slots=True)
class _Unsaved:
    recipe: Recipe
    parts: Mapping[str, Part]


class PackedCache:
    """A folder of packed weights, shared by all processes of one user."""

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int | None = None,
        min_bytes: int = _MIN_BYTES,
    ) -> None:
        """`max_bytes`: of all files together; None: a quarter of the disk's free space."""
        self.folder = folder
        self._records = folder / "known"
        self.max_bytes = max_bytes
        self._min_bytes = min_bytes
        self._unsaved: _Unsaved | None = None

    # ---- finding ---------------------------------------------------------------------------------

    def find(self, recipe: Recipe) -> PackedFile | None:
        """Return the packed weights of these files, if they are kept.

        Files in an unknown state are compared by content with the sources of the candidates.
        Raises `PackedError` with the reason if the kept file must not be used.
        """
        try:
            if found := self._find_by_state(recipe) or self._find_by_content(recipe):
                with suppress(OSError):
                    found.note_use()
                return found
        except OSError as error:
            raise PackedError(f"{self.folder} cannot be read ({error.strerror})") from error
        return None

    def _find_by_state(self, recipe: Recipe) -> PackedFile | None:
        try:
            name = self._record_of(recipe).read_text()
        except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
            return None
        if not _FILE_NAME.fullmatch(name) or not name.startswith(recipe.prefix):
            return None
        with suppress(FileNotFoundError):
            return self._open(self.folder / name, recipe)
        return None

    def _find_by_content(self, recipe: Recipe) -> PackedFile | None:
        for path in sorted(self.folder.glob(f"{recipe.prefix}-*{_SUFFIX}")):
            with suppress(PackedError, FileNotFoundError):
                candidate = self._open(path, recipe)
                if recipe.files.has_content(candidate.facts.get("files")):
                    self._remember(recipe, path.name)
                    return candidate
                candidate.close()
        return None

    def _open(self, path: Path, recipe: Recipe) -> PackedFile:
        if fault := _fault_of(self.folder):
            raise PackedError(fault)
        packed = PackedFile.open(path, map_file)
        try:
            recipe.check(packed)
        except PackedError:
            packed.close()
            raise
        return packed

    def remove(self, packed: PackedFile) -> None:
        """Close a file that turned out to be damaged, and remove it."""
        packed.close()
        with suppress(OSError):
            packed.path.unlink()

    # ---- saving ----------------------------------------------------------------------------------

    def offer(self, recipe: Recipe, parts: Mapping[str, Part]) -> None:
        """Take packed weights for `save_in_background`; their tensors must not change any more."""
        self._unsaved = _Unsaved(recipe, parts)

    def save_in_background(self) -> None:
        """Save offered weights in a thread that leaves the processors to all others."""
        if self._unsaved is not None:
            threading.Thread(target=self._save_slowly, name="save-weights", daemon=True).start()

    def _save_slowly(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        began_s = time.monotonic()
        try:
            saved = self.save()
        except PackedError as error:
            _log.warning("the packed weights are not kept for the next start: %s", error)
            return
        if saved is not None:
            took_s = time.monotonic() - began_s
            _log.info("packed weights kept for the next start, in %.1f s: %s", took_s, saved)

    def save(self) -> Path | None:
        """Save the offered weights and return the file; None: there is nothing to save.

        Raises `PackedError` with the reason if they cannot be kept.
        """
        unsaved, self._unsaved = self._unsaved, None
        if unsaved is None:
            return None
        num_bytes = num_bytes_of(unsaved.parts)
        if num_bytes < self._min_bytes:
            return None
        recipe = unsaved.recipe
        if not recipe.files.is_settled(recipe.began_ns):
            raise PackedError("the files were written in the seconds before they were read")
        try:
            digests = recipe.files.digests()
            if not recipe.files.is_current():
                raise PackedError("the files changed after they were read")
            with _locked(self.folder):
                path = self.folder / recipe.file_name(digests)
                if not self._is_kept(path, recipe):
                    self._make_room(num_bytes)
                    facts = {"packing": recipe.packing, "files": digests}
                    self._write(path, unsaved.parts, facts)
                self._remember(recipe, path.name)
        except OSError as error:
            reason = error.strerror or error
            raise PackedError(f"{self.folder} cannot be written ({reason})") from error
        return path

    def _is_kept(self, path: Path, recipe: Recipe) -> bool:
        """Return whether another process has saved the same weights meanwhile."""
        try:
            self._open(path, recipe).close()
        except (PackedError, FileNotFoundError):
            return False
        return True

    def _write(self, path: Path, parts: Mapping[str, Part], facts: Mapping[str, object]) -> None:
        """Write a file under another name, and rename it when it is on the disk."""
        descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY_PREFIX, dir=self.folder)
        try:
            try:
                write_packed(descriptor, parts, facts)
            finally:
                os.close(descriptor)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync(self.folder)

    def _make_room(self, num_bytes: int) -> None:
        """Remove the least recently used files until the new one fits. Raises `PackedError`."""
        used = sorted(
            ((path.stat().st_mtime_ns, path.stat().st_size, path) for path in self._files()),
        )
        total_bytes = sum(size_bytes for _, size_bytes, _ in used)
        max_bytes = self.max_bytes
        if max_bytes is None:
            disk = os.statvfs(self.folder)
            max_bytes = (disk.f_bavail * disk.f_frsize + total_bytes) // _DISK_SHARE
        if num_bytes > max_bytes:
            raise PackedError(
                f"they take {format_size(num_bytes)}, and {self.folder} may take "
                f"{format_size(max_bytes)} (weights_cache_max_bytes)"
            )
        for _, size_bytes, path in used:
            if total_bytes + num_bytes <= max_bytes:
                break
            path.unlink()
            total_bytes -= size_bytes
        self._forget_removed()

    def _files(self) -> Iterator[Path]:
        return (path for path in self.folder.iterdir() if _FILE_NAME.fullmatch(path.name))

    # ---- states whose content is known -----------------------------------------------------------

    def _record_of(self, recipe: Recipe) -> Path:
        """Return the path of the record: a text file with the name of the packed weights."""
        return self._records / sha256_of([recipe.packing, recipe.files.digest])

    def _remember(self, recipe: Recipe, name: str) -> None:
        """Record that files in this state have the content of the file `name`."""
        if not recipe.files.is_settled(recipe.began_ns) or not recipe.files.is_current():
            return
        # Where the folder cannot be written, each start compares the content.
        with suppress(OSError):
            self._records.mkdir(mode=0o700, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=_TEMPORARY_PREFIX, dir=self._records)
            with os.fdopen(descriptor, "w") as file:
                file.write(name)
            Path(temporary).replace(self._record_of(recipe))

    def _forget_removed(self) -> None:
        """Remove records of files that were removed, and the remains of killed writers."""
        with suppress(FileNotFoundError):
            for record in self._records.iterdir():
                if not (self.folder / record.read_text(errors="replace")).is_file():
                    record.unlink()


def _fault_of(folder: Path) -> str:
    """Return why nothing of a folder may be used; empty if it may. Raises `OSError`."""
    # A link to another disk is fine: it lies in the home folder.
    status = folder.stat()
    if status.st_uid not in {0, os.geteuid()}:
        return f"{folder} belongs to another user: set OCTAVO_HOME to a folder of your own"
    if status.st_mode & _WRITABLE_BY_OTHERS:
        return f"{folder} can be written by other users"
    return ""


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against other processes that save, and make it this user's alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid not in {0, os.geteuid()}:
        raise PermissionError(0, "set OCTAVO_HOME to a folder of your own")
    if folder.stat().st_mode & _WRITABLE_BY_OTHERS:
        # Its files are of unknown origin.
        for path in folder.glob(f"*{_SUFFIX}"):
            path.unlink()
        folder.chmod(0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for abandoned in folder.glob(f"{_TEMPORARY_PREFIX}*"):
            abandoned.unlink(missing_ok=True)
        yield


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
