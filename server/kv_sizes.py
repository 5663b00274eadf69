"""The sizes of a model's pages in bytes and in requests, for operators.

Knows nothing of which pages are in use.
"""

from __future__ import annotations

from scheduler.client import ModelInfo


def page_bytes(info: ModelInfo) -> int:
    """Return the bytes of one of `info.num_pages` pages."""
    windowed_bytes = info.windowed.kv_bytes_per_token if info.windowed else 0
    return (info.kv_bytes_per_token - windowed_bytes) * info.page_size


def windowed_page_bytes(info: ModelInfo) -> int:
    """Return the bytes of a page of the windowed layers; 0 where they have none of their own."""
    return info.windowed.kv_bytes_per_token * info.page_size if info.windowed else 0


def kv_bytes(info: ModelInfo) -> int:
    """Return the bytes of all pages."""
    num_windowed_pages = info.windowed.num_pages if info.windowed else 0
    return info.num_pages * page_bytes(info) + num_windowed_pages * windowed_page_bytes(info)


def full_length_requests(info: ModelInfo) -> int:
    """Return how many requests of `max_model_len` tokens fit at one time."""
    num_requests = info.num_pages * info.page_size // info.max_model_len
    if info.windowed is None:
        return num_requests
    num_read_pages = info.windowed.view.num_pages(info.page_size) or 1
    return min(num_requests, info.windowed.num_pages // num_read_pages)
