"""`SamplingParams` of a request, and their defaults from generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.formats.json_file import shown
from scheduler.client import SamplingParams
from server.generation.prompt_logprobs import num_wanted
from server.generation.prompts import require_tokens
from server.generation.request_fields import GenerationSpec
from server.http.errors import Path, dotted, invalid
from server.service import Service

#: The same as vLLM's.
_MAKERS_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_of(
    service: Service,
    spec: GenerationSpec,
    *,
    max_tokens: int,
    bad_words: tuple[tuple[int, ...], ...],
) -> SamplingParams:
    """Return the parameters that the engine takes. Raises `ApiError`."""
    vocab_size, given = service.client.info.vocab_size, {**spec.fields.sampling()}
    prompt_logprobs, is_ranked = num_wanted(spec), spec.num_tries > spec.num_choices
    stop_token_ids, allowed = given.pop("stop_token_ids", ()), given.pop("allowed_token_ids", None)
    require_tokens(stop_token_ids, vocab_size, ("stop_token_ids",))
    require_tokens(allowed or (), vocab_size, ("allowed_token_ids",))
    name, min_tokens = dotted(spec.max_tokens_path), given.get("min_tokens", 0)
    least_tokens = 0 if spec.is_echoed or spec.is_prewarming else 1
    if max_tokens < least_tokens:
        message = f"{name} must be at least {least_tokens}, got {max_tokens}"
        raise invalid(message, spec.max_tokens_path)
    if not 0 <= min_tokens <= max_tokens:
        raise invalid(f"min_tokens must be between 0 and {name}, got {min_tokens}", "min_tokens")
    top_k = given.get("top_k", int(service.sampling_defaults.get("top_k", 0)))
    try:
        values: dict[str, Any] = {
            **service.sampling_defaults,
            **given,
            # vLLM's clients write -1 for no limit.
            "top_k": 0 if top_k == -1 else min(top_k, vocab_size),
            "seed": _seed(service, given.get("seed")),
            "logit_bias": _logit_bias(given.get("logit_bias", {}), vocab_size),
            "bad_words": bad_words,
        }
        return SamplingParams(
            max_tokens=max_tokens,
            allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
            logprobs=0 if is_ranked and spec.logprobs is None else spec.logprobs,
            prompt_logprobs=prompt_logprobs,
            stop_token_ids=tuple(stop_token_ids),
            **values,
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        paths: dict[str, Path] = {
            "max_tokens": spec.max_tokens_path,
            "logprobs": spec.logprobs_path,
        }
        path = paths.get(name, (name,))
        raise invalid(f"{dotted(path)} {rest}", path) from error


def _seed(service: Service, seed: int | None) -> int:
    if seed is None:
        return service.chance.getrandbits(63)
    if not -(2**63) <= seed < 2**64:
        raise ValueError("seed must fit 64 bits")
    return seed % 2**64


def _logit_bias(biases: Mapping[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            raise invalid(
                f"logit_bias: its keys are token ids, 0 to {vocab_size - 1}, in strings",
                "logit_bias",
            )
    return tuple((int(key), bias) for key, bias in biases.items())


def makers_sampling(stated: Mapping[str, object]) -> tuple[dict[str, float], list[str]]:
    """Return the valid values of generation_config.json by the names of parameters.

    An invalid one has a note instead of an error, because the operator did not write it.
    """
    taken: dict[str, float] = {}
    notes = []
    for name in _MAKERS_NAMES:
        if (value := stated.get(name)) is None:
            continue
        try:
            taken[name] = _checked(name, value)
        except ValueError as error:
            notes.append(f"generation_config.json: {name}: {shown(value)} is not used: {error}")
    does_sample = stated.get("do_sample")
    if does_sample is False:
        taken["temperature"] = 0.0
    elif does_sample not in (None, True):
        notes.append(
            f"generation_config.json: do_sample: {shown(does_sample)} is neither true nor false"
        )
    return taken, notes


def _checked(name: str, value: object) -> float:
    try:
        # A number may stand there as a text; of the truth values float() would make numbers.
        number = float("" if isinstance(value, bool) else value)  # type: ignore[arg-type] # caught
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} must be a number") from None
    if name == "top_k":
        if not number.is_integer():
            raise ValueError(f"{name} must be a whole number")
        # -1 and 0 both mean that there is no limit.
        number = max(0, int(number))
    params: dict[str, Any] = {name: number}
    SamplingParams(max_tokens=1, **params)
    return number
