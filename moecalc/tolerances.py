"""Every tolerance of moecalc and of its tests, with the reason of the number."""

from typing import Final

# Of packages: relative to the largest magnitude of a quantity in a frame, floored at 1 in its unit.

REFERENCE: Final = {"float64": 1e-8, "float32": 2e-5}
"""|value - reference| / max(1, |reference|) when a package is checked on first use; energies are per atom.

float64: instruction sets and devices add in other orders. float32: weights and sums are rounded, and errors
add up over layers. The core has the same numbers (`reference_tolerance` in cpp/evaluator.cpp).
"""

VERIFICATION: Final = {"float64": 1e-10, "float32": 2e-5}
"""Plain PyTorch on both sides. float64: only the order of operations differs. float32: rounded weights."""

VERIFICATION_EVALUATOR: Final = {"float64": 1e-9, "float32": 2e-5}
"""The evaluator against plain PyTorch: its kernels add in an order of their own."""

VERIFICATION_DIFFERENCE: Final = 1e-6
"""Derivatives against differences of energies: rounding of 1e-13 over steps of 1e-4 is 1e-9, with room."""

# Of tests: absolute, for structures of a few atoms.

FINITE_DIFFERENCE: Final = 1e-6
"""Forces (eV/A) and stress (eV/A^3) against finite differences of the energy, float64: their error."""

ORACLE_ENERGY: Final = 1e-8
"""Energy (eV, total and per atom) against the code that trained the checkpoint, float64: order of sums."""

ORACLE_FORCES: Final = 1e-8
"""Forces (eV/A) against the code that trained the checkpoint, float64: order of sums."""

ORACLE_VIRIAL: Final = 1e-7
"""Virial (eV) against the code that trained the checkpoint, float64: forces times distances of up to 10 A."""

ORACLE_FLOAT32: Final = 2e-6
"""Relative deviation of everything from a float32 reference: some ten roundings."""

SAME_MODEL: Final = 1e-12
"""Two float64 evaluations that differ in nothing but the order of sums (eV, eV/A)."""

ROUNDING: Final = 1e-9
"""What is equal up to rounded coordinates: translation, wrapping, cells repeated (eV, eV/A, A)."""
