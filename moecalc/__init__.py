"""Mixture-of-experts interatomic potentials for ASE and LAMMPS."""

from typing import TYPE_CHECKING

from moecalc._lazy import lazy_names

if TYPE_CHECKING:
    from moecalc.calculator import MoECalculator as MoECalculator

__version__ = "0.1.0"

__all__ = ["MoECalculator", "__version__"]

# the command line and LAMMPS import this: what needs NumPy and ASE is imported when it is first used
_MODULES = {"MoECalculator": "moecalc.calculator"}

__getattr__ = lazy_names(__name__, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
