"""Picture of a structure: atoms as balls in a parallel projection, with the edges of the cell."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from ase.utils import rotate

from moecalc.page.pictures import COLORS, Picture
from moecalc.typing import Floats, Ints

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Color = tuple[float, ...]

_VIEW: Final = "-80x,-20y,-2z"  # ASE's notation: a little from above, a little from the side
_SIZE: Final = 0.75  # of a ball, in covalent radii
_ALIKE: Final = 0.3  # distance of two colours, of sqrt(3), that are hard to tell apart
_VECTOR: Final = 300  # more balls than these become an image within the picture


def draw_structure(atoms: Atoms, what: str) -> Picture:
    """Atoms, coloured by element, as one sees them from the front and a little above.

    Args:
        atoms: periodic directions are wrapped into the cell.
        what: begins the text for those who do not see the picture.
    """
    from matplotlib.collections import EllipseCollection
    from matplotlib.figure import Figure

    shown = atoms.copy()
    if atoms.cell.rank == 3:
        shown.wrap(eps=1e-3)
    turned = rotate(_VIEW)
    places = shown.positions @ turned
    order = np.argsort(places[:, 2], kind="stable")
    numbers = shown.numbers[order]
    colors = _colors(numbers)
    diameters = 2 * _SIZE * covalent_radii[numbers]
    figure = Figure(figsize=(5.6, 5.0), layout="constrained")
    axes = figure.subplots()
    balls = EllipseCollection(
        diameters,
        diameters,
        np.zeros(len(numbers)),
        units="xy",
        offsets=places[order, :2],
        offset_transform=axes.transData,
        facecolors=[colors[number] for number in numbers.tolist()],
        edgecolors="#303030",
        linewidths=0.5,
        rasterized=len(numbers) > _VECTOR,
        zorder=2,
    )
    axes.add_collection(balls)
    corners = _draw_cell(axes, atoms, turned)
    _frame(axes, np.concatenate([places[:, :2], corners]), float(diameters.max()) / 2)
    _draw_legend(figure, shown, colors)
    formula = atoms.get_chemical_formula("metal")
    periodic = "periodic" if atoms.pbc.all() else "not periodic in all directions"
    return Picture(figure, f"{what}: {len(atoms)} atoms, {formula}, {periodic}, coloured by element")


def _colors(numbers: Ints) -> dict[int, Color]:
    """Colours of the elements: Jmol's, unless two of them are alike."""
    from matplotlib import colormaps

    elements = np.unique(numbers).tolist()
    found: list[Color] = [tuple(jmol_colors[number].tolist()) for number in elements]
    distances = [float(np.linalg.norm(np.subtract(a, b))) for a, b in combinations(found, 2)]
    if len(elements) <= 10 and min(distances, default=1.0) < _ALIKE:
        found = [colormaps["tab10"](k)[:3] for k in range(len(elements))]
    return dict(zip(elements, found, strict=True))


def _draw_cell(axes: Axes, atoms: Atoms, turned: Floats) -> Floats:
    """Edges of the cell, those in front over the atoms; the (n, 2) corners, none without a cell."""
    if atoms.cell.rank < 3:
        return np.zeros((0, 2))
    steps = np.array([(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners = steps @ atoms.cell.array @ turned
    farthest = int(corners[:, 2].argmin())
    for a in range(8):
        for b in range(a + 1, 8):
            if np.abs(steps[a] - steps[b]).sum() == 1:
                behind = farthest in {a, b}
                axes.plot(
                    corners[[a, b], 0],
                    corners[[a, b], 1],
                    color=COLORS["ink"],
                    lw=0.9,
                    zorder=1 if behind else 3,
                )
    return np.asarray(corners[:, :2])


def _frame(axes: Axes, points: Floats, margin: float) -> None:
    low, high = points.min(0) - margin - 0.3, points.max(0) + margin + 0.3
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    axes.set_axis_off()


def _draw_legend(figure: Any, atoms: Atoms, colors: Mapping[int, Color]) -> None:
    """Colour, symbol and number of atoms of each element, the lightest first."""
    from matplotlib.lines import Line2D

    numbers, counts = np.unique(atoms.numbers, return_counts=True)
    symbols = {number: atoms.symbols[int(np.argmax(atoms.numbers == number))] for number in numbers}
    entries = [
        Line2D([], [], ls="", marker="o", ms=9, mfc=colors[int(n)], mec="#303030", mew=0.5,
               label=f"{symbols[n]} ({count:,})")
        for n, count in zip(numbers, counts, strict=True)
    ]  # fmt: skip
    figure.legend(handles=entries, loc="outside lower center", ncols=min(len(entries), 5), fontsize=9)
