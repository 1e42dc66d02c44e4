# Types of the native module (cpp/python/bindings.cpp).

from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

class Error(RuntimeError): ...
class OutOfMemoryError(Error): ...

class _Evaluation(TypedDict, total=False):
    energy: NDArray[np.float64]
    energies: NDArray[np.float64]
    forces: NDArray[np.float64]
    virial: NDArray[np.float64]
    atom_virial: NDArray[np.float64]
    timings: dict[str, float]
    n_edge: int
    n_angle: int
    max_neighbors: int
    max_angle_neighbors: int

# Arrays (n_node, width) in the order of the input, to be changed in place: see GhostExchange in evaluator.h.
class _GhostExchange(Protocol):
    def forward(self, features: NDArray[Any], /) -> None: ...
    def reverse(self, gradients: NDArray[Any], /) -> None: ...
    def sum(self, values: NDArray[np.float64], /) -> None: ...

def build_info() -> str: ...
def check_archive(path: str | bytes) -> None: ...
def check_package(path: str | bytes, content: bytes = ...) -> None: ...
def words_of_code(path: str | bytes) -> list[str]: ...
def allowed_words() -> list[str]: ...
def read_record(path: str | bytes, name: str) -> bytes: ...

class CleanState:
    def __enter__(self) -> None: ...
    def __exit__(self, *exception: object) -> None: ...

class Evaluator:
    def __init__(
        self,
        path: str | bytes,
        device: str = "cpu",
        dtype: str = "",
        precision: str = "fp32",
        deterministic: bool = True,
    ) -> None: ...
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
    def keeps_lists(self) -> bool: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def backend(self) -> str: ...
    @property
    def backend_reason(self) -> str: ...
    @property
    def buffer_bytes(self) -> int: ...
    def run_layer(
        self,
        types: NDArray[np.integer[Any]],
        edge_index: NDArray[np.integer[Any]],
        edge_vec: NDArray[np.float64],
        layer: int,
        inputs: list[NDArray[np.float64]],
        gradients: list[NDArray[np.float64]] = ...,
    ) -> list[NDArray[np.float64]]: ...
    @property
    def metadata(self) -> str: ...
    def estimate_bytes(self, n_node: int, n_edge: int, n_angle: int) -> int: ...
    def check_reference(self, elements: list[str] = ...) -> None: ...
    def set_list(
        self,
        types: NDArray[np.integer[Any]],
        edge_index: NDArray[np.integer[Any]],
        edge_shift: NDArray[np.integer[Any]] | None,
        system_index: NDArray[np.integer[Any]],
        n_systems: int = 1,
    ) -> None: ...
    def evaluate_positions(
        self,
        positions: NDArray[np.float64],
        cells: NDArray[np.float64] | None = None,
        *,
        forces: bool = True,
        virial: bool = True,
        atom_virial: bool = False,
        exchange: _GhostExchange | None = None,
    ) -> _Evaluation: ...
    def evaluate(
        self,
        types: NDArray[np.integer[Any]],
        edge_index: NDArray[np.integer[Any]],
        edge_vec: NDArray[np.float64],
        system_index: NDArray[np.integer[Any]],
        n_systems: int = 1,
        *,
        forces: bool = True,
        virial: bool = True,
        atom_virial: bool = False,
        exchange: _GhostExchange | None = None,
    ) -> _Evaluation: ...
