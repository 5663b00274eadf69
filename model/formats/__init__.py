"""Readers of a model's file formats. Free of torch and numpy: both processes use them."""


class FormatError(ValueError):
    """A file that does not have the expected format; one line that names the file."""
