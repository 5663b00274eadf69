"""From settings to a runner: the weights, their format and the number of pages.

Importing this module does not import torch: the API process resolves names here, and only the
engine's process, which calls `make_runner`, imports torch.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from configs.schema import OctavoConfig
from model.weights.source import ModelSource, ModelSourceError, octavo_home, resolve

if TYPE_CHECKING:
    from model.runner import TorchRunner

_SPIN_COUNT = "10000"

__all__ = ["ModelSource", "ModelSourceError", "import_engine", "make_runner", "resolve_source"]


def resolve_source(model: str) -> ModelSource:
    """Find the model's files, fetching them if need be. Raises `ModelSourceError`."""
    return resolve(model, home=octavo_home(), progress=True)


def make_runner(
    source: ModelSource,
    config: OctavoConfig,
    end_token_ids: tuple[int, ...] = (),
    proof_token_ids: tuple[int, ...] = (),
    draft_source: ModelSource | None = None,
) -> TorchRunner:
    """Load the model and size its pages. Raises `ValueError` that names the setting at fault.

    `end_token_ids`: tokens that end an answer, in addition to the model's config.
    `proof_token_ids`: a text that proves a lossy format of keys and values; none: no proof.
    `draft_source`: of the draft model, if there is one.
    """
    import_engine()
    from model.assemble import assemble  # noqa: PLC0415 - imports torch, see above

    return assemble(source, config, end_token_ids, proof_token_ids, draft_source)


def import_engine() -> None:
    """Import the modules that `make_runner` needs, torch among them: that takes seconds."""
    # Read when torch loads its OpenMP. Threads that wait for each other between two products spin
    # for some tens of microseconds, then sleep. By default they spin for milliseconds, which delays
    # a step if another process needs the core. Measured beside one busy process: half a second a
    # step by default, 70 ms with this; on an idle machine 17 ms with both, 28 ms without spinning.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    import model.assemble  # noqa: F401, PLC0415 - imports torch, see above
