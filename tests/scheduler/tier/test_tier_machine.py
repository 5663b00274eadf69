"""Random requests, cancels, restarts and faults: every answer is that of a cold engine."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from tier_drive import TierDrive

from scheduler.messages import ResetCache

prompts = st.builds(
    lambda begin, length, turn: [begin] * min(turn, length) + [9] * max(0, length - turn),
    st.integers(1, 3),
    st.integers(1, 60),
    st.integers(1, 40),
)
namespaces = st.sampled_from(("", "", "other"))


class TierMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(18, 40))
    def start(self, num_pages: int) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.num_pages = num_pages
        self.drive = TierDrive(self.folder, num_pages=num_pages, max_bytes=8 * 600)
        self.num_requests = 0
        self.prompts: dict[int, list[int]] = {}

    @rule(tokens=prompts, namespace=namespaces, num_steps=st.integers(0, 3))
    def submit(self, tokens: list[int], namespace: str, num_steps: int) -> None:
        self.num_requests += 1
        self.prompts[self.num_requests] = tokens
        self.drive.submit(self.num_requests, tokens, namespace=namespace)
        for _ in range(num_steps):
            self.drive.take_messages()
            self.drive.step()

    @rule()
    def run(self) -> None:
        self.drive.run()
        for request_id, prompt in self.prompts.items():
            assert self.drive.outputs[request_id] == self.drive.expected(prompt, 4)
        self.prompts.clear()

    @rule(last=st.integers(0, 3))
    def cancel(self, last: int) -> None:
        request_id = self.num_requests - last
        self.prompts.pop(request_id, None)
        self.drive.cancel(request_id)

    @rule()
    def settle(self) -> None:
        self.drive.settle()

    @rule()
    def evict(self) -> None:
        self.drive.engine.cache.reset()

    @rule()
    def reset(self) -> None:
        self.drive.tiered.handle(ResetCache())

    @rule(byte=st.integers(0, 500), damage=st.binary(min_size=1, max_size=40))
    def harm(self, byte: int, damage: bytes) -> None:
        for path in (self.folder / "octavo-kv").glob("segment-*.kv"):
            descriptor = os.open(path, os.O_WRONLY)
            os.pwrite(descriptor, damage, byte % max(1, path.stat().st_size))
            os.close(descriptor)
            break

    @rule()
    def restart(self) -> None:
        self.run()
        self.drive.close()
        self.drive = TierDrive(self.folder, num_pages=self.num_pages, max_bytes=8 * 600)

    def teardown(self) -> None:
        if hasattr(self, "drive"):
            self.run()
            self.drive.flush()
            self.drive.close()
            shutil.rmtree(self.folder)


TestTierMachine = TierMachine.TestCase
TestTierMachine.settings = settings(max_examples=25, stateful_step_count=20)
