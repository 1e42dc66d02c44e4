"""ASE calculator: energies, forces and stresses of a packaged model."""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from ase import Atoms
from ase.calculators.calculator import (
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
    all_changes,
)

from moecalc import __version__, keys
from moecalc.ase_conditions import NAMES, conditions_of, defaults_used
from moecalc.committee import Committee, deviations
from moecalc.conditions import Conditions
from moecalc.errors import MoecalcError, StructureError
from moecalc.models import default_model_path
from moecalc.neighbors import PairList, SkinNeighborList
from moecalc.runtime import backend_name, check_threads, dtype_name, open_model
from moecalc.typing import Floats, Ints

if TYPE_CHECKING:
    from moecalc._C import Evaluation


class UndefinedStressError(StructureError, PropertyNotImplementedError):
    """Stress was asked of a structure that has no volume.

    ASE's file writers pass over it, as over any property that is not there.
    """


class MoECalculator(Calculator):
    """Energies, forces and stresses of a packaged model, for ASE.

    One evaluation gives energy, energies, forces and, for structures periodic in all directions, stress;
    per-atom stresses are computed when asked for. Units are ASE's (eV, Angstrom), stress has ASE's sign
    (negative under compression) and Voigt order.

    Args:
        model: package file (`*.moe.pt`); None is the model that comes with moecalc. A list of files is a
            committee: the first one gives energies, forces and stresses, and all of them `energy_std` and
            `forces_std`, how far they disagree, when these are asked for (docs/committees.md).
        device: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is one.
        dtype: "float32" or "float64"; None is the precision the package was made for.
        precision: how a GPU multiplies the matrices of a float32 network: "fp32" as accurately as float32,
            "bf16x3", "tf32" or "fp16" faster and less accurately, "fp32-ffma" for comparisons (docs/cuda.md
            has the error of each). All but "fp32" are for CUDA only.
        skin: extra reach of the neighbor list in Angstrom. The list is searched anew only when atoms moved
            (or the cell was strained) so much that a pair could be missing; 0 searches at every step. The
            results do not depend on it.
        charge: in units of e, of all structures, for models that take it. A structure's own is in
            `atoms.info` under the same name (or both charge and spin as `charge_spin`); where neither gives
            it, the model's default counts, which a warning names once.
        spin: multiplicity 2S+1, likewise.
        fparam: frame parameters, likewise.
        allow_untrained: accept elements that the model knows but was not trained on.
        check: when a package is first used on a device in this process, compare one of its reference frames.
        threads: number of CPU threads of this calculator; None is the default (OMP_NUM_THREADS if it was set,
            else the cores). No setting of the process is changed, and the results do not depend on it.
        backend: None for the kernels of the device where they cover the model. "plain" runs any model, many
            times slower, and "torchscript" the code that the package brings, which needs torch: only for
            files that you trust.
        atoms: structure to attach the calculator to.

    Attributes:
        neighbor_list: the list in use; `neighbor_list.n_rebuilds` counts its searches.

    Raises:
        PackageError: the package is missing, damaged, foreign, too new, or gives other numbers here than
            where it was made.
        MoecalcError: the device, the precision or the backend does not exist here.
        ConditionError: charge, spin or frame parameters that the model cannot take, that are missing, or that
            contradict each other.
        ElementError: (on use) the structure has an element that the model does not know or was not trained
            on.
        StructureError: (on use) positions or cell are not finite, atoms overlap, or a periodic direction has
            no cell vector.
        UndefinedStressError: (on use) stress was asked of a structure that is not periodic in all directions.
    """

    # ASE's base class wants exactly these types
    implemented_properties = [  # noqa: RUF012
        keys.ENERGY,
        keys.FREE_ENERGY,
        keys.FORCES,
        keys.STRESS,
        keys.ENERGIES,
        keys.STRESSES,
    ]
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(
        self,
        model: str | Path | Sequence[str | Path] | None = None,
        device: str = "auto",
        dtype: Any = None,
        skin: float = 1.0,
        *,
        precision: str = "fp32",
        charge: int | None = None,
        spin: int | None = None,
        fparam: Any = None,
        allow_untrained: bool = False,
        check: bool = True,
        threads: int | None = None,
        backend: str | None = None,
        atoms: Atoms | None = None,
    ) -> None:
        paths = _paths(model)
        network = dtype_name(dtype)
        check_threads(threads)
        models = []
        for path in paths:  # no comprehension: a frame more, to which warnings would point
            models.append(
                open_model(path, device, network, precision, backend=backend_name(backend), check=check)
            )
        self._committee = Committee(models)
        self._model = self._committee.models[0]
        if len(paths) > 1:
            self.implemented_properties = [*type(self).implemented_properties, *_DEVIATIONS]
        self._warned = self._told_defaults = False
        self._conditions = Conditions()  # of the results
        self._renew_lock()
        self.neighbor_list = SkinNeighborList(self.cutoff, skin)
        super().__init__()
        self.parameters.update(
            # an absolute path for pickles in another folder, None for those in another installation
            model=None if model is None else _spelled(paths),
            device=device,
            dtype=network or None,
            precision=precision,
            skin=float(skin),
            charge=charge,
            spin=spin,
            fparam=fparam,
            allow_untrained=bool(allow_untrained),
            check=bool(check),
            threads=threads,
            backend=backend,
        )
        # refused here: values that no structure could have; whether some are missing shows with the first one
        given = {name: self.parameters[name] for name in NAMES}
        if any(value is not None for value in given.values()):
            self._check_conditions(given)
        if atoms is not None:
            atoms.calc = self

    # --- what the model is ---------------------------------------------------------------------

    @property
    def path(self) -> Path:
        """The package file."""
        return self._model.path

    @property
    def metadata(self) -> dict[str, Any]:
        """What the package says of itself (its `metadata.json`)."""
        return self._model.metadata

    @property
    def elements(self) -> list[str]:
        """Chemical symbols that the model knows."""
        return self._model.elements

    @property
    def cutoff(self) -> float:
        """Largest distance of neighbors, Angstrom, of all models."""
        return self._committee.cutoff

    @property
    def paths(self) -> list[Path]:
        """The package files, the one of energies and forces first."""
        return [model.path for model in self._committee.models]

    @property
    def device(self) -> str:
        """Device the model is on."""
        return self._model.device

    @property
    def dtype(self) -> str:
        """Precision of the network; geometry and sums are always float64."""
        return self._model.dtype

    @property
    def threads(self) -> int | None:
        """CPU threads of this calculator; None for the default."""
        threads: int | None = self.parameters["threads"]
        return threads

    @property
    def n_threads(self) -> int:
        """CPU threads that it takes, if it is not on a GPU."""
        return self.threads or self._model.default_threads

    def __repr__(self) -> str:
        return (
            f"MoECalculator({self._model.name}: {' '.join(self.elements)}; cutoff {self.cutoff:g} A, "
            f"{self.dtype} on {self.device}, skin {self.parameters['skin']:g} A)"
        )

    def _get_name(self) -> str:
        return "moecalc"

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        """What produced the results, as ASE stores it in trajectories and databases."""
        described = dict(self.parameters)
        described.update(
            moecalc=__version__,
            model=self._model.name,
            path=str(self.path),
            source_sha256=self.metadata.get("source", {}).get("sha256", ""),
            device=self.device,
            dtype=self.dtype,
        )
        return described

    def get_spin_polarized(self) -> bool:
        """Whether there is a spin degree of freedom: no."""
        return False

    def set(self, **parameters: Any) -> dict[str, Any]:
        """Change `skin`, `threads`, `charge`, `spin`, `fparam` or `allow_untrained` of this calculator.

        Raises:
            MoecalcError: the parameter belongs to the loaded model.
            TypeError: there is no such parameter.
        """
        with self._lock:
            return self._set(parameters)

    def _set(self, parameters: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for name, value in parameters.items():
            if name not in self.parameters:
                raise TypeError(f"expected a parameter among {', '.join(self.parameters)}, got {name!r}")
            if np.array_equal(self.parameters[name], value):
                continue
            if name == "threads":
                check_threads(value)
            elif name not in {"skin", "allow_untrained", *NAMES}:
                raise MoecalcError(
                    f"{name} cannot be changed to {value!r} after the model was loaded: make a new "
                    "MoECalculator"
                )
            changed[name] = value
        if not set(NAMES).isdisjoint(changed):
            together = self.parameters | changed
            self._check_conditions({name: together[name] for name in NAMES})
        if "skin" in changed:
            self.neighbor_list = SkinNeighborList(self.cutoff, changed["skin"])
        if changed:  # all of them, or none
            self.parameters.update(changed)
            self.reset()
        return changed

    def _check_conditions(self, given: dict[str, Any]) -> None:
        for model in self._committee.models:
            model.check_conditions(given)

    # --- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {
                "parameters": dict(self.parameters),
                "atoms": self.atoms,
                "results": self.results,
                "conditions": self._conditions,
                "told_defaults": self._told_defaults,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["parameters"])  # type: ignore[misc]
        self.atoms, self.results = state["atoms"], state["results"]
        self._conditions = state["conditions"]
        self._told_defaults = state["told_defaults"]

    def __deepcopy__(self, memo: dict[int, Any]) -> MoECalculator:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        # models do not change: copies share them, whatever happened to the files
        memo[id(self._committee)] = self._committee
        memo[id(self._model)] = self._model
        with self._lock:
            memo[id(self._lock)] = None
            other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        other._renew_lock()  # noqa: SLF001 - its own class
        return other

    def __copy__(self) -> MoECalculator:
        return copy.deepcopy(self)

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()
        _calculators.add(self)

    def _after_fork(self) -> None:
        """In a forked child: a thread that stayed behind may hold the lock, amid results or list."""
        idle = self._lock.acquire(blocking=False)
        self._renew_lock()
        if not idle:
            super().reset()
            self.neighbor_list.reset()

    # --- results -------------------------------------------------------------------------------
    #
    # ASE keeps the structure and its results in the calculator. Every question is answered under a lock, from
    # "is this the structure that the results are of?" to the copy of the result: threads that share a
    # calculator get the results of their own structures.

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """A property of a structure, calculated if need be; `atoms.get_forces()` and the like end here."""
        with self._lock:
            return super().get_property(name, atoms, allow_calculation)

    def calculate_properties(self, atoms: Atoms, properties: Sequence[str]) -> Any:
        """Several properties of a structure."""
        with self._lock:
            return super().calculate_properties(atoms, properties)

    def calculation_required(self, atoms: Atoms, properties: Sequence[str]) -> bool:
        """Whether a property of the structure is not there yet."""
        with self._lock:
            return bool(super().calculation_required(atoms, properties))

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What differs between the structure, conditions included, and that of the results."""
        with self._lock:
            if _only_moved(self.atoms, atoms, tol):
                changes = ["positions"]
            else:
                changes = list(super().check_state(atoms, tol))
            if self._conditions_of(atoms) != self._conditions:
                changes.append("info")
            return changes

    def reset(self) -> None:
        """Forget structure and results."""
        with self._lock:
            super().reset()

    def _conditions_of(self, atoms: Atoms) -> Conditions:
        return conditions_of(atoms, self._model.conditions, self.parameters)

    def _tell_defaults(self, conditions: Conditions) -> None:
        if self._told_defaults or not conditions.defaulted:
            return
        self._told_defaults = True
        message = defaults_used(conditions, self._model.conditions, self._model.name)
        warnings.warn(str(message), stacklevel=4)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = (keys.ENERGY,),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Fill `results`; called by ASE."""
        with self._lock:
            self._calculate(atoms, properties, system_changes)

    def _calculate(
        self, atoms: Atoms | None, properties: Sequence[str], system_changes: Sequence[str]
    ) -> None:
        if system_changes:
            self.results = {}  # a structure that is refused must not be answered with older results
        # all but how models disagree
        known = keys.ENERGY in self.results and _DEVIATIONS.issuperset(properties)
        super().calculate(atoms, properties, system_changes)
        if self.atoms is None:
            raise CalculatorSetupError(
                "expected a structure, got none: use atoms.calc = calculator, or pass atoms"
            )
        volume = _volume(self.atoms)
        if volume is None and not _STRESSES.isdisjoint(properties):
            raise _undefined_stress(self.atoms)
        types = self._model.types(self.atoms.numbers, allow_untrained=self.parameters["allow_untrained"])
        conditions = self._conditions_of(self.atoms)
        self._tell_defaults(conditions)
        pairs, positions = self.neighbor_list.pairs(self.atoms)
        if not known:
            raw = self._model.evaluate(
                pairs,
                types,
                positions,
                self.atoms.cell.array[None],
                [conditions],
                virial=volume is not None,
                atom_virial=keys.STRESSES in properties,
                threads=self.threads,
            )
            self._warn_once(raw)
            self._conditions = conditions
            self.results = _results(raw, 0, slice(None), volume)
        if not _DEVIATIONS.isdisjoint(properties):
            others = self._others([self.atoms], pairs, positions)
            energies = [self.results[keys.ENERGY], *(float(other[keys.ENERGY][0]) for other in others)]
            forces = [self.results[keys.FORCES], *(other[keys.FORCES] for other in others)]
            self.results |= _deviations(energies, forces)

    def _others(self, structures: Sequence[Atoms], pairs: PairList, positions: Floats) -> list[Evaluation]:
        """What the other models of the committee find."""
        return self._committee.evaluate(
            pairs,
            np.concatenate([atoms.numbers for atoms in structures]),
            positions,
            np.stack([atoms.cell.array for atoms in structures]),
            [
                [conditions_of(atoms, model.conditions, self.parameters) for atoms in structures]
                for model in self._committee.models
            ],
            first=1,
            virial=False,
            allow_untrained=self.parameters["allow_untrained"],
            threads=self.threads,
        )

    def calculate_batch(
        self, structures: Iterable[Atoms], properties: Sequence[str] = (keys.ENERGY, keys.FORCES)
    ) -> list[dict[str, Any]]:
        """Properties of many structures in one evaluation.

        The calculator's own `atoms` and `results` stay as they are.

        Args:
            structures: structures of any size and periodicity.
            properties: names among `implemented_properties`.

        Returns:
            For every structure a dict of the properties asked for, in ASE's units and shapes.

        Raises:
            PropertyNotImplementedError: an unknown property.
            MoecalcError: as for a single structure; the message names the structure.
        """
        for name in properties:
            if name not in self.implemented_properties:
                raise PropertyNotImplementedError(
                    f"expected properties among {', '.join(self.implemented_properties)}, got {name!r}"
                )
        wants_stress = not _STRESSES.isdisjoint(properties)
        kept: list[Atoms] = []
        types: list[Ints] = []
        lists: list[PairList] = []
        positions: list[Floats] = []
        volumes: list[float | None] = []
        conditions: list[Conditions] = []
        for index, atoms in enumerate(structures):
            try:
                volume = _volume(atoms)
                if volume is None and wants_stress:
                    raise _undefined_stress(atoms)
                types.append(
                    self._model.types(atoms.numbers, allow_untrained=self.parameters["allow_untrained"])
                )
                conditions.append(self._conditions_of(atoms))
                pairs, at = SkinNeighborList(self.cutoff, skin=0.0).pairs(atoms)
            except MoecalcError as error:
                raise type(error)(f"structure {index}: {error}") from None
            kept.append(atoms)
            lists.append(pairs)
            positions.append(at)
            volumes.append(volume if wants_stress else None)
        if not kept:
            return []
        for found in conditions:
            self._tell_defaults(found)
        pairs, at = PairList.concatenate(lists), np.concatenate(positions)
        raw = self._model.evaluate(
            pairs,
            np.concatenate(types),
            at,
            np.stack([atoms.cell.array for atoms in kept]),
            conditions,
            virial=wants_stress,
            atom_virial=keys.STRESSES in properties,
            threads=self.threads,
        )
        self._warn_once(raw)
        others = [] if _DEVIATIONS.isdisjoint(properties) else self._others(kept, pairs, at)
        ends = np.cumsum([0] + [len(of_one) for of_one in types])
        results = []
        for index, volume in enumerate(volumes):
            own = slice(ends[index], ends[index + 1])
            everything = _results(raw, index, own, volume)
            if others:
                energies = [float(found[keys.ENERGY][index]) for found in (raw, *others)]
                everything |= _deviations(energies, [found[keys.FORCES][own] for found in (raw, *others)])
            results.append({name: everything[name] for name in properties})
        return results

    def _warn_once(self, result: Evaluation) -> None:
        """Tell the weightiest of what there is to tell of structures, once in the life of the calculator."""
        if self._warned:
            return
        for sentence in self._model.warnings_of(result)[:1]:
            self._warned = True
            warnings.warn(sentence, stacklevel=5)


_STRESSES = frozenset({keys.STRESS, keys.STRESSES})
_ASE_EXTRAS = frozenset({"initial_charges", "initial_magmoms"})
_DEVIATIONS = frozenset({keys.ENERGY_STD, keys.FORCES_STD})


def _paths(model: str | Path | Sequence[str | Path] | None) -> list[Path]:
    """Absolute paths of the packages of a calculator.

    Raises:
        MoecalcError: an empty list.
    """
    if model is None:
        return [default_model_path()]
    files = [model] if isinstance(model, str | Path) else list(model)
    if not files:
        raise MoecalcError("expected one or more packages, got an empty list")
    return [Path(file).expanduser().resolve() for file in files]


def _spelled(paths: list[Path]) -> str | list[str]:
    """As parameters keep them: a committee is a list."""
    return str(paths[0]) if len(paths) == 1 else [str(path) for path in paths]


def _deviations(energies: Sequence[float], forces: Sequence[Floats]) -> dict[str, Any]:
    return {
        keys.ENERGY_STD: float(np.std(energies)),
        keys.FORCES_STD: deviations(np.stack(forces)),
    }


def _only_moved(before: Atoms | None, atoms: Atoms, tol: float) -> bool:
    """Whether the positions changed, and nothing else that ASE compares: what every step of dynamics is.

    False says nothing. ASE's own comparison of all properties takes several times as long.
    """
    if before is None or len(before) != len(atoms):
        return False
    if not _ASE_EXTRAS.isdisjoint(before.arrays) or not _ASE_EXTRAS.isdisjoint(atoms.arrays):
        return False
    same = (
        (before.numbers == atoms.numbers).all()
        and (before.cell.array == atoms.cell.array).all()
        and (before.pbc == atoms.pbc).all()
    )
    return bool(same and len(atoms) and np.abs(before.positions - atoms.positions).max() > tol)


def _volume(atoms: Atoms) -> float | None:
    """Volume in Angstrom^3, or None where stress is undefined."""
    if not atoms.pbc.all():
        return None
    return abs(float(np.linalg.det(atoms.cell.array))) or None


def _undefined_stress(atoms: Atoms) -> UndefinedStressError:
    state = "the cell has no volume" if atoms.pbc.all() else f"pbc is {atoms.pbc.tolist()}"
    return UndefinedStressError(
        f"stress is undefined, expected a structure periodic in all directions, but {state}: ask for energy "
        "and forces only, or set the cell and pbc=True"
    )


def _results(raw: Evaluation, system: int, atoms: slice, volume: float | None) -> dict[str, Any]:
    """ASE's properties of one structure of a batch."""
    energy = float(raw[keys.ENERGY][system])
    results: dict[str, Any] = {
        keys.ENERGY: energy,
        keys.FREE_ENERGY: energy,
        keys.ENERGIES: raw[keys.ENERGIES][atoms],
        keys.FORCES: raw[keys.FORCES][atoms],
    }
    if volume is not None:
        results[keys.STRESS] = _voigt(raw[keys.VIRIAL][system]) / -volume
        if keys.ATOM_VIRIAL in raw:
            results[keys.STRESSES] = _voigt(raw[keys.ATOM_VIRIAL][atoms]) / -volume
    return results


def _voigt(tensor: Floats) -> Floats:
    """Symmetric part of (..., 3, 3) as (..., 6)."""
    rows, columns = keys.VOIGT
    return 0.5 * (tensor[..., rows, columns] + tensor[..., columns, rows])


_calculators: WeakSet[MoECalculator] = WeakSet()


def _after_fork() -> None:
    """In a forked child: a thread that stayed behind may hold the lock of a calculator."""
    for calculator in list(_calculators):
        calculator._after_fork()  # noqa: SLF001 - not for users


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
