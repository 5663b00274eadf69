"""`SamplingParams` of a request: checked values; errors use the client's names."""

from __future__ import annotations

from collections.abc import Mapping

from scheduler.client import SamplingParams
from server.generation.generation_spec import GenerationSpec
from server.generation.prompts import require_tokens
from server.http.errors import Path, dotted, invalid
from server.service import Service

_SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
)


def sampling_of(
    service: Service,
    spec: GenerationSpec,
    *,
    max_tokens: int,
    least_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    bad_words: tuple[tuple[int, ...], ...],
) -> SamplingParams:
    """Return the parameters that the engine takes. Raises `ApiError`."""
    vocab_size, asked = service.client.info.vocab_size, spec.sampling
    defaults = service.sampling_defaults
    given = {name: getattr(asked, name) for name in _SAMPLING_FIELDS}
    given = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    top_k = int(defaults.get("top_k", 0)) if asked.top_k is None else asked.top_k
    stop_token_ids, allowed = asked.stop_token_ids or (), asked.allowed_token_ids
    require_tokens(stop_token_ids, vocab_size, ("stop_token_ids",))
    require_tokens(allowed or (), vocab_size, ("allowed_token_ids",))
    name, min_tokens = dotted(spec.max_tokens_path), asked.min_tokens or 0
    if max_tokens < least_tokens:
        message = f"{name} must be at least {least_tokens}, got {max_tokens}"
        raise invalid(message, spec.max_tokens_path)
    if not 0 <= min_tokens <= max_tokens:
        raise invalid(f"min_tokens must be between 0 and {name}, got {min_tokens}", "min_tokens")
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=_top_k(top_k, vocab_size),
            seed=_seed(service, asked.seed),
            logit_bias=_logit_bias(asked.logit_bias or {}, vocab_size),
            allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
            bad_words=bad_words,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop_token_ids=tuple(stop_token_ids),
            **{name: value for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        paths: dict[str, Path] = {
            "max_tokens": spec.max_tokens_path,
            "logprobs": spec.logprobs_path,
        }
        path = paths.get(name, (name,))
        raise invalid(f"{dotted(path)} {rest}", path) from error


def _top_k(top_k: int | None, vocab_size: int) -> int:
    """Return 0 for no limit, which vLLM's clients write as -1."""
    return 0 if top_k in {None, -1} else min(top_k or 0, vocab_size)


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
