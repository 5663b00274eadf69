"""The policy of a request's keys, as the engine gets it and as the answer reports it.

Knows nothing of the fields of the APIs, nor of how keys are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.client import FULL_VIEW, GenerateRequest, Selection, View
from server.answer_types import KVReport
from server.generation.request_fields import GenerationSpec
from server.http.errors import invalid
from server.service import Service


def view_of(service: Service, spec: GenerationSpec) -> View:
    """Return the keys that the queries of a request read. Raises `ApiError`.

    Where keys are kept by their scores: all, of the kept ones.
    """
    policy, info = spec.kv_policy or service.config.cache.policy, service.client.info
    if policy.type == "full":
        return FULL_VIEW
    if why := info.why_not(is_selection=policy.is_by_score):
        raise invalid(f"kv_policy: {policy} is not served: {why}", "kv_policy")
    if policy.num_keys > info.max_model_len:
        path = "kv_policy.capacity" if policy.is_by_score else "kv_policy.window"
        raise invalid(
            f"{path}: {policy} reads {policy.num_keys} tokens, more than the {info.max_model_len}"
            " that the model's context has",
            path,
        )
    if policy.is_by_score:
        return FULL_VIEW
    return View(policy.sinks, policy.window).within(info.view)


def selection_of(service: Service, spec: GenerationSpec) -> Selection | None:
    """Return how a request chooses the keys that it keeps; None: it does not by their scores."""
    policy = spec.kv_policy or service.config.cache.policy
    if not policy.is_by_score:
        return None
    if policy.type == "h2o":
        return Selection(policy.window, policy.capacity, scoring="all")
    return Selection(policy.window, policy.capacity, policy.fusion)


def dropped_tokens(request: GenerateRequest, num_output: int) -> int:
    """Return how many tokens are not read any more, after so many tokens of the answer."""
    num_prompt = len(request.prompt_token_ids)
    if request.selection is not None:
        # The newest token is not computed, so it drops none.
        return request.selection.num_dropped(num_prompt + num_output - 2, num_prompt)
    max_keys = request.view.max_keys
    return 0 if max_keys is None else max(0, num_prompt + num_output - max_keys)


def report_of(
    requests: Sequence[GenerateRequest], num_output: int, num_dropped: int
) -> KVReport | None:
    """Return the report on the keys of an answer, of all its choices together; None: all are read.

    `num_output`, `num_dropped`: tokens of all choices.
    """
    view, selection = requests[0].view, requests[0].selection
    num_tokens = num_output + sum(len(request.prompt_token_ids) for request in requests)
    if selection is not None and selection.scoring == "all":
        return {
            "policy": "h2o",
            "window": selection.window,
            "capacity": selection.capacity,
            "held_tokens": num_tokens - num_dropped,
            "dropped_tokens": num_dropped,
        }
    if selection is not None:
        return {
            "policy": "morph",
            "window": selection.window,
            "capacity": selection.capacity,
            "fusion": selection.fusion,
            "held_tokens": num_tokens - num_dropped,
            "dropped_tokens": num_dropped,
        }
    if view.window is None:
        return None
    return {
        "policy": "sinks" if view.sinks else "window",
        "window": view.window,
        "sinks": view.sinks,
        "held_tokens": num_tokens - num_dropped,
        "dropped_tokens": num_dropped,
    }
