"""The store of digests: bounded, and separate for each owner."""

from __future__ import annotations

import pytest

from server.generation.fingerprints import Fingerprint, Fingerprints


def fingerprint(num_messages: int = 0) -> Fingerprint:
    return Fingerprint(0, b"", b"", b"", (b"",) * num_messages, {})


def test_each_owner_finds_its_own_until_they_expire() -> None:
    kept = Fingerprints(max_count=9, ttl_s=10.0)
    one, two = fingerprint(), fingerprint(1)
    kept.put("a", "id", one, 0.0)
    kept.put("b", "id", two, 4.0)
    assert (kept.get("a", "id", 5.0), kept.get("b", "id", 5.0)) == (one, two)
    assert kept.get("c", "id", 5.0) is None
    assert kept.get("a", "id", 10.0) is None
    kept.check()
    assert len(kept) == 1


def test_an_id_that_comes_again_is_the_newer_one() -> None:
    kept = Fingerprints(max_count=2, ttl_s=10.0)
    for number in range(3):
        kept.put("a", "id", fingerprint(number), float(number))
        kept.check()
    found = kept.get("a", "id", 11.0)
    assert found is not None
    assert len(found.messages) == 2


@pytest.mark.parametrize(("max_count", "max_bytes"), [(3, 2**20), (100, 3500), (0, 2**20)])
def test_the_oldest_make_room(max_count: int, max_bytes: int) -> None:
    kept = Fingerprints(max_count=max_count, ttl_s=10.0, max_bytes=max_bytes)
    for number in range(10):
        kept.put("a", str(number), fingerprint(), 0.0)
        kept.check()
    num_kept = min(3, max_count)
    found = [number for number in range(10) if kept.get("a", str(number), 0.0)]
    assert found == [*range(10)][10 - num_kept :]
