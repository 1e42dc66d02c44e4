"""Pictures of a run: what the log has, over time or steps, and what the trajectory tells."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from moecalc.dynamics.analysis import Conservation, Displacement, RadialDistribution
from moecalc.page import COLORS, Picture, drawing
from moecalc.typing import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = (COLORS[name] for name in ("blue", "orange", "green", "grey"))
_ENERGIES: Final = ("potential", "total")
_LINES: Final = tuple(
    (COLORS[color], style)
    for style in ("-", "--", ":")
    for color in ("blue", "orange", "green", "red", "purple", "grey")
)
_MOST_POINTS: Final = 600  # of a line; beyond, means of blocks and the band that they had
_ONE_PICTURE: Final = 6  # pairs of elements


class Curve(NamedTuple):
    """A quantity of the log."""

    name: str
    unit: str
    values: Floats
    color: str
    target: float | None = None
    digits: int = 3

    @property
    def label(self) -> str:
        """Name and unit, for an axis."""
        return f"{self.name} ({self.unit})"


def md_curves(
    log: Mapping[str, Floats], n_atoms: int, temperature: float | None, pressure: float | None
) -> list[Curve]:
    """Temperature, energies and, where there is a cell, pressure; the volume where it changes.

    Args:
        log: columns of the log.
        n_atoms: in the structure.
        temperature, pressure: that are kept (K, GPa), or None.
    """
    potential, total = (1000 * (log[f"{name}_eV"] - log[f"{name}_eV"][0]) / n_atoms for name in _ENERGIES)
    curves = [
        Curve("temperature", "K", log["temperature_K"], ORANGE, temperature),
        Curve("potential energy", "meV/atom", potential, BLUE),
        Curve("total energy", "meV/atom", total, GREY),
    ]
    has_cell = bool(np.isfinite(log["pressure_GPa"]).all())
    if has_cell:
        curves.append(Curve("pressure", "GPa", log["pressure_GPa"], GREEN, pressure))
    if has_cell and float(np.ptp(log["volume_A3"])) > 0:
        curves.append(Curve("volume", "Å³/atom", log["volume_A3"] / n_atoms, BLUE, digits=4))
    return curves


def draw_md(
    log: Mapping[str, Floats], n_atoms: int, temperature: float | None, pressure: float | None
) -> bytes:
    """The curves of `md_curves` side by side, as PNG."""
    return _draw(log["time_ps"], "time (ps)", md_curves(log, n_atoms, temperature, pressure))


def draw_relaxation(log: Mapping[str, Floats], n_atoms: int, fmax: float) -> bytes:
    """Energy, largest force and, where there is a cell, pressure over the steps, as PNG."""
    energy = 1000 * (log["energy_eV"] - log["energy_eV"][0]) / n_atoms
    curves = [
        Curve("energy", "meV/atom", energy, BLUE),
        Curve("largest force", "eV/Å", log["force_eV_A"], ORANGE, fmax),
    ]
    if np.isfinite(log["pressure_GPa"]).all():
        curves.append(Curve("pressure", "GPa", log["pressure_GPa"], GREEN))
    return _draw(log["step"], "step", curves, logarithmic=1)


def draw_thermo(times: Floats, curves: Sequence[Curve]) -> list[Picture]:
    """One picture a curve, over time (ps)."""
    pictures = []
    for curve in curves:
        figure, axes = _axes()
        _plot_thinned(axes, times, curve.values, curve.color)
        kept = ""
        if curve.target is not None:
            axes.axhline(curve.target, color=COLORS["ink"], lw=1, ls="--")
            kept = f"; dashed line at {curve.target:g} {curve.unit}"
        axes.set(title=curve.name, xlabel="time (ps)", ylabel=curve.label)
        axes.locator_params(axis="x", nbins=6)
        low, high = (f"{extreme:.{curve.digits}g}" for extreme in (curve.values.min(), curve.values.max()))
        alt = f"{curve.name} over time, from {low} to {high} {curve.unit}{kept}"
        pictures.append(Picture(figure, alt[0].upper() + alt[1:]))
    return pictures


def draw_conservation(found: Conservation, name: str) -> Picture:
    """The conserved quantity over time, and the line fitted to it."""
    figure, axes = _axes()
    _plot_thinned(axes, found.times, found.values, GREY, name)
    axes.plot(
        found.times,
        found.slope * found.times + found.offset,
        color=ORANGE,
        label=f"fit: {found.slope:.3g} meV/atom/ps",
    )
    axes.set(title=name, xlabel="time (ps)", ylabel="change (meV/atom)")
    axes.locator_params(axis="x", nbins=6)
    axes.legend()
    return Picture(
        figure,
        f"{name} over time; the fitted line changes by {found.slope:.3g} meV/atom/ps, and the rest scatters "
        f"by {found.scatter:.3g} meV/atom around it",
    )


def draw_distribution(found: RadialDistribution) -> list[Picture]:
    """The radial distribution of all atoms, and of the pairs: together, or around each element."""
    elements = sorted({name for pair in found.pairs for name in pair.split("-")})
    pictures = [_draw_pairs(found, "all atoms", {"all": found.total})]
    if len(found.pairs) == 1:
        return pictures
    if len(found.pairs) <= _ONE_PICTURE:
        return [*pictures, _draw_pairs(found, "by pair of elements", found.pairs)]
    for element in elements:
        partners = {other: "-".join(sorted((element, other))) for other in elements}
        around = {other: found.pairs[pair] for other, pair in partners.items()}
        pictures.append(_draw_pairs(found, f"around {element}", around))
    return pictures


def _draw_pairs(found: RadialDistribution, title: str, curves: Mapping[str, Floats]) -> Picture:
    figure, axes = _axes()
    for (name, values), (color, style) in zip(curves.items(), cycle(_LINES), strict=False):
        axes.plot(found.distances, values, color=color, ls=style, lw=1.3, label=name)
    axes.axhline(1, color=GREY, lw=0.8, ls=":")
    if found.half_width < found.distances[-1]:
        axes.axvline(found.half_width, color=COLORS["ink"], lw=0.8, ls="--")
    axes.set(title=title, xlabel="distance (Å)", ylabel="g(r)")
    axes.set_xlim(0, found.distances[-1])
    axes.set_ylim(bottom=0)
    if len(curves) > 1:
        axes.legend(ncols=1 + (len(curves) > 7))
    highest = max(curves, key=lambda name: float(curves[name].max()))
    place = found.distances[curves[highest].argmax()]
    which = "" if len(curves) == 1 else f", {highest},"
    return Picture(figure, f"Radial distribution, {title}: the highest peak{which} is at {place:.2f} Å")


def draw_displacement(found: Displacement) -> Picture:
    """Mean squared displacement of every element over the time between two frames."""
    figure, axes = _axes()
    for (name, values), (color, style) in zip(found.elements.items(), cycle(_LINES), strict=False):
        axes.plot(
            found.times,
            values,
            color=color,
            ls=style,
            label=name,
            marker="o" if len(values) < 12 else None,
            ms=3,
        )
    axes.set(title="mean squared displacement", xlabel="time between two frames (ps)", ylabel="MSD (Å²)")
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(ncols=1 + (len(found.elements) > 7))
    ends = ", ".join(f"{name} {values[-1]:.3g}" for name, values in found.elements.items())
    return Picture(figure, f"Mean squared displacement after {found.times[-1]:.3g} ps in Å²: {ends}")


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(4.6, 3.3), layout="constrained")
    return figure, figure.subplots()


def _plot_thinned(axes: Axes, x: Floats, y: Floats, color: str, label: str | None = None) -> None:
    """A line; of very many points, the means of blocks of them, and a band as wide as they are."""
    size = -(-len(x) // _MOST_POINTS)
    if size > 1:
        n = len(x) // size * size
        blocks = y[:n].reshape(-1, size)
        x, y = x[:n].reshape(-1, size).mean(1), blocks.mean(1)
        axes.fill_between(x, blocks.min(1), blocks.max(1), color=color, alpha=0.25, lw=0)
    axes.plot(x, y, color=color, lw=1.3, marker="." if len(x) < 3 else None, label=label)


def _draw(x: Floats, label: str, curves: Sequence[Curve], logarithmic: int | None = None) -> bytes:
    """One panel a curve, with a dashed line at its target."""
    from matplotlib.figure import Figure as NewFigure

    with drawing():
        figure = NewFigure(figsize=(3.6 * len(curves), 3.2), layout="constrained")
        panels: list[Axes] = list(np.atleast_1d(figure.subplots(1, len(curves))))
        for k, (panel, curve) in enumerate(zip(panels, curves, strict=True)):
            panel.plot(x, curve.values, color=curve.color, marker="." if len(x) < 3 else None)
            if curve.target is not None:
                panel.axhline(curve.target, color="k", lw=1, ls="--")
            if k == logarithmic and (curve.values > 0).all():
                panel.set_yscale("log")
            panel.set(title=curve.name, xlabel=label, ylabel=curve.label)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, facecolor="white", format="png")
    return buffer.getvalue()
