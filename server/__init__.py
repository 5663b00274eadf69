"""HTTP, text, processes and metrics."""
