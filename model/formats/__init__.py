"""How a model's files are laid out. Free of torch and of numpy: the API process reads them, too."""


class FormatError(ValueError):
    """A file that cannot be read as what it should be; one line that names the file."""
