"""The cost of grammars in a step (`python -m bench.grammar_steps MODEL.gguf`); no asserts.

The real engine, without HTTP. The rounds of the cases alternate, so that other load on the machine
affects all of them.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import sys
import time
from pathlib import Path

from configs.schema import OctavoConfig
from model.build import make_runner
from model.interface import SamplingParams
from model.weights.source import ModelSource
from scheduler.engine import Engine
from scheduler.messages import Cancel, GenerateRequest, Prepared, SetVocabulary, Submit
from server.structured.checker import vocabulary_of
from server.structured.grammar import json_form, regex_form, whole
from server.text.load import load_text

#: As in `bench/live/structured.py`.
PEOPLE = json.loads((Path(__file__).parents[1] / "tests" / "data" / "people.json").read_text())
SCHEMA = whole(json_form(PEOPLE, is_lenient=False))
COSTLY = whole(regex_form(r"(?s:.*)a(.|\n){500}"))
#: For each case the grammars of its eight rows.
CASES: dict[str, list[str | None]] = {
    "free": [None] * 8,
    "all by a schema": [SCHEMA] * 8,
    "seven free, one by a schema": [None] * 7 + [SCHEMA],
    "seven free, one costly": [None] * 7 + [COSTLY],
}


class Rounds:
    """Runs one case after the other on one engine."""

    def __init__(self, path: Path, steps: int) -> None:
        source = ModelSource("gguf", path, path.stem)
        self.runner = make_runner(source, OctavoConfig())
        self.inbox: queue.SimpleQueue[Prepared] = queue.SimpleQueue()
        config = OctavoConfig().scheduler
        self.engine = Engine(self.runner, config, time.monotonic, self.inbox.put)
        self.tokenizer = load_text(path).tokenizer
        self.engine.handle(SetVocabulary(vocabulary_of(self.tokenizer, self.runner.info)))
        self.prompt = self.tokenizer.encode("Ten people of a town:", add_special_tokens=False)
        self.steps, self.num_requests = steps, 0

    def run(self, grammars: list[str | None], *, compiles: bool = False) -> tuple[list[float], int]:
        """Return the times of the steps and the number of tokens."""
        first = self.num_requests
        for grammar in grammars:
            params = SamplingParams(
                10_000, seed=self.num_requests, grammar=grammar, min_tokens=9999
            )
            self.engine.handle(
                Submit(self.num_requests, GenerateRequest(tuple(self.prompt), params))
            )
            self.num_requests += 1
        taken_s, num_tokens = list[float](), 0
        while len(taken_s) < self.steps:
            if compiles:
                self.runner.prepare(
                    f'start: "{time.perf_counter()}" {SCHEMA.partition("start: ")[2]}'
                )
            while not self.inbox.empty() or not self.engine.has_work:
                self.engine.handle(self.inbox.get())
            began_s = time.perf_counter()
            result = self.engine.step()
            spent_s = time.perf_counter() - began_s
            if result.stats.scheduler.num_running == len(grammars):
                taken_s.append(spent_s)
                num_tokens += len(result.token_ids)
        for request_id in range(first, self.num_requests):
            self.engine.handle(Cancel(request_id))
        self.engine.step()
        return taken_s[5:], num_tokens


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    rounds = Rounds(args.model, args.steps)
    times: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    for _ in range(args.rounds):
        for name, grammars in CASES.items():
            taken_s, num_tokens = rounds.run(grammars)
            times.setdefault(name, []).extend(taken_s)
            tokens[name] = tokens.get(name, 0) + num_tokens
        name = "eight free, grammars compiled beside"
        taken_s, num_tokens = rounds.run([None] * 8, compiles=True)
        times.setdefault(name, []).extend(taken_s)
        tokens[name] = tokens.get(name, 0) + num_tokens
    for name, taken_s in times.items():
        ordered = sorted(taken_s)
        low, middle = ordered[len(ordered) // 10], statistics.median(ordered)
        high = ordered[int(len(ordered) * 0.99)]
        sys.stdout.write(
            f"{name:38} step ms: p10 {low * 1e3:6.2f}  median {middle * 1e3:6.2f}"
            f"  p99 {high * 1e3:6.2f}  tokens {tokens[name]}\n"
        )
    rounds.engine.close()


if __name__ == "__main__":
    main()
