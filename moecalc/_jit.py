"""TorchScript calls in one place: torch 2.13 and 2.14 call TorchScript deprecated, which is no news for a user of moecalc."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

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


def jit_save(module: torch.jit.ScriptModule, path: Path, records: Mapping[str, str]) -> None:
    """Save a scripted module with extra records."""
    with _quiet():
        torch.jit.save(module, str(path), _extra_files=dict(records))


def jit_load(path: str | Path) -> torch.jit.ScriptModule:
    """Load a scripted module on the CPU."""
    with _quiet():
        return torch.jit.load(str(path), map_location="cpu")


def unoptimized() -> AbstractContextManager[None]:
    """Run TorchScript without profiling: nothing is specialised on shapes, no call stalls to recompile."""
    from torch.jit._fuser import optimized_execution  # torch.jit re-exports it without a type

    context: AbstractContextManager[None] = optimized_execution(False)
    return context
