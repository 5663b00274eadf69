"""The cached tokens behind the known ones of a sequence: a guess at those to come.

Reads keys alone, so evicted pages that left a husk count too. Changes nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import islice
from struct import pack, unpack
from typing import NamedTuple

from cache.node import Node

_TOKEN_BYTES = 4
#: Pages beside each other that are compared: a system prompt may have thousands behind it.
_MAX_COMPARED_PAGES = 8


class Continuation(NamedTuple):
    """The tokens on the cached path that was used last."""

    token_ids: list[int]
    #: No other page follows where these tokens do.
    is_only_one: bool = True


def continuation(node: Node, rest: Sequence[int], page_size: int, max_tokens: int) -> Continuation:
    """Return at most `max_tokens` cached tokens behind `rest`, which follows the page of a node.

    O(log children) a page.
    """
    num_whole_tokens = len(rest) // page_size * page_size
    for start in range(0, num_whole_tokens, page_size):
        child = node.child(_key(rest[start : start + page_size]))
        if child is None:
            return Continuation([])
        node = child
    head, found, is_only_one = _key(rest[num_whole_tokens:]), list[int](), True
    while len(found) < max_tokens:
        children = _children(node, head)
        if not children:
            break
        is_only_one = is_only_one and len(children) == 1
        # Pages that are read now have no time of their last use yet.
        node = max(children, key=lambda child: (child.readers > 0, child.last_used))
        found += unpack(f">{page_size - len(head) // _TOKEN_BYTES}I", node.key[len(head) :])
        head = b""
    return Continuation(found[:max_tokens], is_only_one)


def _key(tokens: Sequence[int]) -> bytes:
    return pack(f">{len(tokens)}I", *tokens)


def _children(node: Node, head: bytes) -> list[Node]:
    """List the children whose pages begin with `head`, or some of them."""
    first = bisect_left(node.keys, head)
    compared = islice(node.children, first, first + _MAX_COMPARED_PAGES)
    return [child for child in compared if child.key.startswith(head)]
