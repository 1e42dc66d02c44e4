# Types of the native module (cpp/python/bindings.cpp, cpp/python/training_bindings.cpp).

from typing import Any, NotRequired, Protocol, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

MIN_DISTANCE: float  # Angstrom; moecalc.keys has the same
TRAINING_TENSORS: list[str]  # order of the arrays of a group in Trainer

class Error(RuntimeError): ...
class OutOfMemoryError(Error): ...

class NotFiniteError(Error):
    atom: int  # of the engine's order; -1 where none can be named

class OverlapError(Error):
    first: int
    second: int

# Keys, shapes and units: moecalc.keys.
class Evaluation(TypedDict):
    energy: NDArray[np.float64]
    energies: NDArray[np.float64]
    forces: NotRequired[NDArray[np.float64]]  # these three if they were asked for
    virial: NotRequired[NDArray[np.float64]]
    atom_virial: NotRequired[NDArray[np.float64]]
    timings: dict[str, float]
    n_edge: int
    n_angle: int
    max_neighbors: int
    max_angle_neighbors: int

# What a package says of its model that engines tell their users: Facts in evaluator.h.
class Facts(TypedDict):
    name: str
    citation: str
    trained_elements: list[str]
    node_dim: int
    edge_limit: int
    angle_limit: int
    fixed: str

# Arrays (n_node, width) in the order of the input, to be changed in place: see GhostExchange in evaluator.h.
class GhostExchange(Protocol):
    def forward(self, features: NDArray[Any], /) -> None: ...
    def reverse(self, gradients: NDArray[Any], /) -> None: ...
    def sum(self, values: NDArray[np.float64], /) -> None: ...

_Integers: TypeAlias = NDArray[np.integer[Any]]
_Doubles: TypeAlias = NDArray[np.float64]

def build_info() -> str: ...
def cuda_device_count() -> int: ...
def check_archive(path: str | bytes) -> None: ...
def check_package(path: str | bytes, content: bytes = ...) -> None: ...
def words_of_code(path: str | bytes) -> list[str]: ...
def allowed_words() -> list[str]: ...
def read_record(path: str | bytes, name: str) -> bytes: ...

class Evaluator:
    def __init__(
        self,
        path: str | bytes,
        device: str = "cpu",
        dtype: str = "",
        precision: str = "fp32",
        backend: str = "",
    ) -> None: ...
    num_threads: int
    @property
    def elements(self) -> list[str]: ...
    @property
    def cutoff(self) -> float: ...
    @property
    def angle_cutoff(self) -> float: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def precision(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def backend(self) -> str: ...
    @property
    def backend_reason(self) -> str: ...
    @property
    def survives_fork(self) -> bool: ...
    @property
    def buffer_bytes(self) -> int: ...
    @property
    def metadata(self) -> str: ...
    @property
    def facts(self) -> Facts: ...
    @property
    def n_packed_groups(self) -> int: ...
    def model_warnings(self) -> list[str]: ...
    def structure_warnings(self, max_neighbors: int, max_angle_neighbors: int) -> list[str]: ...
    def release_weights(self) -> None: ...
    def record(self, name: str) -> bytes: ...
    def estimate_bytes(self, n_node: int, n_edge: int, n_angle: int, least: bool = False) -> int: ...
    def check_reference(self, elements: list[str] = ...) -> None: ...
    def set_conditions(
        self, charge_spin: _Integers | None = None, fparam: _Doubles | None = None
    ) -> None: ...
    def give_conditions(
        self, charge: float | None = None, spin: float | None = None, fparam: list[float] | None = None
    ) -> tuple[str, str]: ...
    def set_list(
        self,
        types: _Integers,
        edge_index: _Integers,
        edge_shift: _Integers | None,
        system_index: _Integers,
        n_systems: int = 1,
        edge_from: _Integers | None = None,
        edge_to: _Integers | None = None,
    ) -> None: ...
    def evaluate(
        self,
        positions: _Doubles,
        cells: _Doubles | None = None,
        *,
        forces: bool = True,
        virial: bool = True,
        atom_virial: bool = False,
        exchange: GhostExchange | None = None,
    ) -> Evaluation: ...

# Several models on one list, whose types are those of the first one.
class Committee:
    def __init__(self, members: list[Evaluator]) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def cutoff(self) -> float: ...
    def set_list(
        self,
        types: _Integers,
        edge_index: _Integers,
        edge_shift: _Integers | None,
        system_index: _Integers,
        n_systems: int = 1,
        edge_from: _Integers | None = None,
        edge_to: _Integers | None = None,
    ) -> None: ...
    def evaluate(
        self, n_members: int, positions: _Doubles, cells: _Doubles | None = None
    ) -> list[Evaluation]: ...

def deviations(values: _Doubles, level: float | None = None) -> list[float]: ...

# Single layers of the fused kernels, for tests.
class LayerRunner:
    def __init__(self, path: str | bytes, dtype: str = "") -> None: ...
    def run(
        self,
        types: _Integers,
        edge_index: _Integers,
        edge_vec: _Doubles,
        layer: int,
        inputs: list[_Doubles],
        gradients: list[_Doubles] = ...,
    ) -> list[_Doubles]: ...

_Floats: TypeAlias = NDArray[np.floating[Any]]
_Embedding: TypeAlias = list[_Floats]  # edge matrix and bias, direction, table of nodes
_Layer: TypeAlias = tuple[
    list[_Floats], list[list[_Floats]]
]  # updates of n, e, a; groups in the order of TRAINING_TENSORS

class Trainer:
    def __init__(self, path: str | bytes, dtype: str) -> None: ...
    num_threads: int
    def set_graph(
        self,
        types: NDArray[np.int64],
        edge_index: NDArray[np.int64],
        edge_vec: _Doubles,
        system_index: NDArray[np.int64],
        n_systems: int,
    ) -> NDArray[np.int64]: ...
    def graph(self) -> list[NDArray[Any]]: ...
    def set_edge_vec(self, edge_vec: _Floats) -> None: ...
    def set_weights(self, embedding: _Embedding, layers: list[_Layer]) -> None: ...
    def forward(self, keep_for_weights: bool) -> _Floats: ...
    def backward(self, dv: _Floats) -> _Doubles: ...
    def backward_to_weights(self, dv: _Floats) -> tuple[_Embedding, list[_Layer]]: ...
