"""Checks grammars, and sends the engine the vocabulary it needs to follow them.

Knows nothing of the request fields with grammars.
"""

from __future__ import annotations

import asyncio

from scheduler.client import EngineClient, Vocabulary
from server.structured.checker import GrammarChecker, Verdict
from server.structured.vocabulary import vocabulary_of
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
                client.learn(vocabulary)
                self._vocabulary = vocabulary
        return await self.checker.judge(grammar, self._vocabulary)

    async def close(self) -> None:
        """End the process of the checker."""
        await self.checker.close()
