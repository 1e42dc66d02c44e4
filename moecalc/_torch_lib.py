"""Loads the part of the native library that is linked to torch: the TorchScript backend."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from moecalc import _install
from moecalc._install import BUILD_HERE, REBUILD

WHO = "moecalc's TorchScript backend"


def load_torch_library() -> ModuleType:
    """The module `moecalc._T`, which is linked to libmoecalc_torch.so.

    To be called before an evaluator with backend "torchscript" is made: torch is imported here, because its libraries must be
    loaded before ours. A library that was compiled against another torch is not even tried: the C++ interface of torch changes
    with every minor version, and a mismatch would end in an undefined symbol at best.

    Raises:
        ImportError: One line that names the versions involved and the command that repairs it.
    """
    if "moecalc._T" in sys.modules:
        return sys.modules["moecalc._T"]
    running = _running_torch()
    built = _torch_of_build()
    if built is None:
        raise ImportError(f"{WHO} has not been built for torch {running}: build it with {BUILD_HERE}")
    if _install.minor(built) != _install.minor(running):
        raise ImportError(
            f"{WHO} was compiled against torch {built}, but torch {running} is installed: {REBUILD}"
        )
    try:
        return import_module("moecalc._T")
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise ImportError(
            f"{WHO} (compiled against torch {built}) does not load with torch {running} and "
            f"Python {sys.version_info.major}.{sys.version_info.minor}: {reason}: {REBUILD}"
        ) from error


def _running_torch() -> str:
    """Version of the torch that is installed, imported."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"{WHO} needs torch, which is not installed: `{_install.INSTALL_TORCH}`, then build it with {BUILD_HERE}"
        ) from None
    return str(torch.__version__)


def _torch_of_build() -> str | None:
    """Version of torch that the library was compiled against; None if there is no such library."""
    try:
        found = import_module("moecalc._build_info").torch
    except (ModuleNotFoundError, AttributeError):
        return None
    return None if found is None else str(found)
