"""The options that shape a load, and the plans they make; shared by the commands that measure."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

from loadtest import arguments as values
from loadtest.arrivals import PROCESSES
from loadtest.plan import TRACE, Load, Plan
from loadtest.presets import PRESETS

_SEEDS = 1_000_000
#: Rounds of a comparison count up from a load's seed.
_SEEDS_APART = 10_000


def add_to(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    load = parser.add_argument_group("load")
    load.add_argument(
        "--workload",
        choices=[*PRESETS, TRACE],
        metavar="NAME",
        help="below (default: c8)",
    )
    values.add(load, "--trace", Path, "FILE", "replay JSON lines of at_s, prompt, max_tokens")
    values.add(load, "--speed", values.positive, "X", "of a trace (default: 1)", 1.0)
    values.add(
        load, "--concurrency", values.concurrencies, "N[,N...]", "closed loop: so many at a time"
    )
    values.add(load, "--rate", values.rates, "R[,R...]", "open loop: so many begin a second")
    load.add_argument("--arrivals", choices=PROCESSES, default="poisson", help="of an open loop")
    values.add(load, "--burst", values.count, "N", "how many begin at once (default: 8)", 8)
    values.add(load, "--requests", values.count, "N", "or conversations (default: 2 to 8 a worker)")
    values.add(load, "--duration", values.seconds, "TIME", "begin none after that")
    values.add(
        load, "--warmup", values.whole, "N", "before the clock starts (default: a round, at most 8)"
    )
    values.add(load, "--timeout", values.seconds, "TIME", "of a request (default: 10m)", 600.0)
    values.add(load, "--seed", values.whole, "N", "for the same words again (default: new ones)")
    shape = parser.add_argument_group("requests")
    values.add(shape, "--model", str, "NAME", "default: the first the server lists")
    shape.add_argument("--api-key", default="", metavar="KEY")
    values.add(shape, "--prompt-tokens", values.count, "N", "of the longest kind of prompt")
    values.add(shape, "--max-tokens", values.count, "N", "of an answer")
    values.add(shape, "--turns", values.count, "N", "of an agent (default: 20)")
    shape.add_argument(
        "--endpoint",
        choices=["completions", "chat"],
        help="default: the workload's",
    )
    shape.add_argument(
        "--prompts",
        choices=["auto", "ids", "text"],
        default="auto",
        help="token ids are exact and need /tokenize (default: ids where possible)",
    )
    shape.add_argument(
        "--response-format",
        choices=["schema", "none"],
        default="schema",
        help="of the workloads structured and schema",
    )
    shape.add_argument("--continuous-usage", action="store_true", help="exact tokens of each piece")
    values.add(shape, "--extra", values.json_object, "JSON", "more fields", {})
    results = parser.add_argument_group("results")
    values.add(
        results, "--slo", values.bounds, "BOUNDS", "for the goodput: ttft=500ms,itl=50ms", {}
    )
    values.add(results, "--out", Path, "FILE", "append records, as JSON lines")
    values.add(results, "--html", Path, "FILE", "write a page with plots")
    results.add_argument("--no-progress", action="store_true", help="draw no progress bar")


def plans(options: argparse.Namespace) -> tuple[Plan, ...]:
    """Return a plan for each requested load. Raises `ValueError`."""
    if options.workload == TRACE and options.trace is None:
        raise ValueError("--workload trace needs --trace FILE")
    if options.trace is not None and options.workload not in (None, TRACE):
        raise ValueError("--trace is a workload of its own; leave --workload out")
    if options.concurrency and options.rate:
        raise ValueError("--concurrency is a closed loop and --rate an open one: give one of them")
    if options.trace is not None and options.rate:
        raise ValueError("a trace says itself when its requests are due; --speed changes that")
    loads = [Load(concurrency=one) for one in options.concurrency or ()]
    loads += [Load(rate_per_s=one) for one in options.rate or ()]
    plan = Plan(
        workload=options.workload or "c8",
        trace=options.trace,
        speed=options.speed,
        arrivals=options.arrivals,
        burst=options.burst,
        seed=random.SystemRandom().randrange(_SEEDS) if options.seed is None else options.seed,
        num_requests=options.requests,
        duration_s=options.duration,
        timeout_s=options.timeout,
        warm_up=options.warmup,
        prompt_tokens=options.prompt_tokens,
        max_tokens=options.max_tokens,
        num_turns=options.turns,
        endpoint=options.endpoint,
        prompt_form=options.prompts,
        has_schema=options.response_format == "schema",
        has_continuous_usage=options.continuous_usage,
        slo=options.slo,
        extra=options.extra,
    )
    # Each load has words of its own, or the second would find its prompts cached by the first.
    found = tuple(
        replace(plan, load=load, seed=plan.seed + i * _SEEDS_APART)
        for i, load in enumerate(loads or [Load()])
    )
    for one in found:
        one.make_workload()
    return found
