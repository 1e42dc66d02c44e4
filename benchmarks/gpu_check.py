"""The Python parts of gpu_check.sh: first results, timings, transfers per step, the largest system that fits.

python benchmarks/gpu_check.py --json gpu.json [--dry-run] [--peer-python PYTHON --peer-model MODEL ...]
python benchmarks/gpu_check.py --smoke
python benchmarks/gpu_check.py --only-steps 8

Every measurement is a process of its own, so that one that runs out of memory stops no other; with
`--one-process` they share one, which saves the start of the driver for each. `--dry-run` goes through all of it
with the emulated kernels, a small model and 24 atoms: its times mean nothing. torch makes the models, and its
profiler counts the transfers. Without torch, give models with `--packages`; nothing is counted then.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime as dt
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

DRIVE = Path(__file__).parent / "peers" / "drive.py"
COPIES = (1, 8, 52, 260)  # of 192 atoms of water: 192 to 49,920 atoms
MODELS = {"dense": 0, "moe": 8}  # routed experts, of which 2 are active beside 1 shared
PRECISIONS = ("fp32", "fp32-ffma", "bf16x3", "tf32", "fp16", "float64")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
TIME_LIMIT = 120.0  # seconds for one measurement
MOST_IN_FLOAT64 = 10_000  # atoms; more do not fit on every device
# Of the first results: deviation of forces from the CPU in float64, relative to the largest force
BOUNDS = {"fp32": 1e-4, "fp32-ffma": 1e-4, "bf16x3": 1e-3, "tf32": 3e-2, "fp16": 3e-2, "float64": 1e-8}
SMALL = "small"  # the package that the sanitizer runs


def water(copies: int, *, dry_run: bool) -> Any:
    """Copies of 192 atoms (dry run: of 24)."""
    from moecalc import benchmark

    return benchmark.repeated(benchmark.water(2 if dry_run else 4), copies)


def write_package(path: Path, n_routed: int, *, dry_run: bool) -> None:
    """Full-size DPA3 with random weights (dry run: the same in small)."""
    from moecalc import testing

    small: dict[str, Any] = (
        {"n_dim": 16, "e_dim": 8, "a_dim": 8, "nlayers": 2, "neuron": (8, 8)} if dry_run else {}
    )
    testing.write_random_package(path, testing.full_size_config(["O", "H"], n_routed=n_routed, **small))


def made_packages(folder: Path, *, dry_run: bool) -> dict[str, str]:
    """The packages of `MODELS` in a folder; those that are missing are written."""
    packages = {}
    folder.mkdir(parents=True, exist_ok=True)
    for model, n_routed in MODELS.items():
        path = folder / f"{model}.moe.pt"
        if not path.exists():
            write_package(path, n_routed, dry_run=dry_run)
        packages[model] = str(path.resolve())
    return packages


def small_package(folder: Path) -> str:
    """A mixture of experts that is small enough for a sanitizer; written where it is missing."""
    path = folder / f"{SMALL}.moe.pt"
    if not path.exists():
        write_package(path, MODELS["moe"], dry_run=True)
    return str(path.resolve())


def evaluator_of(spec: dict[str, Any]) -> Any:
    """The model on the device, with the CUDA kernels or not at all."""
    from moecalc import _lib

    double = spec["precision"] == "float64"
    return _lib.load().Evaluator(
        spec["model"],
        spec["device"],
        "float64" if double else "float32",
        "fp32" if double else spec["precision"],
        spec["backend"],
    )


def device_memory_in_use() -> int | None:
    """Bytes of the device that are taken, by whatever program; None where there is none.

    To be called after an evaluation, which chooses the device.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    if driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)):
        return None
    return total.value - free.value


class Steps:
    """Evaluations as in dynamics: one list with a skin of 1 A, atoms that move a little before each."""

    def __init__(self, spec: dict[str, Any]) -> None:
        import numpy as np

        from moecalc.neighbors import SkinNeighborList

        self.model = evaluator_of(spec)
        self.atoms = water(spec["copies"], dry_run=spec["dry_run"])
        types = np.array([self.model.elements.index(symbol) for symbol in self.atoms.symbols])
        pairs, self.positions = SkinNeighborList(self.model.cutoff, 1.0).pairs(self.atoms)
        self.model.set_list(types, pairs.edge_index, pairs.edge_shift, pairs.system_index)
        self.cells = self.atoms.cell.array[None]
        self.rng = np.random.default_rng(0)

    def step(self) -> dict[str, Any]:
        """Energy and forces, as a step of NVE needs them."""
        moved = self.positions + self.rng.normal(scale=0.002, size=self.positions.shape)
        result: dict[str, Any] = self.model.evaluate(moved, self.cells, virial=False)
        return result


def measure_time(spec: dict[str, Any]) -> dict[str, Any]:
    """Median time of a step, and the device memory in use."""
    steps = Steps(spec)
    start = time.perf_counter()
    result = steps.step()
    first = time.perf_counter() - start
    times = []
    for call in range(spec["warm_up"] + spec["steps"]):
        start = time.perf_counter()
        steps.step()
        if call >= spec["warm_up"]:
            times.append(time.perf_counter() - start)
    n = len(steps.atoms)
    estimate = steps.model.estimate_bytes(n, result["n_edge"], result["n_angle"])
    return {
        "backend": steps.model.backend,
        "atoms": n,
        "edges": result["n_edge"],
        "angles": result["n_angle"],
        "step_s": statistics.median(times),
        "slowest_s": max(times),
        "first_s": first,
        "list_s": result["timings"].get("list"),
        "buffer_bytes": steps.model.buffer_bytes,
        "estimate_bytes": estimate,
        "device_bytes_in_use": device_memory_in_use(),
    }


def measure_calculator(spec: dict[str, Any]) -> dict[str, Any]:
    """The same through the ASE calculator, whose list decides at every step whether it still serves."""
    from moecalc import MoECalculator

    steps = Steps(spec)
    double = spec["precision"] == "float64"
    atoms = steps.atoms
    atoms.calc = MoECalculator(
        spec["model"],
        device=spec["device"],
        dtype="float64" if double else "float32",
        precision="fp32" if double else spec["precision"],
        backend=spec["backend"] or None,
        check=False,
        allow_untrained=True,
    )
    times = []
    for call in range(spec["warm_up"] + spec["steps"]):
        atoms.positions += steps.rng.normal(scale=0.002, size=atoms.positions.shape)
        start = time.perf_counter()
        atoms.get_forces()
        if call >= spec["warm_up"]:
            times.append(time.perf_counter() - start)
    return {"atoms": len(atoms), "step_s": statistics.median(times)}


def measure_transfers(spec: dict[str, Any]) -> dict[str, Any]:
    """What one step asks of the CUDA runtime: launches, copies by direction, waits.

    The profiler of torch sees all calls of the process.
    """
    if importlib.util.find_spec("torch") is None:
        return {"left_out": "not counted: torch, whose profiler counts them, is not installed"}
    import torch
    from torch.profiler import ProfilerActivity, profile

    steps = Steps(spec)
    for _ in range(spec["warm_up"]):
        steps.step()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        for _ in range(spec["steps"]):
            steps.step()
    counts = {event.key: event.count / spec["steps"] for event in profiler.key_averages()}

    def total(*words: str) -> float:
        return sum(count for key, count in counts.items() if any(word in key for word in words))

    return {
        "waits": total(*WAITS),
        "copies_up": total("Memcpy HtoD"),
        "copies_down": total("Memcpy DtoH"),
        "launches": total("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"),
        "per_step": {key: count for key, count in counts.items() if key.startswith(("cuda", "cu", "Mem"))},
    }


def measure_sanitized(spec: dict[str, Any]) -> dict[str, Any]:
    """A few steps, for compute-sanitizer to look at."""
    steps = Steps(spec)
    return {"energy": [float(steps.step()["energy"][0]) for _ in range(2)]}


def measure_smoke(spec: dict[str, Any]) -> dict[str, Any]:
    """Forces of one evaluation against the CPU in float64."""
    import numpy as np

    steps = Steps(spec)
    got = steps.model.evaluate(steps.positions, steps.cells)
    reference = Steps({**spec, "device": "cpu", "backend": "", "precision": "float64"})
    want = reference.model.evaluate(steps.positions, steps.cells)
    scale = np.abs(want["forces"]).max()
    deviation = float(np.abs(got["forces"] - want["forces"]).max() / scale)
    bound = BOUNDS[spec["precision"]]
    result = {"backend": steps.model.backend, "atoms": len(steps.atoms), "deviation": deviation}
    if not deviation <= bound:
        result["error"] = f"forces deviate by {deviation:.2g} of the largest, expected at most {bound:g}"
    return result


MEASUREMENTS = {
    "smoke": measure_smoke,
    "time": measure_time,
    "calculator": measure_calculator,
    "transfers": measure_transfers,
    "sanitized": measure_sanitized,
}


def run(kind: str, spec: dict[str, Any], prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """A measurement in a process of its own: its result, or `error` and the last line that it wrote.

    With `one_process` in `spec`, in this one.
    """
    if spec.get("one_process") and not prefix:
        try:
            return MEASUREMENTS[kind](spec)
        except Exception as error:  # noqa: BLE001 - the others go on
            return {"error": str(error).splitlines()[-1] if str(error) else type(error).__name__}
    environment = dict(os.environ)
    environment.pop("MOECALC_BACKEND", None)
    command = [*prefix, sys.executable, __file__, "--measure", kind, json.dumps(spec)]
    return _run(command, environment)


def _run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    from moecalc.benchmark import ProcessError, answer_of

    try:
        return answer_of(command, environment, seconds=TIME_LIMIT)
    except ProcessError as error:
        return {"error": str(error)}


def largest(spec: dict[str, Any], limit: int) -> dict[str, Any]:
    """The largest number of copies that fits.

    It is doubled until it fails, then the interval is halved until it is known within 5 %.
    """
    good, bad, last = 0, limit + 1, {}
    copies = 1
    while copies < bad:
        result = run("time", {**spec, "copies": copies, "warm_up": 0, "steps": 1})
        if "error" in result:
            bad, last = copies, result
        else:
            good, best = copies, result
        if bad - good <= max(1, good // 20):
            break
        copies = min(2 * good, limit) if bad > limit else (good + bad) // 2
        if copies == good:
            break
    if good == 0:
        return last
    return {**best, "copies": good, "stopped_by": last.get("error", f"the limit of {limit} copies")}


def peer(options: argparse.Namespace, model: str, copies: int, folder: Path) -> dict[str, Any]:
    """One size through DeePMD-kit: `.pth` or `.pt2` in its LAMMPS."""
    from ase.data import atomic_masses, atomic_numbers

    atoms = water(copies, dry_run=options.dry_run)
    data = folder / f"water{len(atoms)}.data"
    if not data.exists():
        x, y, z = atoms.cell.lengths()
        lines = [
            "water\n",
            f"{len(atoms)} atoms\n2 atom types\n",
            f"0 {x} xlo xhi\n0 {y} ylo yhi\n0 {z} zlo zhi\n",
        ]
        masses = [f"{k + 1} {atomic_masses[atomic_numbers[e]]}" for k, e in enumerate("OH")]
        rows = [
            f"{k + 1} {'OH'.index(s) + 1} {p[0]:.12g} {p[1]:.12g} {p[2]:.12g}"
            for k, (s, p) in enumerate(zip(atoms.symbols, atoms.positions, strict=True))
        ]
        data.write_text("\n".join([*lines, "Masses\n", *masses, "\nAtoms # atomic\n", *rows, ""]))
    spec = {
        "code": "deepmd",
        "engine": "lammps",
        "data": str(data),
        "pair_style": f"deepmd {Path(model).resolve()}",
        "pair_coeff": "O H",
        "log": str(folder / "log.peer"),
        "warm_up": 3,
        "steps": 10,
    }
    environment = dict(os.environ)
    libraries = sorted(options.peer_python.parent.parent.glob("lib/python3.*/site-packages/nvidia/*/lib"))
    paths = [str(path) for path in libraries] + [p for p in [os.environ.get("LD_LIBRARY_PATH")] if p]
    environment["LD_LIBRARY_PATH"] = ":".join(paths)
    result = _run([str(options.peer_python), str(DRIVE), json.dumps(spec)], environment)
    result.pop("forces", None)
    return {**result, "atoms": len(atoms)}


def describe(*, dry_run: bool) -> dict[str, Any]:
    """The device, and the versions of what runs on it."""
    from moecalc import __version__

    found: dict[str, Any] = {
        "device": "emulated on the CPU",
        "moecalc": __version__,
        "torch": _version("torch"),
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
    }
    if not dry_run:
        cuda = cuda_info()
        first = cuda["devices"][0]
        found |= {"device": first["name"], "memory_bytes": first["memory"], "cuda": cuda}
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_info() -> dict[str, Any]:
    """What libmoecalc_cuda.so says of itself, the driver and the devices (cpp/backends/cuda/interface.h).

    Raises:
        SystemExit: it was not built, or sees no device.
    """
    import moecalc

    path = Path(moecalc.__file__).with_name("libmoecalc_cuda.so")
    if not path.exists():
        raise SystemExit(f"{path}: no such file: build moecalc with MOECALC_CUDA=1, or use --dry-run")
    function = ctypes.CDLL(str(path)).moecalc_cuda_info
    function.restype = ctypes.c_char_p
    info: dict[str, Any] = json.loads(function())
    if not info["devices"]:
        raise SystemExit(f"{path} sees no GPU ({info['error']}): see nvidia-smi, or use --dry-run")
    return info


def shown_row(row: dict[str, Any]) -> str:
    """One line for a time, to be printed as soon as it is known."""
    name = f"{row['model']} {row['runs']}"
    if "error" in row:
        return f"{name}: {row['error']}"
    if "deviation" in row:
        return f"{name}, {row['backend']}: forces within {row['deviation']:.1e} of the CPU's in float64"
    return f"{name}, {row['atoms']} atoms: {1e3 * row['step_s']:.3f} ms/step"


def save(results: dict[str, Any], path: Path | None) -> None:
    """What is known up to now; a run that is ended early leaves a whole file."""
    if path is None:
        return
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(results, indent=1) + "\n")
    unfinished.replace(path)


def report(results: dict[str, Any]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    machine = results["machine"]
    table = Table(
        "model", "runs", "atoms", "ms/step", "us/atom", "GB", "against dense",
        title=f"{machine['device']}, {machine['date']}",
    )  # fmt: skip
    dense = {
        (r["runs"], r["atoms"]): r["step_s"]
        for r in results["times"]
        if r["model"] == "dense" and "step_s" in r
    }
    for row in results["times"]:
        if "error" in row:
            table.add_row(row["model"], row["runs"], str(row.get("atoms", "")), row["error"][:70])
            continue
        reference = dense.get((row["runs"], row["atoms"]))
        table.add_row(
            row["model"],
            row["runs"],
            str(row["atoms"]),
            f"{1e3 * row['step_s']:.3f}",
            f"{1e6 * row['step_s'] / row['atoms']:.3f}",
            f"{row['buffer_bytes'] / 1e9:.2f}" if "buffer_bytes" in row else "",
            f"{row['step_s'] / reference:.2f}" if reference and row["model"] == "moe" else "",
        )
    console = Console(width=max(100, Console().width))
    console.print(table)
    for name, row in results["largest"].items():
        what = row["error"] if "error" in row else f"{row['atoms']} atoms ({row['stopped_by']})"
        console.print(f"largest system, {name}: {what}", soft_wrap=True)
    moved = results["transfers"]
    if reason := moved.get("error", moved.get("left_out")):
        console.print(f"transfers per step: {reason}", soft_wrap=True)
    elif "launches" in moved:
        console.print(
            f"per step: {moved['launches']:g} launches, {moved['copies_up']:g} copies to the device, "
            f"{moved['copies_down']:g} back, {moved['waits']:g} waits of the host",
            soft_wrap=True,
        )


class Results:
    """What is known up to now: every row is printed and saved at once."""

    def __init__(self, path: Path | None, *, dry_run: bool) -> None:
        self.path = path
        self.known: dict[str, Any] = {
            "machine": describe(dry_run=dry_run), "smoke": [], "times": [], "largest": {}, "transfers": {},
        }  # fmt: skip

    def add(self, part: str, row: dict[str, Any]) -> None:
        """One row of `smoke` or `times`."""
        self.known[part].append(row)
        print(shown_row(row), flush=True)
        save(self.known, self.path)

    def put(self, part: str, value: dict[str, Any]) -> None:
        """All of `transfers`, or one entry of `largest`."""
        self.known[part] |= value
        save(self.known, self.path)

    def failed(self) -> bool:
        """Whether a measurement of moecalc itself failed; peers may."""
        times = [row for row in self.known["times"] if not row["runs"].startswith("DeePMD")]
        return any("error" in row for row in [*self.known["smoke"], *times, self.known["transfers"]])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="moecalc on a GPU: times, transfers, largest system")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--dry-run", action="store_true", help="emulated kernels, a small model, 24 atoms")
    parser.add_argument("--smoke", action="store_true", help="one evaluation of every format, and no times")
    parser.add_argument("--only-steps", type=int, metavar="COPIES", help="a few steps, for a profiler")
    parser.add_argument("--one-process", action="store_true", help="no process of its own for each")
    parser.add_argument("--copies", type=int, nargs="+", help="of 192 atoms of water (1 8 52 260)")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--largest", type=int, default=2000, help="copies to stop at; 0: do not look for it")
    parser.add_argument("--no-transfers", action="store_true", help="do not count copies and waits")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--peer-python", type=Path, help="Python of an environment with DeePMD-kit and its LAMMPS"
    )
    parser.add_argument("--peer-model", nargs="*", default=[], help="its models, .pth or .pt2")
    parser.add_argument("--only-peers", action="store_true", help="times of these, and none of moecalc")
    parser.add_argument(
        "--packages",
        type=Path,
        help="folder of dense.moe.pt, moe.moe.pt and small.moe.pt; made where missing, which needs torch",
    )
    parser.add_argument("--sanitizer", help="compute-sanitizer: check a few steps with it, and nothing else")
    options = parser.parse_args()
    if bool(options.peer_model) != (options.peer_python is not None):
        parser.error("expected --peer-python and --peer-model together: the environment and what it runs")
    return options


def smoke(options: argparse.Namespace, base: dict[str, Any], packages: dict[str, str]) -> int:
    """One evaluation of every model in every format, all in this process."""
    results = Results(options.json, dry_run=options.dry_run)
    for model, path in packages.items():
        for precision in options.precisions:
            spec = {**base, "model": path, "precision": precision, "copies": 1, "one_process": True}
            results.add("smoke", {"model": model, "runs": precision, **run("smoke", spec)})
    return int(results.failed())


def measure_times(
    options: argparse.Namespace,
    base: dict[str, Any],
    packages: dict[str, str],
    folder: Path,
    results: Results,
) -> None:
    """All sizes, the smallest first, and DeePMD-kit beside them."""
    for size in options.copies or ((1,) if options.dry_run else COPIES):
        for model, path in packages.items() if not options.only_peers else ():
            for precision in options.precisions:
                if precision == "float64" and 192 * size > MOST_IN_FLOAT64:
                    continue
                spec = {**base, "model": path, "precision": precision, "copies": size}
                results.add("times", {"model": model, "runs": precision, **run("time", spec)})
            spec = {**base, "model": path, "precision": "fp32", "copies": size}
            results.add("times", {"model": model, "runs": "fp32, ASE", **run("calculator", spec)})
        for file in options.peer_model:
            row = {"model": "dense", "runs": f"DeePMD-kit {Path(file).suffix}"}
            results.add("times", {**row, **peer(options, file, size, folder)})


def main() -> int:
    """Measure all, print the table, write the JSON; the exit code is 1 if a measurement of moecalc failed."""
    options = parsed()
    dry = options.dry_run
    base = {
        "device": "cpu" if dry else "cuda:0",
        "backend": "cuda-emulation" if dry else "",
        "dry_run": dry,
        "warm_up": 1 if dry else 5,
        "steps": 2 if dry else options.steps,
        "one_process": options.one_process,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.sanitizer:
            small = small_package(options.packages or folder)
            return _sanitize(options.sanitizer, {**base, "model": small, "copies": 1})
        packages = made_packages(options.packages or folder, dry_run=dry)
        if options.packages and importlib.util.find_spec("torch"):
            small_package(options.packages)
        fp32 = {**base, "precision": "fp32"}
        if options.smoke:
            return smoke(options, base, packages)
        if options.only_steps:
            print(measure_sanitized({**fp32, "model": packages["dense"], "copies": options.only_steps}))
            return 0
        results = Results(options.json, dry_run=dry)
        measure_times(options, base, packages, folder, results)
        if not (options.no_transfers or options.only_peers):
            spec = {**fp32, "model": packages["moe"], "copies": 1, "one_process": False}
            results.put("transfers", run("transfers", spec))
        if options.largest and not options.only_peers:
            limit = min(options.largest, 2) if dry else options.largest
            for model, path in packages.items():
                spec = {**fp32, "model": path, "one_process": False}
                results.put("largest", {model: largest(spec, limit)})
        for file in options.peer_model if options.largest else ():
            results.put("largest", {Path(file).name: _largest_of_peer(options, file, folder)})
    report(results.known)
    return int(results.failed())


def _largest_of_peer(options: argparse.Namespace, file: str, folder: Path) -> dict[str, Any]:
    """By doubling alone: its failures take long."""
    size, best, result = 1, None, {}
    while "error" not in result and size <= options.largest:
        result = peer(options, file, size, folder)
        if "error" not in result:
            best = result
        size *= 2
    return {**(best or {}), "stopped_by": result.get("error", "the limit")} if best else result


def _sanitize(program: str, spec: dict[str, Any]) -> int:
    failed = 0
    for tool in ("racecheck", "memcheck", "initcheck", "synccheck"):
        prefix = (program, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all")
        for precision in ("fp32", "tf32", "bf16x3"):
            result = run("sanitized", {**spec, "precision": precision}, prefix)
            print(f"compute-sanitizer {tool}, {precision}: {result.get('error', 'clean')}", flush=True)
            failed |= "error" in result
    return failed


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(MEASUREMENTS[sys.argv[2]](json.loads(sys.argv[3]))))
        sys.exit(0)
    sys.exit(main())
