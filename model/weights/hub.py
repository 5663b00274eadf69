"""Fetches models from the hub: the choice of files, the progress, a sentence for each failure.

Free of torch; its import takes a third of a second. Knows nothing of the files' contents. The
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
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants, errors, get_token, try_to_load_from_cache
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined] # documented
from tqdm import tqdm

from configs.sizes import format_size

_log = logging.getLogger("octavo.hub")

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "*.txt"]
#: Subfolders hold the model in other formats, except for chat templates. The other names are the
#: same weights for another program, adapters, and macOS's hidden files.
_LEFT_OUT = [f"*/{pattern}" for pattern in _PATTERNS if pattern != "*.jinja"]
_LEFT_OUT += ["consolidated*", "adapter_*", "._*"]

_NOT_THERE = "the hub has no such model (set HF_TOKEN if it is a private one)"
_STATUSES = {
    401: "the hub does not accept the token: set HF_TOKEN to a valid one",
    403: "the hub forbids it: the token (HF_TOKEN) has no right to read this model",
    429: "the hub accepts no more requests for now (status 429)",
}


class HubError(Exception):
    """A model cannot be fetched; the message is a sentence with the reason and a remedy."""


class NotOnHubError(HubError):
    """The hub has no model of that name."""


class Snapshot(NamedTuple):
    """A model's files on this machine."""

    folder: Path
    notes: tuple[str, ...] = ()


def fetch_snapshot(repo_id: str, revision: str, *, progress: bool) -> Snapshot:
    """Return the folder of a model's files, and fetch the missing ones into the hub's cache.

    Where the hub cannot be reached, the copy in the cache is returned, with a note. `progress`:
    show a bar on stderr where that is a terminal, else log lines. Raises `HubError`.
    """
    api = huggingface_hub.HfApi()
    _forward_log()
    try:
        info = api.model_info(
            repo_id,
            revision=revision,
            files_metadata=True,
            # Without it the library waits forever.
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
    except Exception as error:  # noqa: BLE001 - errors of its HTTP client have no public base class
        return _cached(repo_id, revision, error)
    sizes = {found.rfilename: found.size or 0 for found in info.siblings or ()}
    wanted = [*filter_repo_objects(sizes, allow_patterns=_PATTERNS, ignore_patterns=_LEFT_OUT)]
    _check_is_model(repo_id, wanted, sizes)
    cached = (try_to_load_from_cache(repo_id, name, revision=info.sha) for name in wanted)
    missing = [name for name, path in zip(wanted, cached, strict=True) if not isinstance(path, str)]
    total_bytes = sum(sizes[name] for name in missing)
    if missing and progress:
        how_much = f"{len(missing)} files, {format_size(total_bytes)}"
        _log.info("downloading %s: %s, to %s", repo_id, how_much, constants.HF_HUB_CACHE)
    try:
        with _progress_bars(repo_id, total_bytes if progress else 0) as bars:
            folder = _download(repo_id, revision, tqdm_class=bars)
    except Exception as error:  # see above
        raise _explained(error, revision) from error
    return Snapshot(folder)


def _download(repo_id: str, revision: str, **options: Any) -> Path:  # noqa: ANN401 - the library's
    folder = huggingface_hub.snapshot_download(
        repo_id,
        revision=revision,
        allow_patterns=_PATTERNS,
        ignore_patterns=_LEFT_OUT,
        **options,
    )
    return Path(folder)


def _check_is_model(repo_id: str, wanted: Collection[str], names: Collection[str]) -> None:
    """Refuse a repository without a model before gigabytes are fetched."""
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
    """Return the copy in the hub's cache, since the hub failed with `fault`."""
    reason = _explained(fault, revision)
    try:
        folder = _download(repo_id, revision, local_files_only=True)
    except errors.IncompleteSnapshotError:
        raise HubError(f"{reason} (the hub's cache holds only some of its files)") from fault
    except (errors.LocalEntryNotFoundError, ValueError):  # ValueError: the name cannot be an id.
        if isinstance(fault, errors.OfflineModeIsEnabled):
            where = constants.HF_HUB_CACHE
            raise HubError(f"{reason}, whose cache ({where}) does not have it") from fault
        raise reason from fault
    return Snapshot(folder, (f"the copy in the hub's cache is served: {reason}",))


# ---- failures ------------------------------------------------------------------------------------


def _explained(error: BaseException, revision: str) -> HubError:
    """Return the sentence for a failure of the library."""
    # The library raises it in place of the error that is its cause.
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
                # The hub's answer to anonymous clients for a model that does not exist.
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


# ---- progress ------------------------------------------------------------------------------------


class _Progress:
    """The progress of a download: a bar on a terminal, elsewhere a log line for each tenth."""

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
        """Stop updating the bar."""
        self._bar.close()

    def reach(self, num_bytes: int) -> None:
        """Show that this many bytes are present, unless it already shows more."""
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
    """Yield a class for the library's several bars, which all feed a single one here."""
    with Path(os.devnull).open("w") as nowhere, closing(_Progress(name, total_bytes)) as progress:

        class Bar(tqdm):  # type: ignore[misc] # it has no types
            def __init__(self, *args: object, **options: object) -> None:
                super().__init__(*args, **(options | {"file": nowhere}))

            def update(self, n: float | None = 1) -> bool | None:
                is_shown: bool | None = super().update(n)
                # Other bars count files. Of several byte counts the largest is right: bytes on the
                # disk already are not transferred.
                if self.unit == "B":
                    progress.reach(int(self.n))
                return is_shown

        yield Bar


class _Forwarder(logging.Handler):
    """Copies the library's warnings, such as of a lost connection, to our log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Log one line, without the signatures in URLs of files."""
        words = re.sub(r"\?\S+", "", " ".join(record.getMessage().split()))
        _log.log(record.levelno, "hub: %s", words)


def _forward_log() -> None:
    """Replace the handlers of the library's log, which it sets up when its API is first used."""
    log = logging.getLogger("huggingface_hub")
    log.handlers[:] = [_Forwarder()]
    log.propagate = False
