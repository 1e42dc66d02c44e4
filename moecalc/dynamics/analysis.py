"""What a trajectory and a log tell: distances, motion, and how well the energy is conserved.

Averages are over the second half of the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Final

import numpy as np
from ase import Atoms
from ase.io import read

from moecalc.dynamics.records import TRAJECTORY, has_volume
from moecalc.page import NotComputed
from moecalc.typing import Floats

_REACH: Final = 8.0  # A
_BIN: Final = 0.05  # A
_MOST_PAIRS: Final = 1e7  # counted at once
_PAIRS_IN_ALL: Final = 3e7
_MOST_FRAMES: Final = 400
_MOST_ROWS: Final = 2_000_000  # atoms in all frames together
_FEWEST: Final = 3  # frames or lines that a motion or a fit needs


def read_second_half(folder: Path, n_frames: int, n_atoms: int) -> list[Atoms]:
    """Frames of the second half of a trajectory, evenly fewer where there are very many.

    Args:
        folder: of the run.
        n_frames: in the trajectory.
        n_atoms: in a frame.
    """
    start = n_frames // 2
    most = int(np.clip(_MOST_ROWS // n_atoms, 2, _MOST_FRAMES))
    stride = max(1, math.ceil((n_frames - start) / most))
    return list(read(folder / TRAJECTORY, slice(start, n_frames, stride)))


@dataclass(frozen=True)
class RadialDistribution:
    """How often a distance occurs, against atoms that are spread evenly.

    Attributes:
        distances: (n,) middles of the bins, A.
        total: (n,) of all atoms.
        pairs: (n,) of each pair of elements, "Mo-W".
        shortest: distance of each pair that occurred, A.
        half_width: A; beyond, an atom sees two images of another one.
        n_frames: averaged over.
    """

    distances: Floats
    total: Floats
    pairs: dict[str, Floats]
    shortest: dict[str, float]
    half_width: float
    n_frames: int

    def first_peak(self, pair: str) -> float | None:
        """Distance of the first maximum above 1, A; None: there is none within reach."""
        values = self.pairs[pair]
        above = np.flatnonzero(values > 1)
        if len(above) == 0:
            return None
        rest = np.flatnonzero(values[above[0] :] <= 1)
        end = above[0] + rest[0] if len(rest) else len(values)
        return float(self.distances[above[0] + values[above[0] : end].argmax()])


def radial_distribution(frames: Sequence[Atoms]) -> RadialDistribution:
    """The radial distribution function of all atoms and of the pairs of elements.

    Args:
        frames: of one composition.

    Raises:
        NotComputed: no volume, or a single atom.
    """
    if not has_volume(frames[0]):
        raise NotComputed(
            "Radial distribution: left out, it compares with the density of a structure that is periodic in "
            "all directions, and this one is not."
        )
    if len(frames[0]) < 2:
        raise NotComputed("Radial distribution: left out, it needs two atoms or more, this run has one.")
    n_atoms = len(frames[0])
    density = n_atoms / min(atoms.get_volume() for atoms in frames)
    per_frame = n_atoms * density * 4 / 3 * math.pi
    reach = min(_REACH, float(np.cbrt(_MOST_PAIRS / per_frame)))
    stride = math.ceil(len(frames) * per_frame * reach**3 / _PAIRS_IN_ALL)
    used = frames[:: max(1, stride)]
    edges = np.linspace(0, reach, round(reach / _BIN) + 1)
    symbols = sorted(set(frames[0].symbols))
    counts = np.zeros((len(symbols), len(symbols), len(edges) - 1))
    shortest = np.full((len(symbols), len(symbols)), np.inf)
    for atoms in used:
        _count_pairs(atoms, symbols, edges, counts, shortest)
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    n = np.array([sum(frames[0].symbols == s) for s in symbols])
    even = shells * len(used)
    pairs = {
        f"{a}-{b}": counts[i, j] / (n[i] * n[j] * even)
        for (i, a), (j, b) in combinations_with_replacement(enumerate(symbols), 2)
    }
    return RadialDistribution(
        distances=(edges[1:] + edges[:-1]) / 2,
        total=counts.sum((0, 1)) / (n_atoms**2 * even),
        pairs=pairs,
        shortest={
            f"{a}-{b}": float(shortest[i, j])
            for (i, a), (j, b) in combinations_with_replacement(enumerate(symbols), 2)
            if np.isfinite(shortest[i, j])
        },
        half_width=min(_half_width(atoms) for atoms in used),
        n_frames=len(used),
    )


def _count_pairs(atoms: Atoms, symbols: list[str], edges: Floats, counts: Floats, shortest: Floats) -> None:
    """Add the ordered pairs of a frame, times its volume, to (n_elements, n_elements, n_bins) counts."""
    from matscipy.neighbours import neighbour_list

    first, second, distance = neighbour_list("ijd", atoms, float(edges[-1]))
    element = np.searchsorted(symbols, np.array(atoms.get_chemical_symbols()))
    kind = element[first] * len(symbols) + element[second]
    bins = np.minimum((distance / edges[1]).astype(np.int64), len(edges) - 2)
    flat = np.bincount(kind * (len(edges) - 1) + bins, minlength=counts.size)
    counts += flat.reshape(counts.shape) * atoms.get_volume()
    np.minimum.at(shortest.reshape(-1), kind, distance)


def _half_width(atoms: Atoms) -> float:
    """Half of the smallest distance between two opposite faces of the cell, A."""
    cell = atoms.cell.array
    areas = np.linalg.norm(np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]]), axis=1)
    return float(atoms.get_volume() / areas.max() / 2)


@dataclass(frozen=True)
class Displacement:
    """Mean squared displacement by element.

    Attributes:
        times: (n,) ps between two frames.
        elements: (n,) A^2 of each.
        n_frames: that displacements were taken between.
    """

    times: Floats
    elements: dict[str, Floats]
    n_frames: int


def mean_squared_displacement(frames: Sequence[Atoms], *, fixed: bool) -> Displacement:
    """How far atoms go in a time, averaged over all starts.

    Displacements are those in the cell, so that a cell that changes does not count as motion.

    Args:
        frames: positions are not wrapped; `info["time_ps"]` has the time.
        fixed: some atoms are, so that the motion of the centre of mass is not taken off.

    Raises:
        NotComputed: too few frames, or a single atom.
    """
    if len(frames) < _FEWEST:
        raise NotComputed(
            f"Mean squared displacement: left out, it needs {_FEWEST} frames in the second half of the run, "
            f"this run has {len(frames)}: more --steps, or a smaller --every."
        )
    if len(frames[0]) < 2:
        raise NotComputed(
            "Mean squared displacement: left out, the motion of the centre of mass is taken off, and this "
            "run has a single atom."
        )
    places = _unwrapped(frames)
    if not fixed:
        masses = frames[0].get_masses()
        places -= (np.einsum("fad,a->fd", places, masses) / masses.sum())[:, None]
    times = np.array([float(atoms.info["time_ps"]) for atoms in frames])
    squares = np.zeros((len(frames) // 2 + 1, len(frames[0])))
    for lag in range(1, len(squares)):
        squares[lag] = ((places[lag:] - places[:-lag]) ** 2).sum(-1).mean(0)
    symbols = np.array(frames[0].get_chemical_symbols())
    return Displacement(
        times=times[: len(squares)] - times[0],
        elements={str(s): squares[:, symbols == s].mean(1) for s in np.unique(symbols)},
        n_frames=len(frames),
    )


def _unwrapped(frames: Sequence[Atoms]) -> Floats:
    """(n_frames, n_atoms, 3) places in the mean cell, A; where there is no cell, positions."""
    if frames[0].cell.rank < 3:
        return np.array([atoms.positions for atoms in frames])
    mean_cell = np.mean([atoms.cell.array for atoms in frames], axis=0)
    scaled = [atoms.cell.scaled_positions(atoms.positions) for atoms in frames]
    return np.asarray(np.array(scaled) @ mean_cell)


@dataclass(frozen=True)
class Conservation:
    """A quantity that should not change, and the line fitted to it.

    Attributes:
        times: (n,) ps.
        values: (n,) meV/atom, less the first.
        slope: of the line, meV/atom/ps.
        offset: of the line at time 0, meV/atom.
        scatter: root mean square around the line, meV/atom.
    """

    times: Floats
    values: Floats
    slope: float
    offset: float
    scatter: float


def energy_conservation(log: Mapping[str, Floats], n_atoms: int) -> Conservation:
    """Drift of the conserved quantity, by least squares.

    Args:
        log: columns of the log.
        n_atoms: of the structure.

    Raises:
        NotComputed: the log has no such quantity, or too few lines.
    """
    conserved = log["conserved_eV"]
    if not np.isfinite(conserved).all():
        raise NotComputed(
            "Energy conservation: left out, ASE's LangevinBAOAB, which runs npt, has no conserved quantity. "
            "Run nve to see how well the time step conserves the energy."
        )
    if len(conserved) < _FEWEST:
        raise NotComputed(
            f"Energy conservation: left out, a fit needs {_FEWEST} lines of the log, this run has "
            f"{len(conserved)}: more --steps, or a smaller --log-every."
        )
    times = log["time_ps"]
    values = 1000 * (conserved - conserved[0]) / n_atoms
    slope, offset = np.polyfit(times, values, 1)
    scatter = float(np.sqrt(np.mean((values - slope * times - offset) ** 2)))
    return Conservation(times, values, float(slope), float(offset), scatter)
