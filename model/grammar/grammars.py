"""Grammars, compiled: which texts a request may be answered with.

The library is llguidance (docs/adr/0010-structured-output.md); it is imported when the first
grammar comes, so who uses none pays nothing. Free of torch. Knows nothing of slots or of steps.
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

#: Compiled grammars kept for the next request with the same text. Each holds up to a few MiB.
MAX_CACHED = 32
#: How the library begins a reason: with a line and a column.
_PLACE = re.compile(r"at (\d+)\(\d+\): ")
#: A rule that is a schema, as the server writes them: with options, on one line.
_SCHEMA_RULE = re.compile(r'(\w+: %json )(\{.*"x-guidance": \{"as_said": true.*\})')
#: A request whose mask takes longer than this, of a processor's time, is ended.
MAX_TURN_S = 0.25
#: See `Compiler.try_out`.
_MAX_TRIED_TOKENS = 16
#: As nice as can be: what computes tokens goes first, a grammar takes what is left.
_NICENESS = 19

#: Well below the library's own limits. The schemas of `tests/data/schemas.json` need a fifth of it;
#: what needs more takes tens of milliseconds for each token.
_STEP_LEXER_FUEL = 50_000
_STEP_MAX_ITEMS = 20_000
#: At 1 to 2 kB each.
_MAX_LEXER_STATES = 20_000


class GrammarError(ValueError):
    """A grammar that cannot be used; the message says why, in the library's words."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        #: Of the grammar's text, from 1; 0 where none is to blame.
        self.line = line


class CompiledGrammar:
    """See `Constraint`."""

    def __init__(self, start: LLMatcher) -> None:
        self._start = start

    def matcher(self) -> LLMatcher:
        """Return a matcher that has seen nothing yet. It shares nothing with others."""
        return self._start.deep_copy()


class Compiler:
    """Compiles grammars for one vocabulary. Takes 0.1 s to make for 49k tokens, 0.4 s for 150k."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        # Reads the packages' metadata on its way, some 20 ms.
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
        """Return the grammar, ready to be followed. Lets other Python threads run.

        Raises `GrammarError`.
        """
        grammar, _ = translated(grammar)
        matcher = self._library.LLMatcher(
            self._tokenizer, grammar, log_level=0, limits=self._limits
        )
        # What can begin no text shows only here. What is computed here, copies have for nothing.
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _fault(matcher.get_error())
        return CompiledGrammar(matcher)

    def try_out(self, grammar: CompiledGrammar, seed: int = 0) -> None:
        """Write some tokens as chance will have it. Raises `GrammarError` if that does not go well.

        Some grammars compile in no time, and then take forever.
        """
        chance, matcher = random.Random(seed), grammar.matcher()  # noqa: S311 - no secret
        for _ in range(_MAX_TRIED_TOKENS):
            began_s = time.thread_time()
            mask = matcher.compute_bitmask()
            taken_s = time.thread_time() - began_s
            if matcher.is_stopped() and not matcher.is_error():
                return
            if matcher.is_error():
                raise _fault(matcher.get_error())
            if taken_s > MAX_TURN_S:
                raise GrammarError(f"it is too complex: one token took {taken_s * 1e3:.0f} ms")
            places = [at for at, bits in enumerate(mask) if bits]
            at = chance.choice(places)
            allowed = [bit for bit in range(8) if mask[at] >> bit & 1]
            matcher.consume_token(8 * at + chance.choice(allowed))

    def warnings(self, grammar: str) -> list[str]:
        """Return what is not kept of a grammar that compiles."""
        grammar, left_out = translated(grammar)
        has_failed, messages = self._library.LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokenizer, limits=self._limits
        )
        return [] if has_failed else [*left_out, *messages]


def translated(grammar: str) -> tuple[str, list[str]]:
    """Return a grammar whose schemas the library keeps as they are said, and what was left out.

    What is translated already is returned as it is. Raises `GrammarError`.
    """
    if grammar.startswith("{"):
        told = json.loads(grammar)
        parts = [translated(part["lark_grammar"]) for part in told["grammars"]]
        for part, (text, _) in zip(told["grammars"], parts, strict=True):
            part["lark_grammar"] = text
        return json.dumps(told), [warning for _, warnings in parts for warning in warnings]
    lines, left_out = grammar.split("\n"), list[str]()
    for index, line in enumerate(lines):
        if found := _SCHEMA_RULE.fullmatch(line):
            try:
                schema = json.loads(found[2])
                del schema["x-guidance"]["as_said"]
                left_out += strict_schema(schema)
            except (SchemaError, RecursionError) as fault:
                raise GrammarError(str(fault), index + 1) from fault
            lines[index] = found[1] + json.dumps(schema, ensure_ascii=False)
    return "\n".join(lines), left_out


class Grammars:
    """Compiles in a thread of its own, each grammar once as long as it is remembered.

    All methods are for one thread.
    """

    def __init__(self) -> None:
        self._compiler: Future[Compiler] | None = None
        self._cached: OrderedDict[str, Future[Constraint]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammars", initializer=step_back)

    def learn(self, vocabulary: Vocabulary) -> None:
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
            # The library's panics are no `Exception`; they end this request alone.
            _log.exception("a grammar could not be compiled")
            raise GrammarError(f"it cannot be compiled: {fault}") from fault

    def close(self) -> None:
        """End the thread, once it is through with the grammar in hand."""
        self._thread.shutdown(cancel_futures=True)


class _Words:
    """A vocabulary in the shape the library asks for."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = list(vocabulary.tokens())
        self.special_token_ids = list(vocabulary.special_token_ids)
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.cut: Callable[[str], list[int]] | None = None

    def __call__(self, text: str | bytes) -> list[int]:
        """Cut a text into tokens.

        Asked only by grammars that do not say `no_forcing`, for how to write what they force.
        """
        if self.cut is None or isinstance(text, bytes):
            raise TypeError("text, and only once the tokenizer is made")
        return self.cut(text)


def step_back() -> None:
    """Let this thread wait for all others of the machine."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)


def _fault(told: str) -> GrammarError:
    """Return the library's reason, and its place apart: the client has not written that text."""
    place = _PLACE.match(told)
    return GrammarError(_readable(told), int(place[1]) if place else 0)


def _readable(message: str) -> str:
    kept: list[str] = []
    for line in message.splitlines():
        number, bar, _ = line.strip().partition(" | ")
        if (bar and number.isdecimal()) or line.startswith(("<state>", "<non-verbose")):
            break
        kept.append(line)
    text = _PLACE.sub("", "\n".join(kept).strip(), count=1)
    return text.removeprefix("failed to compile JSON schema: ")
