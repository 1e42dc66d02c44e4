"""Compare kinds and sizes of models, trained alike: errors on held-out frames, and cost of the packages.

    python benchmarks/search.py train.extxyz.gz --steps 3000 --folder search

Every variant is trained as by `moecalc fit` and packaged. Its cost is the arithmetic of one evaluation of the
package on a hot 128-atom alloy, of the last four elements, relative to the first variant. A variant that is
finished is read, one that was interrupted goes on: give the same command again.
Results: a table, and `search.json` in the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols

from moecalc.benchmark import evaluation_costs, total_cost
from moecalc.data import check_frames, read_frames, split_frames
from moecalc.nn import POSITIONS, ModelConfig
from moecalc.package import package_checkpoint
from moecalc.testing import bulk_alloy
from moecalc.training.fit import Options, begin
from moecalc.training.graphs import to_frame

BASE: dict[str, Any] = {
    "n_dim": 64,
    "e_dim": 32,
    "a_dim": 16,
    "nlayers": 3,
    "e_rcut": 5.4,
    "e_rcut_smth": 4.7,
    "e_sel": 500,
    "a_rcut": 4.0,
    "a_rcut_smth": 3.5,
    "a_sel": 200,
    "use_dynamic_sel": True,
    "use_exp_switch": True,
    "edge_init_use_dist": True,
    "smooth_edge_update": True,
    "precision": "float32",
    "activation_function": "silu",
}
EXPERTS = {"n_routed_experts": 6, "top_k": 2, "n_shared_experts": 1}

# name: changes to BASE, experts (None: dense), kind of experts
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, int] | None, str]] = {
    "dense": ({}, None, "mlp"),
    "MoLE 2 of 6 + 1": ({}, EXPERTS, "linear"),
    "MoE 1 of 6": ({}, {"n_routed_experts": 6, "top_k": 1, "n_shared_experts": 0}, "mlp"),
    "MoE 2 of 6 + 1, narrow": ({"n_dim": 32, "e_dim": 16}, EXPERTS, "mlp"),
    "MoLE 3 of 12 + 1": ({}, {"n_routed_experts": 12, "top_k": 3, "n_shared_experts": 1}, "linear"),
    "MoLE, 2 layers": ({"nlayers": 2}, EXPERTS, "linear"),
    "MoLE, cutoffs 4.8 and 3.6": (
        {"e_rcut": 4.8, "e_rcut_smth": 4.2, "a_rcut": 3.6, "a_rcut_smth": 3.1},
        EXPERTS,
        "linear",
    ),
    "MoLE, narrow": ({"n_dim": 32, "e_dim": 16}, EXPERTS, "linear"),
}

FAMILIES = {
    "Cu, Ni, Li": ("mlearn_Cu", "mlearn_Ni", "mlearn_Li"),
    "Si, Ge, Mo": ("mlearn_Si", "mlearn_Ge", "mlearn_Mo"),
    "Nb-Mo-Ta-W": ("NbMoTaW_",),
    "Ni-Mo": ("Ni-Mo_",),
}


def model_config(name: str, elements: list[str]) -> ModelConfig:
    """Architecture of a variant."""
    changes, experts, kind = VARIANTS[name]
    model: dict[str, Any] = {
        "type_map": elements,
        "descriptor": {**BASE, **changes},
        "fitting": {"neuron": [96, 96], "activation_function": "silu", "precision": "float32"},
    }
    if experts is not None:
        positions = {position: {"router": "r", "kind": kind} for position in POSITIONS}
        model["moe"] = {"routers": {"r": experts}, "positions": positions}
    return ModelConfig.model_validate(model)


def family_errors(validation: dict[str, dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean of the groups' errors per family: energy (meV/atom), force (eV/A)."""
    errors = {}
    for family, starts in FAMILIES.items():
        groups = [v for group, v in validation.items() if group.startswith(starts)]
        if groups:
            errors[family] = (
                1e3 * float(np.mean([g["energy"] for g in groups])),
                float(np.mean([g["force"] for g in groups])),
            )
    return errors


def gflop(package: Path, elements: list[str]) -> float:
    """Arithmetic (10^9 operations) of one evaluation of a package on the alloy."""
    _, parts = evaluation_costs(package, bulk_alloy(elements[-4:], repeat=4, amplitude=0.15))
    return total_cost(parts).flops / 1e9


def main() -> int:
    """Train the variants, print the table, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("frames", type=Path, help="extxyz, as for `moecalc fit`")
    parser.add_argument("--folder", type=Path, default=Path("search"))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", action="append", choices=list(VARIANTS), help="a variant; may be repeated")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    atoms = read_frames(arguments.frames)
    elements = [chemical_symbols[z] for z in sorted({int(z) for a in atoms for z in set(a.numbers)})]
    check_frames(atoms, elements)
    held_out = set(split_frames(atoms, 0.05, 0))
    frames: dict[float, list[Any]] = {}
    results: dict[str, Any] = {}
    for name in arguments.only or VARIANTS:
        config = model_config(name, elements)
        cutoffs = (config.descriptor.e_rcut, config.descriptor.a_rcut)
        if cutoffs[0] not in frames:
            frames = {cutoffs[0]: [to_frame(a, elements, cutoffs[0]) for a in atoms]}
        train = [f for k, f in enumerate(frames[cutoffs[0]]) if k not in held_out]
        valid = [frames[cutoffs[0]][k] for k in sorted(held_out)]
        folder = arguments.folder / name.replace(",", "").replace(" ", "_")
        options = Options(
            steps=arguments.steps, energy_weight=(0.2, 1.0), average=0.99, clip=10.0, repulsion=0.0
        )
        fit = begin(config, options, train, folder)
        start = time.time()
        fit.run(train, valid, folder, every=arguments.steps)
        package = folder / "model.moe.pt"
        package_checkpoint(folder / "state.averaged.pt", package)
        log = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        results[name] = {
            "parameters": sum(p.numel() for p in fit.parameters),
            "gflop": gflop(package, elements),
            "seconds_per_step": log["seconds"],
            "errors": family_errors(log["validation"]),
            "validation": log["validation"],
        }
        print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        (arguments.folder / "search.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    first = next(iter(results.values()))
    print(f"| model | trained parameters | cost | {' | '.join(FAMILIES)} |\n|{'---|' * (3 + len(FAMILIES))}")
    for name, result in results.items():
        errors = " | ".join(f"{e:.1f}, {f:.3f}" for e, f in result["errors"].values())
        print(
            f"| {name} | {result['parameters'] / 1e6:.2f} M | {result['gflop'] / first['gflop']:.2f} "
            f"| {errors} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
