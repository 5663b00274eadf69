"""Answers of a given form: what requests say of it, as one grammar that the engine keeps to."""
