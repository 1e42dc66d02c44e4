"""What every expert does: the change of the forces on each element when the expert is taken out of its layer.

    python benchmarks/expert_roles.py examples/data/metals10.pt valid.extxyz

Of every group of frames, the one with the largest forces is evaluated. The number is the mean change of force
components over their mean size: 0, the element does not use the expert; 1, without it nothing is left. Models
that route by element.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

from moecalc.data import read_frames
from moecalc.nn.model import evaluate
from moecalc.nn.moe import ExpertLinear
from moecalc.package.importers import build_model, load_checkpoint
from moecalc.training.graphs import Frame, to_frame


def main() -> int:
    """Evaluate with and without every expert, print a table per layer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="of any layout that `moecalc package` reads")
    parser.add_argument("frames", type=Path, help="extxyz with forces")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = build_model(load_checkpoint(arguments.checkpoint), torch.float64)
    known = list(model.elements)
    largest: dict[str, Frame] = {}
    for atoms in read_frames(arguments.frames):
        frame = to_frame(atoms, known, float(model.cutoff))
        best = largest.get(frame.group)
        if np.abs(frame.forces).mean() > (0.05 if best is None else np.abs(best.forces).mean()):
            largest[frame.group] = frame
    frames = list(largest.values())
    if not frames:
        parser.error(f"{arguments.frames}: no frame with forces above 0.05 eV/A, expected at least one")
    symbols = np.array(known)[np.concatenate([f.types for f in frames])]
    elements = [e for e in known if e in symbols]

    def forces() -> np.ndarray:
        graphs = [[torch.from_numpy(x) for x in (f.types, f.edge_index, f.edge_vec)] for f in frames]
        return np.concatenate([evaluate(model, *graph).forces.numpy() for graph in graphs])

    reference = forces()
    for number, layer in enumerate(model.layers, start=1):
        maps = [m for m in layer.modules() if isinstance(m, ExpertLinear) and m.routed]
        if not maps:
            continue
        n_expert = max(len(m.matrix) for m in maps)
        print(f"\n| layer {number} | {' | '.join(elements)} |\n|{'---|' * (1 + len(elements))}")
        for expert in range(n_expert):
            kept = [(m, m.matrix.data[expert].clone(), m.bias.data[expert].clone()) for m in maps]
            for m, _, _ in kept:
                m.matrix.data[expert] = 0.0
                m.bias.data[expert] = 0.0
            change = np.abs(forces() - reference)
            for m, matrix, bias in kept:
                m.matrix.data[expert] = matrix
                m.bias.data[expert] = bias
            row = [change[symbols == e].mean() / np.abs(reference[symbols == e]).mean() for e in elements]
            print(f"| {expert} | {' | '.join(f'{x:.2f}' for x in row)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
