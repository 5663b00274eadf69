"""From a validated request to its tokens and texts, for all three APIs."""
