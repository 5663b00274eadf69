"""The quality of each format of the weights: `python bench/quality.py [MODEL]`.

Perplexity over this project's own pages, and how often a format's likeliest token is the one that
float32 wrote, over 200 greedy answers. The first format is the reference of the others.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from configs.schema import ModelSection, OctavoConfig, Quantization
from model import build
from model.interface import SamplingParams, TokenLogprobs
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Prepared, Submit
from server.text.load import load_text

#: The first is the reference.
FORMATS: tuple[Quantization, ...] = ("none", "fp16", "bf16", "int8", "int4", "own")
PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
TEXT_TOKENS, NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 1024, 200, 32, 32

Answers = dict[int, list[int]]
Scores = dict[int, list[TokenLogprobs]]


def _no_grammars(_message: Prepared) -> None:
    raise AssertionError("nothing here is prepared beside the steps")


class Judge:
    """An engine with one format of the weights."""

    def __init__(self, model: str, quantization: Quantization) -> None:
        section = ModelSection(model=model, quantization=quantization)
        config = OctavoConfig(model=section)
        runner = build.make_runner(build.resolve_source(model), config)
        self.weights_bytes = runner.info.weights_bytes
        self._engine = Engine(runner, config.scheduler, time.monotonic, _no_grammars)

    def run(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> tuple[Answers, Scores]:
        """Return the tokens of each answer, and the log-probabilities of each prompt."""
        for index, prompt in enumerate(prompts):
            self._engine.handle(Submit(index, GenerateRequest(tuple(prompt), params)))
        answers: Answers = defaultdict(list)
        scores: Scores = defaultdict(list)
        while self._engine.has_work:
            result = self._engine.step()
            for request_id, token_id in zip(result.request_ids, result.token_ids, strict=True):
                answers[request_id].append(token_id)
            for request_id, entries in result.prompt_logprobs:
                scores[request_id] += entries
        return answers, scores

    def close(self) -> None:
        self._engine.close()


def main() -> None:
    """Print a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    model = parser.parse_args().model
    tokenizer = load_text(build.resolve_source(model).path).tokenizer
    words = tokenizer.encode(
        "\n".join(page.read_text() for page in PAGES), add_special_tokens=False
    )
    texts = [words[at : at + TEXT_TOKENS] for at in range(0, len(words) - TEXT_TOKENS, TEXT_TOKENS)]
    stride = (len(words) - PROMPT_TOKENS) // NUM_PROMPTS
    prompts = [words[i * stride : i * stride + PROMPT_TOKENS] for i in range(NUM_PROMPTS)]
    greedy = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    written: list[list[int]] = []
    for quantization in FORMATS:
        try:
            judge = Judge(model, quantization)
        except ValueError as reason:
            sys.stdout.write(f"{quantization:5} not here: {reason}\n")
            continue
        _, scores = judge.run(texts, scored)
        entries = [entry for own in scores.values() for entry in own]
        perplexity = math.exp(-sum(entry.logprob for entry in entries) / len(entries))
        if not written:
            answers, _ = judge.run(prompts, greedy)
            written = [[*prompt, *answers[i]] for i, prompt in enumerate(prompts)]
        _, scores = judge.run(written, scored)
        judged = [entry for own in scores.values() for entry in own[-ANSWER_TOKENS:]]
        same = sum(entry.rank == 1 for entry in judged) / len(judged)
        sys.stdout.write(
            f"{quantization:5} {judge.weights_bytes / 1e6:6.0f} MB  perplexity {perplexity:8.3f}"
            f" over {len(entries)} tokens  same greedy token {100 * same:6.2f} % of {len(judged)}\n"
        )
        sys.stdout.flush()
        judge.close()


if __name__ == "__main__":
    main()
