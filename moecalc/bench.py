"""Time and memory of energy + forces + virial, what they are made of, and how far they are from what the arithmetic allows.

`benchmark` runs every size in a process of its own, so that its memory is its own; `moecalc bench` prints what it returns.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase import Atoms
from pydantic import BaseModel, ConfigDict

from moecalc._gpu import DriverError, gpus
from moecalc.ase_conditions import conditions_of
from moecalc.conditions import ConditionError, ModelConditions, arrays_of
from moecalc.costs import PARTS, Cost, costs, count_graph, read_architecture, total_cost
from moecalc.errors import ElementError, MoecalcError, StructureError
from moecalc.files import display_text, from_text, replacing

WARM_UP: Final = 5
"""Steps before the timed ones."""

_WALK: Final = (
    0.01  # Angstrom that an atom moves per step in each direction: edge counts change at every step
)
_RETURN: Final = 0.98  # pull back to the site: displacements stay near 0.05 A, however long the run
_GEMM: Final = 1536  # rows and columns of the products that measure the arithmetic ceiling
_LAYER_PARTS: Final = ("angles", "edges", "symmetrisation")
_STREAM: Final = 1 << 25  # numbers in the arrays whose copy measures the memory bandwidth


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Machine(_Record):
    """What the numbers depend on."""

    cpu: str
    cores: int
    gpu: str | None
    numpy: str
    moecalc: str
    python: str


class Ceilings(_Record):
    """What NumPy reached on the CPU in the same process: matrix products (FLOP/s) and copies (bytes read and written per second)."""

    gemm: float
    stream: float


class PartCost(_Record):
    """`moecalc.costs.Cost` of a part."""

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
        search_s: a search for neighbours whose list is handed to the evaluator, which happens once in many steps.
        update_s: share of a step to find out that the list still serves.
        timings: shares of the evaluator by part, as it says itself: graph, forward, readout, backward, and with the fused kernels also
            what the layers spend on angles, edges and symmetrisation within forward and backward.
        atom_steps_per_s: atoms over the median step.
        loaded_mb, peak_mb: memory of the process when the package is loaded, and what the first steps added to it.
        peak_gpu_mb: what the evaluator keeps on the GPU.
        cost: arithmetic by part.
        ceilings: None on a GPU, where they are not measured.
        floor_s: forward and backward at `ceilings.gemm`; with_recompute_s: the same with intermediate values computed twice.
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


# --- structures --------------------------------------------------------------------------------


def water(n: int = 4, seed: int = 1) -> Atoms:
    """n^3 molecules of water at 1 g/cm3, on a grid in random orientations: neighbour counts are those of the liquid."""
    from ase.build import molecule

    rng = np.random.default_rng(seed)
    length = (n**3 * 18.015 / 0.602214) ** (1 / 3)
    atoms = Atoms(cell=[length] * 3, pbc=True)
    for site in np.ndindex(n, n, n):
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3))
        one.translate((np.array(site) + 0.5) * length / n - one.get_center_of_mass())
        atoms += one
    return atoms


def alloy(elements: Sequence[str], n: int = 4, seed: int = 1) -> Atoms:
    """2 n^3 atoms of a bcc crystal with the elements in random places, at the mean of their covalent radii."""
    from ase.build import bulk
    from ase.data import atomic_numbers, covalent_radii

    rng = np.random.default_rng(seed)
    radius = float(np.mean([covalent_radii[atomic_numbers[e]] for e in elements]))
    atoms = bulk(elements[0], "bcc", a=4 * radius / math.sqrt(3), cubic=True) * (n, n, n)
    symbols = [elements[k % len(elements)] for k in range(len(atoms))]
    atoms.symbols[:] = rng.permutation(symbols)
    atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    return atoms


def default_structure(elements: Sequence[str]) -> Atoms:
    """192 atoms of water for a model of H and O only, else a 128-atom alloy of all elements of the model."""
    return water() if set(elements) == {"H", "O"} else alloy(elements)


def repeated(atoms: Atoms, copies: int) -> Atoms:
    """As many copies of a structure as given, stacked along its periodic directions to a shape as compact as the factors allow.

    Raises:
        StructureError: fewer than one copy, or more than one of a structure without periodic directions.
    """
    if copies < 1:
        raise StructureError(f"expected a number of copies of at least 1, got {copies}")
    if copies == 1:
        return atoms.copy()
    if not atoms.pbc.any():
        raise StructureError(
            f"{copies} copies of a structure without periodic directions, expected 1: use a periodic one to see scaling"
        )
    counts = np.ones(3, dtype=int)
    lengths = np.where(atoms.pbc, atoms.cell.lengths(), np.inf)
    for factor in sorted(_prime_factors(copies), reverse=True):
        counts[int(np.argmin(lengths * counts))] *= factor
    return atoms.repeat(tuple(int(n) for n in counts))


def _prime_factors(n: int) -> list[int]:
    factors = []
    for p in range(2, n + 1):
        while n % p == 0:
            factors.append(p)
            n //= p
    return factors


# --- one process -------------------------------------------------------------------------------


class Case(_Record):
    """All that the process of one size needs."""

    package: str
    structure: str
    copies: int
    dtype: str | None
    device: str
    threads: int | None
    steps: int


def memory(field: str) -> float | None:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process in MB of 1e6 bytes; None where the system does not tell."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return None


def reset_peak() -> None:
    """Forget the peak memory so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def ceilings(dtype: str, threads: int = 1, repeat: int = 4) -> Ceilings:
    """Best of some matrix products and copies on the CPU.

    Args:
        dtype: "float32" or "float64".
        threads: that copy; the products take those that NumPy was started with (OMP_NUM_THREADS).
        repeat: measurements.
    """

    def fastest(f: Callable[[], Any]) -> float:
        best = math.inf
        for _ in range(1 + repeat):
            start = time.perf_counter()
            f()
            best = min(best, time.perf_counter() - start)
        return best

    rng = np.random.default_rng(0)
    a, b = (rng.random((_GEMM, _GEMM)).astype(dtype) for _ in range(2))
    c = np.empty_like(a)
    gemm = 2 * _GEMM**3 / fastest(lambda: np.matmul(a, b, out=c))
    x = np.ones(_STREAM, dtype=dtype)
    y = np.empty_like(x)
    parts = list(zip(np.array_split(y, threads), np.array_split(x, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        stream = 2 * x.nbytes / fastest(lambda: list(pool.map(lambda part: np.copyto(*part), parts)))
    return Ceilings(gemm=gemm, stream=stream)


def measure(case: Case) -> tuple[Size, dict[str, Any]]:
    """Time one size in this process, which should have done nothing before: its memory is part of the answer.

    Returns:
        The results, and what to say about the run as a whole (dtype, device, backend, threads, machine).
    """
    import ase.io

    from moecalc import MoECalculator
    from moecalc._lib import load
    from moecalc.neighbors import PairList, SkinNeighborList
    from moecalc.package.archive import read_metadata
    from moecalc.runtime import device_name, prepare_backend

    # how many neighbours a model has seen in training does not matter here
    warnings.filterwarnings("ignore", message="an atom has .* neighbours")
    original = ase.io.read(from_text(case.structure))
    assert isinstance(original, Atoms)
    atoms = repeated(original, case.copies)
    sites = atoms.positions.copy()
    device = device_name(case.device)
    native = load()
    prepare_backend()
    start = time.perf_counter()
    evaluator = native.Evaluator(os.fsencode(from_text(case.package)), device, case.dtype or "")
    load_s = time.perf_counter() - start
    if case.threads is not None:
        evaluator.num_threads = case.threads
    taken = read_metadata(from_text(case.package)).conditions
    if taken is not None and taken.open:
        evaluator.set_conditions(*arrays_of([conditions_of(atoms, taken, {})]))
    known = list(evaluator.elements)
    types = np.array([known.index(s) for s in atoms.symbols], dtype=np.int64)
    neighbor_list = SkinNeighborList(float(evaluator.cutoff), 1.0)
    held: PairList | None = None
    rng = np.random.default_rng(0)

    def move() -> None:
        step = rng.normal(scale=_WALK, size=sites.shape)
        atoms.positions = sites + _RETURN * (atoms.positions - sites) + step

    def update() -> tuple[float, Any]:
        """Seconds of the list, and the positions to use with it."""
        nonlocal held
        start = time.perf_counter()
        pairs, positions = neighbor_list.pairs(atoms)
        if pairs is not held:
            evaluator.set_list(types, pairs.edge_index, pairs.edge_shift, pairs.system_index)
            held = pairs
        return time.perf_counter() - start, positions

    def evaluate(positions: Any) -> tuple[float, dict[str, float]]:
        """Seconds of the evaluator, and by part of it."""
        start = time.perf_counter()
        result = evaluator.evaluate(positions, atoms.cell.array[None])
        return time.perf_counter() - start, result["timings"]

    loaded = memory("VmRSS")
    reset_peak()
    search, positions = update()
    first, _ = evaluate(positions)
    for _ in range(WARM_UP):
        move()
        evaluate(update()[1])
    peak = memory("VmHWM")
    on_cpu = device == "cpu"
    peak_gpu = None if on_cpu else evaluator.buffer_bytes / 1e6

    threads = int(evaluator.num_threads)
    before = ceilings(str(evaluator.dtype), threads) if on_cpu else None
    calculator = MoECalculator(
        from_text(case.package),
        device=device,
        dtype=case.dtype,
        check=False,
        allow_untrained=True,
        threads=case.threads,
    )
    twin = atoms.copy()
    twin.calc = calculator
    twin.get_forces()
    columns: dict[str, list[float]] = {"step": [], "update": [], "ase": []}
    timings: dict[str, list[float]] = {}
    for _ in range(case.steps):
        move()
        update_s, positions = update()
        full, parts_s = evaluate(positions)
        columns["step"].append(update_s + full)
        columns["update"].append(update_s)
        for name, seconds in parts_s.items():
            timings.setdefault(name, []).append(seconds)
        twin.positions = atoms.positions
        start = time.perf_counter()
        twin.get_forces()
        columns["ase"].append(time.perf_counter() - start)
    searches = [search]
    for _ in range(3):
        neighbor_list.reset()
        search, positions = update()
        searches.append(search)
    top = None
    if before is not None:
        after = ceilings(str(evaluator.dtype), threads)
        top = Ceilings(gemm=max(before.gemm, after.gemm), stream=max(before.stream, after.stream))

    assert held is not None
    architecture = read_architecture(from_text(case.package))
    counts = count_graph(
        architecture,
        types,
        held.edge_index,
        held.vectors(positions, atoms.cell.array[None]),
        float(evaluator.cutoff),
        float(evaluator.angle_cutoff),
    )
    parts = costs(architecture, counts, 8 if evaluator.dtype == "float64" else 4)
    total = total_cost(parts)
    median = {name: float(np.median(values)) for name, values in columns.items()}
    floor = None if top is None else total.flops / top.gemm
    size = Size(
        copies=case.copies,
        atoms=counts.atoms,
        edges=counts.edges,
        angles=counts.angles,
        load_s=load_s,
        first_s=searches[0] + first,
        step_s=columns["step"],
        step_p50_s=median["step"],
        step_p95_s=float(np.percentile(columns["step"], 95)),
        ase_p50_s=median["ase"],
        search_s=float(np.median(searches)),
        update_s=median["update"],
        timings={name: float(np.median(values)) for name, values in timings.items()},
        atom_steps_per_s=counts.atoms / median["step"],
        loaded_mb=loaded,
        peak_mb=None if loaded is None or peak is None else max(0.0, peak - loaded),
        peak_gpu_mb=peak_gpu,
        cost={name: PartCost(**vars(cost)) for name, cost in parts.items()},
        ceilings=top,
        floor_s=floor,
        with_recompute_s=None if top is None else (total.flops + total.recompute) / top.gemm,
        ratio=None if floor is None else median["step"] / floor,
    )
    about = {
        "dtype": str(evaluator.dtype),
        "device": device,
        "backend": str(evaluator.backend),
        "threads": threads,
        "machine": machine().model_dump(),
    }
    return size, about


def machine() -> Machine:
    """This machine."""
    import moecalc

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    affinity = getattr(os, "sched_getaffinity", None)
    return Machine(
        cpu=cpu,
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        gpu=_gpu_name(),
        numpy=np.__version__,
        moecalc=moecalc.__version__,
        python=platform.python_version(),
    )


def _gpu_name() -> str | None:
    try:
        found = gpus()
    except DriverError:
        return None
    return found[0].name if found else None


# --- all sizes ---------------------------------------------------------------------------------


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
        structure: file that ASE reads; None is `default_structure` of the package's elements.
        copies: how many copies of the structure to time, each in a process of its own.
        dtype: "float32" or "float64"; None is the package's.
        device: "cpu", "cuda", "cuda:N" or "auto".
        threads: CPU threads; None is OMP_NUM_THREADS, or the cores.
        steps: timed steps, after `WARM_UP`.
        progress: called with the name of each step.

    Raises:
        MoecalcError: wrong argument, or the smallest size could not be timed.
        PackageError: as `check_archive`.
        ElementError: the structure has an element that the package does not know.
        StructureError: unreadable or empty structure, or copies of one that is not periodic.
        ConditionError: charge, spin or frame parameters in the structure's `info` that the model cannot take, or that are missing.
    """
    from moecalc.models import default_model_path
    from moecalc.package.archive import read_metadata

    say = progress or (lambda _: None)
    for name, values in (("steps", [steps]), ("threads", [threads or 1]), ("copies", list(copies) or [0])):
        if min(values) < 1:
            raise MoecalcError(f"expected {name} of at least 1, got {min(values)}")
    path = default_model_path() if package is None else Path(package).expanduser().resolve()
    metadata = read_metadata(path)
    atoms = default_structure(metadata.elements) if structure is None else _read_structure(Path(structure))
    unknown = sorted(set(atoms.symbols) - set(metadata.elements))
    if unknown:
        raise ElementError(
            f"the structure contains {', '.join(unknown)}, expected only elements of {metadata.name}, {', '.join(metadata.elements)}: use another "
            f"structure or package"
        )
    try:
        conditions_of(atoms, metadata.conditions or ModelConditions(), {})
    except ConditionError as error:
        raise ConditionError(
            f"{error}, in `info` of the structure (--structure, extxyz with charge=0 spin=1 and the like)"
        ) from None
    for n in copies:
        repeated(atoms[:1] if n > 1 else atoms, n)
    sizes: list[Size] = []
    failures: list[Failure] = []
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="moecalc-bench-") as folder:
        file = Path(folder) / "structure.traj"
        atoms.calc = None
        atoms.write(file)
        for n in sorted(set(copies)):
            say(f"{n * len(atoms)} atoms")
            case = Case(
                package=display_text(path),
                structure=display_text(file),
                copies=n,
                dtype=dtype,
                device=device,
                threads=threads,
                steps=steps,
            )
            answer = _run(case)
            if "error" in answer:
                # a size that does not fit into memory must not cost the smaller ones
                if not sizes:
                    raise MoecalcError(str(answer["error"]))
                failures.append(Failure(copies=n, error=str(answer["error"])))
                continue
            sizes.append(Size.model_validate(answer["size"]))
            about = answer["about"]
    return Report(
        model=metadata.name,
        structure="built in" if structure is None else display_text(Path(structure).name),
        steps=steps,
        sizes=sizes,
        failures=failures,
        **about,
    )


def _read_structure(path: Path) -> Atoms:
    import ase.io

    if not path.is_file():
        raise StructureError(f"{path}: no such file, expected a structure that ASE reads")
    try:
        atoms = ase.io.read(path)
    except Exception as error:  # noqa: BLE001 - every format has its own errors
        raise StructureError(
            f"{path}: not a structure that ASE reads ({type(error).__name__}: {error})"
        ) from None
    if not isinstance(atoms, Atoms) or len(atoms) == 0:
        raise StructureError(f"{path}: expected a structure with atoms, got none")
    return atoms


def _run(case: Case) -> dict[str, Any]:
    """One case in a process of its own."""
    environment = os.environ.copy()
    if case.threads is not None:
        environment["OMP_NUM_THREADS"] = str(case.threads)
    done = subprocess.run(  # noqa: S603 - this program, with arguments made above
        [sys.executable, "-m", "moecalc.bench", json.dumps(case.model_dump())],  # ASCII in any locale
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"the process ended with code {done.returncode} (out of memory?)"
        return {"error": reason}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _main() -> int:
    case = Case.model_validate_json(sys.argv[1])
    try:
        size, about = measure(case)
    except (MoecalcError, RuntimeError, MemoryError, ImportError) as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return 1
    sys.stdout.write(json.dumps({"size": size.model_dump(), "about": about}) + "\n")
    return 0


# --- figure ------------------------------------------------------------------------------------


def check_plot_path(path: str | Path) -> None:
    """Refuse a figure that could not be written, before minutes are spent on it.

    Raises:
        MoecalcError: a suffix that matplotlib does not write, or no such folder.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lstrip(".").lower() not in Figure().canvas.get_supported_filetypes():
        raise MoecalcError(f"{path}: expected a file name that ends in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise MoecalcError(f"{path.parent}: no such folder, expected an existing one for the figure")


def save_plot(report: Report, path: str | Path) -> None:
    """Draw time per atom and memory against the number of atoms, and the shares of a step of the largest size.

    Raises:
        MoecalcError: as `check_plot_path`.
    """
    from matplotlib.figure import Figure

    check_plot_path(path)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    time_axes, memory_axes, share_axes = figure.subplots(1, 3)
    atoms = [size.atoms for size in report.sizes]
    per_atom = [1e6 * size.step_p50_s / size.atoms for size in report.sizes]
    upper = [1e6 * (size.step_p95_s - size.step_p50_s) / size.atoms for size in report.sizes]
    floor = [1e6 * size.floor_s / size.atoms for size in report.sizes if size.floor_s is not None]
    time_axes.errorbar(
        atoms, per_atom, yerr=[[0.0] * len(upper), upper], fmt="o-", capsize=3, label="median, 95 %"
    )
    if len(floor) == len(atoms):
        time_axes.plot(atoms, floor, "--", color="0.5", label="arithmetic floor")
    time_axes.set(xlabel="atoms", ylabel="µs per atom and step", xscale="log")
    time_axes.legend(frameon=False)
    peak = [size.peak_mb if size.peak_gpu_mb is None else size.peak_gpu_mb for size in report.sizes]
    if all(value is not None for value in peak):
        memory_axes.plot(atoms, peak, "o-")
    memory_axes.set(xlabel="atoms", ylabel="peak memory, MB", xscale="log")
    for axes in (time_axes, memory_axes):
        axes.set_xticks(atoms, [str(n) for n in atoms])
        axes.set_xticks([], minor=True)
        axes.margins(0.1)
        axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
    last = report.sizes[-1]
    shares = breakdown(last)
    share_axes.barh([row[0] for row in shares], [1e3 * row[1] for row in shares])
    share_axes.invert_yaxis()
    share_axes.set(xlabel=f"ms per step, {last.atoms} atoms")
    figure.suptitle(
        f"{report.model}, {report.dtype} on {report.device}, {report.threads} thread{'s' * (report.threads > 1)}",
        fontsize="medium",
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)


def part_costs(size: Size) -> dict[str, Cost]:
    """The costs of a size as `moecalc.costs` has them, in the order of the tables."""
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


if __name__ == "__main__":
    sys.exit(_main())
