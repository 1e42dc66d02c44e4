"""Loads the native library, after checking that it fits the torch that is installed."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from moecalc import _install
from moecalc._install import REBUILD


def load() -> ModuleType:
    """The module `moecalc._C`.

    torch is imported first, because its libraries must be loaded before ours. A library that was compiled against
    another torch is not even tried: the C++ interface of torch changes with every minor version, and a mismatch would
    end in an undefined symbol at best.

    Raises:
        ImportError: One line that names the versions involved and the command that repairs it.
    """
    if "moecalc._C" in sys.modules:
        return sys.modules["moecalc._C"]
    _check_range(
        "Python",
        f"{sys.version_info.major}.{sys.version_info.minor}",
        _install.OLDEST_PYTHON,
        _install.NEWEST_PYTHON,
        "install moecalc in an environment of a supported Python",
    )
    import torch

    running = str(torch.__version__)
    _check_range(
        "torch",
        running,
        _install.OLDEST_TORCH,
        _install.NEWEST_TORCH,
        f"`{_install.INSTALL_TORCH}`, then {REBUILD}",
    )
    built = _torch_of_build()
    if built is None:
        raise ImportError(f"moecalc's native library has not been built for torch {running}: {REBUILD}")
    if _minor(built) != _minor(running):
        raise ImportError(
            f"moecalc's native library was compiled against torch {built}, but torch {running} is installed: {REBUILD}"
        )
    try:
        return import_module("moecalc._C")
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise ImportError(
            f"moecalc's native library (compiled against torch {built}) does not load with torch {running} and "
            f"Python {sys.version_info.major}.{sys.version_info.minor}: {reason}: {REBUILD}"
        ) from error


def _torch_of_build() -> str | None:
    """Version of torch that the native library was compiled against; None if there is no such library."""
    try:
        return str(import_module("moecalc._build_info").torch)
    except ModuleNotFoundError:
        return None


def _check_range(
    name: str, version: str, oldest: tuple[int, int], newest: tuple[int, int], remedy: str
) -> None:
    if not oldest <= _minor(version) <= newest:
        raise ImportError(
            f"expected {name} {_install.dotted(oldest)} to {_install.dotted(newest)}, got {name} {version}: {remedy}"
        )


def _minor(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)
