"""A digest of all that the contents of a page depend on, besides tokens.

Two models under one name have different digests, and so have two formats of one model. The content
of the files is read once for each state of them, and the result is kept beside downloaded models.
"""

from __future__ import annotations

import functools
import hashlib
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from configs.schema import OctavoConfig
from model.formats.gguf import shard_paths
from model.interface import ModelInfo
from model.kv.format import KVLayout
from model.stored_pages import StoredPages
from model.weights.file_content import FilesState, sha256_of
from model.weights.source import ModelSource, octavo_home
from model.weights.weight_files import safetensors_files

#: To be raised when the bytes of a page get another meaning without a change of code in `model`.
_VERSION = 1
_CODE = ("*.py", "*.h", "*.cpp")
#: Packages whose arithmetic is that of some models.
_PACKAGES = ("torch", "transformers", "gguf")
_DIGEST_LENGTH = 64


def require_storable(device: str, *, has_windows: bool, has_draft_model: bool) -> None:
    """Raise `ValueError` where the pages of such a model cannot be kept on a disk."""
    if device == "cuda":
        raise ValueError("kv_disk_path: pages are kept on a disk on a CPU alone, not with cuda")
    if has_draft_model:
        raise ValueError(
            "kv_disk_path: not with a draft model, whose keys and values would be lacking; "
            "use speculation auto, suffix or ngram"
        )
    if has_windows:
        raise ValueError("kv_disk_path: not with a model of which some or all layers have a window")


def model_files(source: ModelSource) -> FilesState:
    """Return the state of all files that a model is made of. Raises `OSError`."""
    if source.kind == "gguf":
        return FilesState.of(shard_paths(source.path))
    if source.kind == "dummy":
        # Random weights are a function of the config.
        return FilesState.of([source.path])
    return FilesState.of([source.path / "config.json", *safetensors_files(source.path)])


def stored_pages(
    files: FilesState, config: OctavoConfig, info: ModelInfo, layout: KVLayout, isa: str
) -> StoredPages:
    """Return the properties of a model's pages for a tier; arguments as in `page_digest`."""
    return StoredPages(layout.bytes_per_page, page_digest(files, config, info, layout, isa))


def page_digest(
    files: FilesState, config: OctavoConfig, info: ModelInfo, layout: KVLayout, isa: str
) -> str:
    """Return the digest, in hexadecimal. Reads the files of a model at its first start.

    `files`: their state before the model was loaded. `isa`: instructions of the products.
    Raises `OSError`, and `ValueError` where the files have changed since.
    """
    formats = [layout.format_of(layer).name for layer in range(layout.num_layers)]
    # The angles of some models depend on the longest request.
    model = [info.max_model_len, info.dtype, info.quantization, config.model.activation_bits]
    computed = [info.device, info.attention_backend, config.model.model_impl, isa]
    pages = [layout.page_size, layout.num_kv_heads, layout.head_dim, layout.latent_dim, formats]
    content = _content_of(files)
    if not files.is_current():
        raise ValueError("kv_disk_path: the model's files changed while it was loaded; start again")
    return sha256_of([_VERSION, content, _digest_of_code(), model, computed, pages])


def _content_of(files: FilesState) -> str:
    """Return a digest of the content of files, read unless a start before has read this state."""
    record = octavo_home() / "digests" / files.digest
    with suppress(OSError, UnicodeDecodeError):
        if len(known := record.read_text()) == _DIGEST_LENGTH:
            return known
    is_settled = files.is_settled(time.time_ns())
    content = sha256_of(files.digests())
    if is_settled and files.is_current():
        # Where home cannot be written, each start reads the files.
        with suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            temporary = record.with_suffix(".new")
            temporary.write_text(content)
            temporary.replace(record)
    return content


@functools.cache
def _digest_of_code() -> str:
    digest, folder = hashlib.sha256(), Path(__file__).parent
    for path in sorted(path for pattern in _CODE for path in folder.rglob(pattern)):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            digest.update(f"{package} {version(package)}\n".encode())
    return digest.hexdigest()
