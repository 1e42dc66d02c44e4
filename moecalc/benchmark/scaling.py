"""A package on copies of a structure, each size in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ase import Atoms

from moecalc.ase_conditions import conditions_of
from moecalc.benchmark.isolated import run_isolated
from moecalc.benchmark.results import Case, Failure, Report, Result
from moecalc.benchmark.structures import default_structure, repeated
from moecalc.conditions import ConditionError, ModelConditions
from moecalc.data import read_structure
from moecalc.errors import ElementError, MoecalcError
from moecalc.files import display_text
from moecalc.models import default_model_path
from moecalc.package.archive import read_metadata

if TYPE_CHECKING:
    from moecalc.package.metadata import Metadata


def benchmark(
    package: str | Path | None = None,
    structure: str | Path | None = None,
    *,
    copies: Sequence[int] = (1,),
    dtype: str | None = None,
    device: str = "cpu",
    threads: int | None = None,
    steps: int = 30,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Time a package on a structure and on copies of it.

    Args:
        package: `*.moe.pt`; None is the model that comes with moecalc.
        structure: file or folder with one (`moecalc.data.read_structure`); None is `default_structure` of the
            package's elements.
        copies: how many copies of the structure to time, each in a process of its own.
        dtype: "float32" or "float64"; None is the package's.
        device: "cpu", "cuda", "cuda:N" or "auto".
        threads: CPU threads; None is OMP_NUM_THREADS, or the cores.
        steps: timed steps, after `moecalc.benchmark.measure.WARM_UP`.
        progress: called with the name of each step.

    Raises:
        MoecalcError: wrong argument, or the smallest size could not be timed.
        PackageError: as `check_archive`.
        ElementError: the structure has an element that the package does not know.
        StructureError: unreadable or empty structure, or copies of one that is not periodic.
        ConditionError: charge, spin or frame parameters in the structure's `info` that the model cannot take,
        or that are missing.
    """
    for name, values in (("steps", [steps]), ("threads", [threads or 1]), ("copies", list(copies) or [0])):
        if min(values) < 1:
            raise MoecalcError(f"expected {name} of at least 1, got {min(values)}")
    path = default_model_path() if package is None else Path(package).expanduser().resolve()
    metadata = read_metadata(path)
    atoms = default_structure(metadata.elements) if structure is None else read_structure(structure)
    _check_structure(atoms, metadata)
    for n in copies:
        repeated(atoms[:1] if n > 1 else atoms, n)
    with tempfile.TemporaryDirectory(prefix="moecalc-bench-") as folder:
        file = Path(folder) / "structure.traj"
        atoms.calc = None
        atoms.write(file)
        cases = [
            Case(
                package=display_text(path),
                structure=display_text(file),
                copies=n,
                dtype=dtype,
                device=device,
                threads=threads,
                steps=steps,
            )
            for n in sorted(set(copies))
        ]
        results, failures = _run_all(cases, len(atoms), progress or (lambda _: None))
    return Report(
        model=metadata.name,
        structure="built in" if structure is None else display_text(Path(structure).name),
        steps=steps,
        sizes=[result.size for result in results],
        failures=failures,
        **results[-1].model_dump(exclude={"size"}),
    )


def _check_structure(atoms: Atoms, metadata: Metadata) -> None:
    """Refuse elements, charges, ... that the model cannot take."""
    unknown = sorted(set(atoms.symbols) - set(metadata.elements))
    if unknown:
        raise ElementError(
            f"the structure contains {', '.join(unknown)}, expected only elements of {metadata.name}, "
            f"{', '.join(metadata.elements)}: use another structure or package"
        )
    try:
        conditions_of(atoms, metadata.conditions or ModelConditions(), {})
    except ConditionError as error:
        raise ConditionError(
            f"{error}, in `info` of the structure (--structure, extxyz with charge=0 spin=1 and the like)"
        ) from None


def _run_all(
    cases: Sequence[Case], n_atoms: int, say: Callable[[str], None]
) -> tuple[list[Result], list[Failure]]:
    """Results by size; a size that does not fit into memory must not cost the smaller ones."""
    results: list[Result] = []
    failures: list[Failure] = []
    for case in cases:
        say(f"{case.copies * n_atoms} atoms")
        try:
            results.append(run_isolated(case))
        except MoecalcError as error:
            if not results:
                raise
            failures.append(Failure(copies=case.copies, error=str(error)))
    return results, failures
