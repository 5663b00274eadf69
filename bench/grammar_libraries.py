"""Compare grammar libraries: `python bench/grammar_libraries.py llguidance|xgrammar [SIZE]`.

Each library gets the same made-up vocabulary and the schemas of `tests/data/schemas.json`. A schema
counts as *kept* if its valid instance is accepted and its invalid one is not. Prints a table of
times; asserts nothing. xgrammar is not a dependency of ours: run it in an environment of its own.
"""

# ruff: noqa: T201 - a benchmark's only purpose is to print

from __future__ import annotations

import json
import random
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_SCHEMAS = Path(__file__).parents[1] / "tests" / "data" / "schemas.json"
_MONSTERS = {
    "enum of 100,000": {"enum": [f"value {i}" for i in range(100_000)]},
    "(a{1000}){1000}": {"type": "string", "pattern": "^(a{1000}){1000}$"},
    ".*a.{500}": {"type": "string", "pattern": "^.*a.{500}$"},
    "20 times anyOf in allOf": {
        "allOf": [
            {"anyOf": [{"properties": {f"a{i}": {"type": "string"}}}, {"required": [f"b{i}"]}]}
            for i in range(20)
        ]
    },
    "20,000 properties": {"properties": {f"p{i}": {"type": "integer"} for i in range(20_000)}},
    "optional, 300": {
        "type": "object",
        "properties": {f"p{i}": {"type": "integer"} for i in range(300)},
        "additionalProperties": False,
    },
}


def vocabulary(size: int) -> list[bytes]:
    """Return all bytes, JSON's usual joints and made-up words; the last is the end of the text."""
    rng = random.Random(0)
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
    joints = ('{"', '"}', '":', '": "', '", "', '",', "},", "],", '[{"', "true", "null", "}]", '"]')
    tokens.update(dict.fromkeys(joint.encode() for joint in joints))
    letters, weights = "etaoinshrdlucmfwypvbgkjqxz", [1 / (i + 1) for i in range(26)]
    while len(tokens) < size - 1:
        word = "".join(rng.choices(letters, weights, k=rng.randint(2, 9)))
        kind = rng.random()
        if kind < 0.45:
            word = " " + word
        elif kind < 0.5:
            word = word.capitalize()
        elif kind < 0.53:
            word = str(rng.randint(0, 9999))
        elif kind < 0.56:
            word += rng.choice(".,;:!?()[]{}\"'/")
        tokens[word.encode()] = None
    return [*tokens, b"<|end|>"]


class _Guidance:
    def __init__(self, tokens: list[bytes]) -> None:
        import llguidance  # noqa: PLC0415 - only one of the two need be there

        self._library = llguidance

        class Wrapped:
            eos_token_id, bos_token_id = len(tokens) - 1, None
            special_token_ids = (len(tokens) - 1,)

            def __init__(self) -> None:
                self.tokens = tokens

            def __call__(self, text: bytes) -> list[int]:
                return list(text)

        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Wrapped()))
        self._mask = np.zeros((1, -(-len(tokens) // 32)), dtype=np.int32)

    def compile(self, schema: Any) -> Any:
        text = '%llguidance {"no_forcing": true}\nstart: %json ' + json.dumps(schema)
        matcher = self._library.LLMatcher(self._tokenizer, text, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def start(self, compiled: Any) -> Any:
        return compiled.deep_copy()

    def fill(self, matcher: Any) -> None:
        matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.consume_token(token))

    def is_done(self, matcher: Any) -> bool:
        return bool(matcher.is_accepting())


class _XGrammar:
    def __init__(self, tokens: list[bytes]) -> None:
        import xgrammar  # noqa: PLC0415 - in an environment of its own

        self._library = xgrammar
        info = xgrammar.TokenizerInfo(tokens, stop_token_ids=[len(tokens) - 1])
        self._compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
        self._mask = xgrammar.allocate_token_bitmask(1, len(tokens))
        self._end = len(tokens) - 1

    def compile(self, schema: Any) -> Any:
        return self._compiler.compile_json_schema(json.dumps(schema), strict_mode=False)

    def start(self, compiled: Any) -> Any:
        return self._library.GrammarMatcher(compiled)

    def fill(self, matcher: Any) -> None:
        matcher.fill_next_token_bitmask(self._mask)

    def accept(self, matcher: Any, token: int) -> bool:
        return bool(matcher.accept_token(token))

    def is_done(self, matcher: Any) -> bool:
        # The end of the text is accepted only where the grammar is at an end.
        return bool(matcher.is_terminated() or matcher.accept_token(self._end))


def main(name: str, size: int) -> None:
    """Print the found of one library."""
    began_s, before_kib = time.perf_counter(), _peak_kib()
    tokens = vocabulary(size)
    made_s = time.perf_counter()
    library: Any = (_Guidance if name == "llguidance" else _XGrammar)(tokens)
    ready_s = time.perf_counter()
    print(f"{name}, {len(tokens)} tokens: import and structure {ready_s - made_s:.2f} s,")
    print(
        f"  memory {(_peak_kib() - before_kib) // 1024} MiB (vocabulary {made_s - began_s:.1f} s)"
    )
    ids = {token: i for i, token in enumerate(tokens)}
    kept, missed = 0, list[str]()
    compile_ms, mask_us = list[float](), list[float]()
    for case in json.loads(_SCHEMAS.read_text()):
        at_s = time.perf_counter()
        try:
            compiled = library.compile(case["schema"])
        except Exception as error:  # noqa: BLE001 - any exception of the library
            missed.append(f"{case['name']}: {str(error).splitlines()[0][:70]}")
            continue
        compile_ms.append((time.perf_counter() - at_s) * 1e3)
        valid = _walk(library, compiled, ids, case["valid"], mask_us)
        invalid = "invalid" in case and _walk(library, compiled, ids, case["invalid"], [])
        kept += valid and not invalid
        if not valid or invalid:
            missed.append(f"{case['name']}: {'let a wrong one pass' if invalid else 'refused'}")
    print(f"  kept {kept}, not {len(missed)}: " + "".join(f"\n    {one}" for one in missed))
    print(f"  compile ms: {_spread(compile_ms)}\n  mask µs: {_spread(mask_us)}")
    for label, schema in _MONSTERS.items():
        print(f"  {label:24} {_torture(library, schema)}", flush=True)


def _walk(
    library: Any, compiled: Any, ids: dict[bytes, int], value: Any, taken: list[float]
) -> bool:
    """Return whether `value` is accepted, cut into the longest tokens."""
    matcher, text = library.start(compiled), json.dumps(value).encode()
    while text:
        length = next(n for n in range(min(12, len(text)), 0, -1) if text[:n] in ids)
        at_s = time.perf_counter()
        library.fill(matcher)
        taken.append((time.perf_counter() - at_s) * 1e6)
        if not library.accept(matcher, ids[text[:length]]):
            return False
        text = text[length:]
    return bool(library.is_done(matcher))


def _torture(library: Any, schema: Any) -> str:
    found: list[str] = []

    def work() -> None:
        at_s = time.perf_counter()
        try:
            matcher = library.start(library.compile(schema))
            compiled_s = time.perf_counter()
            library.fill(matcher)
            masked_s = time.perf_counter() - compiled_s
            found.append(
                f"compile {(compiled_s - at_s) * 1e3:.0f} ms, mask {masked_s * 1e3:.1f} ms"
            )
        except Exception as error:  # noqa: BLE001 - any exception of the library
            spent_ms = (time.perf_counter() - at_s) * 1e3
            found.append(f"refused after {spent_ms:.0f} ms: {str(error).splitlines()[0][:60]}")

    stall_s = _worst_stall_s(work)
    return f"{found[0]}; others stood still {stall_s * 1e3:.0f} ms; peak {_peak_kib() // 1024} MiB"


def _worst_stall_s(work: Callable[[], None]) -> float:
    """Return for how long another thread's Python stood still while `work` ran."""
    thread = threading.Thread(target=work)
    worst_s, last_s = 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now_s = time.perf_counter()
        worst_s, last_s = max(worst_s, now_s - last_s), now_s
    return worst_s


def _spread(values: list[float]) -> str:
    ordered = sorted(values)
    high = ordered[int(len(ordered) * 0.99) - 1]
    return f"median {statistics.median(ordered):.2f}, p99 {high:.2f}, worst {ordered[-1]:.2f}"


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 150_000)
