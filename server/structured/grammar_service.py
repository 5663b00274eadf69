"""Where grammars are taken in: judged, and the engine told what it needs to follow them.

Knows nothing of the fields that ask for them.
"""

from __future__ import annotations

import asyncio

from scheduler.client import EngineClient, Vocabulary
from server.structured.checker import GrammarChecker, Verdict
from server.structured.vocabulary import vocabulary_of
from server.text.tokenizer import Tokenizer


class GrammarService:
    """One for each engine. Does nothing, and holds nothing, until the first grammar."""

    def __init__(self) -> None:
        self.checker = GrammarChecker()
        self._vocabulary: Vocabulary | None = None
        self._reads = asyncio.Lock()

    async def judge(self, grammar: str, client: EngineClient, tokenizer: Tokenizer) -> Verdict:
        """Return what is to be said of a grammar; once it has, the engine can be sent it.

        Raises `ApiError` (503) where nobody can say.
        """
        async with self._reads:
            if self._vocabulary is None:
                vocabulary = await asyncio.to_thread(vocabulary_of, tokenizer, client.info)
                client.learn(vocabulary)
                self._vocabulary = vocabulary
        return await self.checker.judge(grammar, self._vocabulary)

    async def close(self) -> None:
        """End what was started."""
        await self.checker.close()
