"""Decides which models of `transformers` can be served, before any weight is read.

Knows nothing of layers: `model/hf/proof.py` checks the properties that need a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from model.architectures.arch import MOST_LAYERS, ArchError, ConfigKeys
from model.formats import FormatError
from model.formats.json_file import read_json_object
from model.hf.attention import NOT_OPEN
from model.hf.text import text_class
from model.weights.source import ModelSource

_SERVED = "served are decoders of text that attend in every layer and keep no other state"
#: Some libraries' messages are pages long.
_MAX_REASON_CHARS = 300
#: The positions that the proof computes.
_MIN_POSITIONS = 8
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_PAGED_KINDS = frozenset({"attention", "full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class HfConfig:
    """A config that `transformers` understands and we can serve."""

    #: An instance of the model's own class of configs.
    config: Any
    #: Its part for text; `config` itself where there is no other part.
    text_config: Any
    #: The class to load where there are parts for more than text, else None; see `text_class`.
    text_class: Any
    #: Below this position, results do not depend on the rest of the batch.
    max_positions: int
    #: Whether the weights are in mxfp4, as in gpt-oss.
    is_mxfp4: bool
    notes: tuple[str, ...]


@contextmanager
def faults_of(model_type: object) -> Iterator[None]:
    """Turn the exceptions of a model's code into `ArchError`s that name the model."""
    try:
        yield
    except (MemoryError, OSError):
        raise
    # Hundreds of authors' code: it may raise anything for a config that it cannot handle.
    except Exception as error:
        reason = " ".join(str(error).split())[:_MAX_REASON_CHARS]
        if not isinstance(error, ArchError | FormatError):
            reason = f"{type(error).__name__}: {reason}"
        raise ArchError(f"model_type {model_type!r}: {reason}; {_SERVED}") from error


def read_hf_config(source: ModelSource, wanted_positions: int | None) -> HfConfig:
    """Read and check a config.json. Raises `ArchError` with the reason in one line."""
    path = source.path if source.kind == "dummy" else source.path / "config.json"
    values = read_json_object(path)
    with faults_of(values.get("model_type")):
        for part in (values, *values.values()):
            if isinstance(part, dict):
                # The library loops over them before any check.
                for key in _LAYER_COUNTS:
                    ConfigKeys(part).count(key, 0, most=MOST_LAYERS)
        config = _parse(source.path, values)
        model_class = _model_class(config)
        text_config = config.get_text_config(decoder=True)
        if reason := _why_not(config, text_config, model_class):
            raise ArchError(f"it {reason}")
        max_positions, notes = _positions(text_config, wanted_positions)
        is_text_class = model_class.config_class is type(text_config)
    if (named := config.architectures) and named != [model_class.__name__]:
        notes = (f"read as {model_class.__name__}, though architectures is {named}", *notes)
    is_mxfp4 = _quantization_method(config) is not None
    if is_mxfp4:
        notes = ("weights in mxfp4 are expanded", *notes)
    # `AutoModelForCausalLM` accepts the text part of a config.
    is_causal_lm = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    is_all_text = is_text_class and not text_config.sub_configs and is_causal_lm
    found_class = None if is_all_text else text_class(model_class)
    return HfConfig(config, text_config, found_class, max_positions, is_mxfp4, notes)


def _model_class(config: Any) -> Any:  # noqa: ANN401 - one of hundreds of classes
    """Return the class that computes logits of text; None where there is none."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING)
    return next((one[type(config)] for one in mappings if type(config) in one), None)


def _quantization_method(config: Any) -> str | None:  # noqa: ANN401 - as above
    """Return the name of the method that quantized the weights, or None."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return str(found.get("quant_method")) if isinstance(found, dict) else "unknown"


def _parse(path: Path, values: Mapping[str, object]) -> Any:  # noqa: ANN401 - as above
    """Parse a config by `AutoConfig`, as users of `transformers` do.

    Its classes by themselves read some files otherwise, such as a Mistral with layer_types.
    """
    if values.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ArchError(
            f"transformers {transformers.__version__} does not know it, and code that comes with "
            "a model is never run"
        )
    config = transformers.AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=False
    )
    if (method := _quantization_method(config)) not in {None, "mxfp4"}:
        raise ArchError(
            f"its weights are quantized ({method}); with transformers only mxfp4 is read"
        )
    return config


def _why_not(config: Any, text_config: Any, model_class: Any) -> str:  # noqa: ANN401 - as above
    """Return the reason why a model cannot be served, or an empty string."""
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder"
    if model_class is None:
        return "is no causal language model"
    kinds = _layer_kinds(text_config)
    ropes = _rope_types(text_config)
    unpaged = sorted(kinds - _PAGED_KINDS)
    reasons = (
        (
            # Not where the config lists only layers without such a state.
            getattr(model_class, "_is_stateful", False) and (unpaged or not kinds),
            "keeps a recurrent state, which has no pages to be shared or brought back",
        ),
        (unpaged, f"has layers of kind {', '.join(unpaged)}"),
        # Known here only for text-only models; the probe finds the others.
        (config is text_config and not _is_open(model_class), NOT_OPEN),
        (
            {"longrope"} < ropes,
            "has rope scaling by which one long request would change all others",
        ),
    )
    return next((reason for is_so, reason in reasons if is_so), "")


def _is_open(model_class: Any) -> bool:  # noqa: ANN401 - as above
    """Return whether a class calls the registered attention; see `open_attention`."""
    is_open: bool = model_class._can_set_attn_implementation()  # noqa: SLF001 - has no public form
    return is_open or model_class is transformers.FalconForCausalLM


def _layer_kinds(config: Any) -> set[str]:  # noqa: ANN401 - as above
    """Return the kinds of layers that a config lists, which may be none."""
    names = ("layer_types", "layers_block_type")
    return {str(kind) for name in names for kind in getattr(config, name, None) or ()}


def _rope_types(config: Any) -> set[str]:  # noqa: ANN401 - as above
    """Return the types of rope: one for all layers, or one for each kind of them."""
    found = getattr(config, "rope_parameters", None) or {}
    specs = (found, *found.values())
    return {str(spec.get("rope_type", "default")) for spec in specs if isinstance(spec, dict)}


def _positions(config: Any, wanted: int | None) -> tuple[int, tuple[str, ...]]:  # noqa: ANN401 - as above
    """Return the longest text, and a note where it is shorter than the config allows.

    Under dynamic rope each token past the trained length changes all angles, also of stored keys,
    so texts end there. Under longrope all angles change once one text of the batch is longer than
    the first trained length. Where such texts are requested, all texts get their angles.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < _MIN_POSITIONS:
        raise ArchError(f"its max_position_embeddings is {longest}, so its length is not known")
    kinds = _rope_types(config)
    if "dynamic" in kinds:
        note = f"limited to {longest} tokens, for past them each changes the angles of all"
        return longest, (note,)
    if "longrope" not in kinds:
        return longest, ()
    rope = config.rope_parameters
    short = rope["original_max_position_embeddings"]
    if wanted is None or wanted <= short:
        note = f"limited to {short} tokens, for past them the model turns all positions by other "
        return short, (note + f"angles; --max-model-len up to {longest} takes those throughout",)
    rope["short_factor"] = rope["long_factor"]
    return longest, (f"angles are those for more than {short} tokens, in short requests too",)
