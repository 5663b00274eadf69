"""From settings to a runner: what is loaded, in which format, with how many pages.

Importing this module does not import torch: the API process resolves names here and hands
`make_runner` to the engine's process, which pays for torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from configs.schema import OctavoConfig
from model.source import ModelSource, ModelSourceError, octavo_home, resolve

if TYPE_CHECKING:
    from model.runner import TorchRunner

__all__ = ["ModelSource", "ModelSourceError", "make_runner", "resolve_source"]


def resolve_source(model: str) -> ModelSource:
    """Find the model's files, fetching them if need be. Raises `ModelSourceError`."""
    return resolve(model, home=octavo_home(), progress=True)


def make_runner(source: ModelSource, config: OctavoConfig) -> TorchRunner:
    """Load the model and size its pages. Raises `ValueError` that names the setting at fault."""
    from model.assemble import assemble  # noqa: PLC0415 - imports torch, see above

    return assemble(source, config)
