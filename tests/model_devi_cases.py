"""What was run to compare model deviations with DeePMD-kit: four models, structures, keywords of a pair style."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from ase import Atoms
from helpers import DATA

RECORDED = DATA / "model_devi"
ELEMENTS = ["O", "H", "Na", "Cl"]  # the type map of the models
MEMBERS = ["gelu", "relu6", "l1", "noangle"]  # tests/data/deepmd


def checkpoints() -> list[Path]:
    return [DATA / f"deepmd/{name}.pt" for name in MEMBERS]


def structures() -> list[Atoms]:
    """A skewed cell of 20 atoms, and two that were rattled."""
    stored = np.load(DATA / "deepmd/gelu__tri20.npz")
    first = Atoms(stored["symbols"], stored["positions"], cell=stored["cell"], pbc=True)
    found = [first]
    for seed in (1, 2):
        found.append(first.copy())
        found[-1].positions += np.random.default_rng(seed).normal(scale=0.05, size=first.positions.shape)
    return found


def write_system(folder: Path, frames: list[Atoms]) -> None:
    """Frames of the same elements as a system of DeePMD-kit, without labels."""
    (folder / "set.000").mkdir(parents=True)
    types = [str(ELEMENTS.index(symbol)) for symbol in frames[0].symbols]
    (folder / "type.raw").write_text("\n".join(types) + "\n")
    (folder / "type_map.raw").write_text("\n".join(ELEMENTS) + "\n")
    np.save(folder / "set.000/coord.npy", np.array([atoms.positions.ravel() for atoms in frames]))
    np.save(folder / "set.000/box.npy", np.array([atoms.cell.array.ravel() for atoms in frames]))


class Case(NamedTuple):
    """Keywords of a pair style, and the units of the simulation."""

    keywords: str
    units: str = "metal"


PAIR_CASES = {
    "plain": Case("out_freq 2"),
    "atomic": Case("out_freq 1 atomic"),
    "relative": Case("relative 0.3 relative_v 0.02 out_freq 4 atomic"),
    "real": Case("out_freq 2", "real"),
    "real_relative": Case("relative 0.3 relative_v 0.02 out_freq 4", "real"),
}

# options of `dp model-devi`, which are those of `moecalc devi`; its --relative_v fails with several frames
DEVI_CASES = {
    "atomic": ["--atomic", "--frequency", "5"],
    "relative": ["--relative", "0.3"],
}

SCRIPT = """
units {units}
boundary p p p
box tilt large
read_data data.system
pair_style {style} out_file {out} {keywords}
pair_coeff * * {files} O H Na Cl
neighbor 1.0 bin
velocity all create 300 3
fix 1 all nve
run 4
"""


def script(case: str, style: str, files: str = "") -> str:
    """Dynamics of the first structure, which is in data.system; deviations go to `case`.out."""
    keywords, units = PAIR_CASES[case]
    return SCRIPT.format(units=units, style=style, out=f"{case}.out", keywords=keywords, files=files)
