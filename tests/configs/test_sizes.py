"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.sizes import format_size, parse_size_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("1048576", 2**20),
        ("1B", 1),
        ("1k", 1024),
        ("1KiB", 1024),
        ("1KB", 1000),
        ("512MiB", 512 * 2**20),
        ("2GB", 2 * 10**9),
        ("1.5g", 3 * 2**29),
        (" 2 TiB ", 2 * 2**40),
        ("2gib", 2 * 2**30),
    ],
)
def test_parse(text: str, num_bytes: int) -> None:
    assert parse_size_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.", "1e3", "2 apples", "1PiB", "1 2", "1BB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="write it as 512MiB, 2GiB or a number of bytes"):
        parse_size_bytes(text)


@pytest.mark.parametrize("value", [None, 5, 1.5])
def test_what_is_no_text_passes_through(value: object) -> None:
    assert parse_size_bytes(value) is value


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 * 2**20, "512 MiB"),
        (2 * 2**30, "2 GiB"),
        (5 * 2**40, "5 TiB"),
    ],
)
def test_format(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text


@given(st.integers(min_value=0, max_value=900 * 2**40))
def test_what_is_formatted_parses_to_nearly_the_same(num_bytes: int) -> None:
    parsed = parse_size_bytes(format_size(num_bytes))
    assert isinstance(parsed, int)
    assert parsed == pytest.approx(num_bytes, rel=0.006, abs=1)
