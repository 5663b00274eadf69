"""The tokens of a model that can be computed by hand (`model/fake.py`), as functions of a text.

Knows nothing of pages or of steps. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from cache.selection import Selection
from cache.view import FULL_VIEW, View
from model.fake_pages import Rule, digest_of, digests_of, extend
from model.interface import TokenLogprobs

FAKE_EOS_TOKEN_ID = 0


def fake_next_token(
    token_ids: Sequence[int],
    vocab_size: int,
    *,
    may_end: bool = True,
    view: View = FULL_VIEW,
    selection: Selection | None = None,
    num_prompt: int = 0,
) -> int:
    """Return the token a `FakeRunner` gives after these; `num_prompt` counts with a selection."""
    rule = Rule(view, selection, num_prompt)
    return choose(digests_of(token_ids, rule)[-1], vocab_size, may_end=may_end)


def fake_output(
    prompt: Sequence[int],
    num_tokens: int,
    vocab_size: int = 64,
    *,
    may_end: bool = False,
    view: View = FULL_VIEW,
    selection: Selection | None = None,
) -> list[int]:
    """Return the tokens that a `FakeRunner` gives after a prompt: alone, uncached, unchunked."""
    rule, output = Rule(view, selection, len(prompt)), list[int]()
    digests = digests_of(prompt, rule)
    for position in range(len(prompt), len(prompt) + num_tokens):
        output.append(choose(digests[-1], vocab_size, may_end=may_end))
        num_dropped = rule.num_dropped(position)
        digests.append(digest_of(position, output[-1], view, digests.__getitem__, num_dropped))
    return output


def fake_logprobs(
    prefix: Sequence[int], token_id: int, num_top: int, view: View = FULL_VIEW
) -> TokenLogprobs:
    """Return a `FakeRunner`'s score of a prompt's token behind a prefix."""
    return score(digests_of(prefix, Rule(view))[-1], token_id, num_top)


def score(digest: int, token_id: int, num_top: int) -> TokenLogprobs:
    """Return the score of a token behind the prefix of a digest."""
    logprob = -float(extend(digest, token_id) % 1009)
    return TokenLogprobs(token_id, logprob, 1, tuple((rank, logprob) for rank in range(num_top)))


def choose(digest: int, vocab_size: int, *, may_end: bool) -> int:
    """Return the token behind the prefix of a digest."""
    if may_end and digest % 61 == 0:
        return FAKE_EOS_TOKEN_ID
    return 1 + digest // 61 % (vocab_size - 1)
