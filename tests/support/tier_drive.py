"""An engine with a disk tier, driven step by step with the model that can be computed by hand."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from configs.schema import SchedulerSection
from model.fake import FakeRunner, fake_output
from model.interface import ModelRunner, SamplingParams
from scheduler.engine import Engine
from scheduler.messages import (
    CacheAnswer,
    Cancel,
    FinishReason,
    GenerateRequest,
    Loaded,
    Prepared,
    Rejected,
    Started,
    Submit,
)
from scheduler.stats import TierStats
from scheduler.tier.folder import StoreFolder
from scheduler.tier.record import PageKey
from scheduler.tier.store import Contents, DiskStore
from scheduler.tier.tiered_engine import TieredEngine
from waiting import TIMEOUT_S


class GatedStore(DiskStore):
    """A store whose reads wait while its gate is closed: a slow disk."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self.gate = threading.Event()
        self.gate.set()
        self.num_reads = 0

    def get(self, key: PageKey) -> memoryview | None:
        assert self.gate.wait(TIMEOUT_S)
        self.num_reads += 1
        return super().get(key)


class TierDrive:
    """An engine with its store, and all that came out of them. Time stands still unless set."""

    def __init__(
        self,
        folder: Path,
        runner: ModelRunner | None = None,
        *,
        num_pages: int = 64,
        max_bytes: int = 2**20,
        fake: Mapping[str, Any] = MappingProxyType({}),
        **config: Any,
    ) -> None:
        """`fake`: arguments of the fake runner, where no other is given."""
        self.runner = runner or FakeRunner(num_pages=num_pages, **fake)
        info = self.runner.info
        self.inbox: queue.SimpleQueue[Prepared | Loaded] = queue.SimpleQueue()
        self.now_s = 0.0
        section = SchedulerSection(**{"max_num_seqs": 8, "max_num_batched_tokens": 32} | config)
        self.engine = Engine(self.runner, section, lambda: self.now_s, self.inbox.put)
        stored = info.stored_pages
        assert stored is not None
        contents = Contents(bytes.fromhex(stored.digest), info.page_size, stored.num_bytes)
        self.store = GatedStore(StoreFolder(folder), contents, max_bytes)
        self.tiered = TieredEngine(self.engine, self.store, lambda: self.now_s, self.inbox.put)
        self.outputs: dict[int, list[int]] = {}
        self.started: dict[int, Started] = {}
        self.rejected: dict[int, Rejected] = {}
        self.finished: dict[int, FinishReason] = {}
        self.failed: dict[int, str] = {}
        self.answers: list[CacheAnswer] = []
        self._is_closed = False
        self._open: dict[int, tuple[Sequence[int], int]] = {}

    @property
    def tier(self) -> TierStats:
        return self.tiered.stats().tier

    def submit(
        self, request_id: int, prompt: Sequence[int], max_tokens: int = 4, **request: Any
    ) -> None:
        how = {name: request.pop(name) for name in ("output_token_ids",) if name in request}
        own = {"max_tokens": max_tokens, "ignore_eos": True} | request.pop("params", {})
        params = SamplingParams(**own)
        self.outputs[request_id] = []
        self._open[request_id] = prompt, max_tokens
        generate = GenerateRequest(tuple(prompt), params, **request)
        self.tiered.handle(Submit(request_id, generate, **how))
        self.tiered.check()

    def cancel(self, request_id: int) -> None:
        self._open.pop(request_id, None)
        self.tiered.handle(Cancel(request_id))
        self.tiered.check()

    def step(self) -> None:
        result = self.tiered.step()
        for request_id, token_id in zip(result.request_ids, result.token_ids, strict=True):
            self.outputs[request_id].append(token_id)
        self.started.update({one.request_id: one for one in result.started})
        self.rejected.update({one.request_id: one for one in result.rejected})
        self.finished.update(result.finished)
        self.failed.update(result.failed)
        self.answers += result.cache_answers
        for request_id in (*self.rejected, *self.finished, *self.failed):
            self._open.pop(request_id, None)
        self.tiered.check()

    def take_messages(self) -> None:
        while not self.inbox.empty():
            self.tiered.handle(self.inbox.get())
            self.tiered.check()

    def run(self) -> None:
        """Serve until no request is open; wait for pages where there is nothing else to do."""
        while self._open:
            if not self.tiered.has_work and self.inbox.empty():
                self.tiered.handle(self.inbox.get(timeout=TIMEOUT_S))
            self.take_messages()
            self.step()

    def settle(self) -> None:
        """Let the engine be idle until all is stored."""
        while self.tiered.idle():
            pass
        self.flush()

    def flush(self) -> None:
        """Wait until all that is queued is on the disk."""
        done = threading.Event()
        self.tiered._writer._tasks.put(done.set)
        assert done.wait(TIMEOUT_S)
        self.store.check()

    def ask(self, request_id: int, prompt: Sequence[int], **request: Any) -> int:
        """Serve one request, check its tokens, and return how many were cached or loaded."""
        self.submit(request_id, prompt, **request)
        self.run()
        assert self.outputs[request_id] == self.expected(prompt, len(self.outputs[request_id]))
        assert self.outputs[request_id]
        return self.started[request_id].cached_tokens

    def expected(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        return fake_output(prompt, num_tokens, self.runner.info.vocab_size)

    def close(self) -> None:
        """End as an engine does. Nothing happens the second time."""
        self.store.gate.set()
        if not self._is_closed:
            self._is_closed = True
            self.tiered.close()
