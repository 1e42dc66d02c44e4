"""Time and memory of energy + forces per call, through the ASE calculator.

Cases: the default model on a 128-atom NbMoTaW alloy, and a full-size DPA3 on water, each in float32 and float64. Every case
runs in a process of its own, so that its memory is its own. See README.md beside this file.

    python benchmarks/benchmark.py --json out.json
    python benchmarks/benchmark.py --checkpoint dpa3.pt --structure water.extxyz
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.build import bulk

from moecalc.bench import water

# Angstrom; like one MD step of 1 fs at room temperature: new positions, and a neighbour list that is rarely searched
STEP = 0.002
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """One line of the table, and all that its process needs."""

    label: str
    structure: str
    dtype: str
    device: str
    repeat: int
    threads: int | None
    model: str | None = None


def alloy() -> Atoms:
    """128 atoms of bcc NbMoTaW, elements in random places, slightly displaced."""
    rng = np.random.default_rng(1)
    atoms = bulk("Nb", "bcc", a=3.24, cubic=True) * (4, 4, 4)
    symbols = np.repeat(["Nb", "Mo", "Ta", "W"], len(atoms) // 4)
    atoms.symbols = rng.permutation(symbols)
    atoms.positions += rng.normal(scale=0.05, size=atoms.positions.shape)
    return atoms


def random_checkpoint(path: Path) -> None:
    """A full-size DPA3 for O and H with random weights: timing does not depend on what the weights are."""
    import torch

    from moecalc.nn import ModelConfig, MoEPotential
    from moecalc.package.importers import save_checkpoint

    config = ModelConfig.model_validate(
        {
            "type_map": ["O", "H"],
            "descriptor": {
                "n_dim": 128, "e_dim": 64, "a_dim": 32, "nlayers": 6,
                "e_rcut": 6.0, "e_rcut_smth": 5.3, "e_sel": 1200,
                "a_rcut": 4.0, "a_rcut_smth": 3.5, "a_sel": 300,
                "axis_neuron": 4, "a_compress_rate": 1, "a_compress_e_rate": 2, "a_compress_use_split": True,
                "smooth_edge_update": True, "edge_init_use_dist": True, "use_exp_switch": True,
                "use_dynamic_sel": True, "activation_function": "silut:10.0", "precision": "float32",
            },
            "fitting": {
                "neuron": [240, 240, 240], "activation_function": "silut:10.0", "precision": "float32",
            },
        }
    )  # fmt: skip
    torch.manual_seed(1)
    save_checkpoint(path, MoEPotential(config), config)


def memory(field: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process in MB (1e6 bytes)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {field}: this benchmark needs Linux")


def reset_peak() -> None:
    """Forget the peak memory of importing and loading."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def count_neighbors(atoms: Atoms, cutoff: float, angle_cutoff: float) -> tuple[int, int]:
    """Directed edges within the cutoff, and angles (ordered pairs of edges of one atom, j = k included)."""
    from matscipy.neighbours import neighbour_list

    i, r = neighbour_list("id", atoms, cutoff)
    per_atom = np.bincount(i[r < angle_cutoff], minlength=len(atoms))
    return len(i), int((per_atom.astype(np.int64) ** 2).sum())


def measure(case: Case) -> dict[str, Any]:
    """Run one case in this process.

    Returns:
        Times of all calls (s), their median and 95th percentile, peak memory above the loaded process (MB), and what was run.
    """
    import torch

    from moecalc import MoECalculator

    # a random model was not trained on any neighbour counts
    warnings.filterwarnings("ignore", message="an atom has .* neighbours")
    atoms = ase.io.read(case.structure)
    calculator = MoECalculator(
        case.model,
        device=case.device,
        dtype=case.dtype,
        check=False,
        threads=case.threads,
        allow_untrained=True,
    )
    atoms.calc = calculator
    cuda = calculator.device.startswith("cuda")
    loaded = memory("VmRSS")
    reset_peak()
    rng = np.random.default_rng(0)
    times = []
    for call in range(WARM_UP + case.repeat):
        atoms.positions += rng.normal(scale=STEP, size=atoms.positions.shape)
        start = time.perf_counter()
        atoms.get_forces()  # results reach the CPU, so this waits for a GPU; energy and stress come with it
        if call >= WARM_UP:
            times.append(time.perf_counter() - start)
    edges, angles = count_neighbors(atoms, calculator.cutoff, calculator.metadata["angle_cutoff"])
    result = {
        "label": case.label,
        "model": calculator.metadata["name"],
        "dtype": calculator.dtype,
        "device": calculator.device,
        "threads": torch.get_num_threads(),
        "atoms": len(atoms),
        "edges": edges,
        "angles": angles,
        "calls": len(times),
        "median_s": float(np.median(times)),
        "p95_s": float(np.percentile(times, 95)),
        "us_per_atom": float(np.median(times)) / len(atoms) * 1e6,
        "loaded_mb": loaded,
        "peak_mb": max(0.0, memory("VmHWM") - loaded),
        "times_s": times,
    }
    if cuda:
        # filled through torch's allocator by the native library as well
        result["peak_gpu_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return result


def run_case(case: Case) -> dict[str, Any]:
    """Run one case in a process of its own."""
    command = [sys.executable, __file__, "--case", json.dumps(asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        # one case that does not fit into memory must not cost the others
        return {"label": case.label, "dtype": case.dtype, "device": case.device, "error": last[0]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    import torch

    import moecalc

    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "moecalc": moecalc.__version__,
        "python": platform.python_version(),
    }


def show(results: list[dict[str, Any]], about: dict[str, Any]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"energy + forces per call, {about['cpu']}, torch {about['torch']}", title_justify="left"
    )
    for name in (
        "case",
        "dtype",
        "device",
        "atoms",
        "edges",
        "angles",
        "median ms",
        "p95 ms",
        "us/atom",
        "peak MB",
    ):
        table.add_column(name, justify="left" if name in {"case", "dtype", "device"} else "right")
    for r in results:
        if "error" in r:
            table.add_row(r["label"], r["dtype"], r["device"], "[red]failed:[/] " + r["error"])
            continue
        device = r["device"] if r["device"] != "cpu" else f"cpu x{r['threads']}"
        table.add_row(
            r["label"], r["dtype"], device, str(r["atoms"]), str(r["edges"]), str(r["angles"]),
            f"{1e3 * r['median_s']:.1f}", f"{1e3 * r['p95_s']:.1f}", f"{r['us_per_atom']:.0f}", f"{r['peak_mb']:.0f}",
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def say(message: str) -> None:
    """Progress, apart from the results."""
    print(message, file=sys.stderr, flush=True)


def full_size_package(checkpoint: Path | None, folder: Path) -> Path:
    """The package to time: made of the checkpoint, or of random weights; one that is given as a package is used as it is."""
    if checkpoint is not None and checkpoint.name.endswith(".moe.pt"):
        return checkpoint
    from moecalc.package import package_checkpoint

    if checkpoint is None:
        checkpoint = folder / "dpa3_random.pt"
        random_checkpoint(checkpoint)
    out = folder / f"{checkpoint.stem}.moe.pt"
    package_checkpoint(checkpoint, out, progress=lambda step: say(f"packaging {checkpoint.name}: {step}"))
    return out


def main() -> int:
    """Parse the command line, run all cases, print the table and write the JSON; 1 if a case failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="package for the alloy; default: the one that comes with moecalc"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="full-size checkpoint or package; default: random weights"
    )
    parser.add_argument("--structure", type=Path, help="structure for it; default: 64 molecules of water")
    parser.add_argument("--skip", choices=("alloy", "full"), help="leave out one of the two models")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="default: both")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N (default: cpu)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: what torch chooses)")
    parser.add_argument("--repeat", type=int, default=7, help="timed calls, at least 5 (default: 7)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(Case(**json.loads(arguments.case)))))
        return 0
    if arguments.repeat < 5:
        parser.error(f"--repeat {arguments.repeat}, expected at least 5: fewer calls give no percentile")
    for path in (arguments.model, arguments.checkpoint, arguments.structure):
        if path is not None and not path.is_file():
            parser.error(f"{path}: no such file")
    with tempfile.TemporaryDirectory(prefix="moecalc-benchmark-") as temporary:
        folder = Path(temporary)
        runs: list[tuple[str, Path, str | None]] = []
        if arguments.skip != "alloy":
            ase.io.write(folder / "alloy.extxyz", alloy())
            label = (
                "default model" if arguments.model is None else arguments.model.name.removesuffix(".moe.pt")
            )
            model = str(arguments.model.resolve()) if arguments.model else None
            runs.append((f"{label}, NbMoTaW", folder / "alloy.extxyz", model))
        if arguments.skip != "full":
            structure = arguments.structure
            if structure is None:
                structure = folder / "water.extxyz"
                ase.io.write(structure, water())
            package = full_size_package(arguments.checkpoint, folder)
            label = package.name.removesuffix(".moe.pt")
            runs.append((f"{label}, {structure.stem}", structure.resolve(), str(package.resolve())))
        results = []
        for label, structure, model in runs:
            for dtype in (arguments.dtype,) if arguments.dtype else ("float32", "float64"):
                say(f"timing {label} in {dtype} on {arguments.device}")
                results.append(
                    run_case(
                        Case(
                            label,
                            str(structure),
                            dtype,
                            arguments.device,
                            arguments.repeat,
                            arguments.threads,
                            model,
                        )
                    )
                )
    about = machine()
    show(results, about)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"machine": about, "results": results}, indent=1) + "\n", encoding="utf-8"
        )
        say(f"wrote {arguments.json}")
    return int(any("error" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
