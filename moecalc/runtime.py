"""The opened model: a package in memory, shared by all that use it in this process, across threads and forks.

Engines that are written in Python (`moecalc.calculator`) hand it a `PairList`, positions and conditions, and
get arrays back. There is no ASE structure, no torch and no pydantic here: this is imported whenever a model
runs.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from numpy.typing import NDArray

from moecalc import keys
from moecalc._lib import load
from moecalc.conditions import Conditions, ModelConditions, arrays_of, check_general, read_conditions
from moecalc.errors import ElementError, MoecalcError, PackageError, StructureError
from moecalc.neighbors import PairList
from moecalc.typing import Bools, Floats, Ints

if TYPE_CHECKING:
    from moecalc._C import Evaluation, Evaluator

MAX_THREADS: Final = 4096  # of one evaluator
BACKENDS: Final = ("fused", "plain", "torchscript", "cuda-emulation")
"""What a user may ask for instead of the best that fits (cpp/include/moecalc/options.h)."""

CPU_BACKENDS: Final = ("fused", "plain", "cuda-emulation")
"""Those that run on the CPU alone."""


class Model:
    """A package in memory: the evaluator, and what of its metadata every call needs.

    Its users share it, and it never changes.

    Args:
        path: of the package.
        evaluator: `moecalc._C.Evaluator`, or what behaves like one.
        open_again: makes another; None: a forked process cannot use the evaluator.

    Attributes:
        metadata: of the package; name: of the model.
        elements: symbols, in the order of the types.
        cutoff: Angstrom.
        device, dtype: where and in which precision the network is.
        backend: what runs it, "fused avx512" for example.
        conditions: what the model takes beside a structure.
        warnings: sentences for the user of the model.
    """

    def __init__(
        self, path: Path, evaluator: Evaluator, open_again: Callable[[], Evaluator] | None = None
    ) -> None:
        self.path = path
        self._evaluator = evaluator
        self._open_again = open_again
        self._lock = threading.Lock()  # an evaluator serves one thread at a time
        self._version = _version(path)
        self._interrupted = False
        self._abandoned: list[Evaluator] = []
        self._listed: tuple[PairList, Ints] | None = None  # what the evaluator holds
        self._given: list[Conditions] = []  # what the evaluator holds
        self.metadata: dict[str, Any] = json.loads(evaluator.metadata)
        self.name = str(self.metadata.get("name", path.name))
        self.elements = list(evaluator.elements)
        self.cutoff = float(evaluator.cutoff)
        self.device = str(evaluator.device)
        self.dtype = str(evaluator.dtype)
        self.backend = str(evaluator.backend)
        self.warnings = evaluator.model_warnings()
        try:
            self.conditions: ModelConditions = read_conditions(self.metadata.get("conditions"))
        except ValueError as error:
            raise PackageError(f"{path}: metadata do not fit their schema ({error}): package again") from None
        self._type_of = np.full(len(chemical_symbols), -1, dtype=np.int64)
        for index, symbol in enumerate(self.elements):
            if symbol in atomic_numbers:
                self._type_of[atomic_numbers[symbol]] = index
        trained = set(self.metadata.get("trained_elements", self.elements))
        self._untrained: Bools = np.array([symbol not in trained for symbol in self.elements], dtype=bool)
        self._any_untrained = bool(self._untrained.any())

    @property
    def default_threads(self) -> int:
        """CPU threads where none were asked for."""
        with self._lock:
            evaluator = self._ready()
            evaluator.num_threads = 0
            return int(evaluator.num_threads)

    def after_fork(self) -> None:
        """In a forked child: a thread that stayed behind may hold the lock, amid an evaluation."""
        self._interrupted |= self._lock.locked()
        self._lock = threading.Lock()

    def _ready(self) -> Evaluator:
        """The evaluator, opened anew where a fork found it in use. Call it with the lock."""
        if self._interrupted and self._open_again is not None:
            if _version(self.path) != self._version:
                raise PackageError(
                    f"{self.path}: the file was changed or removed since it was loaded, but must be read "
                    "again, because this process was forked while a thread was evaluating: make a new "
                    "calculator, or use multiprocessing.get_context('spawn')"
                )
            try:
                opened = self._open_again()
            except load().Error as error:
                raise PackageError(str(error)) from error
            self._abandoned.append(self._evaluator)  # not even destroyed: its state is unknown
            self._evaluator, self._listed, self._given = opened, None, []
            self._interrupted = False
        return self._evaluator

    def types(self, numbers: NDArray[np.integer[Any]], *, allow_untrained: bool) -> Ints:
        """Index of each atom's element in the package's list.

        Args:
            numbers: (n_atoms,) atomic numbers.
            allow_untrained: accept elements that the model was not trained on.

        Raises:
            ElementError: elements that the model does not know, or was not trained on.
        """
        types: Ints = self._type_of[numbers]
        if (types < 0).any():
            unknown = _symbols(numbers[types < 0])
            raise ElementError(
                f"the structure contains {unknown}, expected only elements of the model {self.name}, "
                f"{', '.join(self.elements)}: use a model that knows {unknown}"
            )
        if self._any_untrained and not allow_untrained and self._untrained[types].any():
            guessed = _symbols(numbers[self._untrained[types]])
            raise ElementError(
                f"the structure contains {guessed}, which the model {self.name} has parameters for but was "
                "not trained on: use another model, or pass allow_untrained=True to accept arbitrary "
                "energies and forces"
            )
        return types

    def check_conditions(self, given: Mapping[str, Any]) -> None:
        """Raise ConditionError for values that no structure could have with this model."""
        check_general(self.conditions, given)

    def _give(self, conditions: Sequence[Conditions]) -> None:
        """Hand conditions to the evaluator, if the model takes any and they changed since the last call."""
        if not self.conditions.open:
            return
        found = list(conditions)
        if all(one == found[0] for one in found):
            found = found[:1]  # serves any number of structures
        if found == self._given:
            return
        self._given = []
        self._evaluator.set_conditions(*arrays_of(found))
        self._given = found

    def check_reference(self) -> None:
        """Raise MoecalcError unless the stored reference frames come out as stored."""
        try:
            with self._lock:
                evaluator = self._ready()
                self._listed, self._given = None, []  # the frames have lists and conditions of their own
                evaluator.check_reference()
        except load().Error as error:
            raise MoecalcError(f"{self.path}: {error}") from error

    def record(self, name: str) -> bytes:
        """A record of the file that was loaded, whatever happened to it since."""
        try:
            return self._evaluator.record(name)
        except load().Error as error:
            raise PackageError(str(error)) from error

    def release_weights(self) -> None:
        """Give back what is laid out for the elements seen so far, until it is needed again."""
        with self._lock:
            evaluator = self._ready()
            self._listed = None
            evaluator.release_weights()

    def evaluate(
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
    ) -> Evaluation:
        """Energies, forces and virials (keys, shapes and units: `moecalc.keys`).

        Args:
            pairs: handed to the evaluator only if it is another list than in the last call, or has other
                types.
            types: (n_node,) indices of elements.
            positions: (n_node, 3) Angstrom.
            cells: (n_systems, 3, 3) Angstrom, a vector per row.
            conditions: of every structure.
            virial, atom_virial: compute these as well.
            threads: of the CPU; None: the default.

        Raises:
            StructureError: an energy, a force or a distance is not finite, or two atoms are at one place.
            MoecalcError: whatever else the evaluator refuses, or it needs more memory than there is.
        """
        native = load()
        try:
            with self._lock:
                evaluator = self._ready()
                evaluator.num_threads = threads or 0
                self._give(conditions)
                self._set_list(pairs, types)
                return evaluator.evaluate(
                    positions, cells, forces=True, virial=virial, atom_virial=atom_virial
                )
        except (native.NotFiniteError, native.OverlapError) as error:
            raise StructureError(f"{self.path}: {error}") from error
        except native.Error as error:
            raise MoecalcError(f"{self.path}: {error}") from error

    def warnings_of(self, result: Evaluation) -> list[str]:
        """Sentences for the user of structures that were evaluated, the weightiest first."""
        return self._evaluator.structure_warnings(result["max_neighbors"], result["max_angle_neighbors"])

    def _set_list(self, pairs: PairList, types: Ints) -> None:
        held = self._listed
        if held is not None and held[0] is pairs and np.array_equal(held[1], types):
            return
        self._listed = None  # a list that is refused must not pass for the one before
        self._evaluator.set_list(
            types, pairs.edge_index, pairs.edge_shift, pairs.system_index, pairs.n_systems
        )
        self._listed = (pairs, types)


def _symbols(numbers: NDArray[np.integer[Any]]) -> str:
    return ", ".join(sorted(chemical_symbols[number] for number in np.unique(numbers)))


# --- models in use -----------------------------------------------------------------------------


class _Opening(NamedTuple):
    """What tells opened models apart."""

    path: Path
    changed_ns: int
    size: int
    device: str
    dtype: str
    precision: str
    backend: str
    settings: tuple[tuple[str, str], ...]


_open_models: WeakValueDictionary[_Opening, Model] = WeakValueDictionary()
_checked: set[_Opening] = set()
_open_lock = threading.Lock()


def _after_fork() -> None:
    """In a forked child: the threads that may have held the locks stayed behind."""
    global _open_lock  # noqa: PLW0603 - a lock cannot be renewed in place
    _open_lock = threading.Lock()
    for model in list(_open_models.values()):
        model.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _version(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def open_model(
    path: Path,
    device: str = "auto",
    dtype: str = "",
    precision: str = "fp32",
    *,
    backend: str = "",
    check: bool = True,
) -> Model:
    """Load a package, or find it among those in use.

    Args:
        path: absolute path of the package.
        device: "cpu", "cuda", "cuda:N" or "auto".
        dtype: "float32", "float64", or "" for the package's own.
        precision: "fp32", "fp32-ffma", "bf16x3", "tf32" or "fp16".
        backend: one of `BACKENDS`; "": MOECALC_BACKEND, else the best that fits. "torchscript" runs the code
            of the file.
        check: evaluate stored reference frames when the package is first used in this way in this process.

    Raises:
        PackageError: the package is missing, damaged, foreign, too new, or gives other numbers here than
            where it was made.
        MoecalcError: the device, the precision or the backend does not exist here.
    """
    key = _opening(path, device, dtype, precision, backend)
    with _open_lock:
        model = _open_models.get(key)
        if model is None:
            model = _open_models[key] = _open(key)
            _warn_of(model)
        if check and key not in _checked:
            check_model(model)
            _checked.add(key)
    return model


def _opening(path: Path, device: str, dtype: str, precision: str, backend: str) -> _Opening:
    load()  # before anything is said of the file
    try:
        status = path.stat()
    except OSError:
        raise PackageError(f"{path}: no such file") from None
    if not stat.S_ISREG(status.st_mode):
        raise _foreign(path)
    on_cpu = (backend or os.environ.get("MOECALC_BACKEND", "")) in CPU_BACKENDS
    where = "cpu" if device == "auto" and on_cpu else device_name(device)
    # the settings are those of the evaluator (docs/environment.md)
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("MOECALC_")))
    return _Opening(path, status.st_mtime_ns, status.st_size, where, dtype, precision, backend, settings)


def _open(wanted: _Opening) -> Model:
    native = load()
    prepare_backend(wanted.backend)
    file = os.fsencode(wanted.path)

    def open_evaluator() -> Evaluator:
        return native.Evaluator(file, wanted.device, wanted.dtype, wanted.precision, wanted.backend)

    try:
        evaluator = open_evaluator()
    except native.OutOfMemoryError as error:
        raise MoecalcError(f"{wanted.path}: {error}") from error
    except native.Error as error:
        # the fault may be in what was asked for, not in the file
        chosen = wanted.backend or os.environ.get("MOECALC_BACKEND")
        special = wanted.device != "cpu" or wanted.precision != "fp32" or bool(chosen)
        asked = special or "MOECALC_" in str(error)
        raise _not_opened(wanted.path, str(error), asked=asked) from error
    return Model(wanted.path, evaluator, open_evaluator if evaluator.survives_fork else None)


def prepare_backend(backend: str = "") -> None:
    """Load what evaluators of a backend need beside the core; "": the one of MOECALC_BACKEND.

    Raises:
        ImportError: one line with the remedy.
    """
    if (backend or os.environ.get("MOECALC_BACKEND")) == "torchscript":
        from moecalc._torch_lib import load_torch_library

        load_torch_library()


def _not_opened(path: Path, message: str, *, asked: bool) -> MoecalcError:
    """The error for a package that the evaluator refused.

    Args:
        path, message: of the evaluator.
        asked: for something that may be to blame instead of the file.
    """
    if "not a moecalc package" in message:
        return _foreign(path)
    kind = MoecalcError if asked else PackageError
    return kind(message if str(path) in message else f"{path}: {message}")


def _foreign(path: Path) -> PackageError:
    from moecalc.package.archive import foreign_package

    return foreign_package(path)


def _warn_of(model: Model) -> None:
    """Tell whoever made the calculator; to be called by `open_model`."""
    for sentence in model.warnings:
        warnings.warn(f"{model.path}: {sentence}", stacklevel=4)


def check_model(model: Model) -> None:
    """Evaluate stored reference frames: other numbers show an altered package, device, driver or library.

    Raises:
        PackageError: the numbers differ.
    """
    try:
        model.check_reference()
    except MoecalcError as error:
        raise PackageError(
            f"{error}: run `moecalc verify {model.path}`, try another device, or pass check=False to use it "
            "nevertheless"
        ) from None


# --- what a user writes ------------------------------------------------------------------------


def dtype_name(dtype: object) -> str:
    """'' for None, else 'float32' or 'float64', whether given as text or as a dtype of numpy or torch."""
    if dtype is None:
        return ""
    name = str(dtype.__name__ if isinstance(dtype, type) else dtype).removeprefix("torch.")
    if name not in keys.DTYPES:
        raise MoecalcError(f"expected dtype 'float32', 'float64' or None (the package's own), got {dtype!r}")
    return name


def device_name(device: str) -> str:
    """The device to use, after checking that it is there."""
    name = str(device)
    if name == "cpu":
        return name
    available = load().cuda_device_count()
    if name == "auto":
        return "cuda:0" if available else "cpu"
    kind, _, index = name.partition(":")
    if kind != "cuda" or (name != "cuda" and not index.isdigit()):
        raise MoecalcError(f"expected device 'cpu', 'cuda', 'cuda:N' or 'auto', got {name!r}")
    if not available:
        raise MoecalcError(
            f"device {name!r} is not available, moecalc finds no CUDA device: use device='cpu' (or 'auto'), "
            "or see what `moecalc doctor` says of gpu"
        )
    number = int(index or 0)
    if number >= available:
        raise MoecalcError(f"expected device 'cuda:N' with N below {available}, got {name!r}: see nvidia-smi")
    return f"cuda:{number}"


def backend_name(backend: object) -> str:
    """'' for None, else one of `BACKENDS`."""
    if backend is None:
        return ""
    if backend not in BACKENDS:
        raise MoecalcError(
            f"expected backend None (the best that fits), {', '.join(map(repr, BACKENDS))}, got {backend!r}"
        )
    return str(backend)


def check_threads(threads: object) -> None:
    """Raise ValueError unless this is a number of CPU threads, or None."""
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"expected threads to be a positive integer or None, got {threads!r}")
    if threads > MAX_THREADS:
        raise ValueError(f"expected threads to be at most {MAX_THREADS}, got {threads}")
