"""A prompt with the keys of its pages."""

from __future__ import annotations

from dataclasses import dataclass

from scheduler.messages import Submit
from scheduler.tier.record import PageKey


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """The known tokens of a request, as the disk tier reads them."""

    submit: Submit
    tokens: tuple[int, ...]
    #: Of its whole pages that all views share.
    keys: list[PageKey]
    page_tokens: int

    @property
    def request_id(self) -> int:
        """That of the request."""
        return self.submit.request_id

    @property
    def namespace(self) -> str:
        """That of the request."""
        return self.submit.request.namespace

    @property
    def num_loadable_pages(self) -> int:
        """Pages that may be loaded: the last token is always computed.

        Of a request of its own view none, since it may lack pages in the middle. Neither of one
        whose prompt is scored, since its tokens must be computed.
        """
        request = self.submit.request
        if request.view.window is not None or request.params.prompt_logprobs is not None:
            return 0
        return (len(self.tokens) - 1) // self.page_tokens
