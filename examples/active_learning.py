"""A round of active learning: fit a committee, heat the crystal until it is unsure, label there, fit again.

Four models of tungsten, which differ in their seeds alone, learn strained and cold crystals. They agree on these, and
disagree more and more as molecular dynamics heats the crystal: there the data end. Frames whose deviation is between
two trust levels, as DP-GEN has them, are labelled, and the committee is fitted again.

No DFT program runs here: the frames to choose from are those of published DFT trajectories (data/README.md), and
"labelling" one is to look up its energy, forces and stress. With a DFT program they would be frames of the dynamics.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write
from ase.md.langevin import Langevin
from common import BLUE, DATA, GREY, ORANGE, figure, options, save

from moecalc import MoECalculator
from moecalc.committee import run_below
from moecalc.package import package_checkpoint
from moecalc.training.fit import fit_frames

HOTTEST = 3500.0  # K
TIMESTEP, LOOK_EVERY = 3.0, 5  # fs, steps
GROUPS = ("cold", "warm", "hot")
COLOURS = (ORANGE, BLUE)


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    models: int
    fit_steps: int
    md_steps: int
    low: float  # trust levels, eV/A: below, the models agree well enough;
    high: float  # above, the structure may be nonsense
    most_labels: int  # frames that are labelled in a round
    frames: slice  # of every group


FULL = Size(models=4, fit_steps=800, md_steps=1200, low=0.3, high=2.0, most_labels=24, frames=slice(None))
FAST = Size(
    models=2, fit_steps=80, md_steps=60, low=0.02, high=9.0, most_labels=9, frames=slice(None, None, 2)
)


@dataclass(frozen=True)
class Data:
    """Frames with DFT energies, forces and stresses."""

    start: list[Atoms]  # what the first committee learns
    pool: list[Atoms]  # where labels are bought
    test: list[Atoms]  # what no committee learns


@dataclass(frozen=True)
class Heating:
    """What dynamics met on its way from cold to hot."""

    time: np.ndarray  # ps
    temperature: np.ndarray  # K, of the thermostat
    deviation: np.ndarray  # eV/A, the largest over the atoms
    stopped: bool


@dataclass(frozen=True)
class Score:
    """A committee on frames with labels."""

    groups: np.ndarray
    deviation: np.ndarray  # eV/A, the largest over the atoms
    largest_error: np.ndarray  # eV/A, of a force of the first model
    error: dict[str, float]  # eV/A, mean absolute error of the force components by group


def read_data(size: Size) -> Data:
    """Split the frames: strained and half of the cold ones to start from; of the others every third is for the test."""
    strained = [a for a in read(DATA / "cu_w_dft.extxyz", ":") if a.symbols[0] == "W"]
    for atoms in strained:  # two atoms, each a centre of inversion: no forces
        atoms.calc = SinglePointCalculator(atoms, **atoms.calc.results, forces=np.zeros((len(atoms), 3)))
        atoms.info["dataset"] = "strained"
    frames = read(DATA / "w_aimd_dft.extxyz.gz", ":")
    of_group = {name: [a for a in frames if a.info["dataset"] == name][size.frames] for name in GROUPS}
    cold = of_group.pop("cold")
    others = list(of_group.values())
    return Data(
        start=strained[size.frames] + cold[::2],
        pool=[a for group in others for k, a in enumerate(group) if k % 3 != 1],
        test=cold[1::2] + [a for group in others for a in group[1::3]],
    )


def fit_committee(frames: list[Atoms], folder: Path, size: Size) -> list[Path]:
    """As `moecalc fit frames.extxyz --seeds 4` and `moecalc package` do."""
    folder.mkdir(parents=True)
    write(folder / "frames.extxyz", frames)
    given = json.loads((Path(__file__).parent / "train" / "small.json").read_text())
    given["fit"]["steps"] = size.fit_steps
    (folder / "fit.json").write_text(json.dumps(given, indent=1))
    packages = []
    for seed in range(1, size.models + 1):
        out = folder / f"seed-{seed}"
        fit_frames(folder / "frames.extxyz", folder / "fit.json", out, validation=0, seed=seed)
        package = folder / f"model-{seed}.moe.pt"
        package_checkpoint(out / "state.averaged.pt", package)
        packages.append(package)
    return packages


def heat(packages: list[Path], size: Size) -> Heating:
    """Heat a crystal of 54 atoms from 300 K to `HOTTEST`; stop where the deviation is above the upper trust level."""
    atoms = bulk("W", "bcc", a=3.19, cubic=True) * 3
    atoms.calc = MoECalculator(packages)
    rng = np.random.default_rng(1)
    # 600 K, because half of it becomes potential energy
    widths = np.sqrt(units.kB * 600 * atoms.get_masses())
    atoms.set_momenta(widths[:, None] * rng.standard_normal((len(atoms), 3)))
    dynamics = Langevin(
        atoms, TIMESTEP * units.fs, temperature_K=300, friction=0.02 / units.fs, rng=rng, fixcm=False
    )
    rows: list[tuple[float, float, float]] = []

    def look() -> None:
        target = 300 + (HOTTEST - 300) * dynamics.nsteps / size.md_steps
        dynamics.set_temperature(temperature_K=target)
        deviation = float(atoms.calc.get_property("forces_std", atoms).max())
        rows.append((dynamics.nsteps * TIMESTEP / 1000, target, deviation))

    dynamics.attach(look, interval=LOOK_EVERY)
    stop = run_below(dynamics, size.md_steps, forces_std=size.high, every=LOOK_EVERY)
    time, temperature, deviation = np.array(rows).T
    return Heating(time, temperature, deviation, stop is not None)


def score(packages: list[Path], frames: list[Atoms]) -> Score:
    """Deviations, which need no labels, and errors, which do."""
    found = MoECalculator(packages).calculate_batch(frames, ["forces", "forces_std"])
    errors = [one["forces"] - atoms.get_forces() for one, atoms in zip(found, frames, strict=True)]
    groups = np.array([atoms.info["dataset"] for atoms in frames])
    return Score(
        groups=groups,
        deviation=np.array([one["forces_std"].max() for one in found]),
        largest_error=np.array([np.linalg.norm(error, axis=1).max() for error in errors]),
        error={
            name: float(np.mean([np.abs(errors[k]).mean() for k in np.flatnonzero(groups == name)]))
            for name in GROUPS
            if name in groups
        },
    )


def select(deviation: np.ndarray, size: Size) -> np.ndarray:
    """Frames to label: those between the trust levels, if there are too many drawn at random."""
    candidates = np.flatnonzero((deviation >= size.low) & (deviation < size.high))
    if len(candidates) > size.most_labels:
        candidates = np.random.default_rng(1).choice(candidates, size.most_labels, replace=False)
    return np.sort(candidates)


def shares(deviation: np.ndarray, size: Size) -> str:
    """DP-GEN's three kinds of frames."""
    low, high = (deviation < size.low).mean(), (deviation >= size.high).mean()
    return f"{low:.0%} accurate, {1 - low - high:.0%} candidates, {high:.0%} failed"


def show(name: str, heating: Heating, tested: Score, size: Size) -> None:
    """Print what a committee did."""
    end = f"{'stopped' if heating.stopped else 'done'} at {heating.temperature[-1]:.0f} K"
    errors = ", ".join(f"{group} {error:.3f}" for group, error in tested.error.items())
    print(f"{name}: dynamics {end}, {shares(heating.deviation, size)}")
    print(f"  held-out frames: mean error of forces {errors} eV/A")
    print(f"  held-out frames: largest deviation, mean {tested.deviation.mean():.2f} eV/A")


def draw(heatings: list[Heating], scores: list[Score], size: Size, path: Path) -> None:
    """Deviation over time, deviation against error, errors before and after."""
    fig, (left, middle, right) = figure(3)
    names = ("first fit", "second fit")
    left.axhspan(size.low, size.high, color=GREY, alpha=0.15, lw=0)
    left.text(
        0.02, size.high * 0.94, "to be labelled", va="top", fontsize=8, transform=left.get_yaxis_transform()
    )
    for heating, name, colour in zip(heatings, names, COLOURS, strict=True):
        left.plot(heating.time, heating.deviation, color=colour, label=name)
        if heating.stopped:
            left.plot(
                heating.time[-1], heating.deviation[-1], "x", ms=9, mew=2, color=colour, label="stopped"
            )
    left.set(title=f"heated from 300 to {HOTTEST:.0f} K", xlabel="time (ps)")
    left.set(ylabel="largest deviation of a force (eV/Å)", yscale="log")
    left.set_ylim(bottom=0.01)  # the perfect crystal at the start has no forces
    left.legend(fontsize=8)
    for one, name, colour in zip(scores, names, COLOURS, strict=True):
        middle.loglog(one.deviation, one.largest_error, "o", ms=4, alpha=0.8, color=colour, label=name)
    middle.set(title="held-out frames: deviation and error", xlabel="largest deviation of a force (eV/Å)")
    middle.set(ylabel="largest error of a force (eV/Å)")
    middle.legend(fontsize=8)
    places = np.arange(len(scores[0].error))
    for k, (one, name) in enumerate(zip(scores, names, strict=True)):
        right.bar(places + 0.4 * k - 0.2, list(one.error.values()), 0.38, color=COLOURS[k], label=name)
    right.set_xticks(places, list(scores[0].error))
    right.set(title="held-out frames: errors", ylabel="mean error of a force (eV/Å)")
    right.legend(fontsize=8)
    save(fig, path)


def main(output: Path, fast: bool = False) -> dict[str, float]:
    """Fit, heat, select, label, fit again, heat again; draw.

    Returns:
        Of both fits, on frames that none has seen: mean errors of forces and mean largest deviations (eV/A), and how
        far the dynamics got (K); the number of frames that were labelled.
    """
    size = FAST if fast else FULL
    folder = output / "active_learning"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier run, which a fit would go on from
    data = read_data(size)
    heatings, scores = [], []
    learnt = data.start
    results: dict[str, Any] = {}
    for name in ("first", "second"):
        packages = fit_committee(learnt, folder / name, size)
        heatings.append(heat(packages, size))
        scores.append(score(packages, data.test))
        show(f"{name} fit, {len(learnt)} frames", heatings[-1], scores[-1], size)
        results |= {
            f"{name} error (eV/A)": float(np.mean(list(scores[-1].error.values()))),
            f"{name} deviation (eV/A)": float(scores[-1].deviation.mean()),
            f"{name} end (K)": float(heatings[-1].temperature[-1]),
        }
        if name == "first":
            unsure = score(packages, data.pool)
            chosen = select(unsure.deviation, size)
            print(
                f"  to choose from: {len(data.pool)} frames, {shares(unsure.deviation, size)}; {len(chosen)} labelled"
            )
            learnt = data.start + [data.pool[k] for k in chosen]
            results["labelled"] = len(chosen)
    draw(heatings, scores, size, output / "active_learning.png")
    return results


if __name__ == "__main__":
    main(**options(__doc__))
