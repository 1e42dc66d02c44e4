"""Fit a potential to energies, forces and stresses with the fused kernels.

The gradient of a loss on forces needs second derivatives: d/dw of v . dE/dx, with v = dL/d(dE/dx). Here they are central differences of
first derivatives,

    d/dw (v . dE/dx) = [dE/dw (x + h v) - dE/dw (x - h v)] / (2 h) + O(h^2),

so that a step is one evaluation of forces and two of weight gradients, all by the kernels that also run the dynamics.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from moecalc._clean import clean_torch
from moecalc._jit import jit_script
from moecalc._lib import load
from moecalc._torch_threads import torch_threads
from moecalc.dataset import check_frames, read_frames, split_frames
from moecalc.errors import MoecalcError
from moecalc.files import (
    CHECKPOINT,
    check_outputs,
    describe,
    drop_partial_line,
    load_failure,
    to_bytes,
    write_bytes,
)
from moecalc.nn import ModelConfig, MoEPotential
from moecalc.package.archive import write_archive
from moecalc.package.importers.common import first_error
from moecalc.package.importers.native import save_checkpoint
from moecalc.package.lower import lower
from moecalc.training.data import Batch, Frame, collate, smallest_cell, to_frame
from moecalc.training.losses import huber
from moecalc.training.packing import Packed, pack
from moecalc.training.repulsion import Repulsion


class Options(BaseModel):
    """Settings of a fit.

    The loss of a batch is the mean of Huber functions of errors over their scales: of the energy per atom (eV), of force components
    (eV/A), of virials per atom (eV); below `huber` scales they are squares, above linear. The weights of energies and virials against
    forces grow from the first value to the second over the steps, the learning rate falls along a cosine.
    """

    model_config = ConfigDict(extra="forbid")

    steps: int = Field(default=200_000, gt=0)
    batch_atoms: int = Field(
        default=96, gt=0, description="frames are added to a batch until it has as many atoms"
    )
    learning_rate: float = Field(default=2e-3, gt=0)
    last_learning_rate: float = Field(default=1e-5, gt=0)
    warm_up: int = Field(
        default=500, gt=0, description="steps over which the learning rate rises at the start"
    )
    energy_scale: float = Field(default=0.004, gt=0)
    force_scale: float = Field(default=0.06, gt=0)
    virial_scale: float = Field(default=0.02, gt=0)
    energy_weight: tuple[float, float] = (0.05, 1.0)
    virial_weight: tuple[float, float] = (0.02, 0.1)
    huber: float = Field(default=2.0, gt=0)
    displacement: float = Field(
        default=0.01, gt=0, description="largest displacement h v of the differences, Angstrom"
    )
    average: float = Field(
        default=0.999, ge=0, lt=1, description="decay of the running average of the weights"
    )
    clip: float = Field(default=100.0, gt=0, description="largest norm of the gradient")
    repulsion: float = Field(
        default=0.3,
        ge=0,
        description="weight of the repulsion of close pairs, see `moecalc.training.repulsion`",
    )
    repulsion_every: int = Field(
        default=4, gt=0, description="steps from one batch of close pairs to the next"
    )
    seed: int = 1
    group_weights: dict[str, float] = Field(
        default_factory=dict, description="how often the frames of a group come in an epoch, against 1"
    )


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _between(ends: tuple[float, float], progress: float) -> float:
    """From the first value to the second, in equal factors (in equal steps where one is 0)."""
    first, last = ends
    return first * (last / first) ** progress if min(ends) > 0 else first + (last - first) * progress


@dataclass
class Evaluated:
    """A batch with the weights that are set, in the order of the kernels' graph.

    types (n,), edges (2, E), vectors (E, 3) in Angstrom; row (n,): the batch's atom of every node; energies (n,) of atoms in eV;
    g (E, 3): derivatives of their sum with respect to the edge vectors, eV/Angstrom.
    """

    packed: Packed
    types: Tensor
    edges: Tensor
    vectors: Tensor
    row: Tensor
    energies: Tensor
    g: Tensor


class Fit:
    """A model, its kernels and its optimiser.

    Args:
        config: architecture: routing by element, uncompressed angles, widths that are multiples of 16 (float32) or 8 (float64), one
            precision everywhere.
        options: see `Options`.

    Raises:
        MoecalcError, RuntimeError: an option of the architecture that the kernels do not cover, by name.
    """

    @clean_torch()
    def __init__(self, config: ModelConfig, options: Options) -> None:
        self.config, self.options = config, options
        if config.descriptor.a_compress_rate:
            raise MoecalcError(
                f"a_compress_rate = {config.descriptor.a_compress_rate}: training with the fused kernels needs uncompressed angles (0); "
                "train with the DeePMD-kit plugin instead"
            )
        if config.takes_conditions:
            option = (
                "add_chg_spin_ebd = true"
                if config.descriptor.add_chg_spin_ebd
                else f"numb_fparam = {config.fitting.numb_fparam}"
            )
            raise MoecalcError(
                f"{option}: training with the fused kernels takes no charge, spin or frame parameters; "
                "train with the DeePMD-kit plugin instead"
            )
        torch.manual_seed(options.seed)
        self.dtype = getattr(torch, config.descriptor.precision)
        self.model = MoEPotential(config)
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(self.dtype)
        self.model.dtype_probe = self.model.dtype_probe.to(self.dtype)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.moe.pt"
            lowered, _ = lower(self.model, config)
            write_archive(path, jit_script(lowered), {"metadata.json": "{}"})
            self.kernels: Any = load().Trainer(os.fsencode(path), config.descriptor.precision)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=options.learning_rate, betas=(0.9, 0.99))
        self.averaged = [
            p.detach().clone() for p in self.parameters
        ]  # running average, which is what is validated and packaged
        self.step_number = 0
        self.rng = np.random.default_rng(options.seed)
        self.repulsion: Repulsion | None = None  # set by `run`, which has the frames
        self.repulsion_loss = 0.0
        self.queue: list[int] = []  # frames that are left of this epoch

    # --- what the kernels compute ---

    def _readout(self, types: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
        v = _tensor(self.kernels.forward(keep)).requires_grad_(True)
        return v, self.model.readout(v, types)

    def _evaluate(self, batch: Batch) -> Evaluated:
        self.kernels.num_threads = torch.get_num_threads()
        packed = pack(self.model, sorted(set(batch.types.tolist())))
        self.kernels.set_weights(*packed.arrays())
        row = self.kernels.set_graph(
            batch.types, batch.edge_index, batch.edge_vec, batch.system, len(batch.sizes)
        )
        types, edges, vectors = map(_tensor, self.kernels.graph())
        v, energies = self._readout(types, False)
        (dv,) = torch.autograd.grad(energies.sum(), v)
        g = _tensor(self.kernels.backward(dv.numpy()))
        return Evaluated(packed, types, edges, vectors, _tensor(row), energies.detach(), g)

    @clean_torch()
    def predict(self, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Energies (S,), forces (n, 3) and virials (S, 3, 3) of a batch, with the weights that are set."""
        x = self._evaluate(batch)
        system = _tensor(batch.system)[x.row]
        energy = torch.zeros(len(batch.sizes), dtype=torch.float64).index_add(0, system, x.energies)
        out = np.empty_like(batch.forces)
        out[x.row.numpy()] = _forces(x.g, x.edges, len(batch.types)).numpy()
        virial = _virial(x.g, x.vectors, system[x.edges[0]], len(batch.sizes))
        return energy.numpy(), out, virial.numpy()

    @clean_torch()
    def gradients(self, batch: Batch, energy_weight: float, virial_weight: float) -> dict[str, float]:
        """Add the gradient of the batch's loss to `grad` of the parameters.

        Returns:
            The loss and the mean absolute errors of energies (eV/atom), forces (eV/A) and virials (eV/atom).
        """
        o = self.options
        x = self._evaluate(batch)
        n, n_system = len(batch.types), len(batch.sizes)
        system = _tensor(batch.system)[x.row]
        sizes = _tensor(batch.sizes).double()
        energy = torch.zeros(n_system, dtype=torch.float64).index_add(0, system, x.energies)
        d_energy = (energy - _tensor(batch.energy)) / sizes
        d_force = _forces(x.g, x.edges, n) - _tensor(batch.forces)[x.row]
        edge_system = system[x.edges[0]]
        d_virial = _virial(x.g, x.vectors, edge_system, n_system) - _tensor(batch.virial)
        d_virial = d_virial * (_tensor(batch.has_virial).double() / sizes)[:, None, None]

        loss_e, slope_e = huber(d_energy / o.energy_scale, o.huber)
        loss_f, slope_f = huber(d_force / o.force_scale, o.huber)
        loss_v, slope_v = huber(d_virial / o.virial_scale, o.huber)
        loss = energy_weight * loss_e.mean() + loss_f.mean() + virial_weight * loss_v.mean()
        to_energy = energy_weight / (n_system * o.energy_scale) * slope_e / sizes  # (S,)
        to_force = slope_f / (3 * n * o.force_scale)  # (n, 3)
        to_virial = (
            virial_weight / (9 * n_system * o.virial_scale) * slope_v / sizes[:, None, None]
        )  # (S, 3, 3)
        # F_i = sum of g over edges of i - sum over edges to i; virial = -sum vec (x) g
        direction = to_force[x.edges[0]] - to_force[x.edges[1]]
        direction = direction - (x.vectors.unsqueeze(2) * to_virial[edge_system]).sum(1)
        self._add_gradients(x, to_energy[system], direction)
        return {
            "loss": float(loss),
            "energy": float(d_energy.abs().mean()),
            "force": float(d_force.abs().mean()),
            "virial": float(d_virial.abs().mean()),
        }

    def _add_gradients(self, x: Evaluated, to_energy: Tensor, direction: Tensor) -> None:
        """Add to `grad` of the parameters.

        Args:
            x: what was evaluated last.
            to_energy: (n,) derivative of the loss with respect to the energies of atoms.
            direction: (E, 3) derivative of the loss with respect to g.
        """
        largest = float(direction.abs().max()) if len(direction) else 0.0
        h = self.options.displacement / largest if largest > 0 else 0.0
        sums: list[np.ndarray] = []
        for sign in (1.0, -1.0):
            self.kernels.set_edge_vec((x.vectors + sign * h * direction).numpy())
            v, energies = self._readout(x.types, True)
            # half of the energies' share at either side: their mean is that in the middle, to O(h^2)
            weights = 0.5 * to_energy + (sign / (2.0 * h) if h > 0 else 0.0)
            (weights * energies).sum().backward()
            assert v.grad is not None  # the energies depend on v
            part = _flat(self.kernels.backward_to_weights(v.grad.numpy()), x.packed)
            sums = [a + b for a, b in zip(sums, part, strict=True)] if sums else part
        pairs = [
            (t, _tensor(a).reshape(t.shape))
            for t, a in zip(x.packed.tensors(), sums, strict=True)
            if t.requires_grad
            and a.size  # a map that the model has but the energy does not need has no gradient
        ]
        torch.autograd.backward([t for t, _ in pairs], [a for _, a in pairs])

    @clean_torch()
    def repulsion_gradients(self, repulsion: Repulsion) -> float:
        """Add the gradient for a batch of close pairs to `grad` of the parameters; returns the loss."""
        x = self._evaluate(repulsion.batch(self.rng))
        loss, direction = repulsion.loss(x.types, x.edges, x.vectors, x.g, self.options.huber)
        if loss > 0.0:
            self._add_gradients(x, torch.zeros_like(x.energies), self.options.repulsion * direction)
        return loss

    @clean_torch()
    def step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimiser; returns what `gradients` does, the norm of the gradient and the learning rate."""
        o = self.options
        progress = min(1.0, self.step_number / o.steps)
        fall = 0.5 * (1.0 + math.cos(math.pi * progress))
        rate = o.last_learning_rate + (o.learning_rate - o.last_learning_rate) * fall
        rate *= min(1.0, (self.step_number + 1) / o.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        if o.repulsion > 0 and self.repulsion is not None and self.step_number % o.repulsion_every == 0:
            self.repulsion_loss = self.repulsion_gradients(self.repulsion)
            # forces in a hole may be anything
            torch.nn.utils.clip_grad_norm_(self.parameters, o.clip)
        result = self.gradients(
            batch, _between(o.energy_weight, progress), _between(o.virial_weight, progress)
        )
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, o.clip)
        self.optimizer.step()
        self.step_number += 1
        keep = min(o.average, (1 + self.step_number) / (10 + self.step_number))
        for average, parameter in zip(self.averaged, self.parameters, strict=True):
            average.lerp_(parameter.detach(), 1.0 - keep)
        return {**result, "repulsion": self.repulsion_loss, "norm": float(norm), "rate": rate}

    # --- the loop ---

    def batches(self, frames: list[Frame]) -> Iterator[Batch]:
        """Endless batches of about `batch_atoms` atoms; every frame comes equally often, but for `group_weights`."""
        weights = np.array([self.options.group_weights.get(f.group, 1.0) for f in frames])
        while True:
            chosen: list[Frame] = []
            atoms = 0
            while atoms < self.options.batch_atoms:
                while not self.queue:
                    counts = np.floor(weights + self.rng.random(len(frames))).astype(int)
                    self.queue = self.rng.permutation(np.repeat(np.arange(len(frames)), counts)).tolist()
                frame = frames[self.queue.pop()]
                chosen.append(frame)
                atoms += len(frame.types)
            yield collate(chosen)

    def swap_average(self) -> None:
        """Exchange the weights with their running average (twice: as before)."""
        for parameter, average in zip(self.parameters, self.averaged, strict=True):
            value = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(value)

    @clean_torch()
    def validate(self, frames: list[Frame]) -> dict[str, dict[str, float]]:
        """Mean absolute errors per group, with averaged weights: energy (eV/atom), force (eV/A)."""
        self.swap_average()
        sums: dict[str, list[list[float]]] = {}
        for frame in frames:
            energy, forces, _ = self.predict(collate([frame]))
            entry = sums.setdefault(frame.group, [[], [], []])
            entry[0].append(abs(float(energy[0]) - frame.energy) / len(frame.types))
            entry[1].append(float(np.abs(forces - frame.forces).sum()))
            entry[2].append(float(frame.forces.size))
        self.swap_average()
        return {
            group: {"energy": float(np.mean(e)), "force": sum(f) / sum(n), "frames": len(e)}
            for group, (e, f, n) in sorted(sums.items())
        }

    @clean_torch()
    def save(self, path: Path) -> None:
        """Everything that `restore` needs, and moecalc's checkpoint form of the averaged weights beside it."""
        state = {
            "step": self.step_number,
            "model": self.model.state_dict(),
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.bit_generator.state,
            "queue": self.queue,
            "config": self.config.model_dump(mode="json"),
            "options": self.options.model_dump(mode="json"),
        }
        write_bytes(path, to_bytes(state))
        self.swap_average()
        try:
            save_checkpoint(path.with_suffix(".averaged.pt"), self.model, self.config)
        finally:
            self.swap_average()

    @clean_torch()
    def restore(self, path: Path) -> None:
        """Continue from a file of `save`. Only tensors and plain containers are unpickled: the file cannot run code.

        Raises:
            MoecalcError: it is of another architecture, or not a file of `save`.
        """
        begin_anew = "put back a copy of it, or remove it to begin anew"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about pickles of others
                state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - torch raises whatever a damaged file leads it to
            what = describe(path)
            reason = what if what is not None and what != CHECKPOINT else load_failure(error)
            raise MoecalcError(f"{path}: not the state of a fit ({reason}): {begin_anew}") from None
        try:
            self._restore(state, path)
        except MoecalcError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = " ".join(str(error).split())[:200]
            raise MoecalcError(
                f"{path}: not the state of a fit ({type(error).__name__}: {reason}): {begin_anew}"
            ) from None

    def _restore(self, state: dict[str, Any], path: Path) -> None:
        if state["config"] != self.config.model_dump(mode="json"):
            raise MoecalcError(
                f"{path} belongs to another model: choose another folder, or the input that it was begun with"
            )
        self.model.load_state_dict(state["model"])
        for average, value in zip(self.averaged, state["averaged"], strict=True):
            average.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        self.queue = [int(index) for index in state["queue"]]
        self.step_number = int(state["step"])

    @clean_torch()
    def run(
        self,
        train: list[Frame],
        valid: list[Frame],
        folder: Path,
        every: int = 2000,
        until: float | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """Train to the last step, or to a time.

        Writes to `folder`: `log.jsonl`, a line of errors every `every` steps; `state.pt`, to go on from; `state.averaged.pt`, a
        checkpoint for `moecalc package`.

        Args:
            train, valid: frames.
            folder: made where it does not exist.
            every: steps between validations.
            until: `time.time()` at which to stop, or None.
            progress: called with every line of the log.
        """
        folder.mkdir(parents=True, exist_ok=True)
        drop_partial_line(folder / "log.jsonl")
        batches = self.batches(train)
        self.repulsion = Repulsion(self.config.type_map, train, self.config.descriptor.e_rcut)
        recent: list[dict[str, float]] = []
        while self.step_number < self.options.steps and (until is None or time.time() < until):
            start = time.perf_counter()
            recent.append({**self.step(next(batches)), "seconds": time.perf_counter() - start})
            if self.step_number % every == 0 or self.step_number == self.options.steps:
                entry: dict[str, Any] = {"step": self.step_number}
                entry |= {k: float(np.mean([r[k] for r in recent])) for k in recent[0]}
                entry["validation"] = self.validate(valid)
                recent = []
                with (folder / "log.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
                self.save(folder / "state.pt")
                if progress is not None:
                    progress(entry)
        self.save(folder / "state.pt")


@clean_torch()
def begin(config: ModelConfig, options: Options, train: list[Frame], folder: Path) -> Fit:
    """The fit that was saved in a folder, or else a new one, with the elements' energies from the frames.

    Raises:
        MoecalcError: as `Fit` and `Fit.restore`.
    """
    fit = Fit(config, options)
    fit.model.readout.energy_shift.copy_(torch.from_numpy(element_energies(train, len(config.type_map))))
    if (folder / "state.pt").exists():
        fit.restore(folder / "state.pt")
    return fit


@clean_torch()
def fit_frames(
    source: str | Path,
    input_file: str | Path,
    folder: str | Path,
    *,
    validation: float = 0.05,
    hours: float | None = None,
    threads: int | None = None,
    every: int = 2000,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> Fit:
    """Fit a model to the frames of a file; goes on where an earlier call with the same folder stopped.

    Args:
        source: frames as for `moecalc.dataset.read_frames`.
        input_file: JSON with `model` (a `ModelConfig` without `type_map`) and `fit` (`Options`).
        folder: for the results, see `Fit.run`.
        validation: share of every group that is held out, drawn with the seed of the fit.
        hours: stop after so long; None: at the last step.
        threads: of the kernels; None: torch's number.
        every, progress: as in `Fit.run`.

    Raises:
        MoecalcError: an input that is not valid or is another than that of the folder; frames that cannot be used.
    """
    path, folder = Path(input_file), Path(folder)
    check_outputs(
        [("the fit's file", folder / name) for name in ("state.pt", "state.averaged.pt", "log.jsonl")],
        [("file of frames", source), ("--input", path)],
    )
    started = time.time()
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        model, options = given["model"], Options.model_validate(given.get("fit", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MoecalcError(f"{path}: expected JSON with `model` and `fit` ({error})") from None
    atoms = read_frames(source)
    numbers = sorted({int(z) for a in atoms for z in set(a.numbers)})
    elements = [chemical_symbols[z] for z in numbers]
    check_frames(atoms, elements)
    try:
        config = ModelConfig.model_validate({**model, "type_map": elements})
    except ValidationError as error:
        raise MoecalcError(f"{path}: model: {first_error(error)}") from None
    held_out = set(split_frames(atoms, validation, options.seed))
    cutoff = config.descriptor.e_rcut
    train = [to_frame(smallest_cell(a), elements, cutoff) for k, a in enumerate(atoms) if k not in held_out]
    valid = [to_frame(atoms[k], elements, cutoff) for k in sorted(held_out)]
    with torch_threads(threads):
        fit = begin(config, options, train, folder)
        until = None if hours is None else started + 3600.0 * hours
        fit.run(train, valid, folder, every, until, progress)
    return fit


def _forces(g: Tensor, edges: Tensor, n: int) -> Tensor:
    return torch.zeros((n, 3), dtype=torch.float64).index_add(0, edges[0], g).index_add(0, edges[1], -g)


def _virial(g: Tensor, vectors: Tensor, edge_system: Tensor, n_system: int) -> Tensor:
    outer = -(vectors.unsqueeze(2) * g.unsqueeze(1)).reshape(-1, 9)
    return (
        torch.zeros((n_system, 9), dtype=torch.float64)
        .index_add(0, edge_system, outer)
        .reshape(n_system, 3, 3)
    )


def _flat(gradients: Any, packed: Packed) -> list[np.ndarray]:
    """Gradients of the kernels in the order of `Packed.tensors`."""
    embedding, layers = gradients
    out = list(embedding)
    for (updates, groups), layer in zip(layers, packed.layers, strict=True):
        out += [np.ascontiguousarray(u[: len(t)]) for u, t in zip(updates, layer.updates, strict=True)]
        for arrays, tensors in zip(groups, layer.groups, strict=True):
            out += arrays[: len(tensors)]
    return out


def element_energies(frames: list[Frame], n_types: int) -> np.ndarray:
    """Least-squares energy of an atom of every type (T,), eV; types without frames get 0."""
    counts = np.stack([np.bincount(f.types, minlength=n_types) for f in frames]).astype(float)
    weights = 1.0 / counts.sum(1)
    solution, *_ = np.linalg.lstsq(
        counts * weights[:, None], np.array([f.energy for f in frames]) * weights, rcond=None
    )
    return np.asarray(solution)
