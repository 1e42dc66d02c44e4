"""Exceptions that users meet. Every message is one line: the value, what was expected, and the remedy."""


class MoecalcError(RuntimeError):
    """Base of all errors that moecalc raises on purpose."""


class CheckpointError(MoecalcError):
    """A trained checkpoint cannot be imported (unknown layout, unsupported option, missing tensors)."""


class PackageError(MoecalcError):
    """A package file is missing, damaged, foreign, too new, or failed its verification."""


class ElementError(MoecalcError, ValueError):
    """A structure has an element that the model does not know, or was never trained on."""


class DatasetError(MoecalcError):
    """Training data that cannot be used: names the frames and what is missing."""


def printable(text: str, limit: int = 200) -> str:
    r"""Text from a file, made fit for a terminal: control characters as `\xHH`, cut to `limit`."""
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return safe + ("..." if len(text) > limit else "")


class StructureError(MoecalcError, ValueError):
    """A structure cannot be evaluated (non-finite positions, overlapping atoms, undefined stress, ...)."""
