"""Verification of a package: does the file give the forces that the checkpoint's model has?"""

from __future__ import annotations

import datetime as dt
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from moecalc import _lib
from moecalc._clean import clean_torch
from moecalc._jit import jit_load, unoptimized
from moecalc._torch_threads import torch_threads
from moecalc.conditions import Conditions
from moecalc.keys import ENERGY, FORCES, VIRIAL
from moecalc.nn.model import ModelOutput
from moecalc.package.archive import read_metadata, read_reference
from moecalc.package.edges import evaluate_edges
from moecalc.package.importers import set_precision
from moecalc.package.metadata import Check, ReferenceFrame, VerificationReport, worst
from moecalc.package.reference import (
    CUTOFF_GAP,
    condition_tensors,
    evaluate_structure,
    graph_tensors,
)
from moecalc.tolerances import VERIFICATION, VERIFICATION_DIFFERENCE, VERIFICATION_EVALUATOR
from moecalc.typing import Floats

if TYPE_CHECKING:
    from moecalc._C import Evaluator

Progress = Callable[[str], None]

# Angstrom or strain: no pair crosses a cutoff (reference.py keeps a gap), fourth-order error is nil
_STEP = 1e-4


def _arrays(frame: ReferenceFrame) -> tuple[list[str], Floats, Floats, tuple[bool, ...]]:
    return frame.symbols, np.array(frame.positions).reshape(-1, 3), np.array(frame.cell), tuple(frame.pbc)


def _of_frame(model: Any, frame: ReferenceFrame) -> ModelOutput:
    return evaluate_structure(model, *_arrays(frame), frame.conditions)


def _deviation(energy: float, forces: Floats, virial: Floats, frame: ReferenceFrame) -> float:
    """Largest deviation from a frame, relative to the scale of each quantity."""
    n = max(len(frame.symbols), 1)
    # per-element shifts are exact in every path: what can deviate is the rest, of the order of eV per atom
    found = [abs(energy - frame.energy) / n]
    for got, want in (
        (forces, np.array(frame.forces).reshape(-1, 3)),
        (virial / n, np.array(frame.virial) / n),
    ):
        scale = max(1.0, float(np.abs(want).max(initial=0.0)))
        found.append(float(np.abs(got - want).max(initial=0.0)) / scale)
    return worst(*found)


def _of(out: ModelOutput) -> tuple[float, Floats, Floats]:
    return float(out.energy), out.forces.numpy(), out.virial[0].numpy()


def frame_deviation(got: ReferenceFrame, want: ReferenceFrame) -> float:
    """Largest relative deviation between two answers for one structure."""
    return _deviation(got.energy, np.array(got.forces).reshape(-1, 3), np.array(got.virial), want)


def compare_frames(model: nn.Module, frames: list[ReferenceFrame]) -> float:
    """Largest relative deviation of a (scripted) model from the frames."""
    return worst(*(_deviation(*_of(_of_frame(model, f)), f) for f in frames))


def _evaluator_deviation(evaluator: Evaluator, frames: list[ReferenceFrame]) -> float:
    found = []
    for f in frames:
        symbols, positions, cell, pbc = _arrays(f)
        types, edge_index, edge_vec = graph_tensors(
            symbols, positions, cell, pbc, evaluator.elements, evaluator.cutoff
        )
        _give_conditions(evaluator, f.conditions)
        out = evaluate_edges(evaluator, types.numpy(), edge_index.numpy(), edge_vec.numpy())
        found.append(_deviation(float(out[ENERGY][0]), out[FORCES], out[VIRIAL][0], f))
    return worst(*found)


def _give_conditions(evaluator: Evaluator, conditions: Conditions) -> None:
    """Set what the evaluator's model takes beside a structure."""
    charge_spin, fparam = condition_tensors([conditions])
    if charge_spin is None and fparam is None:
        return
    evaluator.set_conditions(
        None if charge_spin is None else charge_spin.numpy(), None if fparam is None else fparam.numpy()
    )


def _fourth_order(energy: Callable[[float], float], h: float = _STEP) -> float:
    return (8.0 * (energy(h) - energy(-h)) - (energy(2 * h) - energy(-2 * h))) / (12.0 * h)


def _strain_step(cutoff: float) -> float:
    """A strain of which the double moves no pair across the gap at the cutoff."""
    return min(_STEP, 0.45 * CUTOFF_GAP / cutoff)


def _finite_differences(model: nn.Module, frame: ReferenceFrame) -> tuple[float, float]:
    """Deviation of forces (along random directions) and virial from differences of the energy."""
    symbols, positions, cell, pbc = _arrays(frame)
    given = frame.conditions
    out = evaluate_structure(model, symbols, positions, cell, pbc, given)
    rng = np.random.default_rng(11)
    force_error = virial_error = 0.0

    def energy(x: Floats, c: Floats) -> float:
        return float(evaluate_structure(model, symbols, x, c, pbc, given).energy)

    def strained(strain: Floats) -> Callable[[float], float]:
        return lambda h: energy(positions @ (np.eye(3) + h * strain), cell @ (np.eye(3) + h * strain))

    # a random direction over all atoms tests every force component at the cost of one
    for _ in range(4):
        direction = rng.normal(size=positions.shape)
        direction /= np.linalg.norm(direction)
        slope = _fourth_order(lambda h, d=direction: energy(positions + h * d, cell))  # type: ignore[misc]
        exact = -float((out.forces.numpy() * direction).sum())
        force_error = worst(force_error, abs(slope - exact) / max(1.0, abs(exact)))
    step = _strain_step(float(model.cutoff))  # type: ignore[arg-type]
    if all(pbc):
        for a, b in itertools.combinations_with_replacement(range(3), 2):
            strain = np.zeros((3, 3))
            strain[a, b] = strain[b, a] = 1.0 if a == b else 0.5
            slope = _fourth_order(strained(strain), step)
            exact = -float((out.virial[0].numpy() * strain).sum())
            virial_error = worst(virial_error, abs(slope - exact) / max(1.0, abs(exact)))
    return force_error, virial_error


def _symmetries(model: nn.Module, frame: ReferenceFrame) -> dict[str, float]:
    """Deviation under rotation (or rotoinversion), translation and permutation."""
    symbols, positions, cell, pbc = _arrays(frame)
    given = frame.conditions
    base = evaluate_structure(model, symbols, positions, cell, pbc, given)
    e0, f0, w0 = _of(base)
    scale = max(1.0, float(np.abs(f0).max(initial=0.0)))
    q = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    e, f, w = _of(evaluate_structure(model, symbols, positions @ q.T, cell @ q.T, pbc, given))
    w_scale = max(1.0, float(np.abs(w0).max()))
    rotation = worst(
        abs(e - e0) / len(symbols),
        float(np.abs(f - f0 @ q.T).max()) / scale,
        float(np.abs(w - q @ w0 @ q.T).max()) / w_scale,
    )
    moved = positions + np.array([3.3, -7.1, 0.4])
    e, f, _ = _of(evaluate_structure(model, symbols, moved, cell, pbc, given))
    translation = worst(abs(e - e0) / len(symbols), float(np.abs(f - f0).max()) / scale)
    p = np.random.default_rng(3).permutation(len(symbols))
    e, f, _ = _of(evaluate_structure(model, [symbols[k] for k in p], positions[p], cell, pbc, given))
    permutation = worst(abs(e - e0) / len(symbols), float(np.abs(f - f0[p]).max()) / scale)
    return {"rotation": rotation, "translation": translation, "permutation": permutation}


@contextmanager
def _small_structures() -> Iterator[None]:
    """One thread and no TorchScript profiling: the frames have about ten atoms."""
    with torch_threads(1), unoptimized():
        yield


@clean_torch()
def verify_package(
    path: str | Path,
    progress: Progress | None = None,
    device: str = "cpu",
) -> VerificationReport:
    """Check a package against its reference frames, finite differences and symmetries.

    Args:
        path: the package.
        progress: called with the name of each step.
        device: where the C++ evaluator runs. It computes from the records of the package, not from its
            TorchScript.

    Returns:
        All checks with the deviation found and the deviation allowed, relative to the largest magnitude of a
        quantity, at least 1 eV or eV/Angstrom.

    Raises:
        PackageError: the file is damaged, foreign or newer.
    """
    from moecalc import __version__

    say = progress or (lambda _: None)
    metadata = read_metadata(path)
    frames = read_reference(path)
    with _small_structures():
        say("scripted model in float64 against the reference frames")
        scripted = jit_load(path)
        set_precision(scripted, "float64", "float64")
        checks = [
            Check(
                name="scripted vs reference (float64)",
                value=compare_frames(scripted, frames),
                tolerance=VERIFICATION["float64"],
                detail=f"{len(frames)} frames",
            ),
            *_check_evaluator(path, frames, device, say),
            *_check_derivatives(scripted, frames, say),
        ]
        say("isolated atoms")
        checks.append(_check_isolated_atoms(scripted, metadata.elements, frames[0].conditions))
    return VerificationReport(
        checks=checks,
        torch=torch.__version__,
        moecalc=__version__,
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
    )


def _check_evaluator(
    path: str | Path, frames: list[ReferenceFrame], device: str, say: Progress
) -> Iterator[Check]:
    """The evaluator in both precisions against the reference frames."""
    native = _lib.load()
    for dtype in ("float64", "float32"):
        say(f"evaluator in {dtype} on {device}")
        evaluator = native.Evaluator(os.fsencode(path), device, dtype)
        evaluator.num_threads = 1
        yield Check(
            name=f"evaluator {dtype} on {device}",
            value=_evaluator_deviation(evaluator, frames),
            tolerance=VERIFICATION_EVALUATOR[dtype],
            detail=evaluator.backend,
        )


def _check_derivatives(scripted: nn.Module, frames: list[ReferenceFrame], say: Progress) -> Iterator[Check]:
    """Forces, virials and symmetries of every structure."""
    for frame in frames:
        # the last two structures come again with other conditions, which change no derivative rule
        if len(frame.symbols) < 2 or frame.conditions != frames[0].conditions:
            continue
        say(f"finite differences and symmetries: {frame.label}")
        force, virial = _finite_differences(scripted, frame)
        found = {"finite-difference forces": force}
        if all(frame.pbc):
            found["finite-difference virial"] = virial
        for name, value in found.items():
            yield Check(name=f"{name} ({frame.label})", value=value, tolerance=VERIFICATION_DIFFERENCE)
        for name, value in _symmetries(scripted, frame).items():
            yield Check(name=f"{name} ({frame.label})", value=value, tolerance=VERIFICATION["float64"])


def _check_isolated_atoms(scripted: nn.Module, elements: list[str], conditions: Conditions) -> Check:
    """An atom alone has no force, and an energy."""
    found = []
    alone = np.zeros((1, 3)), np.zeros((3, 3)), (False,) * 3
    for element in elements:
        out = evaluate_structure(scripted, [element], *alone, conditions)
        finite = bool(torch.isfinite(out.energy))
        found += [float(out.forces.abs().max()), 0.0 if finite else float("nan")]
    return Check(
        name="isolated atoms: zero force, finite energy",
        value=worst(*found),
        tolerance=0.0,
        detail=f"{len(elements)} elements",
    )
