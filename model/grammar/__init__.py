"""Grammars of answers: compilation, checks and token masks."""
