"""Bugs to put in on purpose, as pieces of source text: see `tools/seeded_bugs.py`."""

from __future__ import annotations

from typing import NamedTuple


class Bug(NamedTuple):
    """`old`, which stands exactly once in `file`, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


KV, RADIX, POLICY = "cache/kv_cache.py", "cache/radix.py", "cache/policy.py"

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
    Bug("a duplicate page leaks", KV, "return duplicates + page_ids", "return page_ids"),
    Bug(
        "the copy is a token short",
        KV,
        "PageCopy(source, target, prefix.num_head_tokens)",
        "PageCopy(source, target, prefix.num_head_tokens - 1)",
    ),
    Bug(
        "the copy goes to the wrong page",
        KV,
        "prefix.source.page_id, page_ids[len(prefix.path)]",
        "prefix.source.page_id, page_ids[-1]",
    ),
    Bug(
        "the last token is not computed",
        KV,
        "        limit = len(tokens) - 1\n",
        "        limit = len(tokens)\n",
    ),
    Bug(
        "pages about to be leased count as evictable",
        KV,
        "self.available_pages - _num_unleased(path)",
        "self.available_pages",
    ),
    Bug(
        "pages leased already are subtracted again",
        KV,
        "        if node.leases:\n            return count\n",
        "        if node.leases:\n            continue\n",
    ),
    Bug(
        "a page not quite full is committed",
        KV,
        "num_whole_pages = num_computed // self._page_size",
        "num_whole_pages = (num_computed + 1) // self._page_size",
    ),
    Bug(
        "a frontier outlives its sequence",
        KV,
        "        self._drop_frontier(allocation)\n        del self._live[allocation]\n",
        "        del self._live[allocation]\n",
    ),
    Bug(
        "a cached page is said to be in flight",
        KV,
        "(end, key) in self._frontiers and end.child(key) is None",
        "(end, key) in self._frontiers",
    ),
    Bug(
        "the reserve is forgotten",
        KV,
        "num_new_pages + reserve_pages > available_pages",
        "num_new_pages > available_pages",
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
        "            node.leases -= 1\n            node.last_used = self._now\n",
        "            node.leases -= 1\n",
    ),
    Bug("a copy does not make its source recent", KV, "self._tree.touch(prefix.source)", "pass"),
    Bug("a leased leaf stays evictable", RADIX, "self._queue.discard(nodes[-1])", "pass"),
    Bug(
        "a parent whose last child went is forgotten",
        RADIX,
        "            self._queue_if_evictable(parent)\n",
        "            pass\n",
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
        "if not root.leases and not root.children:",
        "if not root.leases and not root.children and not root.namespace:",
    ),
    Bug(
        "pins do not matter",
        POLICY,
        "heappush(self._heap, (node.pins > 0, self._policy(node), node.ticket, node))",
        "heappush(self._heap, (False, self._policy(node), node.ticket, node))",
    ),
    Bug(
        "the queue serves a dead entry",
        POLICY,
        "            if node.ticket == ticket:\n                node.ticket = 0\n",
        "            if node.ticket:\n                node.ticket = 0\n",
    ),
]

SCHEDULER, SEQUENCE = "scheduler/scheduler.py", "scheduler/sequence.py"
TABLE, SUSPECTS = "scheduler/table.py", "scheduler/suspects.py"
REFUSAL = "scheduler/refusal.py"
PLAN = "scheduler/plan.py"

SCHEDULER_BUGS = [
    Bug(
        "a preempted sequence keeps its count of computed tokens",
        TABLE,
        "        sequence.num_computed = sequence.num_landed = 0\n",
        "",
    ),
    Bug(
        "cached tokens are computed again, over shared pages",
        TABLE,
        "        sequence.num_computed = sequence.num_landed = num_cached\n",
        "        sequence.num_computed = sequence.num_landed = 0\n",
    ),
    Bug(
        "page copies are forgotten",
        SCHEDULER,
        "        plan.step.copies.extend(\n",
        "        list(\n",
    ),
    Bug(
        "a slot is not given back",
        TABLE,
        "        self.free_slots.append(sequence.slot)\n",
        "",
    ),
    Bug(
        "a request that was cancelled while it waited stays in the queue",
        TABLE,
        "            self.waiting.remove(sequence)\n            sequence.move(",
        "            sequence.move(",
    ),
    Bug(
        "tokens count as computed although their step failed",
        SCHEDULER,
        "        for row, sequence in enumerate(plan.sequences):\n",
        "        self._advance(plan, [])\n"
        "        for row, sequence in enumerate(plan.sequences):\n",
    ),
    Bug(
        "one preemption is believed to be enough room",
        TABLE,
        "        while not self._cache.grow(",
        "        if not self._cache.grow(",
    ),
    Bug(
        "the oldest is preempted",
        TABLE,
        "            victim = self.running[-1]\n",
        "            victim = self.running[0]\n",
    ),
    Bug(
        "a chunk may be longer than what is left of the budget",
        SCHEDULER,
        "                count = min(missing, budget_tokens)\n",
        "                count = missing\n",
    ),
    Bug(
        "a prompt that can never fit is let into the queue",
        REFUSAL,
        "    if num_tokens >= max_model_len:\n",
        "    if num_tokens > max_model_len:\n",
    ),
    Bug(
        "a request ends a token late",
        SEQUENCE,
        "if length >= self.max_len_tokens",
        "if length > self.max_len_tokens",
    ),
    Bug(
        "pages count as computed while their step is under way",
        TABLE,
        "self._cache.free(sequence.allocation, sequence.token_ids, sequence.num_landed)",
        "self._cache.free(sequence.allocation, sequence.token_ids, sequence.num_computed)",
    ),
    Bug(
        "a chunk that does not reach the end samples all the same",
        PLAN,
        "    if end == len(sequence.token_ids):\n",
        "    if True:\n",
    ),
    Bug(
        "a prompt that is scored reuses all that is cached",
        SEQUENCE,
        "self.num_scored if self.num_scored < self.num_to_score else None",
        "None",
    ),
    Bug(
        "the last token of a chunk is not scored",
        PLAN,
        "min(end, sequence.num_to_score)",
        "min(end - 1, sequence.num_to_score)",
    ),
    Bug(
        "a token is sampled though none is wanted",
        SCHEDULER,
        "            if sequence.params.max_tokens == 0:\n",
        "            if False:\n",
    ),
]

#: Rare where steps are launched at random: each has a test of its own.
OVERLAP_BUGS = [
    Bug(
        "a step counts for a sequence that was preempted and came back meanwhile",
        SCHEDULER,
        "if allocation is None or allocation.page_ids is not step.page_ids[row]:",
        "if allocation is None:",
    ),
    Bug(
        "a sequence comes back before its newest token is known",
        SCHEDULER,
        "if sequence.token_ids[-1] == PENDING_TOKEN:",
        "if False:",
    ),
    Bug(
        "a token is computed behind the last one there is room for",
        SCHEDULER,
        " and not sequence.awaits_token",
        "",
    ),
    Bug("a late token is counted on", SEQUENCE, "self.constraint is not None or len", "len"),
    Bug("a late token is not computed again", SCHEDULER, "num_computed -= 1", "num_computed -= 0"),
    Bug(
        "a late token counts in the queue", "scheduler/queue.py", "_tokens -= 1\n", "_tokens -= 0\n"
    ),
    Bug("a prompt's scores are told twice", SCHEDULER, "scores[num_known:]", "scores"),
]

#: What happens after a step that failed.
FAULT_BUGS = [
    Bug(
        "a step counts for a sequence that was rolled back",
        PLAN,
        " or sequence.num_rollbacks != self.rollbacks[row]",
        "",
    ),
    Bug(
        "tokens that never came stay",
        TABLE,
        "            del sequence.token_ids[-1]\n",
        "            break\n",
    ),
    Bug("pages that are not finite stay cached", TABLE, "if sequence.trusts_cache:", "if True:"),
    Bug(
        "a suspect reads cached pages that are not finite",
        SEQUENCE,
        "if not self.trusts_cache:",
        "if False:",
    ),
    Bug(
        "a cleared suspect never trusts the cache again",
        SUSPECTS,
        "sequence.trusts_cache = True",
        "pass",
    ),
    Bug(
        "suspects run with steps under way",
        SCHEDULER,
        "None if self._num_under_way else",
        "None if False else",
    ),
    Bug(
        "one that fails alone is ended without a probe",
        SUSPECTS,
        "self.probe or next(iter",
        "next(iter",
    ),
    Bug("a suspect outgrows its pages", SCHEDULER, " or not self._table.grow(sequence):", ":"),
    Bug(
        "a cancelled request leaves its probe",
        SCHEDULER,
        "if probe := self._suspects.drop(sequence):",
        "if (probe := self._suspects.drop(sequence)) and False:",
    ),
]
