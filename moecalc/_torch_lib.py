"""Loads the part of the native library that is linked to torch: the TorchScript backend."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Protocol, cast

from moecalc import _install
from moecalc._install import BUILD_HERE, REBUILD

WHO = "moecalc's TorchScript backend"


class TorchLibrary(Protocol):
    """What the module `moecalc._T` has (cpp/python/torch_bindings.cpp)."""

    CleanState: type[AbstractContextManager[None]]
    """Context in which torch is, on this thread, as a new thread finds it."""

    def torch_version(self) -> str:
        """Version of torch that the library was compiled against."""


def load_torch_library() -> TorchLibrary:
    """The module `moecalc._T`, which is linked to libmoecalc_torch.so.

    Call it before you make an evaluator with backend "torchscript". It imports torch, whose libraries must be
    loaded before ours. A library that was compiled against another torch is refused before it is loaded: the
    C++ interface of torch changes with every minor version, and a mismatch would end in an undefined symbol
    at best.

    Raises:
        ImportError: One line that names the versions involved and the command that repairs it.
    """
    if "moecalc._T" in sys.modules:
        return cast("TorchLibrary", sys.modules["moecalc._T"])
    running = _running_torch()
    built = _torch_of_build()
    if built is None:
        raise ImportError(f"{WHO} has not been built for torch {running}: build it with {BUILD_HERE}")
    if _install.minor(built) != _install.minor(running):
        raise ImportError(
            f"{WHO} was compiled against torch {built}, but torch {running} is installed: {REBUILD}"
        )
    try:
        return cast("TorchLibrary", import_module("moecalc._T"))
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
            f"{WHO} needs torch, which is not installed: `{_install.INSTALL_TORCH}`, then build it with "
            f"{BUILD_HERE}"
        ) from None
    return str(torch.__version__)


def _torch_of_build() -> str | None:
    """Version of torch that the library was compiled against; None if there is no such library."""
    try:
        found = import_module("moecalc._build_info").torch
    except (ModuleNotFoundError, AttributeError):
        return None
    return None if found is None else str(found)
