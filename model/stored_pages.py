"""The contents of pages as bytes, for tiers that keep them.

Knows nothing of which tokens a page holds, nor of tiers. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StoredPages:
    """The properties of the contents of all pages of a model, where these can be kept."""

    #: Of one page in all layers.
    num_bytes: int
    #: In hexadecimal: of all that the contents depend on, besides tokens.
    digest: str


class PageAccess(Protocol):
    """Reads and writes whole pages, between two steps."""

    def read_page(self, page_id: int) -> bytes | memoryview:
        """Return the contents of a page in all layers, as the steps launched so far leave it."""

    def write_page(self, page_id: int, contents: memoryview) -> None:
        """Replace the contents of a page. The steps launched so far do not see it."""
