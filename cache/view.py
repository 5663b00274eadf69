"""Which stored keys a query reads, as a function of positions alone.

Knows nothing of requests or of kernels. Imports nothing of ours: `model/` reads this module too.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class View:
    """The query at `t` reads the key at `s <= t` if `s < sinks` or `t - s < window`."""

    sinks: int = 0
    #: None: all keys.
    window: int | None = None

    @property
    def max_keys(self) -> int | None:
        """Keys that a query reads at most; None: without bound.

        The queries at as many first positions read all keys before them.
        """
        return None if self.window is None else self.sinks + self.window

    def within(self, model: View) -> View:
        """Return the effective view of a request with this one in a model with the other."""
        if self.window is None or (model.window is not None and model.window <= self.window):
            return model
        return self

    def narrowed(self, layers: View) -> View:
        """Return the view whose keys a request's queries may load in layers with a window.

        Other layers of the model have none. Kernels may load sinks that the window hides.
        """
        if self.window is None or layers.window is None:
            return self.within(layers)
        return View(self.sinks, min(self.window, layers.window))

    def start(self, position: int) -> int:
        """Return the first position behind the sinks that the query at `position` reads."""
        return self.sinks if self.window is None else max(self.sinks, position - self.window + 1)

    def unread_pages(self, position: int, page_size: int) -> range:
        """Return the pages of which no query from `position` on reads a key."""
        first = -(-self.sinks // page_size)
        return range(first, max(first, self.start(position) // page_size))

    def num_pages(self, page_size: int) -> int | None:
        """Return how many pages a query reads at most, its own included; None: without bound."""
        if self.window is None:
            return None
        # The window's first key may stand anywhere in its page.
        return -(-self.sinks // page_size) - (-(self.window - 1) // page_size) + 1


FULL_VIEW = View()
