"""Loss of a batch and its gradient with respect to the weights, by the fused kernels.

The gradient of a loss on forces needs second derivatives: d/dw of v . dE/dx, with v = dL/d(dE/dx). Here they
are central differences of first derivatives,

    d/dw (v . dE/dx) = [dE/dw (x + h v) - dE/dw (x - h v)] / (2 h) + O(h^2).

A step is one evaluation of forces and two of weight gradients, all by the kernels that also run the dynamics.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moecalc._clean import clean_torch
from moecalc._lib import load
from moecalc.errors import MoecalcError
from moecalc.nn import ModelConfig, MoEPotential
from moecalc.package.lower import lower
from moecalc.package.write import write_bare
from moecalc.training.graphs import Batch
from moecalc.training.losses import huber
from moecalc.training.options import Options
from moecalc.training.packing import Arrays, Packed, pack
from moecalc.training.repulsion import Repulsion
from moecalc.typing import Floats

if TYPE_CHECKING:
    from moecalc._C import Trainer


@dataclass
class Evaluated:
    """A batch with the weights that are set, in the order of the kernels' graph.

    Attributes:
        packed: the weights.
        types: (n,) index of every atom's element.
        edges: (2, E) centre and neighbor.
        vectors: (E, 3) from centre to neighbor, Angstrom.
        row: (n,) the batch's atom of every node.
        system: (n,) frame of every node.
        energies: (n,) of atoms, eV.
        d_vectors: (E, 3) derivatives of the sum of the energies with respect to `vectors`, eV/Angstrom.
    """

    packed: Packed
    types: Tensor
    edges: Tensor
    vectors: Tensor
    row: Tensor
    system: Tensor
    energies: Tensor
    d_vectors: Tensor

    def energy(self, n_system: int) -> Tensor:
        """Energies of the frames (S,), eV."""
        zeros = torch.zeros(n_system, dtype=torch.float64)
        return zeros.index_add(0, self.system, self.energies)

    def forces(self) -> Tensor:
        """Forces on the nodes (n, 3), eV/Angstrom."""
        zeros = torch.zeros((len(self.types), 3), dtype=torch.float64)
        return zeros.index_add(0, self.edges[0], self.d_vectors).index_add(0, self.edges[1], -self.d_vectors)

    def virial(self, n_system: int) -> Tensor:
        """Virials of the frames (S, 3, 3), eV."""
        outer = -(self.vectors.unsqueeze(2) * self.d_vectors.unsqueeze(1)).reshape(-1, 9)
        zeros = torch.zeros((n_system, 9), dtype=torch.float64)
        return zeros.index_add(0, self.system[self.edges[0]], outer).reshape(n_system, 3, 3)


class StepFunction:
    """A model and the kernels that evaluate it: predictions, losses, gradients.

    Args:
        config: architecture: routing by element, uncompressed angles, widths that are multiples of 16
            (float32) or 8 (float64), one precision everywhere.
        options: scales, weights and displacement of the loss.

    Raises:
        MoecalcError, RuntimeError: an option of the architecture that the kernels do not cover, by name.
    """

    def __init__(self, config: ModelConfig, options: Options) -> None:
        _check_covered(config)
        self.options = options
        dtype = getattr(torch, config.descriptor.precision)
        self.model = MoEPotential(config)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.model.dtype_probe = self.model.dtype_probe.to(dtype)
        self._kernels = _kernels(self.model, config)

    def _readout(self, types: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        """Node features (n, n_dim) of the last layer, and the energies (n,) that are read from them."""
        node = _tensor(self._kernels.forward(keep)).requires_grad_(True)
        return node, self.model.readout(node, types)

    def _evaluate(self, batch: Batch) -> Evaluated:
        kernels = self._kernels
        kernels.num_threads = torch.get_num_threads()
        packed = pack(self.model, sorted(set(batch.types.tolist())))
        kernels.set_weights(*packed.arrays())
        graph = (batch.types, batch.edge_index, batch.edge_vec, batch.system)
        row = _tensor(kernels.set_graph(*graph, len(batch.sizes)))
        types, edges, vectors = map(_tensor, kernels.graph())
        node, energies = self._readout(types, keep=False)
        (d_node,) = torch.autograd.grad(energies.sum(), node)
        d_vectors = _tensor(kernels.backward(d_node.numpy()))
        system = _tensor(batch.system)[row]
        return Evaluated(packed, types, edges, vectors, row, system, energies.detach(), d_vectors)

    @clean_torch()
    def predict(self, batch: Batch) -> tuple[Floats, Floats, Floats]:
        """Energies (S,), forces (n, 3) and virials (S, 3, 3) of a batch, with the weights that are set."""
        evaluated = self._evaluate(batch)
        n_system = len(batch.sizes)
        forces = np.empty_like(batch.forces)
        forces[evaluated.row.numpy()] = evaluated.forces().numpy()
        return evaluated.energy(n_system).numpy(), forces, evaluated.virial(n_system).numpy()

    @clean_torch()
    def gradients(self, batch: Batch, energy_weight: float, virial_weight: float) -> dict[str, float]:
        """Add the gradient of the batch's loss to `grad` of the parameters.

        Returns:
            The loss and the mean absolute errors of energies (eV/atom), forces (eV/A) and virials (eV/atom).
        """
        options = self.options
        evaluated = self._evaluate(batch)
        n_atom, n_system = len(batch.types), len(batch.sizes)
        sizes = _tensor(batch.sizes).double()
        of_virial = (_tensor(batch.has_virial).double() / sizes)[:, None, None]
        energy_error = (evaluated.energy(n_system) - _tensor(batch.energy)) / sizes
        force_error = evaluated.forces() - _tensor(batch.forces)[evaluated.row]
        has_pressure = _tensor(batch.has_pressure)
        virial_error = (evaluated.virial(n_system) - _tensor(batch.virial)) * of_virial
        virial_error = _without_pressure(virial_error, has_pressure)

        energy_loss, energy_slope = huber(energy_error / options.energy_scale, options.huber)
        force_loss, force_slope = huber(force_error / options.force_scale, options.huber)
        virial_loss, virial_slope = huber(virial_error / options.virial_scale, options.huber)
        loss = energy_weight * energy_loss.mean() + force_loss.mean() + virial_weight * virial_loss.mean()
        d_energy = energy_weight / (n_system * options.energy_scale) * energy_slope / sizes  # (S,)
        d_forces = force_slope / (3 * n_atom * options.force_scale)  # (n, 3)
        per_virial = virial_weight / (9 * n_system * options.virial_scale)
        d_virial = per_virial * _without_pressure(virial_slope, has_pressure) / sizes[:, None, None]
        self._add_gradients(evaluated, d_energy[evaluated.system], _to_vectors(evaluated, d_forces, d_virial))
        return {
            "loss": float(loss),
            "energy": float(energy_error.abs().mean()),
            "force": float(force_error.abs().mean()),
            "virial": float(virial_error.abs().mean()),
        }

    def _add_gradients(self, evaluated: Evaluated, d_energies: Tensor, direction: Tensor) -> None:
        """Add to `grad` of the parameters.

        Args:
            evaluated: what was evaluated last.
            d_energies: (n,) derivative of the loss with respect to the energies of atoms.
            direction: (E, 3) derivative of the loss with respect to `evaluated.d_vectors`.
        """
        largest = float(direction.abs().max()) if len(direction) else 0.0
        h = self.options.displacement / largest if largest > 0 else 0.0
        sums: Arrays = []
        for sign in (1.0, -1.0):
            self._kernels.set_edge_vec((evaluated.vectors + sign * h * direction).numpy())
            node, energies = self._readout(evaluated.types, keep=True)
            # half of the energies' share at either side: their mean is that in the middle, to O(h^2)
            weights = 0.5 * d_energies + (sign / (2.0 * h) if h > 0 else 0.0)
            (weights * energies).sum().backward()
            assert node.grad is not None  # the energies depend on it
            part = evaluated.packed.flat(self._kernels.backward_to_weights(node.grad.numpy()))
            sums = [a + b for a, b in zip(sums, part, strict=True)] if sums else part
        pairs = [
            (tensor, _tensor(array).reshape(tensor.shape))
            for tensor, array in zip(evaluated.packed.tensors(), sums, strict=True)
            # a map that the model has but the energy does not need has no gradient
            if tensor.requires_grad and array.size
        ]
        torch.autograd.backward([tensor for tensor, _ in pairs], [gradient for _, gradient in pairs])

    @clean_torch()
    def repulsion_gradients(self, repulsion: Repulsion, rng: np.random.Generator) -> float:
        """Add the gradient for a batch of close pairs to `grad` of the parameters; returns the loss."""
        evaluated = self._evaluate(repulsion.batch(rng))
        loss, direction = repulsion.loss(
            evaluated.types, evaluated.edges, evaluated.vectors, evaluated.d_vectors, self.options.huber
        )
        if loss > 0.0:
            no_energies = torch.zeros_like(evaluated.energies)
            self._add_gradients(evaluated, no_energies, self.options.repulsion * direction)
        return loss


def _without_pressure(virial: Tensor, has_pressure: Tensor) -> Tensor:
    """Virials (S, 3, 3) less their trace, where that is not to count: a projection, its own adjoint."""
    trace = virial.diagonal(dim1=1, dim2=2).mean(1) * (~has_pressure)
    return virial - trace[:, None, None] * torch.eye(3, dtype=virial.dtype)


def _to_vectors(evaluated: Evaluated, d_forces: Tensor, d_virial: Tensor) -> Tensor:
    """Derivative of the loss with respect to `d_vectors` (E, 3), through forces and virials.

    F_i = sum of d_vectors over edges of i - sum over edges to i; virial = -sum of vector (x) d_vectors.
    """
    centre, neighbor = evaluated.edges
    of_edge = d_virial[evaluated.system[centre]]
    return d_forces[centre] - d_forces[neighbor] - (evaluated.vectors.unsqueeze(2) * of_edge).sum(1)


def _check_covered(config: ModelConfig) -> None:
    """Refuse what the kernels could not be told; they refuse the rest themselves."""
    descriptor = config.descriptor
    if descriptor.a_compress_rate:
        raise MoecalcError(
            f"a_compress_rate = {descriptor.a_compress_rate}: training with the fused kernels needs "
            "uncompressed angles (0); "
            "train with the DeePMD-kit plugin instead"
        )
    if config.takes_conditions:
        option = (
            "add_chg_spin_ebd = true"
            if descriptor.add_chg_spin_ebd
            else f"numb_fparam = {config.fitting.numb_fparam}"
        )
        raise MoecalcError(
            f"{option}: training with the fused kernels takes no charge, spin or frame parameters; "
            "train with the DeePMD-kit plugin instead"
        )


def _kernels(model: MoEPotential, config: ModelConfig) -> Trainer:
    """The kernels for a model's architecture, which they read from a package as any run does."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.moe.pt"
        lowered, _ = lower(model, config)
        write_bare(path, lowered)
        kernels: Trainer = load().Trainer(os.fsencode(path), config.descriptor.precision)
    return kernels


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
