"""Mixture-of-experts interatomic potentials for ASE and LAMMPS."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecalc.calculator import MoECalculator as MoECalculator

__version__ = "0.1.0"

__all__ = ["MoECalculator", "__version__"]

# the command line and LAMMPS import this: what needs NumPy and ASE is imported when it is first used
_LAZY = {"MoECalculator": "moecalc.calculator"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
