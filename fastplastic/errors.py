"""The errors that fastplastic raises on purpose, all under one base class."""


class FastPlasticError(Exception):
    """Base of every error raised on purpose: the value, what was expected, the way out."""


class InputError(FastPlasticError):
    """An argument, an option or the data is not usable."""


class FileError(FastPlasticError):
    """A file is missing, corrupt, not writable, or does not fit the model."""


class FingerprintError(FileError):
    """A plan or profile was made for a model with other parameters."""
