"""Pages that another tier brings to the cache of a state machine, and the prompts of its rules."""

from __future__ import annotations

from itertools import takewhile

from cache_reference import Entry, Key, Reference, prompt
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from cache.kv_cache import KVCache
from cache.moves import PageMove
from cache.node import NO_PAGE

Written = Key | None
prompts = st.builds(prompt, st.integers(1, 16), st.integers(0, 12), st.integers(0, 7))
namespaces = st.sampled_from(("", "", "", "other"))


class ArrivalRules(RuleBasedStateMachine):
    cache: KVCache
    model: Reference
    memory: list[list[Written]]
    moves: list[PageMove]

    @precondition(lambda self: not self.moves)
    @rule(tokens=prompts, namespace=namespaces, first=st.sampled_from((0, 0, 0, 1, 2)))
    def enter(self, tokens: list[int], namespace: str, first: int) -> None:
        """Bring pages from another tier, between two steps."""
        model, size = self.model, self.model.page_size
        path = list(model.path(namespace, tokens, len(tokens) // size))
        held = [*takewhile(lambda key: key in model.cached and model.cached[key].has_page, path)]
        resident = self.cache.arrivals.resident(tokens, namespace, len(path))
        assert [self.memory[page_id][-1] for page_id in resident] == held
        is_new, read, leased = [False] * (len(held) - first), model.read, model.leased
        for key in path[len(held) :] if len(held) >= first else ():
            read.update(held)
            leased.update(held)
            is_new.append(key not in model.cached or not model.cached[key].has_page)
            if is_new[-1]:
                if model.num_pages - model.num_private - len(read) == 0:
                    is_new.pop()
                    break
                model.make_room(1, read, leased)
                model.cached.setdefault(key, Entry()).has_page = True
                model.ghosts.pop(key, None)
            held.append(key)

        page_ids = self.cache.arrivals.enter(tokens, namespace, range(first, len(path)))
        assert [page_id != NO_PAGE for page_id in page_ids] == is_new
        if len(held) >= first:
            model.use(*held)
            model.forget_husks(model.leased)
        for (_, prefix), page_id in zip(path[first:], page_ids, strict=False):
            if page_id != NO_PAGE:
                ends = range(len(prefix) - size + 1, len(prefix) + 1)
                self.memory[page_id] = [(namespace, prefix[:end]) for end in ends]
