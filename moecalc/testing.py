"""Small structures, packages and reference computations for tests, of moecalc and of what builds on it.

All is plain NumPy and ASE, to serve as an oracle. What makes models needs torch and imports it when it is
called. Tests alone import this: nothing in moecalc does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from ase import Atoms
from ase.build import bcc100, bulk

from moecalc import keys
from moecalc.keys import VOIGT
from moecalc.package.edges import brute_force_edges, evaluate_edges
from moecalc.tolerances import (
    FINITE_DIFFERENCE,
    ORACLE_ENERGY,
    ORACLE_FLOAT32,
    ORACLE_FORCES,
    ORACLE_VIRIAL,
    ROUNDING,
    SAME_MODEL,
)
from moecalc.typing import Floats, Ints

__all__ = [
    "FINITE_DIFFERENCE",
    "ORACLE_ENERGY",
    "ORACLE_FLOAT32",
    "ORACLE_FORCES",
    "ORACLE_VIRIAL",
    "ROUNDING",
    "SAME_MODEL",
    "PairEvaluator",
    "brute_force_edges",
    "bulk_alloy",
    "evaluate_edges",
    "finite_difference_forces",
    "finite_difference_stress",
    "full_size_config",
    "molecule",
    "one_atom_cell",
    "random_config",
    "random_potential",
    "slab",
    "write_checkpoint_package",
    "write_random_package",
    "write_unverified",
]


def bulk_alloy(
    symbols: Sequence[str] = ("Nb", "Mo", "Ta", "W"),
    a: float = 3.24,
    repeat: int = 2,
    amplitude: float = 0.1,
    seed: int = 0,
) -> Atoms:
    """Strained and rattled bcc crystal of 2 repeat^3 atoms, periodic in all directions."""
    return _disturb(bulk(symbols[0], "bcc", a=a, cubic=True) * repeat, symbols, amplitude, seed)


def slab(
    symbols: Sequence[str] = ("Nb", "Mo", "Ta", "W"),
    a: float = 3.24,
    repeat: int = 2,
    amplitude: float = 0.1,
    seed: int = 1,
) -> Atoms:
    """Rattled bcc (100) slab of 4 repeat^2 atoms, periodic in x and y, without a third cell vector."""
    return _disturb(bcc100(symbols[0], (repeat, repeat, 4), a=a, periodic=False), symbols, amplitude, seed)


def molecule(
    symbols: Sequence[str] = ("Nb", "Mo", "Ta", "W"),
    distance: float = 2.5,
    n_atoms: int = 8,
    amplitude: float = 0.2,
    seed: int = 2,
) -> Atoms:
    """Cluster of up to 8 atoms, not periodic, without a cell."""
    corners = distance * np.array(list(itertools.product((0.0, 1.0), repeat=3)))[:n_atoms]
    return _disturb(Atoms([symbols[0]] * len(corners), corners), symbols, amplitude, seed)


def one_atom_cell(symbol: str = "W", a: float = 3.17) -> Atoms:
    """Primitive bcc cell, sheared: every neighbor of the atom is its own image."""
    atoms = bulk(symbol, "bcc", a=a)
    deformation = np.eye(3) + np.array([[0.01, 0.03, 0.0], [0.0, -0.02, 0.02], [0.015, 0.0, 0.01]])
    atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    return atoms


def _disturb(atoms: Atoms, symbols: Sequence[str], amplitude: float, seed: int) -> Atoms:
    rng = np.random.default_rng(seed)
    atoms.info.clear()  # surface builders leave notes there that not every file format takes
    atoms.symbols[:] = [symbols[k % len(symbols)] for k in rng.permutation(len(atoms))]
    strain = np.eye(3) + 0.02 * rng.standard_normal((3, 3))
    strain[2, :2] = strain[:2, 2] = 0  # a slab stays across its normal
    atoms.set_cell(atoms.cell.array @ strain, scale_atoms=False)
    atoms.positions = atoms.positions @ strain + amplitude * rng.uniform(-1, 1, atoms.positions.shape)
    return atoms


_STENCIL: Final = ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12))
"""Offsets and weights of the five-point first derivative: error of fourth order in the step."""


def finite_difference_forces(
    energies: Callable[[list[Atoms]], Sequence[float]],
    atoms: Atoms,
    step: float = 2e-3,
    indices: Sequence[int] | None = None,
) -> Floats:
    """Minus the derivative of the energy with respect to positions.

    Args:
        energies: eV of each of many structures, for example from `MoECalculator.calculate_batch`.
        atoms: the structure; not changed.
        step: displacement in Angstrom.
        indices: atoms to move, all by default.

    Returns:
        (len(indices), 3) forces in eV/A.
    """
    chosen = range(len(atoms)) if indices is None else indices
    moved = []
    for index, axis, (offset, _) in itertools.product(chosen, range(3), _STENCIL):
        moved.append(atoms.copy())
        moved[-1].positions[index, axis] += offset * step
    return -_derivatives(energies(moved), step).reshape(len(chosen), 3)


def finite_difference_stress(
    energies: Callable[[list[Atoms]], Sequence[float]], atoms: Atoms, step: float = 1e-3
) -> Floats:
    """Derivative of the energy by symmetric strain, over the volume: (6,) in ASE's Voigt order, eV/A^3."""
    strained = []
    for (a, b), (offset, _) in itertools.product(zip(*VOIGT, strict=True), _STENCIL):
        strain = np.eye(3)
        strain[a, b] += offset * step / 2
        strain[b, a] += offset * step / 2
        strained.append(atoms.copy())
        strained[-1].set_cell(atoms.cell.array @ strain, scale_atoms=False)
        strained[-1].positions = atoms.positions @ strain
    return _derivatives(energies(strained), step) / atoms.get_volume()


def _derivatives(values: Sequence[float], step: float) -> Floats:
    weights = np.array([weight for _, weight in _STENCIL])
    return np.asarray(values, dtype=float).reshape(-1, len(_STENCIL)) @ weights / step


class PairEvaluator:
    """Stand-in for the compiled evaluator, with its attributes and methods: a smooth pair energy of types.

    `E = 1/2 sum_ij k(t_i, t_j) (1/r^2 - 1/4) (1 - (r/cutoff)^2)^3 + sum_i t_i`, with k(s, t) = 1 + (s + t) /
    10. `n_calls` and `n_lists` count evaluations and lists.
    """

    dtype = "float64"
    device = "cpu"
    n_layers = 1
    angle_cutoff = 0.0
    backend = "pair"
    backend_reason = ""

    def __init__(self, elements: Sequence[str], cutoff: float = 5.0, metadata: str = "{}") -> None:
        self.elements = list(elements)
        self.metadata = metadata
        self.cutoff = cutoff
        self.n_calls = self.n_lists = 0
        self._list: tuple[Any, ...] = ()

    def model_warnings(self) -> list[str]:
        """Nothing."""
        return []

    def structure_warnings(self, max_neighbors: int, max_angle_neighbors: int) -> list[str]:
        """Nothing."""
        return []

    def set_list(
        self,
        types: Ints,
        edge_index: Ints,
        edge_shift: Ints | None = None,
        system_index: Ints | None = None,
        n_systems: int = 1,
        edge_from: Ints | None = None,
        edge_to: Ints | None = None,
    ) -> None:
        """The list of the evaluations to come: see `NeighborList` in cpp/include/moecalc/evaluator.h."""
        self.n_lists += 1
        i, j = edge_index
        system = np.zeros(len(types), dtype=np.int64) if system_index is None else system_index
        rows = (i if edge_from is None else edge_from, j if edge_to is None else edge_to)
        self._list = (types, i, j, *rows, edge_shift, system, n_systems)

    def evaluate(
        self,
        positions: Floats,
        cells: Floats | None = None,
        *,
        forces: bool = True,
        virial: bool = True,
        atom_virial: bool = False,
        exchange: Any = None,
    ) -> dict[str, Any]:
        """Energies, forces and virials of the list: keys, shapes and units as in `moecalc.keys`."""
        types, i, j, begin, end, shift, system_index, n_systems = self._list
        edge_vec = positions[end] - positions[begin]
        if shift is not None and cells is not None:
            edge_vec = edge_vec + np.einsum("na,nab->nb", shift, cells[system_index[i]])
        self.n_calls += 1
        length2 = (edge_vec**2).sum(axis=1)
        inside = length2 <= self.cutoff**2
        i, j, vec, length2 = i[inside], j[inside], edge_vec[inside], length2[inside]
        strength = 1 + (types[i] + types[j]) / 10
        core, tail = 1 / length2 - 0.25, 1 - length2 / self.cutoff**2
        pair = 0.5 * strength * core * tail**3
        slope = 0.5 * strength * (-(tail**3) / length2**2 - 3 * core * tail**2 / self.cutoff**2)  # dE/d(r^2)
        gradient = 2 * slope[:, None] * vec
        energies = types.astype(float)
        np.add.at(energies, i, pair)
        n = len(types)
        atom = np.zeros((n, 3, 3))
        np.add.at(atom, j, -vec[:, :, None] * gradient[:, None, :])
        total = np.zeros((n_systems, 3, 3))
        np.add.at(total, system_index, atom)
        result: dict[str, Any] = {
            keys.ENERGY: np.bincount(system_index, energies, n_systems),
            keys.ENERGIES: energies,
            "n_edge": len(vec),
            "n_angle": 0,
            keys.MAX_NEIGHBORS: int(np.bincount(i).max(initial=0)),
            keys.MAX_ANGLE_NEIGHBORS: 0,
        }
        if forces:
            result[keys.FORCES] = np.zeros((n, 3))
            np.add.at(result[keys.FORCES], i, gradient)
            np.subtract.at(result[keys.FORCES], j, gradient)
        if virial:
            result[keys.VIRIAL] = total
        if atom_virial:
            result[keys.ATOM_VIRIAL] = atom
        return result


def random_config(
    type_map: Sequence[str] = ("Nb", "Mo", "Ta", "W"),
    *,
    n_routed: int = 0,
    top_k: int = 2,
    n_shared: int = 1,
    kind: str = "mlp",
    gate: str = "topk_softmax",
    routing: str = "element",
    shared_routers: bool = False,
    route_on_charge_spin: bool = False,
    neuron: Sequence[int] = (8, 8),
    fitting: Mapping[str, Any] | None = None,
    fparam_is_charge_spin: bool = False,
    **descriptor: Any,
) -> Any:
    """Configuration of a small potential (`moecalc.nn.ModelConfig`), dense or with experts at every position.

    Args:
        type_map: element symbols.
        n_routed: routed experts per position; 0 is a dense model.
        top_k, n_shared, kind, gate, routing: see `moecalc.nn.MoEConfig`.
        shared_routers: one router for all positions of nodes, one for edges, one for angles.
        route_on_charge_spin: see `moecalc.nn.MoEConfig`.
        neuron: hidden widths of the fitting net; fitting: overrides of `moecalc.nn.FittingConfig`.
        fparam_is_charge_spin: see `moecalc.nn.ModelConfig`.
        **descriptor: overrides of `moecalc.nn.DescriptorConfig`.
    """
    from moecalc.nn import POSITIONS, DescriptorConfig, FittingConfig, ModelConfig, MoEConfig

    small: dict[str, Any] = {
        "n_dim": 8, "e_dim": 6, "a_dim": 4, "nlayers": 3, "e_rcut": 4.5, "e_rcut_smth": 3.5, "e_sel": 100,
        "a_rcut": 3.5, "a_rcut_smth": 2.8, "a_sel": 40, "a_compress_rate": 1, "a_compress_e_rate": 2,
        "a_compress_use_split": True, "use_dynamic_sel": True, "smooth_edge_update": True,
        "use_exp_switch": True, "edge_init_use_dist": True, "activation_function": "silut:3.0",
    }  # fmt: skip
    moe = MoEConfig()
    if n_routed:
        router = {"n_routed_experts": n_routed, "top_k": top_k, "n_shared_experts": n_shared, "gate": gate}
        names = {p: p.split("_", maxsplit=1)[0] if shared_routers else p for p in POSITIONS}
        moe = MoEConfig.model_validate(
            {
                "routing": routing,
                "route_on_charge_spin": route_on_charge_spin,
                "routers": dict.fromkeys(names.values(), router),
                "positions": {p: {"router": names[p], "kind": kind} for p in POSITIONS},
            }
        )
    return ModelConfig(
        type_map=list(type_map),
        descriptor=DescriptorConfig.model_validate({**small, **descriptor}),
        fitting=FittingConfig.model_validate(
            {"neuron": list(neuron), "activation_function": "silut:3.0", **(fitting or {})}
        ),
        moe=moe,
        fparam_is_charge_spin=fparam_is_charge_spin,
    )


def random_potential(config: Any, seed: int = 0, dtype: str = "float64") -> Any:
    """A `moecalc.nn.MoEPotential` of a configuration with random weights and energy shifts, reproducible."""
    import torch

    from moecalc.nn import MoEPotential
    from moecalc.package.importers import set_precision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MoEPotential(config)
        model.readout.energy_shift.copy_(torch.randn(len(config.type_map), dtype=torch.float64))
        for name, tensor in model.conditions.named_buffers():
            tensor.copy_(torch.rand_like(tensor) + (0.5 if name == "fparam_inv_std" else 0.0))
    set_precision(model, dtype, dtype)
    return model.eval()


def full_size_config(
    type_map: Sequence[str] = ("O", "H"), *, n_routed: int = 0, kind: str = "mlp", **options: Any
) -> Any:
    """Configuration of the size that DPA3 is used in: widths 128, 64 and 32, 6 layers, cutoffs 6 and 4 A.

    Args:
        type_map: element symbols.
        n_routed: routed experts at all seven positions, 2 of them active, with 1 shared; 0 is a dense model.
        kind: "mlp", or "linear" for experts that merge into one matrix per element (MoLE).
        **options: as for `random_config`.
    """
    size: dict[str, Any] = {
        "n_dim": 128, "e_dim": 64, "a_dim": 32, "nlayers": 6, "e_rcut": 6.0, "e_rcut_smth": 5.3,
        "e_sel": 1200, "a_rcut": 4.0, "a_rcut_smth": 3.5, "a_sel": 300,
        "activation_function": "silut:10.0", "neuron": (240, 240, 240),
    }  # fmt: skip
    return random_config(type_map, n_routed=n_routed, kind=kind, **{**size, **options})


def write_random_package(
    path: str | Path,
    config: Any,
    dtype: str = "float32",
    seed: int = 0,
    fixed: Mapping[str, Any] | None = None,
) -> None:
    """Write a package of random weights, for timing: no checkpoint, and a dimer as its only reference frame.

    Args:
        path: file to write, `*.moe.pt`.
        config: for example from `full_size_config`.
        dtype: precision of the network.
        seed: of the weights.
        fixed: `charge`, `spin`, `fparam` to fold into the model, as far as given.
    """
    model = random_potential(config, seed, dtype)
    write_unverified(
        path, model, config, dtype, fixed=fixed, layout="random", note="random weights: for timing only"
    )


def write_checkpoint_package(
    path: str | Path,
    checkpoint: str | Path,
    head: str | None = None,
    frames: Sequence[str] = ("isolated atom", "dimer"),
) -> None:
    """Write a package of a checkpoint, with few reference frames and without its verification.

    Args:
        path: file to write, `*.moe.pt`.
        checkpoint: file of any supported layout.
        head: head of a multi-task checkpoint.
        frames: labels of the reference frames that it has, under every condition that packaging tries.
    """
    import torch

    from moecalc.package.importers import build_model, load_checkpoint

    imported = load_checkpoint(Path(checkpoint), head)
    model = build_model(imported, torch.float64)
    write_unverified(
        path,
        model,
        imported.config,
        imported.config.descriptor.precision,
        trained_elements=imported.trained_elements,
        frames=frames,
        every_condition=True,
    )


def write_unverified(
    path: str | Path,
    model: Any,
    config: Any,
    dtype: str,
    *,
    fixed: Mapping[str, Any] | None = None,
    trained_elements: Sequence[str] | None = None,
    frames: Sequence[str] = ("dimer",),
    every_condition: bool = False,
    layout: str = "unverified",
    note: str = "",
) -> None:
    """Write a package of a model: as packaging does, but without its verification.

    Args:
        path: file to write, `*.moe.pt`.
        model: a `MoEPotential` with all its experts; not changed.
        config: its `ModelConfig`.
        dtype: precision of the package.
        fixed: `charge`, `spin`, `fparam` to fold into the model, as far as given.
        trained_elements: symbols that occurred in training; None: all.
        frames: labels of `reference_structures`, here of the first two elements; engines refuse a package of
            none.
        every_condition: frames under other conditions than the default as well, as packaging has them.
        layout, note: texts of the metadata.
    """
    from moecalc.conditions import fix
    from moecalc.package import reference
    from moecalc.package.lower import lower
    from moecalc.package.metadata import Source
    from moecalc.package.write import Labels, Lowered, write_package

    folded, taken = fix(config.conditions(), **(fixed or {}))
    exact, routing = lower(model, config, None, folded)
    low = reference.in_precision(exact, dtype)
    structures = reference.reference_structures(low.elements[:2], (low.cutoff, low.angle_cutoff))
    chosen = [(label, atoms) for label, atoms in structures if label in frames]
    conditions = reference.reference_conditions(exact, taken)
    cases = reference.reference_cases(chosen, conditions if every_condition else conditions[:1])
    n_parameters = sum(p.numel() for p in model.parameters())
    labels = Labels(
        name=Path(path).name.removesuffix(".moe.pt"),
        source=Source(file="", sha256="", layout=layout, size_bytes=0, parameters=n_parameters),
        trained_elements=trained_elements,
        note=note,
    )
    lowered = Lowered(low, routing, config, taken)
    write_package(path, lowered, labels, reference.reference_frames(low, cases))
