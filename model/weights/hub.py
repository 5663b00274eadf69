"""Fetches models from the hub: the choice of files, the progress, a sentence for each failure.

Free of torch; its import takes a third of a second. Knows nothing of what is in the files. The
transfer, the cache and the operator's settings (HF_ENDPOINT, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE) are
`huggingface_hub`'s.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors, get_token
from tqdm import tqdm

from configs.sizes import format_size

_log = logging.getLogger("octavo.hub")

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
#: Folders hold the model in other formats, except for chat templates. The rest are the same weights
#: under the names of another program, or weights that belong to another model.
_LEFT_OUT = [f"*/{pattern}" for pattern in _PATTERNS if pattern != "*.jinja"]
_LEFT_OUT += ["consolidated*", "adapter_*", "._*"]

_NOT_THERE = "the hub has no such model (set HF_TOKEN if it is a private one)"
_STATUSES = {
    401: "the hub does not accept the token: set HF_TOKEN to a valid one",
    403: "the hub forbids it: the token (HF_TOKEN) has no right to read this model",
    429: "the hub accepts no more requests for now (status 429)",
}


class HubError(Exception):
    """A model cannot be fetched; the message is a sentence that says why and what to do."""


class NotOnHubError(HubError):
    """The hub has no model of that name."""


class Snapshot(NamedTuple):
    """A model's files on this machine."""

    folder: Path
    notes: tuple[str, ...] = ()


def fetch_snapshot(repo_id: str, revision: str, *, progress: bool) -> Snapshot:
    """Return the folder of a model's files, and fetch those that the hub's cache lacks.

    Where the hub cannot be asked, the copy in the cache is returned, with a note. With `progress`,
    a bar on stderr where that is a terminal, else lines of the log. Raises `HubError`.
    """
    api = huggingface_hub.HfApi()
    _forward_log()
    try:
        info = api.model_info(
            repo_id,
            revision=revision,
            files_metadata=True,
            # Its own requests wait for ever.
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except Exception as error:  # noqa: BLE001 - errors of its HTTP client have no public base class
        return _cached(repo_id, revision, error)
    sizes = {found.rfilename: found.size or 0 for found in info.siblings or ()}
    missing = _missing_files(repo_id, info.sha, sizes)
    total_bytes = sum(sizes[name] for name in missing)
    if missing and progress:
        how_much = f"{len(missing)} files, {format_size(total_bytes)}"
        _log.info("downloading %s: %s, to %s", repo_id, how_much, constants.HF_HUB_CACHE)
    try:
        with _progress_bars(repo_id, total_bytes if progress else 0) as bars:
            folder = huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                allow_patterns=_PATTERNS,
                ignore_patterns=_LEFT_OUT,
                tqdm_class=bars,
            )
    except Exception as error:  # see above
        raise _explained(error, revision) from error
    return Snapshot(Path(folder))


def _missing_files(repo_id: str, commit: str | None, names: Collection[str]) -> list[str]:
    """Return those of a repository's files to fetch. `HubError` where they would be no model."""
    wanted = [name for name in names if _is_wanted(name)]
    _check_is_model(repo_id, wanted, names)

    def is_cached(name: str) -> bool:
        found = huggingface_hub.try_to_load_from_cache(repo_id, name, revision=commit)
        return isinstance(found, str)

    return [name for name in wanted if not is_cached(name)]


def _is_wanted(name: str) -> bool:
    """Tell as the library does, which takes the same patterns."""
    return any(fnmatch(name, pattern) for pattern in _PATTERNS) and not any(
        fnmatch(name, pattern) for pattern in _LEFT_OUT
    )


def _check_is_model(repo_id: str, wanted: Collection[str], names: Collection[str]) -> None:
    """Refuse a repository before gigabytes are fetched that are no model."""
    if "adapter_config.json" in names and "config.json" not in names:
        raise HubError("what the hub has under that name is an adapter, not a model")
    has_weights = any(name.endswith(".safetensors") for name in wanted)
    if has_weights and "config.json" in wanted:
        return
    if files := sorted(name for name in names if name.endswith(".gguf")):
        raise HubError(
            "the hub has it only as GGUF: fetch one of the files, such as with"
            f" `hf download {repo_id} {files[0]}`, and give its path"
        )
    if has_weights:
        raise HubError("it has no config.json on the hub, so it is not a model that can be served")
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    there = f"only {pickles[0]}, which is a pickle: convert it" if pickles else "none"
    raise HubError(f"it needs .safetensors files: on the hub there is {there}")


def _cached(repo_id: str, revision: str, fault: Exception) -> Snapshot:
    """Return the copy in the hub's cache, for `fault` keeps from asking the hub."""
    reason = _explained(fault, revision)
    try:
        folder = huggingface_hub.snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=_PATTERNS,
            ignore_patterns=_LEFT_OUT,
            local_files_only=True,
        )
    except errors.IncompleteSnapshotError:
        raise HubError(f"{reason} (the hub's cache holds only some of its files)") from fault
    except (errors.LocalEntryNotFoundError, ValueError):  # ValueError: the name cannot be an id.
        if isinstance(fault, errors.OfflineModeIsEnabled):
            where = constants.HF_HUB_CACHE
            raise HubError(f"{reason}, whose cache ({where}) does not have it") from fault
        raise reason from fault
    return Snapshot(Path(folder), (f"the copy in the hub's cache is served: {reason}",))


# ---- failures ------------------------------------------------------------------------------------


def _explained(error: BaseException, revision: str) -> HubError:
    """Return the sentence for a failure of the library."""
    # It stands where another error was, which it names as its cause.
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__
    cache = f"the hub's cache ({constants.HF_HUB_CACHE})"
    match error:
        case errors.OfflineModeIsEnabled():
            sentence = "HF_HUB_OFFLINE keeps from asking the hub"
        case errors.GatedRepoError():
            sentence = (
                "the hub gives it only to those who accepted its terms: do so on the model's page,"
                " then set HF_TOKEN to a token of that account"
            )
        case errors.HFValidationError():
            return NotOnHubError("that is not an id of the hub")
        case errors.RepositoryNotFoundError():
            return NotOnHubError(_NOT_THERE)
        case errors.RevisionNotFoundError():
            sentence = f"the hub has no revision {revision!r} of it"
        case errors.HfHubHTTPError(response=response):
            if response.status_code == 401 and get_token() is None:
                # What the hub says of a model that it does not have to whom it does not know.
                return NotOnHubError(_NOT_THERE)
            sentence = _status_sentence(response.status_code, response.headers)
        case OSError(strerror=str(why)):
            sentence = f"{cache} cannot be written: {why}; HF_HOME names another place"
        case _:
            why = re.split(r"\.\s", str(error).strip())[0] or "the connection failed"
            sentence = (
                f"it could not be fetched from {constants.ENDPOINT}: {why}; check the network,"
                " HF_ENDPOINT and HTTPS_PROXY"
            )
    return HubError(sentence)


def _status_sentence(status: int, headers: Mapping[str, str]) -> str:
    sentence = _STATUSES.get(status, f"the hub answered with status {status}: try again later")
    wait_s = headers.get("Retry-After", "")
    return f"{sentence}: try again in {wait_s} s" if wait_s.isdecimal() else sentence


# ---- what is shown meanwhile ---------------------------------------------------------------------


class _Progress:
    """How much of a download is here: a bar on a terminal, a line of the log a tenth elsewhere."""

    def __init__(self, name: str, total_bytes: int) -> None:
        self._name = name
        self._total_bytes = total_bytes
        self._num_tenths = 0
        # None: only where stderr is a terminal.
        self._bar = tqdm(
            total=total_bytes,
            desc=f"downloading {name}",
            unit="B",
            unit_scale=True,
            disable=None if total_bytes else True,
        )
        self._lock = threading.Lock()

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def reach(self, num_bytes: int) -> None:
        """Show that this many bytes are here, unless more are already."""
        if not self._total_bytes:
            return
        num_bytes = min(num_bytes, self._total_bytes)
        with self._lock:
            if not self._bar.disable:
                self._bar.update(max(num_bytes - self._bar.n, 0))
                return
            num_tenths = num_bytes * 10 // self._total_bytes
            if num_tenths > self._num_tenths:
                self._num_tenths = num_tenths
                of = format_size(self._total_bytes)
                _log.info("downloading %s: %d %% of %s", self._name, 10 * num_tenths, of)


@contextmanager
def _progress_bars(name: str, total_bytes: int) -> Iterator[type[tqdm]]:
    """Yield a class for the library's bars, of which it has several: here all feed a single one."""
    with Path(os.devnull).open("w") as nowhere, closing(_Progress(name, total_bytes)) as progress:

        class Bar(tqdm):  # type: ignore[misc] # it has no types
            def __init__(self, *args: object, **options: object) -> None:
                super().__init__(*args, **(options | {"file": nowhere}))

            def update(self, n: float | None = 1) -> bool | None:
                is_shown: bool | None = super().update(n)
                # The others count files. Of those that count bytes the one ahead is right: what
                # is on the disk already is not transferred.
                if self.unit == "B":
                    progress.reach(int(self.n))
                return is_shown

        yield Bar


class _Forwarder(logging.Handler):
    """Writes the library's warnings, such as of a lost connection, as lines of our log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, without the signatures that addresses of files have."""
        words = re.sub(r"\?\S+", "", " ".join(record.getMessage().split()))
        _log.log(record.levelno, "hub: %s", words)


def _forward_log() -> None:
    """Take over the library's log, which it sets up when its API is first used."""
    log = logging.getLogger("huggingface_hub")
    log.handlers[:] = [_Forwarder()]
    log.propagate = False
