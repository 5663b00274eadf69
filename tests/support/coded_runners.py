"""A tiny model whose pages are codes, in runners with any number of pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from configs.schema import CacheSection, ModelSection, OctavoConfig, SchedulerSection
from model import build
from model.attention.reference import ReferenceAttention
from model.interface import Vocabulary
from model.kv.format import KVLayout
from model.runner import TorchRunner


def coded_runners(
    config_file: Path, layout: KVLayout, backend: Any, vocabulary: Vocabulary
) -> Iterator[Callable[[int], TorchRunner]]:
    """Yield a function from a number of pages to a runner whose results do not depend on a batch.

    A last bit of a key may be a whole step of its code. So products are the compiled ones, and
    attention too, or it is in float64, whose own last bits vanish in the result.
    """
    source, name = build.resolve_source(f"dummy:{config_file}"), layout.format.name
    runners: dict[int, TorchRunner] = {}

    def make(num_pages: int) -> TorchRunner:
        if num_pages not in runners:
            runner = build.make_runner(
                source,
                OctavoConfig(
                    model=ModelSection(
                        quantization="bf16",
                        attention_backend=backend,
                        threads=1,
                        weights_cache="off",
                    ),
                    cache=CacheSection.model_validate(
                        {
                            "kv_cache_memory": num_pages * layout.bytes_per_page,
                            "kv_cache_dtype": name,
                            "page_size": layout.page_size,
                        }
                    ),
                    scheduler=SchedulerSection(max_num_seqs=6, max_num_batched_tokens=64),
                ),
            )
            assert (runner.info.num_pages, runner.info.kv_cache_dtype) == (num_pages, name)
            if backend == "reference":
                reference: Any = runner._attention
                runner._attention = ReferenceAttention(
                    reference._spec, reference._pool, softmax_dtype=torch.float64
                )
            runner.set_vocabulary(vocabulary)
            runners[num_pages] = runner
        return runners[num_pages]

    yield make
    for runner in runners.values():
        runner.close()
