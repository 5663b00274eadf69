"""Whether a model can serve the default policy of keys. Knows nothing of pages."""

from __future__ import annotations

from configs.kv_policy import KVPolicy
from model.interface import ModelInfo


def require_served(policy: KVPolicy, info: ModelInfo) -> None:
    """Raise `ValueError` where the model cannot serve the default of `kv_policy`."""
    if policy.type == "full":
        return
    if why := info.why_not(is_selection=policy.is_by_score):
        raise ValueError(f"kv_policy: {policy} is not served: {why}")
    if policy.num_keys > info.max_model_len:
        raise ValueError(
            f"kv_policy: {policy} holds {policy.num_keys} tokens, more than the "
            f"{info.max_model_len} that a sequence may have"
        )
