"""Pictures of a report. White paper in every theme: the page gives them a frame."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import units

from moecalc.errors import PackageError
from moecalc.package.metadata import Metadata
from moecalc.report.composition import contributions, shares
from moecalc.report.evaluation import Evaluation
from moecalc.report.numbers import Report
from moecalc.report.routing_figure import plot_routing
from moecalc.typing import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


BLUE, ORANGE, GREEN, RED, GREY = "#1f5fa8", "#d9730d", "#2e8b57", "#b5343c", "#7d7d7d"
_MANY = 1500  # points: beyond, density is drawn instead
_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "font.size": 10,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


def draw(evaluation: Evaluation, report: Report) -> dict[str, bytes]:
    """All pictures that the data allow, as PNG, by name."""
    makers: dict[str, Callable[[Evaluation, Report], Figure | None]] = {
        "parity": parity,
        "groups": groups,
        "force_errors": force_errors,
        "elastic": elastic,
        "eos": equations_of_state,
        "distances": distances,
        "routing": routing,
    }
    import matplotlib as mpl

    pictures = {}
    with mpl.rc_context(_STYLE):
        for name, maker in makers.items():
            figure = maker(evaluation, report)
            if figure is not None:
                buffer = io.BytesIO()
                figure.savefig(buffer, dpi=130, facecolor="white")
                pictures[name] = buffer.getvalue()
    return pictures


def parity(ev: Evaluation, report: Report) -> Figure:
    """Model against reference: energies, force components, stress components."""
    figure, panels = _figure(3, 4.4, 4.1)
    reference, model = ev.energy / ev.n_atoms, ev.energy_model / ev.n_atoms
    # Energies of different elements are eV apart, errors meV: what the composition explains is taken off.
    of_elements = shares(ev.frames, sorted(set(ev.symbols.tolist())))
    base = of_elements @ contributions(of_elements, reference)[0]
    _scatter(
        panels[0],
        reference - base,
        model - base,
        f"energy, MAE {report.total.energy.mae:.3g} meV/atom",
        "eV/atom*",
    )
    _scatter(
        panels[1],
        ev.forces.ravel(),
        ev.forces_model.ravel(),
        f"force, MAE {report.total.forces.mae:.3g} eV/Å",
        "eV/Å",
    )
    stressed = np.isfinite(ev.stress).all(axis=1)
    if report.total.stress is not None:
        _scatter(
            panels[2],
            ev.stress[stressed].ravel() / units.GPa,
            ev.stress_model[stressed].ravel() / units.GPa,
            f"stress, MAE {report.total.stress.mae:.3g} GPa",
            "GPa",
        )
    else:
        panels[2].set_axis_off()
        panels[2].text(0.5, 0.5, "no stress in the data", ha="center", color=GREY)
    return figure


def groups(_ev: Evaluation, report: Report) -> Figure | None:
    """Errors of every group side by side; the shifted energies beside the plain ones."""
    if len(report.groups) < 2:
        return None
    n = len(report.groups)
    figure, panels = _figure(2, 6.2, 0.9 + 0.27 * n)
    y = np.arange(n)
    left, right = panels
    left.barh(y - 0.2, [g.energy.mae for g in report.groups], 0.38, color=BLUE, label="as they are")
    left.barh(
        y + 0.2,
        [g.energy_shifted.mae for g in report.groups],
        0.38,
        color="#9dbfe3",
        label="without the group's mean error",
    )
    left.set_yticks(y, [g.name for g in report.groups], fontsize=8.5)
    left.set(title="energy MAE (meV/atom)")
    left.legend(loc="lower right", frameon=True, framealpha=0.9)
    right.barh(y, [g.forces.mae for g in report.groups], 0.6, color=ORANGE, label="MAE")
    right.plot(
        [g.forces.scale for g in report.groups], y, "|", ms=11, mew=2, color=GREY, label="rms reference force"
    )
    right.set_yticks(y, [])
    right.set(title="force MAE (eV/Å)")
    right.legend(loc="lower right", frameon=True, framealpha=0.9)
    for panel in panels:
        panel.set_ylim(n - 0.4, -0.6)
        panel.grid(axis="y", visible=False)
    return figure


def force_errors(ev: Evaluation, report: Report) -> Figure:
    """Length of the force error against that of the force, and the errors by element."""
    figure, panels = _figure(2, 6.2, 4.0)
    left, right = panels
    length = np.linalg.norm(ev.forces, axis=1)
    error = np.linalg.norm(ev.forces_model - ev.forces, axis=1)
    seen = (length > 1e-3) & (error > 1e-4)  # the rest is zero by symmetry
    if seen.any():
        x, y = length[seen], error[seen]
        if len(x) > _MANY:
            left.hexbin(
                x,
                y,
                xscale="log",
                yscale="log",
                gridsize=60,
                bins="log",
                mincnt=1,
                cmap="Blues",
                linewidths=0,
            )
        else:
            left.plot(x, y, ".", ms=4, color=BLUE, alpha=0.5)
            left.set(xscale="log", yscale="log")
        bins = [b for b in report.force_bins if b.mean > 1e-3]
        left.plot(
            [b.mean for b in bins], [b.median_error for b in bins], "o-", ms=4, color=ORANGE, label="median"
        )
        left.plot([b.mean for b in bins], [b.p90_error for b in bins], "s--", ms=4, color=RED, label="90 %")
        ends = np.array([x.min(), x.max()])
        left.plot(ends, ends, ":", color=GREY, lw=1.2, label="error = force")
        left.set_ylim(y.min() / 1.5, max(y.max(), x.max()) * 1.5)
        left.legend(loc="lower right", frameon=True, framealpha=0.9)
    left.set(
        title="error against force, per atom", xlabel="|reference force| (eV/Å)", ylabel="|error| (eV/Å)"
    )
    names = [e.name for e in report.elements]
    places = np.arange(len(names))
    right.bar(places - 0.2, [e.forces.mae for e in report.elements], 0.38, color=BLUE, label="MAE")
    right.bar(places + 0.2, [e.forces.rmse for e in report.elements], 0.38, color="#9dbfe3", label="RMSE")
    right.plot(
        places,
        [e.forces.scale for e in report.elements],
        "_",
        ms=16,
        mew=2,
        color=GREY,
        label="rms reference force",
    )
    right.set_xticks(places, names)
    right.set(title="force components by element (eV/Å)")
    right.grid(axis="x", visible=False)
    right.legend()
    return figure


def elastic(ev: Evaluation, _report: Report) -> Figure | None:
    """Stress against strain of the strained crystals."""
    if not ev.strained:
        return None
    figure, panels = _grid(len(ev.strained), 3, 4.2, 3.3)
    for panel, strained in zip(panels, ev.strained, strict=False):
        reference = strained.family.curves(strained.reference)
        model = strained.family.curves(strained.model)
        for name, colour, label in (
            ("C11", BLUE, "along"),
            ("C12", GREEN, "across"),
            ("C44", ORANGE, "shear"),
        ):
            panel.plot(*reference[name], "o", ms=4.5, mfc="none", color=colour)
            panel.plot(*model[name], color=colour, label=f"{label} ({name})")
        panel.set(title=f"{strained.family.label} {strained.lattice}", xlabel="strain", ylabel="stress (GPa)")
    panels[0].legend(title="circles: reference", title_fontsize=8.5)
    return figure


def equations_of_state(ev: Evaluation, _report: Report) -> Figure | None:
    """Energy against volume of the elemental crystals."""
    if not ev.crystals:
        return None
    figure, panels = _grid(len(ev.crystals), 4, 3.3, 2.9)
    for k, (panel, crystal) in enumerate(zip(panels, ev.crystals, strict=False)):
        eos = crystal.eos
        panel.plot(eos.volumes, 1000 * (eos.energies - eos.energies.min()), "-", color=BLUE, label="model")
        volumes, energies = crystal.reference
        panel.plot(
            volumes,
            1000 * (energies - energies.min()),
            "o",
            ms=5,
            mfc="none",
            color=GREY,
            label="reference frames",
        )
        panel.axvline(crystal.volume, ls=":", color=GREY, lw=1.2, label="reference, lowest frame")
        low, high = panel.get_xlim()
        panel.set_xlim(min(low, crystal.volume * 0.97), max(high, crystal.volume * 1.03))
        panel.set(title=f"{crystal.element} {crystal.lattice}")
        if k % 4 == 0:
            panel.set_ylabel("meV/atom")
        panel.set_xlabel("volume (Å³/atom)")
        if k == 0:
            panel.legend(fontsize=7)
    return figure


def distances(_ev: Evaluation, report: Report) -> Figure | None:
    """Shortest distance of every pair of elements, blank where a pair does not meet."""
    names = [e.name for e in report.elements]
    if len(names) < 2:
        return None
    table = np.full((len(names), len(names)), np.nan)
    for pair in report.pairs:
        i, j = sorted(names.index(e) for e in pair.pair.split("-"))
        table[j, i] = pair.shortest
    side = 1.4 + 0.5 * len(names)
    figure, panels = _figure(1, side + 0.9, side)
    panel = panels[0]
    image = panel.imshow(np.ma.masked_invalid(table), cmap="YlGnBu", vmin=1.0, vmax=4.0)
    for j, i in zip(*np.nonzero(np.isfinite(table)), strict=True):
        panel.text(i, j, f"{table[j, i]:.2f}", ha="center", va="center", fontsize=8,
                   color="white" if table[j, i] > 2.9 else "#222222")  # fmt: skip
    for j in range(len(names)):
        for i in range(j + 1):
            if not np.isfinite(table[j, i]):
                panel.text(i, j, "–", ha="center", va="center", color=GREY)
    panel.set_xticks(range(len(names)), names)
    panel.set_yticks(range(len(names)), names)
    panel.grid(visible=False)
    panel.set_title("shortest distance in the data (Å)")
    figure.colorbar(image, ax=panel, shrink=0.7)
    return figure


def routing(ev: Evaluation, _report: Report) -> Figure | None:
    """Experts by element; nothing for models without such routing."""
    try:
        return plot_routing(Metadata.model_validate(ev.calculator.metadata))
    except PackageError:
        return None  # dense, shared experts only, or routed by composition: the facts of the model say which


def _figure(n_columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width * n_columns, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, n_columns)))


def _grid(n: int, n_columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure as NewFigure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    n_columns = min(n, n_columns)
    n_rows = -(-n // n_columns)
    layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.08)
    figure = NewFigure(figsize=(width * n_columns, height * n_rows), layout=layout)
    panels = list(np.atleast_1d(figure.subplots(n_rows, n_columns)).ravel())
    for panel in panels[n:]:
        panel.set_axis_off()
    return figure, panels


def _scatter(panel: Any, x: Floats, y: Floats, title: str, unit: str) -> None:
    """Model against reference with the diagonal: few values as points, many as counts on a log scale."""
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    pad = 0.04 * (high - low) or 1e-3
    low, high = low - pad, high + pad
    if x.size > _MANY:
        picture = panel.hexbin(
            x,
            y,
            gridsize=70,
            bins="log",
            mincnt=1,
            cmap="viridis_r",
            extent=(low, high, low, high),
            linewidths=0,
        )
        bar = panel.figure.colorbar(picture, ax=panel, shrink=0.8, pad=0.02)
        bar.set_label("count", fontsize=8.5)
        bar.ax.tick_params(labelsize=8)
    else:
        panel.plot(x, y, ".", ms=4, color=BLUE, alpha=0.6)
    panel.plot([low, high], [low, high], color=GREY, lw=0.9, zorder=0)
    panel.set(
        xlim=(low, high),
        ylim=(low, high),
        aspect="equal",
        title=title,
        xlabel=f"reference ({unit})",
        ylabel=f"model ({unit})",
    )
