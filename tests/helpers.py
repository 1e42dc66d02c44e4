"""Reading the reference frames under tests/data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from ase import Atoms

from moecalc.nn import evaluate
from moecalc.testing import brute_force_edges

DATA = Path(__file__).parent / "data"


class Frame:
    """One frame of a reference code: structure and answers (eV, Angstrom)."""

    def __init__(self, path: Path) -> None:
        stem = path.name.removesuffix(".npz")
        model, self.frame = stem.split("__")
        self.model, _, head = model.partition("@")
        self.head = head or None
        data = np.load(path)
        self.atoms = Atoms(data["symbols"], data["positions"], cell=data["cell"], pbc=data["pbc"])
        self.energy = float(data["energy"])
        self.forces, self.virial = data["forces"], data["virial"]
        self.energies = data["atom_energy"].ravel()


def frames(folder: str) -> list[Frame]:
    """All frames of a folder of tests/data."""
    found = [Frame(path) for path in sorted((DATA / folder).glob("*.npz"))]
    assert found, f"no frames in {folder}"
    return found


def graph_of(atoms: Atoms, elements: list[str], cutoff: float):
    """types, edge_index, edge_vec of a structure as tensors."""
    i, j, vec = brute_force_edges(atoms, cutoff)
    types = torch.tensor([elements.index(s) for s in atoms.symbols])
    return types, torch.from_numpy(np.stack([i, j])), torch.from_numpy(vec)


def evaluate_atoms(model, atoms: Atoms):
    """Reference answer of an eager or scripted model."""
    return evaluate(model, *graph_of(atoms, list(model.elements), float(model.cutoff)))
