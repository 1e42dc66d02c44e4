"""TorchScript calls in one place, without the warnings of torch 2.13 and 2.14 that it is deprecated."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*TorchScript.*")
        yield


def jit_script(module: nn.Module) -> torch.jit.ScriptModule:
    """Compile a module."""
    with _quiet():
        return torch.jit.script(module)


def jit_save(module: torch.jit.ScriptModule, file: BinaryIO, records: Mapping[str, str]) -> None:
    """Save a scripted module with extra records to a file in memory."""
    with _quiet():
        torch.jit.save(module, file, _extra_files=dict(records))


def jit_load(path: str | Path) -> torch.jit.ScriptModule:
    """Load the module of a package on the CPU, after a check that its code can do nothing but compute.

    torch runs code of a file while it loads it, so nothing in moecalc calls `torch.jit.load` but this.

    Raises:
        PackageError: the file is damaged, or holds what packages do not.
    """
    from moecalc._lib import load
    from moecalc.errors import PackageError

    native = load()
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise PackageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        native.check_package(os.fsencode(path), content)
    except native.Error as error:
        raise PackageError(str(error)) from None
    # what was checked, whatever happens to the file meanwhile
    with _quiet(), io.BytesIO(content) as file:
        return torch.jit.load(file, map_location="cpu")


def unoptimized() -> AbstractContextManager[None]:
    """Run TorchScript without profiling: nothing is specialised on shapes, no call stalls to recompile."""
    from torch.jit._fuser import optimized_execution  # torch.jit re-exports it without a type

    context: AbstractContextManager[None] = optimized_execution(False)
    return context
