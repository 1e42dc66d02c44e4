"""torch-sim: packages as models of its batched simulations (extra `torch-sim`).

from moecalc.torch_sim import MoEModel

model = MoEModel("my.moe.pt")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from moecalc import keys
from moecalc.ase_conditions import conditions_of
from moecalc.errors import MoecalcError, StructureError
from moecalc.models import default_model_path
from moecalc.neighbors import PairList, SkinNeighborList
from moecalc.runtime import check_threads, dtype_name, open_model
from moecalc.typing import Floats, Ints

try:
    import torch
    import torch_sim
    from torch_sim.models.interface import ModelInterface
except ImportError as error:
    raise MoecalcError(
        f"moecalc.torch_sim needs torch-sim, which does not import ({error}): "
        "`pip install torch-sim-atomistic`"
    ) from error


class MoEModel(ModelInterface):
    """A package as a model of torch-sim: energies, forces and stresses of a batch of structures at once.

    The batch is one evaluation of the fused kernels, not a graph of torch: results have no gradients. Every
    structure has a neighbor list of its own with a skin, which is kept until a pair could be missing.

    Args:
        model: package file (`*.moe.pt`); None is the model that comes with moecalc.
        device: of the tensors and of the model; None is CUDA where moecalc has it, else the CPU.
        dtype: of the tensors that go in and come out. Geometry and sums are float64 inside.
        network: precision of the network, "float32" or "float64"; None is the package's own.
        compute_stress: give "stress"; all structures must be periodic in all directions then.
        skin: extra reach of the neighbor lists, Angstrom.
        charge: of all structures, for models that take it.
        spin: the same.
        fparam: the same.
        allow_untrained: accept elements that the model knows but was not trained on.
        threads: of the CPU; None is the default.

    Raises:
        PackageError: the package is missing, damaged, foreign or too new.
        MoecalcError: the device or the precision does not exist here.
        ElementError, StructureError, ConditionError: (on use) as `MoECalculator`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float64,
        *,
        network: str | None = None,
        compute_stress: bool = True,
        skin: float = 1.0,
        charge: int | None = None,
        spin: int | None = None,
        fparam: Any = None,
        allow_untrained: bool = False,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        if dtype not in {torch.float32, torch.float64}:
            raise MoecalcError(f"expected dtype torch.float32 or torch.float64, got {dtype}")
        check_threads(threads)
        path = default_model_path() if model is None else Path(model).expanduser().resolve()
        self._model = open_model(path, "auto" if device is None else str(device), dtype_name(network))
        self._device = torch.device(self._model.device)
        self._dtype = dtype
        self._compute_stress = bool(compute_stress)
        self._compute_forces = True
        self._memory_scales_with = "n_atoms_x_density"
        self._skin = skin
        self._given = {"charge": charge, "spin": spin, "fparam": fparam}
        self._allow_untrained = allow_untrained
        self._threads = threads
        self._lists: list[SkinNeighborList] = []
        self._sizes: list[bytes] = []  # the atoms that each list is of
        self._joined: tuple[list[PairList], PairList] | None = None

    @property
    def compute_stress(self) -> bool:
        """Whether results have a stress."""
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, compute_stress: bool) -> None:
        self._compute_stress = bool(compute_stress)

    @property
    def elements(self) -> list[str]:
        """Chemical symbols that the model knows."""
        return self._model.elements

    def forward(self, state: Any, **_: Any) -> dict[str, torch.Tensor]:
        """Energies, forces and stresses of a batch.

        Args:
            state: `torch_sim.SimState`, or a dict of its tensors.

        Returns:
            "energy" (n_systems,) eV, "forces" (n_atoms, 3) eV/A and, if asked for, "stress" (n_systems, 3, 3)
            eV/A^3, positive under tension.
        """
        if isinstance(state, dict):
            state = torch_sim.SimState(**state, masses=torch.ones_like(state["positions"][:, 0]))
        structures = self._structures(state)
        pairs, positions = self._pairs(structures)
        cells = np.stack([atoms.cell.array for atoms in structures])
        found = self._model.evaluate(
            pairs,
            self._types(structures),
            positions,
            cells,
            [conditions_of(atoms, self._model.conditions, self._given) for atoms in structures],
            virial=self._compute_stress,
            threads=self._threads,
        )
        results = {"energy": found[keys.ENERGY], "forces": found[keys.FORCES]}
        if self._compute_stress:
            virial = found[keys.VIRIAL]
            volumes = np.abs(np.linalg.det(cells))[:, None, None]
            results["stress"] = -0.5 * (virial + virial.transpose(0, 2, 1)) / volumes
        return {
            name: torch.tensor(values, dtype=self._dtype, device=self._device)
            for name, values in results.items()
        }

    def _types(self, structures: list[Atoms]) -> Ints:
        numbers = np.concatenate([atoms.numbers for atoms in structures])
        return self._model.types(numbers, allow_untrained=self._allow_untrained)

    def _structures(self, state: Any) -> list[Atoms]:
        """Structures of a state, in its order."""
        positions = state.positions.detach().cpu().double().numpy()
        cells = state.row_vector_cell.detach().cpu().double().numpy()
        numbers = state.atomic_numbers.detach().cpu().numpy()
        # one flag, or one for each direction, by the version of torch-sim
        pbc = np.broadcast_to(np.asarray(torch.as_tensor(state.pbc).cpu()), 3)
        counts = np.bincount(state.system_idx.detach().cpu().numpy(), minlength=len(cells))
        if self._compute_stress and not (pbc.all() and np.linalg.det(cells).all()):
            raise StructureError(
                "stress is undefined, expected structures periodic in all directions, but pbc is "
                f"{pbc.tolist()}: use compute_stress=False"
            )
        ends = np.cumsum(counts)
        structures = [
            Atoms(
                numbers[end - count : end],
                positions[end - count : end],
                cell=cell if pbc.any() else None,
                pbc=pbc,
            )
            for count, end, cell in zip(counts, ends, cells, strict=True)
        ]
        _give_conditions(structures, state)
        return structures

    def _pairs(self, structures: list[Atoms]) -> tuple[PairList, Floats]:
        """Pairs of the batch, the same object until a list is searched anew, and the positions for them."""
        kinds = [atoms.numbers.tobytes() for atoms in structures]
        if kinds != self._sizes:
            self._lists = [SkinNeighborList(self._model.cutoff, self._skin) for _ in structures]
            self._sizes = kinds
        parts: list[PairList] = []
        positions: list[Floats] = []
        for atoms, neighbors in zip(structures, self._lists, strict=True):
            pairs, at = neighbors.pairs(atoms)
            parts.append(pairs)
            positions.append(at)
        held = self._joined
        if (
            held is None
            or len(held[0]) != len(parts)
            or any(old is not new for old, new in zip(held[0], parts, strict=True))
        ):
            held = self._joined = (parts, PairList.concatenate(parts))
        return held[1], np.concatenate(positions)


def _give_conditions(structures: list[Atoms], state: Any) -> None:
    """Take charges and spins that a state carries; its zeros mean that nobody gave one."""
    for name in ("charge", "spin"):
        carried = getattr(state, name, None)
        if carried is None:
            continue
        for atoms, value in zip(structures, torch.as_tensor(carried).reshape(-1).tolist(), strict=True):
            if value != 0:
                atoms.info[name] = value
