"""Attention over paged keys and values: one interface, several backends."""
