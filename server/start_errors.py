"""The errors that end a start. The message of each is one line for the operator."""

from __future__ import annotations


class StartError(Exception):
    """The daemon cannot start."""


class UsageError(Exception):
    """A file of a setting is wrong; the message names the setting."""
