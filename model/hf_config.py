"""Which models of `transformers` can be served, decided before any weight is read.

Knows nothing of layers: what only a run can tell is found out in `model/hf_proof.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from model.arch import ArchError
from model.read_arch import read_json
from model.source import ModelSource

_SERVED = "served are decoders of text that attend in every layer and keep no other state"
_OTHER_SENSES = re.compile("audio|image|speech|video|vision|vq")
_PAGED_KINDS = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class HfConfig:
    """A config that `transformers` understands and we can serve."""

    #: Its own, with its own attributes.
    config: Any
    #: Of the decoder with its head, such as `Gemma2ForCausalLM`.
    model_class: Any
    #: Positions below this give the same result whatever else is in the batch.
    max_positions: int
    notes: tuple[str, ...]


@contextmanager
def faults_of(model_type: object) -> Iterator[None]:
    """Have whatever a model's code raises begin with its name, and be an `ArchError`."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    # Hundreds of authors' code: what it makes of a config it cannot work with is anybody's guess.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ArchError(f"model_type {model_type!r}: {' '.join(lines[:2])}; {_SERVED}") from error


def read_hf_config(source: ModelSource, wanted_positions: int | None) -> HfConfig:
    """Read and judge a config.json. `ArchError` says in a line why a model cannot be served."""
    path = source.path if source.kind == "dummy" else source.path / "config.json"
    values = read_json(path)
    with faults_of(values.get("model_type")):
        config = _parse(values)
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if isinstance(model_class, tuple):
            model_class = model_class[0]
        if reason := _why_not(config, model_class):
            raise ArchError(f"it {reason}")
        max_positions, notes = _positions(config.get_text_config(), wanted_positions)
    return HfConfig(config, model_class, max_positions, notes)


def _parse(values: Mapping[str, object]) -> Any:  # noqa: ANN401 - one of hundreds of classes
    name = values.get("model_type")
    if name not in transformers.CONFIG_MAPPING:
        raise ArchError(
            f"transformers {transformers.__version__} does not know it, and code that comes with "
            "a model is never run"
        )
    if values.get("quantization_config") is not None:
        raise ArchError("its weights are quantized, which is supported in .gguf files alone")
    return transformers.CONFIG_MAPPING[name].from_dict(dict(values))


def _why_not(config: Any, model_class: Any) -> str:  # noqa: ANN401 - as above
    """Say what is in the way; nothing where nothing is."""
    senses = sorted(name for name in config.sub_configs if _OTHER_SENSES.search(name))
    kinds = getattr(config, "layer_types", None) or ()
    unpaged = sorted({str(kind) for kind in kinds} - _PAGED_KINDS)
    reasons = (
        (model_class is None, "is no causal language model"),
        (getattr(config, "is_encoder_decoder", False), "has an encoder"),
        (senses, f"has parts that are not for text ({', '.join(senses)})"),
        (
            getattr(model_class, "_is_stateful", False),
            "keeps a recurrent state, which has no pages to be shared or brought back",
        ),
        (unpaged, f"has layers of kind {', '.join(unpaged)}"),
        (
            not getattr(model_class, "_supports_attention_backend", False),
            "does not let others compute its attention (transformers' attention interface)",
        ),
        (
            "dynamic" in set(_rope_types(config)),
            "has dynamic rope scaling, by which one long request would change all others",
        ),
    )
    return next((reason for is_so, reason in reasons if is_so), "")


def _rope_types(config: Any) -> Iterator[str]:  # noqa: ANN401 - as above
    """Yield the types of rope: one for all layers, or one for each kind of them."""
    found = getattr(config, "rope_parameters", None) or {}
    for spec in (found, *found.values()):
        if isinstance(spec, dict) and isinstance(spec.get("rope_type"), str):
            yield spec["rope_type"]


def _positions(config: Any, wanted: int | None) -> tuple[int, tuple[str, ...]]:  # noqa: ANN401 - as above
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 2:
        raise ArchError(f"max_position_embeddings does not say how long a text may be: {longest}")
    if "longrope" not in set(_rope_types(config)):
        return longest, ()
    short = config.rope_parameters.get("original_max_position_embeddings") or longest
    if wanted is None or wanted <= short:
        note = f"requests are limited to {short} tokens; past that all positions are turned by "
        note += f"other angles, which --max-model-len (up to {longest}) chooses for every request"
        return min(short, longest), (note,) if short < longest else ()
    return longest, (f"angles are those for more than {short} tokens, also in shorter requests",)
