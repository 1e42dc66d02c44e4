"""Close pairs, which no data cover: structures that contain them, and how strongly they must repel.

At distances shorter than its data a network extrapolates, and the better it fits, the steeper it may fall
there. A fit can ask that every directed edge of a pair closer than the pair's radius repels with at least
half of a given share of the screened nuclear repulsion (ZBL): a bound from one side, no label.
"""

from __future__ import annotations

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.data import atomic_numbers, covalent_radii
from torch import Tensor

from moecalc.keys import MIN_DISTANCE
from moecalc.training.graphs import Batch, Frame, collate, edges_of
from moecalc.training.losses import huber
from moecalc.typing import Ints
from moecalc.zbl import charge_and_length, screened_coulomb

OF_COVALENT = 0.7
"""Radius of a pair over the sum of the covalent radii, if the data leave so much.

Radii: Cordero et al., Dalton Trans. 2832 (2008).
"""

MARGIN = 0.97
"""Largest radius over the shortest distance of the pair in the data: labels are not overruled."""

SHARE = 0.3
"""Of the force of ZBL, which is several times that between real atoms near the radius."""

LARGEST = 30.0
"""Force (eV/A) that is asked for at most: closer pairs need no stronger repulsion."""

SCALE = 1.0
"""Missing force (eV/A) that counts as one."""


class Repulsion:
    """Structures with close pairs, and the loss of their forces.

    Args:
        elements: the model's.
        frames: of the training data, for their shortest distances.
        cutoff: of the model's edges, in Angstrom.
    """

    def __init__(self, elements: list[str], frames: list[Frame], cutoff: float) -> None:
        self.elements, self.cutoff = elements, cutoff
        z = np.array([atomic_numbers[e] for e in elements])
        self.covalent = covalent_radii[z]
        self.charge, self.length = charge_and_length(z[:, None], z[None, :])
        shortest = np.full((len(z), len(z)), np.inf)
        for frame in frames:
            pair = frame.types[frame.edge_index]
            np.minimum.at(shortest, (pair[0], pair[1]), np.linalg.norm(frame.edge_vec, axis=1))
        self.radius = np.minimum(OF_COVALENT * np.add.outer(self.covalent, self.covalent), MARGIN * shortest)

    def batch(self, rng: np.random.Generator) -> Batch:
        """A compressed, disordered crystal of one to four elements, and eight dimers."""
        n = len(self.elements)
        types = rng.choice(rng.permutation(n)[: rng.integers(1, 5)], size=16)
        crystal = (
            bulk("Cu", "bcc", a=1.0, cubic=True) * 2
            if rng.random() < 0.5
            else bulk("Cu", "fcc", a=1.0, cubic=True) * (2, 2, 1)
        )
        nearest = np.linalg.norm(crystal.positions[1] - crystal.positions[0])
        wanted = rng.uniform(0.55, 1.0) * 2.0 * float(self.covalent[types].mean())
        crystal.set_cell(crystal.cell * (wanted / nearest), scale_atoms=True)
        sites, frame = crystal.positions.copy(), None
        while frame is None or np.linalg.norm(frame.edge_vec, axis=1).min() < MIN_DISTANCE:
            crystal.positions = sites + rng.normal(0.0, rng.uniform(0.0, 0.3), sites.shape)
            frame = self._frame(crystal, types)
        frames = [frame]
        for _ in range(8):
            types = rng.integers(n, size=2)
            distance = rng.uniform(MIN_DISTANCE, self.radius[types[0], types[1]])
            frames.append(self._frame(Atoms("H2", [[0.0, 0.0, 0.0], [distance, 0.0, 0.0]]), types))
        return collate(frames)

    def _frame(self, atoms: Atoms, types: Ints) -> Frame:
        atoms.set_chemical_symbols([self.elements[t] for t in types])
        if not atoms.pbc.any():
            atoms.center(vacuum=self.cutoff)
        edge_index, edge_vec = edges_of(atoms, self.cutoff)
        return Frame(
            types=types.astype(np.int64),
            edge_index=edge_index,
            edge_vec=edge_vec,
            energy=0.0,
            forces=np.zeros((len(atoms), 3)),
            virial=None,
            group="repulsion",
        )

    def loss(
        self, types: Tensor, edges: Tensor, vectors: Tensor, d_vectors: Tensor, delta: float
    ) -> tuple[float, Tensor]:
        """Mean over close directed edges of the Huber function of the missing force over `SCALE`.

        Args:
            types: (n,); edges: (2, E); vectors: (E, 3), of the kernels' graph.
            d_vectors: (E, 3) derivatives of the energy with respect to the edge vectors, eV/Angstrom.
            delta: above so many scales the function is linear.

        Returns:
            The loss and its gradient with respect to `d_vectors` (E, 3).
        """
        distance = vectors.norm(dim=1)
        pair = (types[edges[0]].numpy(), types[edges[1]].numpy())
        close = distance.numpy() < self.radius[pair]
        direction = torch.zeros_like(d_vectors)
        if not close.any():
            return 0.0, direction
        pair = (pair[0][close], pair[1][close])
        _, slope, _ = screened_coulomb(distance.numpy()[close], self.charge[pair], self.length[pair])
        wanted = torch.from_numpy(np.minimum(SHARE * -slope, LARGEST)) / 2.0
        chosen = torch.from_numpy(close)
        unit = vectors[chosen] / distance[chosen, None]
        missing = ((wanted + (d_vectors[chosen] * unit).sum(1)) / SCALE).clamp(min=0.0)
        value, slopes = huber(missing, delta)
        direction[chosen] = (slopes / (SCALE * len(missing)))[:, None] * unit
        return float(value.mean()), direction
