"""Drafters without a model in the loop: its answers are generated once, then followed by each.

`python bench/drafters.py [--model smollm2] [--requests 6] [--tokens 8]`: prints the share of draft
tokens that were accepted, the tokens of a step, and the time of a proposal. A step verifies at
most `--tokens` draft tokens, whatever their price. Prints; asserts nothing.
"""

# ruff: noqa: T201 - printing is all a benchmark is for

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs.schema import OctavoConfig
from loadtest.presets import PRESETS
from loadtest.prompts import Composer, Manner, Spelling
from loadtest.workloads import Shape
from model import build
from model.interface import SamplingParams
from scheduler.drafters.choice import BestDrafter
from scheduler.drafters.draft import Drafter
from scheduler.drafters.lookups import NgramDrafter, SuffixDrafter
from scheduler.drafters.prediction import PredictionDrafter
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Prepared, Submit
from scheduler.sequence import Sequence
from server.text.load import ModelText, load_text

DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "ngram": NgramDrafter,
    "suffix": SuffixDrafter,
    "prediction": PredictionDrafter,
    "best": lambda: BestDrafter([PredictionDrafter(), SuffixDrafter()]),
}
Recording = tuple[GenerateRequest, list[int]]


def _no_grammars(_message: Prepared) -> None:
    raise AssertionError("nothing here is prepared beside the steps")


def requests(text: ModelText, workload: str, num_requests: int) -> list[GenerateRequest]:
    """Return the first turns of a workload's first conversations as the engine gets them."""
    assert text.template is not None, "the model has no chat template"
    plan = PRESETS[workload][1](Shape(seed=1))
    composer = Composer("", plan, Spelling(), Manner())
    found = []
    for number in range(num_requests):
        turn = plan.lanes[0].make(number)[0]
        messages = composer.messages(turn, [])
        rendered = text.template.render(messages, add_generation_prompt=True)
        prompt = text.tokenizer.encode(rendered, add_special_tokens=False)
        # An editor expects the document itself.
        document = str(messages[-1]["content"]).split("\n\n", 1)[-1]
        predicted = text.tokenizer.encode(document, add_special_tokens=False)
        params = SamplingParams(turn.max_tokens, temperature=0.0)
        found.append(GenerateRequest(tuple(prompt), params, prediction_token_ids=tuple(predicted)))
    return found


def record(engine: Engine, asked: list[GenerateRequest]) -> list[Recording]:
    """Return each request with its answer."""
    outputs: dict[int, list[int]] = {number: [] for number in range(len(asked))}
    for number, request in enumerate(asked):
        engine.handle(Submit(number, request))
    while engine.has_work:
        result = engine.step()
        for request_id, token_id in zip(result.request_ids, result.token_ids, strict=True):
            outputs[request_id].append(token_id)
    return [(request, outputs[number]) for number, request in enumerate(asked)]


def follow(drafter: Drafter, recordings: list[Recording], max_tokens: int) -> str:
    """Return the figures of a drafter over all answers, one after another."""
    num_steps = num_offered = num_accepted = num_drafts = 0
    taken_s = 0.0
    for number, (request, output) in enumerate(recordings):
        sequence = Sequence(
            Submit(number, request, tuple(output[:1])),
            arrival=number,
            eos_token_ids=(),
            max_model_len=1 << 20,
        )
        place = 1
        while place < len(output):
            began_s = time.thread_time()
            draft = drafter.propose(sequence, max_tokens)
            taken_s += time.thread_time() - began_s
            offered = [] if draft is None else draft.token_ids
            wanted = output[place : place + len(offered)]
            pairs = enumerate(zip(offered, wanted, strict=False))
            accepted = next((n for n, (a, b) in pairs if a != b), len(wanted))
            added = output[place : place + accepted + 1]
            sequence.token_ids += added
            drafter.observe(sequence, added)
            place += len(added)
            num_steps += 1
            num_drafts += bool(offered)
            num_offered += len(offered)
            num_accepted += accepted
        drafter.forget(sequence)
    num_tokens = sum(len(output) - 1 for _, output in recordings)
    share, a_draft = num_accepted / max(1, num_offered), num_accepted / max(1, num_drafts)
    each_us = taken_s / max(1, num_steps) * 1e6
    return (
        f"{num_tokens / max(1, num_steps):5.2f} tokens a step, {num_accepted}/{num_offered}"
        f" accepted ({share:.0%}), {a_draft:.1f} a draft, {each_us:.1f} µs each"
    )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=8)
    options = parser.parse_args()
    config = OctavoConfig.model_validate({"model": {"model": options.model}})
    source = build.resolve_source(options.model)
    text, runner = load_text(source.path), build.make_runner(source, config)
    for workload in ("edit", "summary", "retry"):
        engine = Engine(runner, config.scheduler, time.monotonic, _no_grammars)
        recordings = record(engine, requests(text, workload, options.requests))
        if workload == "retry":
            recordings = [one for one in recordings for _ in range(2)]
        for name, make in DRAFTERS.items():
            print(
                f"{workload:8} {name:10} {follow(make(), recordings, options.tokens)}", flush=True
            )
    runner.close()


if __name__ == "__main__":
    main()
