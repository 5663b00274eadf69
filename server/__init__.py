"""HTTP, text, processes and metrics."""

#: Octavo's; the build reads it here, so that a checkout that is not installed knows it too.
__version__ = "0.1.0"
