"""Sequences as drafters see them: their tokens are known, and no scheduler runs them."""

from __future__ import annotations

from model.interface import SamplingParams
from scheduler.messages import GenerateRequest, Submit
from scheduler.sequence import Sequence


def sequence_of(
    prompt: list[int],
    output: tuple[int, ...] = (),
    *,
    request_id: int = 0,
    namespace: str = "",
    prediction: tuple[int, ...] = (),
    store_up_to: int | None = None,
) -> Sequence:
    params = SamplingParams(max_tokens=1000)
    request = GenerateRequest(
        tuple(prompt),
        params,
        namespace=namespace,
        prediction_token_ids=prediction,
        store_up_to=store_up_to,
    )
    submit = Submit(request_id, request, output)
    return Sequence(submit, arrival=0, eos_token_ids=(), max_model_len=10_000)
