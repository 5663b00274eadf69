"""The parts that all routes need, passed once: no globals, no application state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from configs.schema import OctavoConfig
from scheduler.client import EngineClient, EngineUnavailableError
from server.generation.retry_after import QueueReservations
from server.http.context import Clock
from server.http.errors import model_not_found
from server.http.lifecycle import Lifecycle
from server.http.work import Workshop
from server.metrics import Metrics
from server.structured.checker import GrammarService
from server.text.load import ModelText


@dataclass(frozen=True, slots=True)
class Service:
    """The engine, the text side of its model, and the services around both."""

    config: OctavoConfig
    client: EngineClient
    text: ModelText
    lifecycle: Lifecycle
    metrics: Metrics
    clock: Clock
    #: For seeds and ids.
    chance: random.Random
    reservations: QueueReservations
    grammars: GrammarService
    #: Of requests that do not set them.
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    #: Where long texts are converted.
    work: Workshop = field(default_factory=Workshop)

    @property
    def model_name(self) -> str:
        """The name clients ask for."""
        return served_name(self.config, self.client)

    def require_model(self, name: str | None) -> None:
        """Raise `ApiError` (404) if the request names another model than the served one."""
        if name is not None and name != self.model_name:
            raise model_not_found(name)


def served_name(config: OctavoConfig, client: EngineClient) -> str:
    """Return the configured name, else the model's own; before the engine is up, its path."""
    if config.model.served_model_name is not None:
        return config.model.served_model_name
    try:
        return client.info.name
    except EngineUnavailableError:
        return config.model.model
