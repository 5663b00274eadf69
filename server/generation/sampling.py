"""A request's fields as `SamplingParams`: what the client wrote, checked, under its own names."""

from __future__ import annotations

from scheduler.client import SamplingParams
from server.generation.prompts import require_tokens
from server.http.errors import invalid
from server.openai.schemas import GenerateFields
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
    request: GenerateFields,
    *,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    bad_words: tuple[tuple[int, ...], ...],
    names: dict[str, str],
    least_tokens: int = 1,
) -> SamplingParams:
    """Build the parameters; `names`: what the client calls a field otherwise than we do."""
    vocab_size = service.client.info.vocab_size
    defaults = service.sampling_defaults
    given = {name: getattr(request, name) for name in _SAMPLING_FIELDS}
    given = {name: defaults.get(name) if value is None else value for name, value in given.items()}
    top_k = int(defaults.get("top_k", 0)) if request.top_k is None else request.top_k
    stop_token_ids = request.stop_token_ids or []
    require_tokens(stop_token_ids, vocab_size, "stop_token_ids")
    allowed = request.allowed_token_ids
    require_tokens(allowed or (), vocab_size, "allowed_token_ids")
    if max_tokens < least_tokens:
        name = names.get("max_tokens", "max_tokens")
        raise invalid(f"{name} must be at least {least_tokens}, got {max_tokens}", name)
    try:
        return SamplingParams(
            max_tokens=max_tokens,
            top_k=_top_k(top_k, vocab_size),
            seed=_seed(service, request.seed),
            logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
            allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
            bad_words=bad_words,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop_token_ids=tuple(stop_token_ids),
            **{name: value for name, value in given.items() if value is not None},
        )
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        param = names.get(name, name)
        raise invalid(f"{param} {rest}", param) from error


def _top_k(top_k: int | None, vocab_size: int) -> int:
    """-1 is vLLM's word for no limit."""
    return 0 if top_k in {None, -1} else min(top_k or 0, vocab_size)


def _seed(service: Service, seed: int | None) -> int:
    if seed is None:
        return service.chance.getrandbits(63)
    if not -(2**63) <= seed < 2**64:
        raise ValueError("seed must fit 64 bits")
    return seed % 2**64


def _logit_bias(biases: dict[str, float], vocab_size: int) -> tuple[tuple[int, float], ...]:
    for key in biases:
        if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocab_size):
            raise invalid(
                f"logit_bias: its keys are token ids, 0 to {vocab_size - 1}, in strings",
                "logit_bias",
            )
    return tuple((int(key), bias) for key, bias in biases.items())
