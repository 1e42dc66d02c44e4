"""ASE calculator: energies, forces and stresses of a packaged model."""

from __future__ import annotations

import copy
import json
import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
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
        allow_untrained: accept elements that the model knows but was not trained on.
        check: when a package is first used on a device in this process, compare one of its reference frames.
        threads: number of CPU threads for torch, a setting of the whole process; None leaves it alone.
        atoms: structure to attach the calculator to.

    Attributes:
        neighbor_list: the list in use; `neighbor_list.n_rebuilds` counts its searches.

    Raises:
        PackageError: the package is missing, damaged, foreign, too new, or gives other numbers here than where it was made.
        MoecalcError: the device or precision does not exist here.
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
        allow_untrained: bool = False,
        check: bool = True,
        threads: int | None = None,
        atoms: Atoms | None = None,
    ) -> None:
        path = default_model_path() if model is None else Path(model).expanduser().resolve()
        dtype_name = _dtype_name(dtype)
        if threads is not None:
            _set_threads(threads)
        self._model = _open(path, device, dtype_name, precision, check=check)
        self._warned = False
        self.neighbor_list = SkinNeighborList(self._model.cutoff, skin)
        super().__init__()
        self.parameters.update(
            # an absolute path, so that a pickle works in another folder; None, so that it works in another installation
            model=None if model is None else str(path),
            device=device,
            dtype=dtype_name or None,
            precision=precision,
            skin=float(skin),
            allow_untrained=bool(allow_untrained),
            check=bool(check),
            threads=threads,
        )
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
        """Change `skin` or `allow_untrained` of this calculator.

        Raises:
            MoecalcError: the parameter belongs to the loaded model.
            TypeError: there is no such parameter.
        """
        changed: dict[str, Any] = {}
        for name, value in parameters.items():
            if name not in self.parameters:
                raise TypeError(f"expected a parameter among {', '.join(self.parameters)}, got {name!r}")
            if self.parameters[name] == value:
                continue
            if name == "skin":
                self.neighbor_list = SkinNeighborList(self.cutoff, value)
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
        return {"parameters": dict(self.parameters), "atoms": self.atoms, "results": self.results}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["parameters"])  # type: ignore[misc]
        self.atoms, self.results = state["atoms"], state["results"]

    def __deepcopy__(self, memo: dict[int, Any]) -> MoECalculator:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        memo[id(self._model)] = (
            self._model
        )  # a model does not change: copies share it, whatever happened to the file
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __copy__(self) -> MoECalculator:
        return copy.deepcopy(self)

    # --- results -------------------------------------------------------------------------------

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = (keys.ENERGY,),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Fill `results`; called by ASE."""
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
        virial, atom_virial = volume is not None, keys.STRESSES in properties
        if self._model.keeps_lists:
            pairs, positions = self.neighbor_list.pairs(self.atoms)
            cells = self.atoms.cell.array[None]
            raw = self._model.evaluate_pairs(
                pairs, types, positions, cells, virial=virial, atom_virial=atom_virial
            )
        else:
            graph = self.neighbor_list.graph(self.atoms, types)
            raw = self._model.evaluate(graph, virial=virial, atom_virial=atom_virial)
        self._warn_about_density(raw)
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
        for index, atoms in enumerate(structures):
            try:
                volume = _volume(atoms)
                if volume is None and wants_stress:
                    raise _undefined_stress(atoms)
                types.append(self._model.types(atoms, allow_untrained=self.parameters["allow_untrained"]))
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
        atom_virial = keys.STRESSES in properties
        if keeps_lists:
            raw = self._model.evaluate_pairs(
                PairList.concatenate(lists),
                np.concatenate(types),
                np.concatenate([atoms.positions for atoms in kept]),
                np.stack([atoms.cell.array for atoms in kept]),
                virial=wants_stress,
                atom_virial=atom_virial,
            )
        else:
            raw = self._model.evaluate(
                AtomicGraph.concatenate(graphs), virial=wants_stress, atom_virial=atom_virial
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
                    stacklevel=4,
                )
                return


_STRESSES = frozenset({keys.STRESS, keys.STRESSES})


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
        self._lock = threading.Lock()  # an evaluator serves one thread at a time
        self.metadata: dict[str, Any] = json.loads(evaluator.metadata)
        self.name = str(self.metadata.get("name", path.name))
        self.elements: list[str] = list(evaluator.elements)
        self.cutoff = float(evaluator.cutoff)
        self.device = str(evaluator.device)
        self.dtype = str(evaluator.dtype)
        self.keeps_lists = bool(evaluator.keeps_lists)
        self._listed: tuple[PairList, Ints] | None = None  # what the evaluator holds
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
        self, graph: AtomicGraph, *, virial: bool = True, atom_virial: bool = False
    ) -> Mapping[str, Any]:
        try:
            with self._lock:
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
        *,
        virial: bool = True,
        atom_virial: bool = False,
    ) -> Mapping[str, Any]:
        """As `evaluate`. The list is handed to the evaluator only if it is another than in the last call."""
        try:
            with self._lock:
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


def _open(path: Path, device: str, dtype: str, precision: str, *, check: bool) -> _Model:
    """Load a package, or find it among those in use."""
    native = load()
    try:
        status = path.stat()
    except OSError:
        raise PackageError(f"{path}: no such file") from None
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
                evaluator = native.Evaluator(str(path), key[3], dtype, precision)
            except native.OutOfMemoryError as error:
                raise MoecalcError(f"{path}: {error}") from error
            except native.Error as error:
                message = str(error)
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
            _check(model, model.record(keys.REFERENCE_RECORD))
            _checked.add(key)
    return model


def _check(model: _Model, record: bytes) -> None:
    """Evaluate one reference frame of a package: a device, driver or library that computes something else must not go unnoticed."""
    frames = json.loads(record)
    if not frames:
        raise PackageError(
            f"{model.path}: expected reference frames, got none: package the checkpoint again, or pass check=False"
        )
    frame = max(frames, key=lambda frame: len(frame["symbols"]))  # an isolated atom would test little
    atoms = Atoms(frame["symbols"], frame["positions"], cell=frame["cell"], pbc=frame["pbc"])
    types = model.types(atoms, allow_untrained=True)
    raw = model.evaluate(SkinNeighborList(model.cutoff, skin=0.0).graph(atoms, types))
    model.release_weights()  # the frame's elements need not be those of the user's structure
    n = max(1, len(atoms))
    tolerance = keys.REFERENCE_TOLERANCE[model.dtype]
    for name, unit, value, expected in (
        (keys.ENERGY, "eV/atom", raw[keys.ENERGY][0] / n, frame["energy"] / n),
        (keys.FORCES, "eV/A", raw[keys.FORCES], frame["forces"]),
        (keys.VIRIAL, "eV", raw[keys.VIRIAL][0], frame["virial"]),
    ):
        reference = np.asarray(expected, dtype=float)
        deviation = np.abs(np.asarray(value) - reference).max(initial=0.0)
        allowed = tolerance * max(1.0, np.abs(reference).max(initial=0.0))
        if not deviation <= allowed:
            raise PackageError(
                f"{model.path}: {name} of the stored reference frame deviates by {deviation:.2g} {unit} (allowed {allowed:.2g}) on {model.device} in "
                f"{model.dtype}: run `moecalc verify {model.path}`, try another device, or pass check=False to use it nevertheless"
            )


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


def _set_threads(threads: int) -> None:
    import torch

    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"expected threads to be a positive integer or None, got {threads!r}")
    torch.set_num_threads(threads)
