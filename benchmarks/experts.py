"""What experts cost: a dense full-size model against mixtures of experts.

The mixtures have 8 and 64 routed experts (2 active, 1 shared), and 8 linear experts that merge.

All models have random weights and the same widths, and are timed in turn, step by step, in one process: what
else the machine does meets all of them alike.

    python benchmarks/experts.py --threads 2 --rounds 15 --json experts.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path

import ase.io
import numpy as np

from moecalc import MoECalculator, testing
from moecalc.benchmark import evaluation_costs, isolated_ceilings, machine, total_cost, water

MODELS: dict[str, dict[str, object]] = {
    "dense": {},
    "MoE, 8 routed": {"n_routed": 8},
    "MoE, 64 routed": {"n_routed": 64},
    "MoLE, 8 routed": {"n_routed": 8, "kind": "linear"},
}
WARM_UP = 2


def main() -> int:
    """Write the packages, time them in turn, print the table and write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--structure", type=Path, help="of O and H; default: 64 molecules of water")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each model, at least 5")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error(f"--rounds {arguments.rounds}, expected at least 5: fewer give no median worth the name")
    if arguments.structure is not None and not arguments.structure.is_file():
        parser.error(f"{arguments.structure}: no such file")
    warnings.filterwarnings("ignore", message="an atom has .* neighbou?rs")
    atoms = water() if arguments.structure is None else ase.io.read(arguments.structure)
    results: dict[str, dict[str, float]] = {}
    calculators = {}
    with tempfile.TemporaryDirectory(prefix="moecalc-experts-") as folder:
        for number, (name, options) in enumerate(MODELS.items()):
            print(f"writing {name}", file=sys.stderr, flush=True)
            package = Path(folder) / f"{number}.moe.pt"
            testing.write_random_package(package, testing.full_size_config(**options), arguments.dtype)
            calculators[name] = MoECalculator(package, device="cpu", threads=arguments.threads, check=False)
            _, parts = evaluation_costs(package, atoms)
            results[name] = {"gflop": total_cost(parts).flops / 1e9}
        times: dict[str, list[float]] = {name: [] for name in MODELS}
        rng = np.random.default_rng(0)
        for step in range(WARM_UP + arguments.rounds):
            atoms.positions += rng.normal(scale=0.002, size=atoms.positions.shape)
            for name, calculator in calculators.items():
                start = time.perf_counter()
                calculator.get_property("forces", atoms)
                if step >= WARM_UP:
                    times[name].append(time.perf_counter() - start)
    dense = float(np.median(times["dense"]))
    print(f"\n| model | GFLOP | ms per step | times dense | GFLOP times dense |\n|{'---|' * 5}")
    for name, result in results.items():
        result["median_s"] = float(np.median(times[name]))
        # each step against the dense one beside it
        result["ratio"] = float(np.median(np.array(times[name]) / np.array(times["dense"])))
        work = result["gflop"] / results["dense"]["gflop"]
        print(
            f"| {name} | {result['gflop']:.1f} | {1e3 * result['median_s']:.0f} | {result['ratio']:.2f} | {work:.2f} |"
        )
    ratio = results["MoE, 64 routed"]["ratio"] / results["MoE, 8 routed"]["ratio"]
    print(f"\n64 against 8 routed experts: {ratio:.3f} (dense: {1e3 * dense:.0f} ms)")
    if arguments.json:
        about = {
            **machine().model_dump(),
            "threads": arguments.threads,
            "dtype": arguments.dtype,
            **isolated_ceilings(arguments.dtype, arguments.threads).model_dump(),
        }
        record = {"machine": about, "atoms": len(atoms), "results": results, "times_s": times}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
