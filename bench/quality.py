"""The quality of formats: `python bench/quality.py [MODEL] [--kv FORMAT,...] [--view VIEW]`.

Alone: of each format of the weights, the perplexity over this project's own pages, and how often
its likeliest token is the one that float32 wrote, over 200 greedy answers.

With `--kv int8,fp8,int4`, of formats of keys and values: the same beside float32 pages, the KL
divergence of the next token's distribution, and how often its likeliest token is the same. With
`--view window:1024`, `sinks:4+1020` or `morph:32/1024`, under that policy: texts must then be
longer (`--text-tokens`) than its keys. `bench/needle.py` has the same options.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from kv_variants import FULL_FORMAT, Pages, Variant, add_arguments, append, exact_decoder, variants
from torch import Tensor

from configs.schema import ModelSection, OctavoConfig, Quantization
from model import build
from model.architectures.transformer import ServedDecoder
from model.interface import SamplingParams, TokenLogprobs
from model.kv_proof import Divergence
from scheduler.engine import Engine
from scheduler.messages import GenerateRequest, Prepared, Submit
from server.text.load import load_text
from server.text.prose import prose_token_ids

#: The first is the reference.
FORMATS: tuple[Quantization, ...] = ("none", "fp16", "bf16", "int8", "int4", "own")
PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
TEXT_TOKENS, NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 1024, 200, 32, 32

Answers = dict[int, list[int]]
Scores = dict[int, list[TokenLogprobs]]
#: Texts, and the tokens of greedy answers with their prompts.
Texts = list[list[int]]


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

    def written(self, prompts: Texts) -> Texts:
        """Return the prompts with their greedy answers."""
        greedy = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0.0, ignore_eos=True)
        answers, _ = self.run(prompts, greedy)
        return [[*prompt, *answers[i]] for i, prompt in enumerate(prompts)]

    def close(self) -> None:
        self._engine.close()


def judge_weights(model: str, texts: Texts, prompts: Texts) -> None:
    """Print a line for each format of the weights."""
    scored = SamplingParams(max_tokens=0, prompt_logprobs=0)
    written: Texts = []
    for quantization in FORMATS:
        try:
            judge = Judge(model, quantization)
        except ValueError as reason:
            sys.stdout.write(f"{quantization:5} not here: {reason}\n")
            continue
        _, scores = judge.run(texts, scored)
        entries = [entry for own in scores.values() for entry in own]
        perplexity = math.exp(-sum(entry.logprob for entry in entries) / len(entries))
        written = written or judge.written(prompts)
        _, scores = judge.run(written, scored)
        judged = [entry for own in scores.values() for entry in own[-ANSWER_TOKENS:]]
        same = sum(entry.rank == 1 for entry in judged) / len(judged)
        sys.stdout.write(
            f"{quantization:5} {judge.weights_bytes / 1e6:6.0f} MB  perplexity {perplexity:8.3f}"
            f" over {len(entries)} tokens  same greedy token {100 * same:6.2f} % of {len(judged)}\n"
        )
        sys.stdout.flush()
        judge.close()


def _hidden(pages: Pages, texts: Texts) -> list[Tensor]:
    return [append(pages.text(len(text)), text) for text in texts]


def _divergence(
    decoder: ServedDecoder, expected: Sequence[Tensor], pages: Pages, texts: Texts
) -> Divergence:
    divergence = Divergence(decoder)
    for exact, found, text in zip(expected, _hidden(pages, texts), texts, strict=True):
        divergence.add(exact, found, text[1:])
    return divergence


def _same_greedy(decoder: ServedDecoder, pages: Pages, written: Texts) -> float:
    """Return how often the likeliest token is the one that the reference wrote."""
    num_same = 0
    for text in written:
        # The token before each of the answer's.
        hidden = append(pages.text(len(text)), text)[-ANSWER_TOKENS - 1 : -1]
        answer = torch.tensor(text[-ANSWER_TOKENS:])
        num_same += int((decoder.logits(hidden).argmax(-1) == answer).sum())
    return num_same / (len(written) * ANSWER_TOKENS)


@torch.inference_mode()
def judge_pages(
    arguments: argparse.Namespace, prose: list[int], texts: Texts, prompts: Texts
) -> None:
    """Print a line for each format and view of keys and values."""
    judge = Judge(arguments.model, arguments.quantization)
    written = judge.written(prompts)
    judge.close()
    decoder = exact_decoder(arguments.model, arguments.quantization)
    full = Pages(decoder, Variant(FULL_FORMAT), arguments.attention_backend)
    full_prose, full_texts = _hidden(full, [prose]), _hidden(full, texts)
    for variant in variants(arguments):
        began_s = time.perf_counter()
        pages = Pages(decoder, variant, arguments.attention_backend)
        of_prose = _divergence(decoder, full_prose, pages, [prose])
        of_texts = _divergence(decoder, full_texts, pages, texts)
        same_greedy = _same_greedy(decoder, pages, written)
        sys.stdout.write(
            f"{variant!s:20} {pages.bytes_per_token:6} bytes a token, of float32"
            f" {full.bytes_per_token}  perplexity {of_texts.perplexity:.3f} ({FULL_FORMAT}"
            f" {of_texts.expected_perplexity:.3f}, {of_texts.rise:+.2%}) over"
            f" {of_texts.num_tokens} tokens  KL {of_prose.kl:.1e} prose, {of_texts.kl:.1e} pages"
            f"  same likeliest token {of_texts.same_share:.2%}  same greedy token {same_greedy:.2%}"
            f"  ({pages.backend}, {time.perf_counter() - began_s:.0f} s)\n"
        )
        sys.stdout.flush()


def main() -> None:
    """Print a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--texts", type=int, help="default: all")
    parser.add_argument("--text-tokens", type=int, default=TEXT_TOKENS, help="of each text")
    parser.add_argument("--prompts", type=int, default=NUM_PROMPTS, help="greedy answers")
    arguments = parser.parse_args()
    tokenizer = load_text(build.resolve_source(arguments.model).path).tokenizer
    words = tokenizer.encode(
        "\n".join(page.read_text() for page in PAGES), add_special_tokens=False
    )
    length = arguments.text_tokens
    texts = [words[at : at + length] for at in range(0, len(words) - length, length)]
    stride = (len(words) - PROMPT_TOKENS) // arguments.prompts
    prompts = [words[i * stride : i * stride + PROMPT_TOKENS] for i in range(arguments.prompts)]
    texts = texts[: arguments.texts]
    if arguments.kv or arguments.view:
        judge_pages(arguments, list(prose_token_ids(tokenizer)), texts, prompts)
    else:
        judge_weights(arguments.model, texts, prompts)


if __name__ == "__main__":
    main()
