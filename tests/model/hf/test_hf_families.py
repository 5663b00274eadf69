"""Every family of `transformers`: served as it is there, or refused in a line. Minutes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from model.architectures.arch import ArchError
from model.hf.decoder import load_hf_decoder
from model.weights.source import ModelSource

_ROOT = Path(__file__).parents[3]
#: The most popular families on the hub.
_POPULAR = set(
    """falcon granitemoehybrid nemotron stablelm
    apertus arcee bitnet cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 exaone4 gemma gemma2
    gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox gpt_oss granite
    gemma3 gemma4 llava llava_next llava_onevision mistral3 paligemma idefics3 smolvlm internvl
    qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe glm4v molmo2 voxtral phi4_multimodal kimi_k25
    granitemoe helium hunyuan_v1_dense llama minicpm3 ministral3 mistral mixtral olmo olmo2 olmo3
    olmoe opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2""".split()  # noqa: SIM905 - reads best as one text
)


@pytest.mark.slow
def test_every_family_is_served_or_refused(
    tmp_path: Path, family_sizes: Callable[[str], dict[str, Any]]
) -> None:
    path = tmp_path / "config.json"
    served, refused = set(), {}
    families = [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES]
    for family in dict.fromkeys(families):
        path.write_text(json.dumps({"model_type": family, **family_sizes(family)}))
        try:
            load_hf_decoder(
                ModelSource("dummy", path, family), dtype=torch.float32, device=torch.device("cpu")
            )
            served.add(family)
        except ArchError as error:
            refused[family] = str(error)
    assert served >= _POPULAR, {one: refused[one] for one in sorted(_POPULAR - served)}
    for family, reason in refused.items():
        assert reason.startswith(f"model_type '{family}': "), reason
    for document, claim in (
        ("README.md", f"{len(served)} families in all"),
        (
            "docs/adr/0012-universal-models.md",
            f"Of {len(set(families))} families that transformers",
        ),
        ("docs/adr/0012-universal-models.md", f"language models, {len(served)} were served"),
    ):
        told = " ".join((_ROOT / document).read_text(encoding="utf-8").split())
        assert claim in told, (document, claim)
    print(f"{len(served)} served: {', '.join(sorted(served))}")  # noqa: T201 - the purpose of a manual run
    print(*sorted(refused.values()), sep="\n")  # noqa: T201 - likewise
