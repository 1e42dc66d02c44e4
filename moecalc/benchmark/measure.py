"""Time and memory of one size, in a process that has done nothing before."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import ase.io
import numpy as np
from ase import Atoms

from moecalc._lib import load
from moecalc.ase_conditions import conditions_of
from moecalc.benchmark.costs import Cost, GraphCounts, evaluation_costs, total_cost
from moecalc.benchmark.hardware import Ceilings, ceilings, machine
from moecalc.benchmark.process_memory import memory, reset_peak
from moecalc.benchmark.results import Case, PartCost, Result, Size
from moecalc.benchmark.structures import repeated
from moecalc.calculator import MoECalculator
from moecalc.conditions import arrays_of
from moecalc.files import from_text
from moecalc.neighbors import PairList, SkinNeighborList
from moecalc.package.archive import read_metadata
from moecalc.runtime import device_name, prepare_backend
from moecalc.typing import Floats

WARM_UP: Final = 5
"""Steps before the timed ones."""

_SKIN: Final = 1.0  # Angstrom
_WALK: Final = 0.01  # Angstrom per step and direction: edge counts change at every step
_RETURN: Final = 0.98  # pull back to the site: displacements stay near 0.05 A, however long the run
_SEARCHES: Final = 3  # timed, beside the first one


def measure(case: Case) -> Result:
    """Time one size in this process, whose memory is part of the answer.

    Raises:
        MoecalcError: as the evaluator, the calculator and `read_metadata`.
    """
    # how many neighbors a model has seen in training does not matter here
    warnings.filterwarnings("ignore", message="an atom has .* neighbou?rs")
    structure = ase.io.read(from_text(case.structure))
    assert isinstance(structure, Atoms)
    atoms = repeated(structure, case.copies)
    device = device_name(case.device)
    evaluator, load_s = _open(case, device, atoms)
    dynamics = _Dynamics(evaluator, atoms)
    start = _time_start(dynamics)
    on_cpu = device == "cpu"
    peak_gpu_mb = None if on_cpu else evaluator.buffer_bytes / 1e6
    threads = int(evaluator.num_threads)
    dtype = str(evaluator.dtype)
    before = ceilings(dtype, threads) if on_cpu else None
    steps = _time_steps(dynamics, _calculator(case, device), case.steps)
    searches = [start.search, *(dynamics.time_search() for _ in range(_SEARCHES))]
    top = None if before is None else _best(before, ceilings(dtype, threads))
    counts, parts = evaluation_costs(from_text(case.package), atoms, 8 if dtype == "float64" else 4)
    size = Size(
        copies=case.copies,
        load_s=load_s,
        first_s=start.search + start.first,
        search_s=float(np.median(searches)),
        loaded_mb=start.loaded_mb,
        peak_mb=start.added_mb,
        peak_gpu_mb=peak_gpu_mb,
        **steps.summary(counts),
        **_floor(parts, top, float(np.median(steps.step))),
    )
    return Result(
        size=size,
        dtype=dtype,
        device=device,
        backend=str(evaluator.backend),
        threads=threads,
        machine=machine(),
    )


def _open(case: Case, device: str, atoms: Atoms) -> tuple[Any, float]:
    """The evaluator, ready for the structure, and the seconds to load it."""
    native = load()
    prepare_backend()
    start = time.perf_counter()
    evaluator = native.Evaluator(os.fsencode(from_text(case.package)), device, case.dtype or "")
    seconds = time.perf_counter() - start
    if case.threads is not None:
        evaluator.num_threads = case.threads
    taken = read_metadata(from_text(case.package)).conditions
    if taken is not None and taken.open:
        evaluator.set_conditions(*arrays_of([conditions_of(atoms, taken, {})]))
    return evaluator, seconds


def _calculator(case: Case, device: str) -> MoECalculator:
    """The same model for ASE."""
    return MoECalculator(
        from_text(case.package),
        device=device,
        dtype=case.dtype,
        check=False,
        allow_untrained=True,
        threads=case.threads,
    )


class _Dynamics:
    """A structure whose atoms move as in dynamics, its list with a skin, and the evaluator."""

    def __init__(self, evaluator: Any, atoms: Atoms) -> None:
        known = list(evaluator.elements)
        self.atoms = atoms
        self._evaluator = evaluator
        self._sites = atoms.positions.copy()
        self._types = np.array([known.index(s) for s in atoms.symbols], dtype=np.int64)
        self._list = SkinNeighborList(float(evaluator.cutoff), _SKIN)
        self._held: PairList | None = None
        self._positions: Floats = self._sites
        self._rng = np.random.default_rng(0)

    def move(self) -> None:
        """One step of a random walk around the sites."""
        step = self._rng.normal(scale=_WALK, size=self._sites.shape)
        self.atoms.positions = self._sites + _RETURN * (self.atoms.positions - self._sites) + step

    def time_list(self) -> float:
        """Seconds to find out whether the list still serves, and to search and hand over another if not."""
        start = time.perf_counter()
        pairs, self._positions = self._list.pairs(self.atoms)
        if pairs is not self._held:
            self._evaluator.set_list(self._types, pairs.edge_index, pairs.edge_shift, pairs.system_index)
            self._held = pairs
        return time.perf_counter() - start

    def time_search(self) -> float:
        """Seconds of a search whose list is handed over."""
        self._list.reset()
        return self.time_list()

    def time_evaluation(self) -> tuple[float, dict[str, float]]:
        """Seconds of the evaluator, and those of its parts."""
        start = time.perf_counter()
        result = self._evaluator.evaluate(self._positions, self.atoms.cell.array[None])
        return time.perf_counter() - start, result["timings"]


@dataclass(frozen=True)
class _Start:
    """The first step (seconds), and memory (MB) before it and added by it and the warm-up."""

    search: float
    first: float
    loaded_mb: float | None
    added_mb: float | None


def _time_start(dynamics: _Dynamics) -> _Start:
    """The first step and the warm-up."""
    loaded = memory("VmRSS")
    reset_peak()
    search = dynamics.time_list()
    first, _ = dynamics.time_evaluation()
    for _ in range(WARM_UP):
        dynamics.move()
        dynamics.time_list()
        dynamics.time_evaluation()
    peak = memory("VmHWM")
    return _Start(search, first, loaded, None if loaded is None or peak is None else max(0.0, peak - loaded))


@dataclass
class _Steps:
    """Seconds of every step.

    Attributes:
        step: evaluator and list together.
        update: list alone.
        ase: through ASE.
        parts: by part of the evaluator.
    """

    step: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    ase: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)

    def summary(self, counts: GraphCounts) -> dict[str, Any]:
        """Fields of `Size`."""
        median = float(np.median(self.step))
        return {
            "atoms": counts.atoms,
            "edges": counts.edges,
            "angles": counts.angles,
            "step_s": self.step,
            "step_p50_s": median,
            "step_p95_s": float(np.percentile(self.step, 95)),
            "ase_p50_s": float(np.median(self.ase)),
            "update_s": float(np.median(self.update)),
            "timings": {name: float(np.median(values)) for name, values in self.parts.items()},
            "atom_steps_per_s": counts.atoms / median,
        }


def _time_steps(dynamics: _Dynamics, calculator: MoECalculator, n_steps: int) -> _Steps:
    """Steps of the evaluator, each followed by the same one through ASE: noise of the machine meets both."""
    twin = dynamics.atoms.copy()
    twin.calc = calculator
    twin.get_forces()
    steps = _Steps()
    for _ in range(n_steps):
        dynamics.move()
        update = dynamics.time_list()
        evaluation, parts = dynamics.time_evaluation()
        steps.update.append(update)
        steps.step.append(update + evaluation)
        for name, seconds in parts.items():
            steps.parts.setdefault(name, []).append(seconds)
        twin.positions = dynamics.atoms.positions
        start = time.perf_counter()
        twin.get_forces()
        steps.ase.append(time.perf_counter() - start)
    return steps


def _best(one: Ceilings, other: Ceilings) -> Ceilings:
    return Ceilings(gemm=max(one.gemm, other.gemm), stream=max(one.stream, other.stream))


def _floor(parts: Mapping[str, Cost], top: Ceilings | None, median: float) -> dict[str, Any]:
    """Fields of `Size`: the arithmetic, and how far a step of `median` seconds is from its floor."""
    total = total_cost(parts)
    floor = None if top is None else total.flops / top.gemm
    return {
        "cost": {name: PartCost(**vars(cost)) for name, cost in parts.items()},
        "ceilings": top,
        "floor_s": floor,
        "with_recompute_s": None if top is None else (total.flops + total.recompute) / top.gemm,
        "ratio": None if floor is None else median / floor,
    }
