"""Exceptions that users meet. Every message is one line: the value, what was expected, and the remedy."""


class MoecalcError(RuntimeError):
    """Base of all errors that moecalc raises on purpose."""


class CheckpointError(MoecalcError):
    """A trained checkpoint cannot be imported (unknown layout, unsupported option, missing tensors)."""


class PackageError(MoecalcError):
    """A package file is missing, damaged, foreign, too new, or failed its verification."""


class ElementError(MoecalcError, ValueError):
    """A structure has an element that the model does not know, or was never trained on."""


class StructureError(MoecalcError, ValueError):
    """A structure cannot be evaluated (non-finite positions, overlapping atoms, undefined stress, ...)."""
