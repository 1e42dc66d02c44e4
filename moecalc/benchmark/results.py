"""What is to be timed, and what came out: records that travel between processes and into JSON."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict

from moecalc.benchmark.costs import PARTS, Cost
from moecalc.benchmark.hardware import Ceilings, Machine

_LAYER_PARTS: Final = ("angles", "edges", "symmetrisation")


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Case(_Record):
    """All that the process of one size needs.

    Attributes:
        package, structure: paths, as `moecalc.files.display_text` writes them.
        copies: of the structure.
        dtype: "float32" or "float64"; None is the package's.
        device: "cpu", "cuda", "cuda:N" or "auto".
        threads: CPU threads; None is OMP_NUM_THREADS, or the cores.
        steps: timed steps.
    """

    package: str
    structure: str
    copies: int
    dtype: str | None
    device: str
    threads: int | None
    steps: int


class PartCost(_Record):
    """`moecalc.benchmark.costs.Cost` of a part."""

    forward: int
    backward: int
    recompute: int
    activations: int
    forward_bytes: int
    backward_bytes: int


class Size(_Record):
    """Results for one number of copies of the structure. Times in seconds, memory in MB of 1e6 bytes.

    Attributes:
        copies, atoms, edges, angles: of the structure as timed.
        load_s, first_s: reading the package; first step after that.
        step_s, step_p50_s, step_p95_s: evaluator and update of its list, all steps and their percentiles.
        ase_p50_s: the same structures through `MoECalculator`.
        search_s: a search for neighbors whose list is handed to the evaluator, which happens once in many
            steps.
        update_s: share of a step to find out that the list still serves.
        timings: shares of the evaluator by part, from the evaluator itself: graph, forward, readout,
            backward, and with the fused kernels also angles, edges and symmetrisation of the layers, within
            forward and backward.
        atom_steps_per_s: atoms over the median step.
        loaded_mb, peak_mb: memory of the process when the package is loaded, and what the first steps added
            to it.
        peak_gpu_mb: what the evaluator keeps on the GPU.
        cost: arithmetic by part.
        ceilings: None on a GPU, where they are not measured.
        floor_s: forward and backward at `ceilings.gemm`; with_recompute_s: the same with intermediate values
            computed twice.
        ratio: step_p50_s over floor_s. None without ceilings, as those.
    """

    copies: int
    atoms: int
    edges: int
    angles: int
    load_s: float
    first_s: float
    step_s: list[float]
    step_p50_s: float
    step_p95_s: float
    ase_p50_s: float
    search_s: float
    update_s: float
    timings: dict[str, float]
    atom_steps_per_s: float
    loaded_mb: float | None
    peak_mb: float | None
    peak_gpu_mb: float | None
    cost: dict[str, PartCost]
    ceilings: Ceilings | None
    floor_s: float | None
    with_recompute_s: float | None
    ratio: float | None


class Result(_Record):
    """A size, and what holds for the run as a whole."""

    size: Size
    dtype: str
    device: str
    backend: str
    threads: int
    machine: Machine


class Failure(_Record):
    """A size that could not be timed, and why."""

    copies: int
    error: str


class Report(_Record):
    """What `benchmark` returns, and `moecalc bench --json` writes."""

    model: str
    structure: str
    dtype: str
    device: str
    backend: str
    threads: int
    steps: int
    machine: Machine
    sizes: list[Size]
    failures: list[Failure]


def part_costs(size: Size) -> dict[str, Cost]:
    """The costs of a size as `moecalc.benchmark.costs` has them, in the order of the tables."""
    return {name: Cost(**size.cost[name].model_dump()) for name in PARTS if name in size.cost}


def breakdown(size: Size) -> list[tuple[str, float]]:
    """Parts of a step and their seconds, which add up to the median step where the parts are known."""
    t = size.timings
    rows = [("list", size.update_s), ("graph", t.get("graph", 0.0))]
    for total, suffix in (("forward", ""), ("backward", " backward")):
        inner = [(part + suffix, t[part + suffix]) for part in _LAYER_PARTS if part + suffix in t]
        rest = t.get(total, 0.0) - sum(seconds for _, seconds in inner)
        rows += [*inner, (f"{total}, rest" if inner else total, max(0.0, rest))]
        if total == "forward":
            rows.append(("fitting net", t.get("readout", 0.0)))
    # not every backend says where its time goes
    rest = size.step_p50_s - sum(seconds for _, seconds in rows)
    return [*((name, seconds) for name, seconds in rows if seconds > 0), ("elsewhere", max(0.0, rest))]
