"""Decoders of `transformers` over our own paged attention."""
