"""The store by itself, against a model that is slow and plain."""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.responses.store import ResponseStore, Turn

MAX_COUNT, MAX_BYTES, TTL_S = 6, 12_000, 100.0


def turn_of(parent: Turn | None = None, size: int = 10) -> Turn:
    return Turn(parent, b"x" * size, b"[]", num_items=1)


def store_of(
    max_count: int = 100, max_bytes: int = 1_000_000, ttl_s: float = TTL_S
) -> ResponseStore:
    return ResponseStore(max_count=max_count, max_bytes=max_bytes, ttl_s=ttl_s)


def put_chain(store: ResponseStore, length: int, owner: str = "") -> list[Turn]:
    turns: list[Turn] = []
    for index in range(length):
        turns.append(turn_of(turns[-1] if turns else None))
        assert store.put(owner, f"r{index}", b"{}", turns[-1], 0.0)
        store.check()
    return turns


def test_a_chain_holds_each_turn_once() -> None:
    one, many = store_of(), store_of()
    put_chain(one, 1)
    turns = put_chain(many, 100)
    assert many.stats().num_bytes == 100 * one.stats().num_bytes
    assert many.stats().num_turns == 100
    assert turns[-1].chain() == turns
    assert turns[-1].chain_items == 100


def test_a_turn_lives_as_long_as_something_needs_it() -> None:
    store = store_of()
    turns = put_chain(store, 3)
    assert store.forget("", "r0", 0.0)
    assert store.forget("", "r1", 0.0)
    store.check()
    assert store.stats().num_turns == 3
    found = store.recall("", "r2", 0.0)
    assert found is not None
    assert found.turn.chain() == turns
    assert store.forget("", "r2", 0.0)
    store.check()
    stats = store.stats()
    assert (stats.num_turns, stats.num_bytes, stats.num_owners) == (0, 0, 0)


def test_what_a_running_request_goes_on_from_may_be_forgotten_meanwhile() -> None:
    store = store_of()
    [parent] = put_chain(store, 1)
    store.forget("", "r0", 0.0)
    assert store.stats().num_bytes == 0
    assert store.put("", "child", b"{}", turn_of(parent), 0.0)
    store.check()
    assert store.stats().num_turns == 2
    assert store.recall("", "r0", 0.0) is None


def test_the_body_is_whole() -> None:
    store = store_of()
    turn = Turn(None, b"[]", b'[{"a":1}]', num_items=1)
    store.put("", "r", b'{"id":"r"}', turn, 0.0)
    found = store.recall("", "r", 0.0)
    assert found is not None
    assert found.body() == b'{"id":"r","output":[{"a":1}]}'


def test_the_least_recently_used_goes_first() -> None:
    store = store_of(max_count=2)
    for name in ("a", "b"):
        store.put("", name, b"{}", turn_of(), 0.0)
    assert store.recall("", "a", 1.0)
    store.put("", "c", b"{}", turn_of(), 2.0)
    store.check()
    assert store.recall("", "b", 2.0) is None
    assert store.recall("", "a", 2.0)
    assert store.stats().num_evicted == 1


@pytest.mark.parametrize("limits", [{"max_count": 10}, {"max_bytes": 12_000}])
def test_a_flood_takes_room_from_its_owner(limits: dict[str, int]) -> None:
    store = store_of(**limits)
    for index in range(2):
        assert store.put("quiet", f"q{index}", b"{}", turn_of(), float(index))
    for index in range(50):
        assert store.put("loud", f"l{index}", b"{}", turn_of(), float(index))
        store.check()
    assert store.recall("quiet", "q0", 50.0)
    assert store.recall("quiet", "q1", 50.0)


def test_what_is_not_used_is_forgotten() -> None:
    store = store_of(ttl_s=10.0)
    store.put("", "a", b"{}", turn_of(), 0.0)
    store.put("", "b", b"{}", turn_of(), 5.0)
    assert store.recall("", "a", 9.0)
    assert store.recall("", "b", 15.0) is None
    assert store.recall("", "a", 18.0)
    store.expire(28.0)
    store.check()
    assert store.stats().num_responses == 0
    assert store.stats().num_expired == 2


@pytest.mark.parametrize(
    "large",
    [
        lambda: turn_of(size=MAX_BYTES),
        lambda: turn_of(turn_of(size=MAX_BYTES // 2), size=MAX_BYTES // 2),
        lambda: turn_of(turn_of(turn_of(turn_of(turn_of())))),
    ],
    ids=["bytes", "bytes of the chain", "turns"],
)
def test_what_alone_would_be_too_much_is_not_kept(large: Callable[[], Turn]) -> None:
    store = store_of(max_count=4, max_bytes=MAX_BYTES)
    store.put("", "a", b"{}", turn_of(), 0.0)
    before = store.stats()
    assert not store.put("", "b", b"{}", large(), 0.0)
    store.check()
    assert store.stats() == before
    assert store.recall("", "a", 0.0)


def test_a_store_of_nothing_keeps_nothing() -> None:
    store = store_of(max_count=0)
    assert store.is_off
    assert not store.put("", "a", b"{}", turn_of(), 0.0)
    store.check()


class StoreMachine(RuleBasedStateMachine):
    """Random requests of three owners, compared with the expected contents of the store."""

    def __init__(self) -> None:
        super().__init__()
        self.store = store_of(MAX_COUNT, MAX_BYTES)
        self.now_s = 0.0
        self.num_put = 0
        #: All that was ever kept: (owner, id) to its turn and when it was last used.
        self.known: dict[tuple[str, str], tuple[Turn, float]] = {}
        self.deleted: set[tuple[str, str]] = set()
        #: Turns that a running request holds.
        self.held: list[tuple[str, Turn]] = []

    @rule(owner=st.sampled_from("abc"), size=st.integers(0, 4000), shell=st.integers(2, 2000))
    def put(self, owner: str, size: int, shell: int) -> None:
        self._put(owner, turn_of(size=size), b"x" * shell)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), size=st.integers(0, 4000))
    def go_on(self, data: st.DataObject, size: int) -> None:
        owner, parent = data.draw(st.sampled_from(self.held))
        self._put(owner, turn_of(parent, size), b"{}")

    def _put(self, owner: str, turn: Turn, shell: bytes) -> None:
        name = f"r{self.num_put}"
        self.num_put += 1
        if self.store.put(owner, name, shell, turn, self.now_s):
            self.known[owner, name] = turn, self.now_s
            # Eviction never removes the newest response.
            assert self.store.recall(owner, name, self.now_s) is not None
        else:
            cost = turn.chain_bytes + len(shell)
            assert turn.chain_turns > MAX_COUNT or cost > MAX_BYTES - 600

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def recall(self, data: st.DataObject) -> None:
        owner, name = data.draw(st.sampled_from(sorted(self.known)))
        turn, used_at_s = self.known[owner, name]
        found = self.store.recall(owner, name, self.now_s)
        if found is not None:
            assert found.turn is turn
            assert (owner, name) not in self.deleted
            assert used_at_s + TTL_S > self.now_s
            self.known[owner, name] = turn, self.now_s
            self.held.append((owner, turn))
        for other in set("abc") - {owner}:
            assert self.store.recall(other, name, self.now_s) is None

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        owner, name = data.draw(st.sampled_from(sorted(self.known)))
        self.store.forget(owner, name, self.now_s)
        self.deleted.add((owner, name))

    @rule(passed_s=st.floats(0, 80))
    def wait(self, passed_s: float) -> None:
        self.now_s += passed_s

    @rule()
    def finish_requests(self) -> None:
        self.held.clear()

    @invariant()
    def is_sound(self) -> None:
        self.store.check()
        stats = self.store.stats()
        assert stats.num_turns <= MAX_COUNT
        assert stats.num_bytes <= MAX_BYTES
        gone = stats.num_evicted + stats.num_expired
        assert stats.num_responses + gone <= len(self.known)
        assert stats.num_responses + gone >= len(self.known) - len(self.deleted)


TestStoreMachine = StoreMachine.TestCase
