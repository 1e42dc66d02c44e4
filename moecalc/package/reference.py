"""Small reference structures of a package; neighbors by brute force, not by the production list."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import atomic_numbers, covalent_radii
from torch import Tensor, nn

from moecalc.conditions import Conditions, ModelConditions
from moecalc.errors import PackageError
from moecalc.nn.model import ModelOutput, MoEPotential, evaluate
from moecalc.package.edges import brute_force_edges
from moecalc.package.importers import set_precision
from moecalc.package.metadata import ReferenceFrame
from moecalc.typing import Floats

_MAX_ELEMENTS_PER_FRAME = 10
# distance of every edge from the cutoffs, so that finite differences never step across one (Angstrom)
CUTOFF_GAP = 1e-3


def graph_tensors(
    symbols: list[str],
    positions: Floats,
    cell: Floats,
    pbc: tuple[bool, ...],
    elements: list[str],
    cutoff: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Types (n,), edge_index (2, E), edge_vec (E, 3) of a structure as tensors."""
    types = torch.tensor([elements.index(s) for s in symbols], dtype=torch.int64)
    i, j, edge_vec = brute_force_edges(Atoms(symbols, positions, cell=cell, pbc=pbc), cutoff)
    return types, torch.from_numpy(np.stack([i, j])), torch.from_numpy(edge_vec)


def evaluate_structure(
    model: Any,
    symbols: list[str],
    positions: Floats,
    cell: Floats,
    pbc: tuple[bool, ...],
    conditions: Conditions | None = None,
) -> ModelOutput:
    """Reference answer of a (scripted) `MoEPotential` for one structure."""
    types, edge_index, edge_vec = graph_tensors(
        symbols, positions, cell, pbc, list(model.elements), model.cutoff
    )
    charge_spin, fparam = condition_tensors([conditions or Conditions()])
    return evaluate(model, types, edge_index, edge_vec, charge_spin=charge_spin, fparam=fparam)


def condition_tensors(conditions: Sequence[Conditions]) -> tuple[Tensor | None, Tensor | None]:
    """Conditions of structures as tensors; None where not taken.

    Returns:
        Charge and multiplicity (S, 2) int64, and frame parameters (S, nf) float64.
    """
    charge_spin = fparam = None
    if all(c.charge_spin is not None for c in conditions):
        charge_spin = torch.tensor([c.charge_spin for c in conditions], dtype=torch.int64)
    if all(c.fparam is not None for c in conditions):
        fparam = torch.tensor([c.fparam for c in conditions], dtype=torch.float64)
    return charge_spin, fparam


def reference_conditions(model: Any, taken: ModelConditions | None) -> list[Conditions]:
    """Conditions to check a model with: its default (or neutral singlet, mean parameters), and two others.

    Args:
        model: a `MoEPotential`.
        taken: what it takes; one empty entry where that is nothing.
    """
    if taken is None or not taken.open:
        return [Conditions()]
    pairs: list[tuple[int, int] | None] = [None, None, None]
    numbers: list[tuple[float, ...] | None] = [None, None, None]
    if taken.charge_spin is not None:
        pairs = [taken.charge_spin.default or (0, 1), (1, 2), (-2, 3)]
    if taken.fparam_is_charge_spin:
        numbers = [None if p is None else (float(p[0]), float(p[1])) for p in pairs]
    elif taken.fparam is not None:
        mean = model.conditions.fparam_avg.detach().numpy()
        spread = 1.0 / np.abs(model.conditions.fparam_inv_std.detach().numpy()).clip(min=1e-6)
        base = mean if taken.fparam.default is None else np.array(taken.fparam.default)
        numbers = [tuple((base + k * spread).tolist()) for k in (0.0, 1.0, -0.7)]
    entries = [(p or (None, None), x) for p, x in zip(pairs, numbers, strict=True)]
    return [Conditions(q, s, x) for (q, s), x in entries]


def reference_cases(
    structures: Sequence[tuple[str, Atoms]], conditions: Sequence[Conditions]
) -> list[tuple[str, Atoms, Conditions]]:
    """Every structure with the first of the conditions, and the last two structures with the others."""
    cases = [(label, atoms, conditions[0]) for label, atoms in structures]
    for (label, atoms), other in zip(structures[-2:], conditions[1:], strict=False):
        cases.append((f"{label}, {other}", atoms, other))
    return cases


def _radius(symbol: str) -> float:
    """Covalent radius in Angstrom; not below 0.9, or hydrogen would have hundreds of neighbors."""
    return max(0.9, float(covalent_radii[atomic_numbers[symbol]]))


def _insert(rng: np.random.Generator, symbols: list[str], cell: Floats, periodic: bool) -> Floats | None:
    """Random positions no closer than 0.85 of the sum of covalent radii, or None when it does not fit."""
    images = np.array(list(itertools.product((-1, 0, 1), repeat=3))) @ cell if periodic else np.zeros((1, 3))
    placed: list[Floats] = []
    for k, symbol in enumerate(symbols):
        for _ in range(300):
            trial = rng.random(3) @ cell
            close = 0.85 * (_radius(symbol) + np.array([_radius(s) for s in symbols[:k]]))
            if k:
                d = np.linalg.norm(np.array(placed)[:, None] - trial + images[None], axis=2).min(axis=1)
                if (d < close).any():
                    continue
            placed.append(trial)
            break
        else:
            return None
    return np.array(placed)


def _random_frame(seed: int, symbols: list[str], periodic: bool, avoid: tuple[float, ...]) -> Atoms:
    """A dense random structure: skewed cell or free cluster, no edge within a gap of a cutoff."""
    rng = np.random.default_rng(seed)
    length = float((sum((2.0 * _radius(s)) ** 3 for s in symbols) / 0.85) ** (1 / 3))
    while True:
        cell = length * (np.eye(3) + rng.uniform(-0.15, 0.15, (3, 3)))
        length *= 1.02  # a larger box next time, in case this one cannot hold the atoms
        positions = _insert(rng, symbols, cell, periodic)
        if positions is None:
            continue
        if not periodic:
            cell = np.zeros((3, 3))
        atoms = Atoms(symbols, positions, cell=cell, pbc=periodic)
        r = np.linalg.norm(brute_force_edges(atoms, max(avoid) + 0.1)[2], axis=1)
        # swell the structure by up to 5 % until no distance is near a cutoff
        for scale in np.linspace(1.0, 1.05, 300):
            if all((np.abs(scale * r - c) > CUTOFF_GAP).all() for c in avoid):
                return Atoms(symbols, positions=scale * positions, cell=scale * cell, pbc=periodic)


def reference_structures(elements: list[str], cutoffs: tuple[float, ...]) -> list[tuple[str, Atoms]]:
    """Labelled structures that hold every element: isolated atom, dimer, cells as dense as crystals, cluster.

    Args:
        elements: symbols of the package.
        cutoffs: edge and angle cutoff in Angstrom; no pair sits on one.
    """
    avoid = tuple(c for c in cutoffs if c > 0)
    first, last = elements[0], elements[-1]
    frames = [
        ("isolated atom", Atoms([first], positions=[[0.0, 0.0, 0.0]])),
        ("dimer", Atoms([first, last], positions=[[0, 0, 0], [0.1, 0.2, _radius(first) + _radius(last)]])),
    ]
    n = _MAX_ELEMENTS_PER_FRAME
    for k, begin in enumerate(range(0, len(elements), n)):
        chunk = elements[begin : begin + n]
        symbols = [chunk[i % len(chunk)] for i in range(max(8, len(chunk)))]
        label = "periodic" if len(elements) <= n else f"periodic {k + 1}"
        frames.append((label, _random_frame(101 + k, symbols, True, avoid)))
    symbols = [elements[(3 * i) % len(elements)] for i in range(9)]
    frames.append(("cluster", _random_frame(7, symbols, False, avoid)))
    return frames


def in_precision(model: MoEPotential, dtype: str) -> MoEPotential:
    """A copy whose network is float32 or float64."""
    converted = copy.deepcopy(model)
    set_precision(converted, dtype, dtype)
    return converted


def reference_frames(
    model: MoEPotential, cases: Sequence[tuple[str, Atoms, Conditions]]
) -> list[ReferenceFrame]:
    """What a package of a model must give for structures: its own rounded weights, computed in float64.

    Raises:
        PackageError: an answer is not finite.
    """
    rounded = in_precision(model, "float64")
    return [reference_frame(rounded, *case) for case in cases]


def reference_frame(
    model: nn.Module, label: str, atoms: Atoms, conditions: Conditions | None = None
) -> ReferenceFrame:
    """Evaluate a structure and record it.

    Raises:
        PackageError: the model's answer is not finite.
    """
    symbols = atoms.get_chemical_symbols()
    given = conditions or Conditions()
    out = evaluate_structure(model, symbols, atoms.positions, atoms.cell.array, tuple(atoms.pbc), given)
    for name, value in (("energies", out.energies), ("forces", out.forces), ("virial", out.virial)):
        if not bool(torch.isfinite(value).all()):
            raise PackageError(
                f"reference frame {label!r}: expected finite {name} of the model, got NaN or infinity: "
                "check the weights of the checkpoint"
            )
    return ReferenceFrame(
        label=label,
        charge=given.charge,
        spin=given.spin,
        fparam=None if given.fparam is None else list(given.fparam),
        symbols=symbols,
        positions=atoms.positions.tolist(),
        cell=atoms.cell.array.tolist(),
        pbc=[bool(p) for p in atoms.pbc],
        energy=float(out.energy),
        energies=out.energies.tolist(),
        forces=out.forces.tolist(),
        virial=out.virial[0].tolist(),
    )
