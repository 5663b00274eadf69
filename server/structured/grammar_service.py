"""Checks grammars, and sends the engine the vocabulary it needs to follow them.

Knows nothing of the request fields with grammars.
"""

from __future__ import annotations

import asyncio
from array import array
from itertools import accumulate

from scheduler.client import EngineClient, ModelInfo, Vocabulary
from server.structured.checker import GrammarChecker, Verdict
from server.text.tokenizer import Tokenizer


class GrammarService:
    """One for each engine. Does and holds nothing until the first grammar."""

    def __init__(self) -> None:
        self.checker = GrammarChecker()
        self._vocabulary: Vocabulary | None = None
        self._reads = asyncio.Lock()

    async def judge(self, grammar: str, client: EngineClient, tokenizer: Tokenizer) -> Verdict:
        """Check a grammar; afterwards the engine can take it.

        Raises `ApiError` (503) if it cannot be checked.
        """
        async with self._reads:
            if self._vocabulary is None:
                vocabulary = await asyncio.to_thread(vocabulary_of, tokenizer, client.info)
                client.set_vocabulary(vocabulary)
                self._vocabulary = vocabulary
        return await self.checker.judge(grammar, self._vocabulary)

    async def close(self) -> None:
        """End the process of the checker."""
        await self.checker.close()


def vocabulary_of(tokenizer: Tokenizer, info: ModelInfo) -> Vocabulary:
    """Return the bytes of the model's tokens; ids that the tokenizer lacks are empty.

    Takes 1 µs a token.
    """
    pieces = [tokenizer.token_bytes(token_id) for token_id in range(info.vocab_size)]
    special = tokenizer.special_token_ids | set(info.eos_token_ids)
    return Vocabulary(
        packed=b"".join(pieces),
        ends=array("I", accumulate(map(len, pieces))),
        special_token_ids=tuple(sorted(one for one in special if 0 <= one < info.vocab_size)),
        eos_token_ids=info.eos_token_ids,
    )
