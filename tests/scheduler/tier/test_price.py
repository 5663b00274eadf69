"""A load is compared with computing by measured times alone."""

from __future__ import annotations

import pytest

from scheduler.tier.price import LoadPrice

PAGE_TOKENS = 16


def measured(latency_s: float, page_s: float) -> LoadPrice:
    price = LoadPrice(PAGE_TOKENS)
    price.observe(latency_s + 16 * page_s, latency_s + 64 * page_s, 16, 64)
    return price


def test_what_was_not_measured_is_tried() -> None:
    price = LoadPrice(PAGE_TOKENS)
    assert price.pays(1, None)
    assert price.pays(1, 1e-9)
    assert measured(1.0, 1.0).pays(1, None)


def test_a_load_pays_from_some_length_on() -> None:
    price = measured(0.010, 0.001)
    assert price.latency_s == pytest.approx(0.010)
    assert price.page_s == pytest.approx(0.001)
    # A page takes 1.6 ms to compute: 0.6 ms are saved by each, against 10 ms.
    assert not price.pays(16, 1e-4)
    assert price.pays(17, 1e-4)


def test_a_load_of_one_run_alone_is_all_pages() -> None:
    price = LoadPrice(PAGE_TOKENS)
    price.observe(0.08, 0.08, 8, 8)
    assert (price.latency_s, price.page_s) == (0.0, 0.01)
    price.observe(0.2, 0.2, 8, 8)
    assert price.page_s == pytest.approx(0.01)
    assert price.latency_s == pytest.approx(0.2 * 0.12)


def test_after_many_refusals_one_load_is_tried() -> None:
    price = measured(0.0, 1.0)
    answers = [price.pays(10, 1e-4) for _ in range(130)]
    assert [index for index, pays in enumerate(answers) if pays] == [64, 129]


def test_a_deadline_is_the_time_of_computing() -> None:
    price = LoadPrice(PAGE_TOKENS)
    assert price.deadline_s(100, 1e-3) == pytest.approx(1.6)
    assert price.deadline_s(1, 1e-3) == 0.25
    assert price.deadline_s(1, None) == 5.0
