"""Fit a potential to energies, forces and stresses with the fused kernels: the loop over batches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from pydantic import ValidationError

from moecalc._clean import clean_torch
from moecalc._torch_threads import torch_threads
from moecalc.data.frames import check_frames, group_of, read_frames
from moecalc.errors import MoecalcError
from moecalc.files import check_outputs, drop_partial_line
from moecalc.nn import ModelConfig
from moecalc.nn.deepmd_input import first_error
from moecalc.package.importers import ImportedModel, build_model, load_checkpoint, save_checkpoint
from moecalc.training.checkpoint import Checkpoint, refusing_damage
from moecalc.training.graphs import Batch, Frame, collate, to_frame
from moecalc.training.optimizer import make_optimizer
from moecalc.training.options import Options
from moecalc.training.repulsion import Repulsion
from moecalc.training.schedule import settings_at
from moecalc.training.split import SPLIT, TEST, draw, keep
from moecalc.training.step import StepFunction
from moecalc.training.supercells import smallest_cell
from moecalc.training.team import Alone, team
from moecalc.typing import Floats

_SHIFT_FRAMES: Final = 200
_FILES: Final = ("state.pt", "state.averaged.pt", "log.jsonl", SPLIT, TEST)


class Fit:
    """A model and its optimiser, on their way from random weights to the last step.

    Args:
        config: architecture, see `StepFunction`.
        options: settings.
        repulsion: close pairs that must repel; None: the loss has the data alone.
        hours: how long the steps are to take in all; None: as long as `options.steps` take. The settings
            follow the time then, and an interrupted fit is like an uninterrupted one, but not equal.

    Raises:
        MoecalcError, RuntimeError: an option of the architecture that the kernels do not cover, by name.
    """

    @clean_torch()
    def __init__(
        self,
        config: ModelConfig,
        options: Options,
        repulsion: Repulsion | None = None,
        hours: float | None = None,
    ) -> None:
        self.config = config
        self.options = options
        self.repulsion = repulsion
        self.hours = hours
        torch.manual_seed(options.seed)
        self.step_function = StepFunction(config, options)
        self.model = self.step_function.model
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(options.optimizer, self.model, options.learning_rate)
        self.team = Alone()
        # running average, which is what is validated and packaged
        self.averaged = [p.detach().clone() for p in self.parameters]
        self.step_number = 0
        self.seconds = 0.0  # that the steps have taken
        self.rng = np.random.default_rng(options.seed)
        self.repulsion_loss = 0.0
        self.queue: list[int] = []  # frames that are left of this epoch

    @clean_torch()
    def step(self, batch: Batch) -> dict[str, float]:
        """One step of the optimiser.

        Returns:
            What `StepFunction.gradients` does, the loss of close pairs, the norm of the gradient, the
            learning rate.
        """
        options = self.options
        started = time.perf_counter()
        settings = settings_at(options, self.progress)
        rate = settings.rate * min(1.0, (self.step_number + 1) / options.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        if self.repulsion is not None and options.repulsion > 0:
            self._repel(self.repulsion)
        result = self.step_function.gradients(batch, settings.energy_weight, settings.virial_weight)
        self.team.average(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.clip)
        self.optimizer.step()
        self.step_number += 1
        keep = min(settings.average, (1 + self.step_number) / (10 + self.step_number))
        for average, parameter in zip(self.averaged, self.parameters, strict=True):
            average.lerp_(parameter.detach(), 1.0 - keep)
        self.seconds = self.team.of_first(self.seconds + time.perf_counter() - started)
        return {**result, "repulsion": self.repulsion_loss, "norm": float(norm), "rate": rate}

    @property
    def progress(self) -> float:
        """Which part of the fit is done, from 0 to 1."""
        if self.hours is None:
            return min(1.0, self.step_number / self.options.steps)
        return min(1.0, self.seconds / (3600.0 * self.hours))

    def _counted(self) -> tuple[int, int]:
        """What is done and what there is to do: steps, or seconds."""
        if self.hours is None:
            return self.step_number, self.options.steps
        return round(self.seconds), round(3600.0 * self.hours)

    def _repel(self, repulsion: Repulsion) -> None:
        """Add the gradient of close pairs, at every `repulsion_every`-th step."""
        if self.step_number % self.options.repulsion_every != 0:
            return
        rng = np.random.default_rng([self.options.seed, self.step_number, self.team.rank])
        self.repulsion_loss = self.step_function.repulsion_gradients(repulsion, rng)
        # forces in a hole may be anything
        torch.nn.utils.clip_grad_norm_(self.parameters, self.options.clip)

    def batches(self, frames: list[Frame]) -> Iterator[Batch]:
        """Endless batches of about `batch_atoms` atoms; frames come equally often, or by `group_weights`.

        All processes of a team draw the same, and each has its own of every `team.size` batches.
        """
        weights = np.array([self.options.group_weights.get(f.group, 1.0) for f in frames])
        while True:
            drawn = [self._draw(frames, weights) for _ in range(self.team.size)]
            yield collate(drawn[self.team.rank])

    def _draw(self, frames: list[Frame], weights: Floats) -> list[Frame]:
        chosen: list[Frame] = []
        atoms = 0
        while atoms < self.options.batch_atoms:
            while not self.queue:
                counts = np.floor(weights + self.rng.random(len(frames))).astype(int)
                self.queue = self.rng.permutation(np.repeat(np.arange(len(frames)), counts)).tolist()
            frame = frames[self.queue.pop()]
            chosen.append(frame)
            atoms += len(frame.types)
        return chosen

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Let the model have the running average of its weights inside a `with` block."""
        self._exchange_weights()
        try:
            yield
        finally:
            self._exchange_weights()

    def _exchange_weights(self) -> None:
        for parameter, average in zip(self.parameters, self.averaged, strict=True):
            value = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(value)

    @clean_torch()
    def validate(self, frames: list[Frame]) -> dict[str, dict[str, float]]:
        """Mean absolute errors per group, with averaged weights: energy (eV/atom), force (eV/A)."""
        sums: dict[str, list[list[float]]] = {}
        with self.averaged_weights():
            for frame in frames:
                energy, forces, _ = self.step_function.predict(collate([frame]))
                entry = sums.setdefault(frame.group, [[], [], []])
                entry[0].append(abs(float(energy[0]) - frame.energy) / len(frame.types))
                entry[1].append(float(np.abs(forces - frame.forces).sum()))
                entry[2].append(float(frame.forces.size))
        return {
            group: {"energy": float(np.mean(e)), "force": sum(f) / sum(n), "frames": len(e)}
            for group, (e, f, n) in sorted(sums.items())
        }

    @clean_torch()
    def save(self, path: Path) -> None:
        """Write what `restore` needs, and moecalc's checkpoint form of the averaged weights beside it."""
        Checkpoint(
            step=self.step_number,
            model=self.model.state_dict(),
            averaged=self.averaged,
            optimizer=self.optimizer.state_dict(),
            rng=dict(self.rng.bit_generator.state),
            queue=self.queue,
            config=self.config.model_dump(mode="json"),
            options=self.options.model_dump(mode="json"),
            seconds=self.seconds,
        ).write(path)
        with self.averaged_weights():
            save_checkpoint(path.with_suffix(".averaged.pt"), self.model, self.config)

    @clean_torch()
    def restore(self, path: Path) -> None:
        """Go on from a file of `save`.

        Raises:
            MoecalcError: it is of another architecture or optimizer, or not a file of `save`.
        """
        saved = Checkpoint.read(path)
        if saved.config != self.config.model_dump(mode="json"):
            raise MoecalcError(
                f"{path} belongs to another model: choose another folder, or the input that it was begun with"
            )
        begun = saved.options.get("optimizer", "adam")  # what fits had before there was a choice
        if begun != self.options.optimizer:
            raise MoecalcError(
                f"{path} was begun with the optimizer {begun}, the input has {self.options.optimizer}: give "
                f'"optimizer": "{begun}" in `fit`, or choose another folder'
            )
        with refusing_damage(path):
            self.model.load_state_dict(saved.model)
            for average, value in zip(self.averaged, saved.averaged, strict=True):
                average.copy_(value)
            self.optimizer.load_state_dict(saved.optimizer)
            self.rng.bit_generator.state = saved.rng
            self.queue = [int(index) for index in saved.queue]
            self.step_number = int(saved.step)
            self.seconds = float(saved.seconds)

    @clean_torch()
    def start_from(self, imported: ImportedModel, train: list[Frame]) -> None:
        """Take the weights of a checkpoint, and shift its energies of single atoms to those of the frames.

        Data of another program or functional have another zero of energy. The shifts are least-squares ones,
        of the errors of at most some hundred frames; elements without frames keep their energies.

        Args:
            imported: of this architecture and these elements.
            train: frames.
        """
        self.model.load_state_dict(build_model(imported).state_dict())
        for average, parameter in zip(self.averaged, self.parameters, strict=True):
            average.copy_(parameter.detach())
        errors = []
        for frame in train[:: max(1, len(train) // _SHIFT_FRAMES)]:
            energy = float(self.step_function.predict(collate([frame]))[0][0])
            errors.append(replace(frame, energy=frame.energy - energy))
        self.model.readout.energy_shift += torch.from_numpy(
            element_energies(errors, len(self.config.type_map))
        )

    @clean_torch()
    def run(
        self,
        train: list[Frame],
        valid: list[Frame],
        folder: Path,
        every: int = 2000,
        until: float | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
        stepped: Callable[[int, int], None] | None = None,
    ) -> None:
        """Train to the end, or to a time.

        Writes to `folder`: `log.jsonl`, a line of errors every `every` steps; `state.pt`, to go on from;
        `state.averaged.pt`, a checkpoint for `moecalc package`.

        Args:
            train, valid: frames.
            folder: made where it does not exist.
            every: steps between validations.
            until: `time.time()` at which to stop, or None.
            progress: called with every line of the log.
            stepped: called with the step and the last step (or the seconds that steps have taken and are to
                take), at the beginning and after every step.
        """
        folder.mkdir(parents=True, exist_ok=True)
        drop_partial_line(folder / "log.jsonl")
        recent: list[dict[str, float]] = []
        if stepped is not None:
            stepped(*self._counted())
        for result in self._steps(train, until):
            recent.append(result)
            if stepped is not None:
                stepped(*self._counted())
            if self.step_number % every == 0 or self.progress >= 1.0:
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
    def accompany(self, train: list[Frame]) -> None:
        """Take part in the steps of the team's first process, until that stops."""
        for _ in self._steps(train, None):
            pass

    def _steps(self, train: list[Frame], until: float | None) -> Iterator[dict[str, float]]:
        batches = self.batches(train)
        while self.team.of_first(self.progress < 1.0 and (until is None or time.time() < until)):
            start = time.perf_counter()
            yield {**self.step(next(batches)), "seconds": time.perf_counter() - start}


@clean_torch()
def begin(
    config: ModelConfig,
    options: Options,
    train: list[Frame],
    folder: Path,
    hours: float | None = None,
    start: ImportedModel | None = None,
) -> Fit:
    """The fit that was saved in a folder, or else a new one, with the elements' energies from the frames.

    Args:
        config, options, hours: of the fit.
        train: frames.
        folder: of the results.
        start: checkpoint whose weights a new fit begins with; None: random ones.

    Raises:
        MoecalcError: as `Fit` and `Fit.restore`.
    """
    fit = Fit(config, options, Repulsion(config.type_map, train, config.descriptor.e_rcut), hours)
    if (folder / "state.pt").exists():
        fit.restore(folder / "state.pt")
    elif start is not None:
        fit.start_from(start, train)
    else:
        energies = element_energies(train, len(config.type_map))
        fit.model.readout.energy_shift.copy_(torch.from_numpy(energies))
    return fit


@clean_torch()
def fit_frames(
    source: str | Path,
    input_file: str | Path,
    folder: str | Path,
    *,
    validation: float = 0.05,
    test: float = 0.0,
    hours: float | None = None,
    pause_after: float | None = None,
    threads: int | None = None,
    processes: int = 1,
    every: int = 2000,
    seed: int | None = None,
    start: str | Path | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    stepped: Callable[[int, int], None] | None = None,
) -> Fit:
    """Fit a model to the frames of a file; goes on where an earlier call with the same folder stopped.

    Args:
        source: frames as for `moecalc.data.read_frames`.
        input_file: JSON with `model` (a `ModelConfig` without `type_map`) and `fit` (`Options`).
        folder: for the results, see `Fit.run`; `split.json` has the indices of the frames of each kind.
        validation: share of every group that is held out, drawn with the seed of the input. Its errors are in
            the log.
        test: share of every group that neither trains nor validates, written to `test.extxyz` of the folder,
            for `moecalc report`; drawn first, with the same seed.
        hours: how long the steps are to take in all, over all calls; the learning rate and the weights of
            the loss follow the time. None: as long as the steps of the input take.
        pause_after: hours after which this call stops, to go on later; None: at the end of the fit.
        threads: of the kernels, in every process; None: torch's number, divided by the processes.
        processes: that share every step. Each takes a batch of its own, and the step is that of the mean
            gradient: as many times the atoms per step. A script that asks for more than one needs
            `if __name__ == "__main__":`.
        every, progress, stepped: as in `Fit.run`.
        seed: of the weights and the order of the frames; None: that of the input. Members of a committee
            differ in nothing else, and hold out the same frames.
        start: checkpoint to begin with, of any layout; None: random weights. The model has its elements, and
            `model` of the input may be left out. A fit that goes on takes no weights from it.

    Raises:
        CheckpointError: `start` cannot be read.
        MoecalcError: an input that is not valid or is another than that of the folder; frames that cannot be
            used; groups in `without_pressure` that there are not; frames for the test that an earlier call
            has seen; `hours` or `processes` that are not positive; a process of the fit that has ended.
    """
    if hours is not None and not hours > 0:
        raise MoecalcError(f"expected more than 0 hours of training, got {hours:g}")
    if processes < 1:
        raise MoecalcError(f"expected at least 1 process, got {processes}")
    path, folder = Path(input_file), Path(folder)
    check_outputs(
        [("the fit's file", folder / name) for name in _FILES],
        [("file of frames", source), ("--input", path), *([] if start is None else [("--start", start)])],
    )
    started = time.time()
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        model = given.get("model") if start is not None else given["model"]
        options = Options.model_validate(given.get("fit", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MoecalcError(f"{path}: expected JSON with `model` and `fit` ({error})") from None
    imported = None if start is None else load_checkpoint(start)
    atoms = read_frames(source)
    numbers = sorted({int(z) for a in atoms for z in set(a.numbers)})
    elements = [chemical_symbols[z] for z in numbers] if imported is None else imported.config.type_map
    check_frames(atoms, elements)
    config = _config(path, model, elements, imported)
    split = draw(atoms, validation, test, options.seed)
    keep(folder, split, atoms)
    if seed is not None:
        options = options.model_copy(update={"seed": seed})
    cutoff = config.descriptor.e_rcut
    _check_groups(atoms, options.without_pressure)
    train = [
        to_frame(
            smallest_cell(atoms[k]), elements, cutoff, group_of(atoms[k]) not in options.without_pressure
        )
        for k in split.train
    ]
    valid = [to_frame(atoms[k], elements, cutoff) for k in split.valid]
    if threads is None and processes > 1:
        threads = max(1, torch.get_num_threads() // processes)
    beginning = (config, options, train, folder, hours, imported)
    with torch_threads(threads):
        fit = begin(*beginning)
        until = None if pause_after is None else started + 3600.0 * pause_after
        with team(processes, fit.parameters, _accompany, threads, beginning) as fit.team:
            fit.run(train, valid, folder, every, until, progress, stepped)
        fit.team = Alone()
    return fit


def _accompany(own_team: Alone, threads: int, beginning: tuple[Any, ...]) -> None:
    """What the other processes of a fit do: begin like the first one, and take part in its steps."""
    with torch_threads(threads):
        fit = begin(*beginning)
        fit.team = own_team
        fit.accompany(beginning[2])


def _check_groups(frames: list[Atoms], groups: list[str]) -> None:
    """Refuse groups that no frame is of.

    Raises:
        MoecalcError: names the group.
    """
    known = {group_of(frame) for frame in frames}
    for name in groups:
        if name not in known:
            raise MoecalcError(f"without_pressure: expected groups of the frames, got {name}")


def _config(path: Path, model: Any, elements: list[str], start: ImportedModel | None) -> ModelConfig:
    """The architecture of an input and, where there is one, of the checkpoint to begin with.

    Raises:
        MoecalcError: the input's is not valid, or another than the checkpoint's.
    """
    if model is None and start is not None:
        return start.config
    try:
        config = ModelConfig.model_validate({**model, "type_map": elements})
    except (ValidationError, TypeError) as error:
        reason = first_error(error) if isinstance(error, ValidationError) else error
        raise MoecalcError(f"{path}: model: {reason}") from None
    if start is None or config == start.config:
        return config
    wanted, found = (_options(one.model_dump(mode="json")) for one in (config, start.config))
    name = next(name for name in [*wanted, *found] if wanted.get(name) != found.get(name))
    raise MoecalcError(
        f"{path}: model: {name} is {wanted.get(name)}, but {found.get(name)} in {start.path}: leave `model` "
        "out of the input to take that of the checkpoint"
    )


def _options(section: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Options of a section and those within it, by path."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        found |= (
            _options(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
        )
    return found


def element_energies(frames: list[Frame], n_types: int) -> Floats:
    """Least-squares energy of an atom of every type (T,), eV; types without frames get 0."""
    counts = np.stack([np.bincount(f.types, minlength=n_types) for f in frames]).astype(float)
    weights = 1.0 / counts.sum(1)
    solution, *_ = np.linalg.lstsq(
        counts * weights[:, None], np.array([f.energy for f in frames]) * weights, rcond=None
    )
    return np.asarray(solution)
