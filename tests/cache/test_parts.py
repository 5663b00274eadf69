"""The parts the cache is made of, and that `check` sees what it is there for."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from cache.kv_cache import KVCache
from cache.lease import Lease
from cache.node import NO_PAGE, Node
from cache.pages import PagePool
from cache.pending_pages import NextPage, PendingPages
from cache.policy import EvictionQueue, lru
from cache.radix import RadixTree


def a_node(last_used: int = 0) -> Node:
    return Node("", b"", last_used, None, 1, last_used=last_used)


# ---- pages ---------------------------------------------------------------------------------------


def test_pages_are_handed_out_in_order_and_the_last_given_back_first() -> None:
    pool = PagePool(4)
    assert pool.take(3) == [0, 1, 2]
    pool.give_back([1])
    pool.give_back([0])
    assert pool.take(2) == [0, 1]
    assert pool.num_free == 1
    pool.check()


def test_more_pages_than_there_are_cannot_be_taken() -> None:
    with pytest.raises(AssertionError, match="3 pages"):
        PagePool(2).take(3)


@pytest.mark.parametrize(("page_id", "message"), [(1, "twice"), (7, "out of range")])
def test_the_pool_sees_pages_that_are_not_free(page_id: int, message: str) -> None:
    pool = PagePool(2)
    pool.give_back([page_id])
    with pytest.raises(AssertionError, match=message):
        pool.check()


# ---- leases --------------------------------------------------------------------------------------


def test_a_lease_is_released_exactly_once() -> None:
    tree = RadixTree(1, lru)
    lease = Lease(tree, tree.root(""), [], range(0))
    lease.extend(tree.insert(lease.end, tree.key([5], 0), 0))
    assert tree.num_evictable == 0
    lease.release()
    assert tree.num_evictable == 1
    with pytest.raises(ValueError, match="released before"):
        lease.release()
    tree.check()


def test_a_page_is_held_until_the_last_lease_is_released() -> None:
    tree = RadixTree(1, lru)
    first = Lease(tree, tree.root(""), [], range(0))
    first.extend(tree.insert(first.end, tree.key([5], 0), 0))
    second = Lease(tree, first.root, list(first.nodes), range(0))
    first.release()
    assert tree.num_evictable == 0
    second.release()
    assert tree.evict() == 0
    assert len(tree.roots()) == 0


# ---- eviction queue ------------------------------------------------------------------------------


def test_nodes_come_out_in_order_whatever_happened_to_them_before() -> None:
    chance = random.Random(0)
    queue = EvictionQueue(lru)
    inside: dict[int, Node] = {}
    for now in range(2_000):
        if inside and chance.random() < 0.3:
            queue.discard(inside.pop(chance.choice(list(inside))))
        elif inside and chance.random() < 0.3:
            oldest = min(inside)
            assert queue.pop() is inside.pop(oldest)
        elif inside and chance.random() < 0.3:
            node = inside.pop(chance.choice(list(inside)))
            node.last_used = now
            inside[now] = node
            queue.push(node)
        else:
            inside[now] = a_node(now)
            queue.push(inside[now])
        queue.check(inside.values())


def test_garbage_is_bounded() -> None:
    queue = EvictionQueue(lru)
    node = a_node()
    for _ in range(1_000):
        queue.push(node)
    assert len(queue._heap) <= 3


def test_discarding_what_is_not_there_changes_nothing() -> None:
    queue = EvictionQueue(lru)
    queue.discard(a_node())
    queue.check([])


# ---- pending pages
# -----------------------------------------------------------------------------------


def test_a_frontier_stays_until_its_last_owner_leaves() -> None:
    pending_pages, pending_page = PendingPages(), NextPage(a_node(), b"page")
    pending_pages.add(pending_page)
    pending_pages.add(pending_page)
    pending_pages.remove(pending_page)
    assert pending_page in pending_pages
    pending_pages.remove(pending_page)
    assert pending_page not in pending_pages
    pending_pages.check([])


# ---- check sees ----------------------------------------------------------------------------------


def lose_a_page(cache: KVCache) -> None:
    cache._pool.take(1)


def free_a_cached_page(cache: KVCache) -> None:
    cache._pool.give_back([next(iter(cache._tree.nodes())).page_id])


def miscount_leases(cache: KVCache) -> None:
    next(node for node in cache._tree.nodes() if node.leases).leases += 1


def miscount_readers(cache: KVCache) -> None:
    next(node for node in cache._tree.nodes() if node.readers).readers += 1


def leave_a_husk(cache: KVCache) -> None:
    leaf = next(node for node in cache._tree.nodes() if not node.children and not node.leases)
    cache._tree._queue.discard(leaf)
    cache._pool.give_back([leaf.page_id])
    cache._tree.num_pages -= 1
    leaf.page_id = NO_PAGE


def take_a_page_that_is_read(cache: KVCache) -> None:
    node = next(node for node in cache._tree.nodes() if node.readers)
    cache._pool.give_back([node.page_id])
    cache._tree.num_pages -= 1
    node.page_id = NO_PAGE


def miscount_root_leases(cache: KVCache) -> None:
    cache._tree.root("").leases += 1


def miscount_pages(cache: KVCache) -> None:
    cache._tree.num_pages += 1


def miscount_leased_pages(cache: KVCache) -> None:
    cache._tree.num_read -= 1


def hide_a_leaf(cache: KVCache) -> None:
    cache._tree._queue.pop()


def queue_a_leased_node(cache: KVCache) -> None:
    cache._tree._queue.push(next(node for node in cache._tree.nodes() if node.leases))


def age_a_leaf(cache: KVCache) -> None:
    next(node for node in cache._tree.nodes() if not node.children).last_used += 100


def miscount_garbage(cache: KVCache) -> None:
    cache._tree._queue._num_dead += 1


def disorder_children(cache: KVCache) -> None:
    root = cache._tree.root("")
    root.keys.reverse()
    root.children.reverse()


def rename_a_child(cache: KVCache) -> None:
    cache._tree.root("").keys[0] = b"other"


def adopt(cache: KVCache) -> None:
    cache._tree.root("").children[0].parent = cache._tree.root("else")


def sink(cache: KVCache) -> None:
    cache._tree.root("").children[0].depth += 1


def emigrate(cache: KVCache) -> None:
    cache._tree.root("").children[0].namespace = "else"


def leave_an_empty_root(cache: KVCache) -> None:
    cache._tree.root("nobody")


def lose_a_frontier(cache: KVCache) -> None:
    cache._pending_pages = PendingPages()


def forget_a_frontier(cache: KVCache) -> None:
    next(iter(cache._live)).pending_page = None


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_page,
        free_a_cached_page,
        miscount_leases,
        miscount_readers,
        leave_a_husk,
        take_a_page_that_is_read,
        miscount_root_leases,
        miscount_pages,
        miscount_leased_pages,
        hide_a_leaf,
        queue_a_leased_node,
        age_a_leaf,
        miscount_garbage,
        disorder_children,
        rename_a_child,
        adopt,
        sink,
        emigrate,
        leave_an_empty_root,
        lose_a_frontier,
        forget_a_frontier,
    ],
)
def test_check_sees(damage: Callable[[KVCache], None]) -> None:
    cache = KVCache(8, 2)
    for tokens in ([1, 1, 1], [2, 2, 2]):
        allocation = cache.admit(tokens)
        assert allocation is not None
        cache.free(allocation, tokens, 2)
    assert cache.admit([1, 1, 3, 3])
    cache.check()
    damage(cache)
    with pytest.raises(AssertionError):
        cache.check()


def test_two_who_compute_one_page_are_both_counted() -> None:
    cache = KVCache(num_pages=8, page_size=2)
    first, second = cache.admit([1, 2, 3]), cache.admit([1, 2, 4])
    assert first is not None
    assert second is not None
    assert cache.match([1, 2, 5]).in_flight
    cache.free(first, [1, 2, 3], 0)
    assert cache.match([1, 2, 5]).in_flight
    cache.check()
    cache.free(second, [1, 2, 4], 0)
    assert not cache.match([1, 2, 5]).in_flight
    assert len(cache._pending_pages) == 0
    cache.check()
