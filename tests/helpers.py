"""Reading the reference frames under tests/data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from moecalc.conditions import Conditions
from moecalc.nn import evaluate
from moecalc.package.reference import condition_tensors
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
        # what the code was given beside the structure; None: it used the stored default
        self.fparam = data["fparam"].ravel() if "fparam" in data else None
        self.charge_spin = data["charge_spin"].ravel() if "charge_spin" in data else None

    @property
    def given(self) -> dict[str, Any]:
        """Arguments for `moecalc.conditions.resolve`, or to fix at packaging."""
        values: dict[str, Any] = {} if self.fparam is None else {"fparam": self.fparam.tolist()}
        if self.charge_spin is not None:
            values |= {"charge": int(self.charge_spin[0]), "spin": int(self.charge_spin[1])}
        return values


# oracle models that take charge, spin or frame parameters
CONDITIONAL = ("H", "J")


def frames(folder: str, conditional: bool = False) -> list[Frame]:
    """Frames of a folder of tests/data: of models without conditions, or of those with."""
    paths = sorted((DATA / folder).glob("*.npz"))
    found = [Frame(path) for path in paths if path.name.startswith(CONDITIONAL) == conditional]
    assert found, f"no frames in {folder}"
    return found


def graph_of(atoms: Atoms, elements: list[str], cutoff: float):
    """types, edge_index, edge_vec of a structure as tensors."""
    i, j, vec = brute_force_edges(atoms, cutoff)
    types = torch.tensor([elements.index(s) for s in atoms.symbols])
    return types, torch.from_numpy(np.stack([i, j])), torch.from_numpy(vec)


def evaluate_atoms(model, atoms: Atoms, conditions: Conditions | None = None):
    """Reference answer of an eager or scripted model."""
    charge_spin, fparam = condition_tensors([conditions or Conditions()])
    graph = graph_of(atoms, list(model.elements), float(model.cutoff))
    return evaluate(model, *graph, charge_spin=charge_spin, fparam=fparam)
