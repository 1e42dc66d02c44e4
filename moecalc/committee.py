"""Several models of one material: how far they disagree, DeePMD-kit's model deviation.

The models of a committee are evaluated on one list of neighbors, that of the largest cutoff. The deviation of
a vector is sqrt(mean over models of |x - mean|^2), as DeePMD-kit has it (docs/committees.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moecalc import keys
from moecalc.conditions import Conditions
from moecalc.errors import MoecalcError
from moecalc.neighbors import PairList
from moecalc.runtime import Model
from moecalc.typing import Floats

if TYPE_CHECKING:
    from moecalc._C import Evaluation


def deviations(values: Floats, level: float | None = None) -> Floats:
    """How far models disagree about vectors.

    Args:
        values: (n_models, n, width).
        level: None, or relative deviations, divided by |mean| + level.

    Returns:
        (n,) the square root of the mean over models of |x - mean|^2.
    """
    mean = values.mean(axis=0)
    found: Floats = np.sqrt(((values - mean) ** 2).sum(axis=-1).mean(axis=0))
    if level is None:
        return found
    # no deviation from a mean of zero is none, also for a level of zero
    return np.divide(found, np.linalg.norm(mean, axis=-1) + level, out=np.zeros_like(found), where=found > 0)


class Deviation(NamedTuple):
    """How far models disagree about one structure: the columns of DeePMD-kit's model_devi.out."""

    max_virial: float  # eV per atom, over the nine components
    min_virial: float
    avg_virial: float  # root mean square
    max_forces: float  # eV/A, over the atoms
    min_forces: float
    avg_forces: float  # mean
    energy: float  # eV per atom
    of_atoms: Floats  # (n_atoms,) eV/A


def deviation_of(
    results: Sequence[Evaluation], *, relative: float | None = None, relative_v: float | None = None
) -> Deviation:
    """Deviation of one structure.

    Args:
        results: of every model, with forces and virial.
        relative: level of relative deviations of forces, eV/A.
        relative_v: the same of virials, eV per atom.
    """
    n_atoms = len(results[0][keys.FORCES])
    forces = deviations(np.stack([result[keys.FORCES] for result in results]), relative)
    per_atom = np.stack([result[keys.VIRIAL][0].reshape(9, 1) for result in results]) / n_atoms
    virials = deviations(per_atom, relative_v)
    energies = np.array([result[keys.ENERGY][0] for result in results]) / n_atoms
    return Deviation(
        float(virials.max()),
        float(virials.min()),
        float(np.linalg.norm(virials) / 3),
        float(forces.max()),
        float(forces.min()),
        float(forces.mean()),
        float(energies.std()),
        forces,
    )


class Committee:
    """Opened models, of which the first drives dynamics.

    Attributes:
        models: at least one.
        cutoff: Angstrom, the largest: that of the lists.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self.models = list(models)
        self.cutoff = max(model.cutoff for model in self.models)

    def evaluate(
        self,
        pairs: PairList,
        numbers: NDArray[np.integer[Any]],
        positions: Floats,
        cells: Floats,
        conditions: Sequence[Sequence[Conditions]],
        *,
        first: int = 0,
        virial: bool = True,
        allow_untrained: bool = False,
        threads: int | None = None,
    ) -> list[Evaluation]:
        """What the models from `first` on find, as `moecalc.runtime.Model.evaluate`.

        Args:
            pairs, positions, cells, virial, threads: as for one model.
            numbers: (n_node,) atomic numbers.
            conditions: by model, those of every structure.
            allow_untrained: accept elements that a model was not trained on.

        Raises:
            ElementError: an element that one of the models does not know, or was not trained on.
            MoecalcError: as for one model.
        """
        models = self.models[first:]
        types = [model.types(numbers, allow_untrained=allow_untrained) for model in models]
        return [
            model.evaluate(pairs, of_model, positions, cells, given, virial=virial, threads=threads)
            for model, of_model, given in zip(models, types, conditions[first:], strict=True)
        ]


class Stop(NamedTuple):
    """Where dynamics was stopped."""

    step: int
    value: float  # of the property, the largest over atoms
    name: str  # of the property


def run_below(
    dynamics: Any,
    steps: int,
    *,
    forces_std: float | None = None,
    energy_std: float | None = None,
    every: int = 1,
) -> Stop | None:
    """Run ASE's dynamics until the models of a calculator disagree.

    Args:
        dynamics: molecular dynamics of ASE whose atoms have a `MoECalculator` of several packages.
        steps: the most to take.
        forces_std: stop where an atom's deviation is larger, eV/A.
        energy_std: stop where that of the energy is larger, eV.
        every: steps between two looks, at which all models are evaluated; at the others only the first is.

    Returns:
        Where and why it stopped; None: all steps were taken.

    Raises:
        MoecalcError: no threshold, one that is no number of 0 or more, or `every` is no positive number.
    """
    limits = {keys.FORCES_STD: forces_std, keys.ENERGY_STD: energy_std}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if not given:
        raise MoecalcError("expected forces_std or energy_std, got neither: give a threshold to stop at")
    for name, limit in given.items():
        if not (np.isfinite(limit) and limit >= 0):
            raise MoecalcError(f"expected a threshold {name} of 0 or more, got {limit}")
    if every < 1:
        raise MoecalcError(f"expected a look every 1 or more steps, got {every}")
    atoms = dynamics.atoms
    for _ in dynamics.irun(steps):
        if dynamics.nsteps % every:
            continue
        for name, limit in given.items():
            value = float(np.max(atoms.calc.get_property(name, atoms)))
            if value > limit:
                return Stop(int(dynamics.nsteps), value, name)
    return None
