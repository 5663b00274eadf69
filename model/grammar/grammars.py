"""Compiled grammars: the texts that may answer a request.

The library is llguidance (docs/adr/0010-structured-output.md). It is imported with the first
grammar, so servers without grammars do not pay for it. Free of torch. Knows nothing of slots or of
steps.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from model.grammar.json_schema import SchemaError, strict_schema
from model.interface import Constraint, Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

_log = logging.getLogger(__name__)

#: Compiled grammars kept for the next request with the same text, up to a few MiB each.
MAX_CACHED = 32
#: The beginning of the library's reasons: a line and a column.
_PLACE = re.compile(r"at (\d+)\(\d+\): ")
#: A rule that is a schema, as the server writes it: with options, on one line.
_SCHEMA_RULE = re.compile(r'(\w+: %json )(\{.*"x-guidance": \{"as_said": true.*\})')
#: A request whose mask takes more CPU time than this is ended.
MAX_MASK_S = 0.25
#: See `Compiler.try_out`.
_MAX_TRIED_TOKENS = 16
#: Added to that of the threads that compute tokens, which go first. Where these leave no core idle,
#: a thread with 5 more gets a quarter of one, and with 10 more a tenth. With 19 more, the lowest
#: priority, it gets a hundredth. Beside four busy processes a first grammar took 5 s, now 2 s.
_COMPILER_NICENESS = 5
_MAX_NICENESS = 19

#: Well below the library's own limits. The schemas of `tests/data/schemas.json` need a fifth of it;
#: grammars that need more take tens of milliseconds for each token.
_STEP_LEXER_FUEL = 50_000
_STEP_MAX_ITEMS = 20_000
#: At 1 to 2 kB each.
_MAX_LEXER_STATES = 20_000


class GrammarError(ValueError):
    """A grammar that cannot be used; the message is the library's reason."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        #: Of the grammar's text, from 1; 0 where no single line is at fault.
        self.line = line


class CompiledGrammar:
    """See `Constraint`."""

    def __init__(self, start: LLMatcher) -> None:
        self._start = start

    def matcher(self) -> LLMatcher:
        """Return a new matcher that has consumed no tokens.

        It shares the states of the lexer, whose number is limited.
        """
        return self._start.deep_copy()


class Compiler:
    """Compiles grammars for one vocabulary. Takes 0.1 s to build for 49k tokens, 0.4 s for 150k."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        # Its import reads the packages' metadata, some 20 ms.
        import llguidance  # noqa: PLC0415 - see the module's header

        self._library = llguidance
        words = _Words(vocabulary)
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(words), eos_token=list(vocabulary.eos_token_ids)
        )
        words.cut = self._tokenizer.greedy_tokenize
        self._limits = llguidance.LLParserLimits(
            step_lexer_fuel=_STEP_LEXER_FUEL,
            step_max_items=_STEP_MAX_ITEMS,
            max_lexer_states=_MAX_LEXER_STATES,
            verbose_errors=False,
        )

    def compile(self, grammar: str) -> CompiledGrammar:
        """Compile a grammar, without holding the GIL. Raises `GrammarError`."""
        grammar, _ = translated(grammar)
        matcher = self._library.LLMatcher(
            self._tokenizer, grammar, log_level=0, limits=self._limits
        )
        # Finds grammars that match no text. Copies of the matcher reuse the mask.
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _fault(matcher.get_error())
        return CompiledGrammar(matcher)

    def try_out(self, grammar: CompiledGrammar, seed: int = 0) -> None:
        """Generate some random tokens. Raises `GrammarError` if that fails or takes too long.

        Some grammars compile fast, and then need minutes for a mask.
        """
        rng, matcher = random.Random(seed), grammar.matcher()  # noqa: S311 - not a secret
        for _ in range(_MAX_TRIED_TOKENS):
            began_s = time.thread_time()
            mask = matcher.compute_bitmask()
            taken_s = time.thread_time() - began_s
            if matcher.is_stopped() and not matcher.is_error():
                return
            if matcher.is_error():
                raise _fault(matcher.get_error())
            if taken_s > MAX_MASK_S:
                raise GrammarError(f"it is too complex: one token took {taken_s * 1e3:.0f} ms")
            places = [at for at, bits in enumerate(mask) if bits]
            at = rng.choice(places)
            allowed = [bit for bit in range(8) if mask[at] >> bit & 1]
            matcher.consume_token(8 * at + rng.choice(allowed))

    def warnings(self, grammar: str) -> list[str]:
        """Return a warning for each part of a compiled grammar that is not enforced."""
        grammar, left_out = translated(grammar)
        has_failed, messages = self._library.LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokenizer, limits=self._limits
        )
        return [] if has_failed else [*left_out, *messages]


def translated(grammar: str) -> tuple[str, list[str]]:
    """Translate a grammar's schemas to ones that the library enforces; also return warnings.

    A translated grammar is returned unchanged. Raises `GrammarError`.
    """
    warnings: list[str] = []
    if grammar.startswith("{"):
        parsed = json.loads(grammar)
        for part in parsed["grammars"]:
            part["lark_grammar"], found = translated(part["lark_grammar"])
            warnings += found
        return json.dumps(parsed), warnings
    lines = grammar.split("\n")
    for index, line in enumerate(lines):
        if rule := _SCHEMA_RULE.fullmatch(line):
            try:
                schema = json.loads(rule[2])
                del schema["x-guidance"]["as_said"]
                warnings += strict_schema(schema)
            except (SchemaError, RecursionError) as fault:
                raise GrammarError(str(fault), index + 1) from fault
            lines[index] = rule[1] + json.dumps(schema, ensure_ascii=False)
    return "\n".join(lines), warnings


class Grammars:
    """Compiles grammars in its own thread, and caches them.

    All methods are for one thread.
    """

    def __init__(self) -> None:
        self._compiler: Future[Compiler] | None = None
        self._cached: OrderedDict[str, Future[Constraint]] = OrderedDict()
        self._thread = ThreadPoolExecutor(
            1, "grammars", initializer=lower_priority, initargs=(_COMPILER_NICENESS,)
        )

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """See `ModelRunner`."""
        self._compiler = self._thread.submit(Compiler, vocabulary)

    def prepare(self, grammar: str) -> Future[Constraint]:
        """See `ModelRunner`."""
        found = self._cached.get(grammar)
        if found is None or (found.done() and found.exception() is not None):
            found = self._cached[grammar] = self._thread.submit(self._compile, grammar)
        self._cached.move_to_end(grammar)
        if len(self._cached) > MAX_CACHED:
            self._cached.popitem(last=False)
        return found

    def _compile(self, grammar: str) -> Constraint:
        if self._compiler is None:
            raise GrammarError("the model's vocabulary is not known here")
        try:
            return self._compiler.result().compile(grammar)
        except GrammarError:
            raise
        except BaseException as fault:
            # The library's panics are not an `Exception`; they end this request alone.
            _log.exception("a grammar could not be compiled")
            raise GrammarError(f"it cannot be compiled: {fault}") from fault

    def close(self) -> None:
        """End the thread after the grammar that it is compiling."""
        self._thread.shutdown(cancel_futures=True)


class _Words:
    """A vocabulary with the attributes that the library reads."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = list(vocabulary.tokens())
        self.special_token_ids = list(vocabulary.special_token_ids)
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.cut: Callable[[str], list[int]] | None = None

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokenize text that a grammar forces; not called for grammars with `no_forcing`."""
        if self.cut is None or isinstance(text, bytes):
            raise TypeError("text, and only once the tokenizer is made")
        return self.cut(text)


def lower_priority(niceness: int) -> None:
    """Give this thread a lower priority than its process has."""
    thread_id = threading.get_native_id()
    lower = os.getpriority(os.PRIO_PROCESS, thread_id) + niceness
    os.setpriority(os.PRIO_PROCESS, thread_id, min(lower, _MAX_NICENESS))


def _fault(message: str) -> GrammarError:
    """Return the library's reason without the text around its place, which is not the client's."""
    kept: list[str] = []
    for line in message.splitlines():
        number, bar, _ = line.strip().partition(" | ")
        if (bar and number.isdecimal()) or line.startswith(("<state>", "<non-verbose")):
            break
        kept.append(line)
    place = _PLACE.match(message)
    text = _PLACE.sub("", "\n".join(kept).strip(), count=1)
    text = text.removeprefix("failed to compile JSON schema: ")
    return GrammarError(text, int(place[1]) if place else 0)
