"""The folder of a store: its owner, its lock, its secret, and where it may lie.

Knows nothing of segments and records.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import secrets
import stat
from pathlib import Path

FOLDER_NAME = "octavo-kv"
_MEMORY_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
_MOUNTS = Path("/proc/self/mountinfo")
_SECRET_BYTES = 32
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


class StoreError(ValueError):
    """A folder that cannot hold a store; the message is one line with the reason."""


class StoreFolder:
    """A folder of one engine's own, from its opening to `close` or the end of the process."""

    def __init__(self, parent: Path) -> None:
        """Lock the store in `parent`, made if need be. Raises `StoreError`."""
        self.path = parent / FOLDER_NAME
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
            check_owner(self.path)
            self._lock = _locked(self.path)
            self._secret = _secret(self.path / "secret")
        except OSError as error:
            raise StoreError(f"{self.path} cannot be used: {error.strerror or error}") from error

    def digest_of(self, namespace: str) -> bytes:
        """Return the name of a namespace in this store: salts are never on the disk."""
        return hmac.digest(self._secret, namespace.encode(), "sha256")

    def close(self) -> None:
        """Unlock the folder."""
        os.close(self._lock)


def check_owner(path: Path) -> None:
    """Raise `StoreError` for a folder that others can write or read, `OSError` where it is none."""
    status = path.stat(follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(f"{path} is not a folder")
    if status.st_uid != os.geteuid():
        raise StoreError(f"{path} belongs to another user")
    if status.st_mode & _OTHERS:
        raise StoreError(f"{path} is open to other users: its mode must be 0700")


def check_is_on_disk(path: Path, mounts: Path = _MOUNTS) -> None:
    """Raise `StoreError` where the file system of a path keeps its files in memory."""
    there = path.absolute()
    while not there.exists():
        there = there.parent
    device = there.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.read_text().splitlines() if mounts.exists() else ():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == number and kind.split()[0] in _MEMORY_FILE_SYSTEMS:
            raise StoreError(f"{path} is on {kind.split()[0]}, which is memory and not a disk")


def _locked(folder: Path) -> int:
    descriptor = os.open(
        folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise StoreError(f"{folder} is in use by another engine") from None
    return descriptor


def _secret(path: Path) -> bytes:
    """Return the secret of a store, made with it. One that is damaged makes all records foreign."""
    if path.exists() and len(secret := path.read_bytes()) == _SECRET_BYTES:
        return secret
    secret = secrets.token_bytes(_SECRET_BYTES)
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
    temporary.replace(path)
    return secret
