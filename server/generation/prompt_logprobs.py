"""Log-probabilities of tokens in answers, and the checks of requests for the prompt's own.

A request has two ways to the prompt's: vLLM's `prompt_logprobs`, and OpenAI's older `echo` with
`logprobs`, which evaluation harnesses use. Knows nothing of how they are computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from scheduler.client import TokenLogprobs
from server.answer_types import (
    CompletionLogprobs,
    PromptCandidate,
    PromptLogprobs,
    TokenLogprob,
    TopLogprob,
)
from server.generation.request_fields import GenerationSpec
from server.http.errors import invalid
from server.text.detokenize import StreamDecoder
from server.text.tokenizer import Tokenizer

#: Stands for the logarithm of 0, which JSON cannot express; the same as OpenAI's.
LOWEST_LOGPROB = -9999.0
#: Probabilities in one answer: some hundred megabytes.
MAX_ENTRIES = 2**20


def num_wanted(spec: GenerationSpec) -> int | None:
    """Return the number of likeliest tokens to list; None: no scores. Raises `ApiError`."""
    if spec.fields.prompt_logprobs is not None and spec.fields.stream:
        message = "prompt_logprobs cannot be streamed: ask without stream"
        raise invalid(message, "prompt_logprobs", code="unsupported_parameter")
    counts = (spec.fields.prompt_logprobs, spec.logprobs if spec.is_echoed else None)
    return max((count for count in counts if count is not None), default=None)


def require_few(spec: GenerationSpec, prompts: Iterable[Sequence[int]], count: int) -> None:
    """Raise `ApiError` for more log-probabilities than an answer may hold, all prompts together.

    `count`: of the likeliest at each token.
    """
    num_entries = sum(map(len, prompts)) * spec.num_tries * (1 + count)
    if num_entries > MAX_ENTRIES:
        name = "logprobs" if spec.fields.prompt_logprobs is None else "prompt_logprobs"
        message = (
            f"{name}: the prompts of all answers together have {num_entries} probabilities, more"
            f" than the {MAX_ENTRIES} that an answer may contain"
        )
        raise invalid(message, name)


def logprobs_entry(tokenizer: Tokenizer, score: TokenLogprobs) -> TokenLogprob:
    """Return the log-probabilities at one token in OpenAI's shape."""
    sampled = _of_token(tokenizer, score.token_id, score.logprob)
    return {**sampled, "top_logprobs": [_of_token(tokenizer, *top) for top in score.top]}


def _of_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def listed(tokenizer: Tokenizer, scores: Iterable[TokenLogprobs], count: int) -> PromptLogprobs:
    """Return the prompt's in vLLM's shape: null for the first token, then the candidates."""
    return [None, *(_candidates(tokenizer, score, count) for score in scores)]


def _candidates(
    tokenizer: Tokenizer, score: TokenLogprobs, count: int
) -> dict[str, PromptCandidate]:
    """Return the prompt's own token, and the likeliest ones, by their ids."""
    ranked = {score.token_id: (score.rank, score.logprob)}
    for rank, (token_id, logprob) in enumerate(score.top[:count], 1):
        ranked.setdefault(token_id, (rank, logprob))
    return {
        str(token_id): {
            "logprob": max(logprob, LOWEST_LOGPROB),
            "rank": rank,
            "decoded_token": tokenizer.token_text(token_id),
        }
        for token_id, (rank, logprob) in ranked.items()
    }


def echoed(
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    scores: Sequence[TokenLogprobs],
    count: int,
    *,
    skip_special_tokens: bool,
) -> CompletionLogprobs:
    """Return them in OpenAI's shape, as of an output that begins with the prompt's tokens."""
    decoder = StreamDecoder(tokenizer, skip_special_tokens=skip_special_tokens)
    return {
        "tokens": [tokenizer.token_text(token_id) for token_id in prompt],
        "token_logprobs": [None, *(max(score.logprob, LOWEST_LOGPROB) for score in scores)],
        "top_logprobs": [None, *(top_texts(tokenizer, score, count) for score in scores)],
        "text_offset": list(_offsets(decoder, prompt)),
    }


def top_texts(tokenizer: Tokenizer, score: TokenLogprobs, count: int) -> dict[str, float]:
    """Return the likeliest, and the token itself in any case, by their texts."""
    shown = (*score.top[:count], (score.token_id, score.logprob))
    return {
        tokenizer.token_text(token_id): max(logprob, LOWEST_LOGPROB) for token_id, logprob in shown
    }


def _offsets(decoder: StreamDecoder, prompt: Iterable[int]) -> Iterator[int]:
    num_chars = 0
    for token_id in prompt:
        yield num_chars
        num_chars += len(decoder.push((token_id,)))
