"""Bugs to put into the cache on purpose: see `tools/seeded_bugs.py`."""

from __future__ import annotations

from tools.bugs import Bug

KV, RADIX, POLICY = "cache/kv_cache.py", "cache/radix.py", "cache/policy.py"
ALLOCATION, LEASE = "cache/allocation.py", "cache/lease.py"
GROUPS, MOVES, REUSE = "cache/groups.py", "cache/moves.py", "cache/reuse.py"

CACHE_BUGS = [
    Bug(
        "a duplicate page is freed at commit",
        KV,
        "self._num_duplicate_pages += 1\n",
        "self._num_duplicate_pages += 1\n"
        "                self._pool.give_back([allocation.page_ids[index]])\n",
    ),
    Bug(
        "commit replaces an entry of the block table",
        KV,
        "            allocation.lease.extend(node)\n",
        "            allocation.lease.extend(node)\n"
        "            allocation.page_ids[index] = node.page_id\n",
    ),
    Bug("a duplicate page leaks", ALLOCATION, "return duplicates + self", "return self"),
    Bug(
        "the copy is a token short",
        MOVES,
        "PageRef(Tier.DEVICE, target), num_tokens)",
        "PageRef(Tier.DEVICE, target), num_tokens - 1)",
    ),
    Bug(
        "the copy goes to the wrong page",
        KV,
        "head_copy(source_page, page_ids[len(path)], ",
        "head_copy(source_page, page_ids[-1], ",
    ),
    Bug(
        "a page that is cached again stays a ghost",
        RADIX,
        "        self.ghosts.discard(node.chain)\n",
        "",
    ),
    Bug(
        "another namespace has the same ghosts",
        "cache/ghosts.py",
        "return hash((0, namespace))",
        "return 0",
    ),
    Bug(
        "pages behind an evicted one are not lost with it",
        "cache/misses.py",
        "num_pages * size + num_heads, MissReason.EVICTED",
        "num_pages * size, MissReason.EVICTED",
    ),
    Bug(
        "the last token is not computed",
        REUSE,
        "min(limit, len(tokens) - 1)",
        "min(limit, len(tokens))",
    ),
    Bug(
        "pages about to be leased count as evictable",
        KV,
        "self.available_pages - reuse.num_unread\n",
        "self.available_pages\n",
    ),
    Bug(
        "pages leased already are subtracted again",
        REUSE,
        "sum(not node.readers for node in",
        "sum(True for node in",
    ),
    Bug(
        "a page not quite full is committed",
        KV,
        "num_whole_pages = num_computed // self._page_size",
        "num_whole_pages = (num_computed + 1) // self._page_size",
    ),
    Bug(
        "a pending page outlives its sequence",
        KV,
        "        self._drop_pending_page(allocation)\n        del self._live[allocation]\n",
        "        del self._live[allocation]\n",
    ),
    Bug(
        "a cached page is said to be in in_flight_step",
        KV,
        "return child is None or child.page_id == NO_PAGE",
        "return True",
    ),
    Bug(
        "the reserve is forgotten",
        KV,
        "self._num_new_pages(reuse, num_tokens) + reserve_pages <=",
        "self._num_new_pages(reuse, num_tokens) <=",
    ),
    Bug(
        "growth takes more than there is",
        KV,
        "if num_new_pages > self.available_pages:",
        "if num_new_pages > self.available_pages + 1:",
    ),
    Bug(
        "a use does not make a path recent",
        RADIX,
        "            node.last_used = self._now\n            node.readers -= 1\n",
        "            node.readers -= 1\n",
    ),
    Bug("a copy does not make its source recent", KV, "self._tree.touch(prefix.source)", "pass"),
    Bug(
        "a page that is read stays evictable",
        RADIX,
        "node.readers += 1\n            self._queue.discard(node)",
        "node.readers += 1",
    ),
    Bug(
        "a parent whose last child went is forgotten",
        RADIX,
        "        self._settle(parent)\n",
        "",
    ),
    Bug(
        "only the child after the probe is looked at",
        RADIX,
        "node.children[max(position - 1, 0) : position + 1]",
        "node.children[position : position + 1]",
    ),
    Bug(
        "only the child before the probe is looked at",
        RADIX,
        "node.children[max(position - 1, 0) : position + 1]",
        "node.children[max(position - 1, 0) : position]",
    ),
    Bug(
        "a token half shared counts as shared",
        RADIX,
        "_num_shared_bytes(child.key[: len(probe)], probe) // TOKEN_BYTES",
        "-(-_num_shared_bytes(child.key[: len(probe)], probe) // TOKEN_BYTES)",
    ),
    Bug(
        "namespaces share",
        RADIX,
        "root = self._roots.get(namespace)\n        if root is None:\n            return",
        "root = self._roots.get('')\n        if root is None:\n            return",
    ),
    Bug(
        "an empty namespace stays",
        RADIX,
        "                self._roots.pop(node.namespace, None)\n",
        "                self._roots.pop('', None)\n",
    ),
    Bug(
        "pins do not matter",
        POLICY,
        "heappush(self._heap, (node.pin_rank, self._policy(node), node.ticket, node))",
        "heappush(self._heap, (0, self._policy(node), node.ticket, node))",
    ),
    Bug(
        "the queue serves a dead entry",
        POLICY,
        "            if node.ticket == ticket:\n                node.ticket = 0\n",
        "            if node.ticket:\n                node.ticket = 0\n",
    ),
    Bug(
        "a drop leaves its readers",
        LEASE,
        "        self._tree.unread(dropped)\n",
        "",
    ),
    Bug(
        "pages that depend on the view of a request are shared",
        KV,
        "num_whole_pages = min(num_computed, allocation.max_shared_tokens) // self._page_size",
        "num_whole_pages = num_computed // self._page_size",
    ),
    Bug(
        "a request reads pages that its view would have computed otherwise",
        KV,
        "        limit = max_shared_tokens\n",
        "        limit = maxsize\n",
    ),
    Bug(
        "a duplicate page that is dropped leaks",
        KV,
        "self._pool.give_back(allocation.private_among(pages))",
        "pass",
    ),
    Bug(
        "a husk is left behind",
        RADIX,
        "            if node.parent is not None:\n                self._unlink(node)\n",
        "            if node.parent is not None:\n                return\n",
    ),
    Bug("find does not see husks", RADIX, "husks.append(len(path))", "pass"),
    Bug(
        "find takes the page before the gap for unread",
        RADIX,
        "end > view.start(num_tokens)",
        "first > view.start(num_tokens)",
    ),
    Bug("a head is copied from a husk", RADIX, " and child.page_id != NO_PAGE", ""),
    Bug(
        "a husk stays one when its page is computed again",
        KV,
        "self._tree.fill(node, allocation.page_ids[index])",
        "pass",
    ),
    Bug(
        "pages out of view are read at admission",
        KV,
        "or self._tree.root(namespace), path, gap)",
        "or self._tree.root(namespace), path, range(0))",
    ),
    Bug(
        "a pruned husk gives back a page that it has not",
        RADIX,
        "page_ids = [node.page_id for node in nodes if node.page_id != NO_PAGE]",
        "page_ids = [node.page_id for node in nodes]",
    ),
    Bug(
        "admission asks for the pages of the whole prompt",
        KV,
        "num_pages = self._num_pages(min(num_tokens, end))",
        "num_pages = self._num_pages(num_tokens)",
    ),
]

#: About a second group of pages for windowed layers.
GROUP_BUGS = [
    Bug(
        "a sequence is taken in without room in the windowed group",
        GROUPS,
        "if not other.has_room(windowed, num_tokens, reserve_pages):",
        "if False:",
    ),
    Bug(
        "the groups differ in the reused tokens",
        GROUPS,
        "while windowed.num_tokens != full.num_tokens:",
        "while False:",
    ),
    Bug(
        "windowed pages are copied in the other group",
        GROUPS,
        "is_windowed=True",
        "is_windowed=False",
    ),
    Bug(
        "windowed pages are kept behind the window",
        GROUPS,
        "self.windowed.drop_unread(_part(allocation), num_computed)",
        "pass",
    ),
    Bug(
        "windowed pages behind a request's view are shared",
        GROUPS,
        "            model_view=FULL_VIEW,\n",
        "",
    ),
    Bug(
        "a window's pages go before older ones",
        KV,
        "evicts_inside=model_view not in (None, view)",
        "evicts_inside=False",
    ),
    Bug(
        "a table outgrows the other",
        GROUPS,
        "min(part.page_ids, allocation.page_ids, key=len)",
        "allocation.page_ids",
    ),
    Bug(
        "pages under computation in the windowed group are computed twice",
        GROUPS,
        " or self.windowed.is_in_flight(page)",
        "",
    ),
]
