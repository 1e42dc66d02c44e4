"""ASE calculator: energies, forces and stresses of a packaged model."""

from __future__ import annotations

import copy
import json
import os
import stat
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from weakref import WeakValueDictionary

import numpy as np
from ase import Atoms
from ase.calculators.calculator import (
    Calculator,
    CalculatorSetupError,
    PropertyNotImplementedError,
    all_changes,
)
from ase.data import atomic_numbers
from numpy.typing import NDArray

from moecalc import __version__, keys
from moecalc._lib import load
from moecalc.ase_conditions import check_general, conditions_of, defaults_used
from moecalc.conditions import Conditions, ModelConditions
from moecalc.errors import ElementError, MoecalcError, PackageError, StructureError
from moecalc.models import default_model_path
from moecalc.neighbors import AtomicGraph, Floats, Ints, PairList, SkinNeighborList


class UndefinedStressError(StructureError, PropertyNotImplementedError):
    """Stress was asked of a structure that has no volume. ASE's file writers pass over it, as over any property that is not there."""


class MoECalculator(Calculator):
    """Energies, forces and stresses of a packaged model, for ASE.

    One evaluation gives energy, energies, forces and, for structures periodic in all directions, stress; per-atom stresses are computed
    when asked for. Units are ASE's (eV, Angstrom), stress has ASE's sign (negative under compression) and Voigt order.

    Args:
        model: package file (`*.moe.pt`); None is the model that comes with moecalc.
        device: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is one.
        dtype: "float32" or "float64"; None is the precision the package was made for.
        precision: how a GPU multiplies the matrices of a float32 network: "fp32", "tf32" or "bf16x3" (docs/performance.md has speed and error
            of each). The last two are for CUDA only.
        skin: extra reach of the neighbour list in Angstrom. The list is searched anew only when atoms moved (or the cell was strained) so much
            that a pair could be missing; 0 searches at every step. The results do not depend on it.
        charge, spin, fparam: charge (e), multiplicity 2S+1 and frame parameters of all structures, for models that take them. A structure's own
            are in `atoms.info` under the same names (or both as `charge_spin`); where neither gives them, the model's defaults count, which a
            warning names once.
        allow_untrained: accept elements that the model knows but was not trained on.
        check: when a package is first used on a device in this process, compare one of its reference frames.
        threads: number of CPU threads of this calculator; None is torch's number (OMP_NUM_THREADS if it was set, else the cores). No setting of
            the process is changed, and the results do not depend on it.
        atoms: structure to attach the calculator to.

    Attributes:
        neighbor_list: the list in use; `neighbor_list.n_rebuilds` counts its searches.

    Raises:
        PackageError: the package is missing, damaged, foreign, too new, or gives other numbers here than where it was made.
        MoecalcError: the device or precision does not exist here.
        ConditionError: charge, spin or frame parameters that the model cannot take, that are missing, or that contradict each other.
        ElementError: (on use) the structure has an element that the model does not know or was not trained on.
        StructureError: (on use) positions or cell are not finite, atoms overlap, or a periodic direction has no cell vector.
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
        model: str | Path | None = None,
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
        atoms: Atoms | None = None,
    ) -> None:
        path = default_model_path() if model is None else Path(model).expanduser().resolve()
        dtype_name = _dtype_name(dtype)
        _check_threads(threads)
        self._model = _open(path, device, dtype_name, precision, check=check)
        self._warned = self._told_defaults = False
        self._conditions = Conditions()  # of the results
        self._lock = threading.RLock()
        self.neighbor_list = SkinNeighborList(self._model.cutoff, skin)
        super().__init__()
        self.parameters.update(
            # an absolute path, so that a pickle works in another folder; None, so that it works in another installation
            model=None if model is None else str(path),
            device=device,
            dtype=dtype_name or None,
            precision=precision,
            skin=float(skin),
            charge=charge,
            spin=spin,
            fparam=fparam,
            allow_untrained=bool(allow_untrained),
            check=bool(check),
            threads=threads,
        )
        # values that no structure could have are refused here; whether some are missing shows with the first structure
        given = {name: self.parameters[name] for name in _CONDITIONS}
        if any(value is not None for value in given.values()):
            self._model.check_conditions(given)
        if atoms is not None:
            atoms.calc = self

    def __new__(cls, *_: Any, **__: Any) -> Self:  # noqa: D102 - that of `__init__`
        calculator = super().__new__(cls)
        _calculators[id(calculator)] = calculator
        return calculator

    def renew_lock(self) -> None:
        """In a forked child: a lock that another thread held will never be released, and what that thread worked on is half done."""
        lock = self.__dict__.get("_lock")
        if lock is None or lock.acquire(blocking=False):
            if lock is not None:
                lock.release()
            return
        self._lock = threading.RLock()
        self.neighbor_list = SkinNeighborList(self.cutoff, self.parameters["skin"])
        self.reset()

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
        """Largest distance of neighbours, Angstrom."""
        return self._model.cutoff

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
        """CPU threads of this calculator; None for torch's number."""
        threads: int | None = self.parameters["threads"]
        return threads

    def __repr__(self) -> str:
        return (
            f"MoECalculator({self._model.name}: {' '.join(self.elements)}; cutoff {self.cutoff:g} A, {self.dtype} on {self.device}, "
            f"skin {self.parameters['skin']:g} A)"
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
            if name == "skin":
                self.neighbor_list = SkinNeighborList(self.cutoff, value)
            elif name in _CONDITIONS:
                self._model.check_conditions({name: value})
            elif name == "threads":
                _check_threads(value)
            elif name != "allow_untrained":
                raise MoecalcError(
                    f"{name} cannot be changed to {value!r} after the model was loaded: make a new MoECalculator"
                )
            changed[name] = self.parameters[name] = value
        if changed:
            self.reset()
        return changed

    # --- copies --------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {
                "parameters": dict(self.parameters),
                "atoms": self.atoms,
                "results": self.results,
                "conditions": self._conditions,
            }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["parameters"])  # type: ignore[misc]
        self.atoms, self.results = state["atoms"], state["results"]
        self._conditions = state["conditions"]

    def __deepcopy__(self, memo: dict[int, Any]) -> MoECalculator:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        memo[id(self._model)] = (
            self._model
        )  # a model does not change: copies share it, whatever happened to the file
        with self._lock:
            memo[id(self._lock)] = threading.RLock()
            other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __copy__(self) -> MoECalculator:
        return copy.deepcopy(self)

    # --- results -------------------------------------------------------------------------------
    #
    # ASE keeps the structure and its results in the calculator. Every question is answered under a lock, from "is this the structure that
    # the results are of?" to the copy of the result, so that threads that share a calculator get the results of their own structures.

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
        """What differs between the structure and the one that the results are of, charge, spin and frame parameters included."""
        with self._lock:
            changes: list[str] = super().check_state(atoms, tol)
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
        warnings.warn(str(defaults_used(conditions, self._model.name)), stacklevel=4)

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
            self.results = {}  # a structure that is refused must not be answered with the results of the one before
        super().calculate(atoms, properties, system_changes)
        if self.atoms is None:
            raise CalculatorSetupError(
                "expected a structure, got none: use atoms.calc = calculator, or pass atoms"
            )
        volume = _volume(self.atoms)
        if volume is None and not _STRESSES.isdisjoint(properties):
            raise _undefined_stress(self.atoms)
        types = self._model.types(self.atoms, allow_untrained=self.parameters["allow_untrained"])
        conditions = self._conditions_of(self.atoms)
        self._tell_defaults(conditions)
        virial, atom_virial = volume is not None, keys.STRESSES in properties
        if self._model.keeps_lists:
            pairs, positions = self.neighbor_list.pairs(self.atoms)
            cells = self.atoms.cell.array[None]
            raw = self._model.evaluate_pairs(
                pairs,
                types,
                positions,
                cells,
                [conditions],
                virial=virial,
                atom_virial=atom_virial,
                threads=self.threads,
            )
        else:
            graph = self.neighbor_list.graph(self.atoms, types)
            raw = self._model.evaluate(
                graph, [conditions], virial=virial, atom_virial=atom_virial, threads=self.threads
            )
        self._warn_about_density(raw)
        self._conditions = conditions
        self.results = _results(raw, 0, slice(None), volume)

    def calculate_batch(
        self, structures: Iterable[Atoms], properties: Sequence[str] = (keys.ENERGY, keys.FORCES)
    ) -> list[dict[str, Any]]:
        """Properties of many structures in one evaluation; the calculator's own `atoms` and `results` stay as they are.

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
        keeps_lists = self._model.keeps_lists
        kept: list[Atoms] = []
        types: list[Ints] = []
        graphs: list[AtomicGraph] = []
        lists: list[PairList] = []
        volumes: list[float | None] = []
        conditions: list[Conditions] = []
        for index, atoms in enumerate(structures):
            try:
                volume = _volume(atoms)
                if volume is None and wants_stress:
                    raise _undefined_stress(atoms)
                types.append(self._model.types(atoms, allow_untrained=self.parameters["allow_untrained"]))
                conditions.append(self._conditions_of(atoms))
                neighbor_list = SkinNeighborList(self.cutoff, skin=0.0)
                if keeps_lists:
                    lists.append(neighbor_list.pairs(atoms)[0])
                else:
                    graphs.append(neighbor_list.graph(atoms, types[-1]))
            except MoecalcError as error:
                raise type(error)(f"structure {index}: {error}") from None
            kept.append(atoms)
            volumes.append(volume if wants_stress else None)
        if not kept:
            return []
        for found in conditions:
            self._tell_defaults(found)
        atom_virial = keys.STRESSES in properties
        if keeps_lists:
            raw = self._model.evaluate_pairs(
                PairList.concatenate(lists),
                np.concatenate(types),
                np.concatenate([atoms.positions for atoms in kept]),
                np.stack([atoms.cell.array for atoms in kept]),
                conditions,
                virial=wants_stress,
                atom_virial=atom_virial,
                threads=self.threads,
            )
        else:
            raw = self._model.evaluate(
                AtomicGraph.concatenate(graphs),
                conditions,
                virial=wants_stress,
                atom_virial=atom_virial,
                threads=self.threads,
            )
        self._warn_about_density(raw)
        ends = np.cumsum([0] + [len(of_one) for of_one in types])
        results = []
        for index, volume in enumerate(volumes):
            everything = _results(raw, index, slice(ends[index], ends[index + 1]), volume)
            results.append({name: everything[name] for name in properties})
        return results

    def _warn_about_density(self, raw: Mapping[str, Any]) -> None:
        if self._warned:
            return
        for key, limit, where in self._model.limits:
            if raw[key] > limit:
                self._warned = True
                warnings.warn(
                    f"an atom has {raw[key]} neighbours {where}, but in training the model saw at most the nearest {limit}: all of them are "
                    f"used, which is smooth, but differs from the training code, and the structure is denser than what the model knows",
                    stacklevel=5,
                )
                return


MAX_THREADS = 4096  # of one evaluator
_STRESSES = frozenset({keys.STRESS, keys.STRESSES})
_CONDITIONS = ("charge", "spin", "fparam")


def _volume(atoms: Atoms) -> float | None:
    """Volume in Angstrom^3, or None where stress is undefined."""
    if not atoms.pbc.all():
        return None
    return abs(float(np.linalg.det(atoms.cell.array))) or None


def _undefined_stress(atoms: Atoms) -> UndefinedStressError:
    state = "the cell has no volume" if atoms.pbc.all() else f"pbc is {atoms.pbc.tolist()}"
    return UndefinedStressError(
        f"stress is undefined, expected a structure periodic in all directions, but {state}: ask for energy and forces only, or set the cell and pbc=True"
    )


def _results(raw: Mapping[str, Any], system: int, atoms: slice, volume: float | None) -> dict[str, Any]:
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


# --- loading -----------------------------------------------------------------------------------


class _Model:
    """A package in memory: the evaluator, and what of its metadata every call needs. Shared by calculators, never changed."""

    def __init__(self, path: Path, evaluator: Any, error: type[Exception]) -> None:
        self.path = path
        self._evaluator = evaluator
        self._error = error
        self.renew_lock()
        self.metadata: dict[str, Any] = json.loads(evaluator.metadata)
        self.name = str(self.metadata.get("name", path.name))
        self.elements: list[str] = list(evaluator.elements)
        self.cutoff = float(evaluator.cutoff)
        self.device = str(evaluator.device)
        self.dtype = str(evaluator.dtype)
        self.keeps_lists = bool(evaluator.keeps_lists)
        self._listed: tuple[PairList, Ints] | None = None  # what the evaluator holds
        self.conditions = ModelConditions.model_validate(self.metadata.get("conditions") or {})
        self._given: list[Conditions] = []  # what the evaluator holds
        limits = self.metadata.get("neighbor_limits", {})
        self.limits = [
            (key, limits[name], f"within {radius:g} A")
            for key, name, radius in (
                (keys.MAX_NEIGHBORS, "edge", self.cutoff),
                (keys.MAX_ANGLE_NEIGHBORS, "angle", float(evaluator.angle_cutoff)),
            )
            if limits.get(name)
        ]
        self._type_of = np.full(max(atomic_numbers.values()) + 1, -1, dtype=np.int64)
        for index, symbol in enumerate(self.elements):
            if symbol in atomic_numbers:
                self._type_of[atomic_numbers[symbol]] = index
        trained = set(self.metadata.get("trained_elements", self.elements))
        self._untrained: NDArray[np.bool_] = np.array(
            [symbol not in trained for symbol in self.elements], dtype=bool
        )
        self._any_untrained = bool(self._untrained.any())

    def renew_lock(self) -> None:
        """An evaluator serves one thread at a time. In a forked child, a thread that is not there may hold the lock."""
        self._lock = threading.Lock()

    def types(self, atoms: Atoms, *, allow_untrained: bool) -> Ints:
        """(n_atoms,) index of each atom's element in the package's list."""
        types: Ints = self._type_of[atoms.numbers]
        if (types < 0).any():
            unknown = ", ".join(sorted(set(atoms.symbols[types < 0])))
            raise ElementError(
                f"the structure contains {unknown}, expected only elements of the model {self.name}, {', '.join(self.elements)}: use a model that "
                f"knows {unknown}"
            )
        if self._any_untrained and not allow_untrained and self._untrained[types].any():
            guessed = ", ".join(sorted(set(atoms.symbols[self._untrained[types]])))
            raise ElementError(
                f"the structure contains {guessed}, which the model {self.name} has parameters for but was not trained on: use another model, or pass "
                f"allow_untrained=True to accept arbitrary energies and forces"
            )
        return types

    def check_conditions(self, given: Mapping[str, Any]) -> None:
        """Raise ConditionError for values that no structure could have with this model."""
        check_general(self.conditions, given)

    def _give(self, conditions: Sequence[Conditions]) -> None:
        """Hand conditions to the evaluator, if the model takes any and they are others than in the last call."""
        if not self.conditions.open:
            return
        found = list(conditions)
        if all(one == found[0] for one in found):
            found = found[:1]  # serves any number of structures
        if found == self._given:
            return
        self._given = []
        pairs = [one.charge_spin for one in found]
        fparam = [one.fparam for one in found]
        self._evaluator.set_conditions(
            None if pairs[0] is None else np.array(pairs, dtype=np.int64),
            None if fparam[0] is None or self.conditions.fparam is None else np.array(fparam, dtype=float),
        )
        self._given = found

    def check_reference(self) -> None:
        """Raise MoecalcError unless the stored reference frames come out as stored."""
        try:
            with self._lock:
                self._given = []  # the frames have conditions of their own
                self._evaluator.check_reference()
        except self._error as error:
            raise MoecalcError(f"{self.path}: {error}") from error

    def record(self, name: str) -> bytes:
        """A record of the file that was loaded, whatever happened to it since."""
        try:
            content: bytes = self._evaluator.record(name)
        except self._error as error:
            raise PackageError(str(error)) from error
        return content

    def release_weights(self) -> None:
        """Give back what is laid out for the elements seen so far; it is laid out again where it is needed."""
        with self._lock:
            self._listed = None
            self._evaluator.release_weights()

    def evaluate(
        self,
        graph: AtomicGraph,
        conditions: Sequence[Conditions],
        *,
        virial: bool = True,
        atom_virial: bool = False,
        threads: int | None = None,
    ) -> Mapping[str, Any]:
        try:
            with self._lock:
                self._evaluator.num_threads = threads or 0
                self._give(conditions)
                result: Mapping[str, Any] = self._evaluator.evaluate(
                    graph.types,
                    graph.edge_index,
                    graph.edge_vec,
                    graph.system_index,
                    graph.n_systems,
                    forces=True,
                    virial=virial,
                    atom_virial=atom_virial,
                )
        except self._error as error:
            raise MoecalcError(f"{self.path}: {error}") from error
        return result

    def evaluate_pairs(
        self,
        pairs: PairList,
        types: Ints,
        positions: Floats,
        cells: Floats,
        conditions: Sequence[Conditions],
        *,
        virial: bool = True,
        atom_virial: bool = False,
        threads: int | None = None,
    ) -> Mapping[str, Any]:
        """As `evaluate`. The list is handed to the evaluator only if it is another than in the last call."""
        try:
            with self._lock:
                self._evaluator.num_threads = threads or 0
                self._give(conditions)
                if (
                    self._listed is None
                    or self._listed[0] is not pairs
                    or not np.array_equal(self._listed[1], types)
                ):
                    self._listed = None
                    self._evaluator.set_list(
                        types, pairs.edge_index, pairs.edge_shift, pairs.system_index, pairs.n_systems
                    )
                    self._listed = (pairs, types)
                result: Mapping[str, Any] = self._evaluator.evaluate_positions(
                    positions, cells, forces=True, virial=virial, atom_virial=atom_virial
                )
        except self._error as error:
            raise MoecalcError(f"{self.path}: {error}") from error
        return result


_open_models: WeakValueDictionary[tuple[Any, ...], _Model] = WeakValueDictionary()
_checked: set[tuple[Any, ...]] = set()
_open_lock = threading.Lock()
_calculators: WeakValueDictionary[int, MoECalculator] = WeakValueDictionary()  # all of this process


def _renew_locks() -> None:
    """In a forked child: the threads that may have held the locks stayed behind."""
    global _open_lock  # noqa: PLW0603 - a lock cannot be renewed in place
    _open_lock = threading.Lock()
    for model in list(_open_models.values()):
        model.renew_lock()
    for calculator in list(_calculators.values()):
        calculator.renew_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _open(path: Path, device: str, dtype: str, precision: str, *, check: bool) -> _Model:
    """Load a package, or find it among those in use."""
    native = load()
    try:
        status = path.stat()
    except OSError:
        raise PackageError(f"{path}: no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise _foreign(path)
    key = (
        path,
        status.st_mtime_ns,
        status.st_size,
        _device_name(device),
        dtype,
        precision,
        os.environ.get("MOECALC_BACKEND"),
    )
    with _open_lock:
        model = _open_models.get(key)
        if model is None:
            try:
                evaluator = native.Evaluator(os.fsencode(path), key[3], dtype, precision)
            except native.OutOfMemoryError as error:
                raise MoecalcError(f"{path}: {error}") from error
            except native.Error as error:
                message = str(error)
                if "not a moecalc package" in message:
                    raise _foreign(path) from error
                kind = PackageError if precision == "fp32" else MoecalcError
                raise kind(message if str(path) in message else f"{path}: {message}") from error
            model = _open_models[key] = _Model(path, evaluator, native.Error)
            if evaluator.backend == "torchscript":
                kernels = "fused" if evaluator.device == "cpu" else "CUDA"
                warnings.warn(
                    f"{path}: evaluated through TorchScript, several times slower than the {kernels} kernels ({evaluator.backend_reason})",
                    stacklevel=4,
                )
        if check and key not in _checked:
            _check(model)
            _checked.add(key)
    return model


def _foreign(path: Path) -> PackageError:
    from moecalc.package.archive import foreign_package

    return foreign_package(path)


def _check(model: _Model) -> None:
    """Evaluate stored reference frames: an altered package, or a device, driver or library that computes something else, must not go unnoticed."""
    try:
        model.check_reference()
    except MoecalcError as error:
        raise PackageError(
            f"{error}: run `moecalc verify {model.path}`, try another device, or pass check=False to use it nevertheless"
        ) from None


def _dtype_name(dtype: Any) -> str:
    """'' for None, else 'float32' or 'float64', whether given as text or as a dtype of numpy or torch."""
    if dtype is None:
        return ""
    name = str(dtype.__name__ if isinstance(dtype, type) else dtype).removeprefix("torch.")
    if name not in keys.DTYPES:
        raise MoecalcError(f"expected dtype 'float32', 'float64' or None (the package's own), got {dtype!r}")
    return name


def _device_name(device: str) -> str:
    """The device to use, after checking that it is there."""
    import torch

    name = str(device)
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda:0" if available else "cpu"
    if name == "cpu":
        return name
    kind, _, index = name.partition(":")
    if kind != "cuda" or (name != "cuda" and not index.isdigit()):
        raise MoecalcError(f"expected device 'cpu', 'cuda', 'cuda:N' or 'auto', got {name!r}")
    if not available:
        raise MoecalcError(
            f"device {name!r} is not available, torch {torch.__version__} finds no CUDA device: use device='cpu' (or 'auto'), or install the "
            f"driver and a CUDA build of torch"
        )
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        raise MoecalcError(
            f"expected device 'cuda:N' with N below {torch.cuda.device_count()}, got {name!r}: see nvidia-smi"
        )
    return f"cuda:{number}"


def _check_threads(threads: Any) -> None:
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"expected threads to be a positive integer or None, got {threads!r}")
    if threads > MAX_THREADS:
        raise ValueError(f"expected threads to be at most {MAX_THREADS}, got {threads}")
