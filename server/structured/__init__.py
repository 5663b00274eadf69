"""Structured output: the form that a request asks for, as one grammar for the engine."""
