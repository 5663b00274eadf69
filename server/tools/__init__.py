"""Reads reasoning and calls of tools from a model's output."""
