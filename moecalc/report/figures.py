"""Pictures of a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from ase import units

from moecalc.errors import PackageError
from moecalc.package.metadata import Metadata
from moecalc.page import COLORS, Picture, drawing
from moecalc.page.routing import plot_routing
from moecalc.report.composition import contributions, shares
from moecalc.report.evaluation import Evaluation
from moecalc.report.numbers import Report
from moecalc.typing import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY, PALE = (
    COLORS[name] for name in ("blue", "orange", "green", "red", "grey", "pale")
)
_MANY = 1500  # points: beyond, density is drawn instead

Pictures = dict[str, list[Picture]]


def draw(evaluation: Evaluation, report: Report) -> Pictures:
    """All pictures that the data allow, by the part of the report; parts without any are left out.

    They are to be made into files within `moecalc.page.drawing`.
    """
    makers: dict[str, Callable[[Evaluation, Report], list[Picture]]] = {
        "parity": parity,
        "groups": groups,
        "force_errors": force_errors,
        "elastic": elastic,
        "eos": equations_of_state,
        "distances": distances,
        "routing": routing,
    }
    with drawing():
        pictures = {name: maker(evaluation, report) for name, maker in makers.items()}
    return {name: found for name, found in pictures.items() if found}


def parity(ev: Evaluation, report: Report) -> list[Picture]:
    """Model against reference: energies, force components, stress components where there are any."""
    reference, model = ev.energy / ev.n_atoms, ev.energy_model / ev.n_atoms
    # Energies of different elements are eV apart, errors meV: what the composition explains is taken off.
    of_elements = shares(ev.frames, sorted(set(ev.symbols.tolist())))
    base = of_elements @ contributions(of_elements, reference)[0]
    pictures = [
        _scatter(reference - base, model - base, "energy*", report.total.energy.mae, "eV/atom", "meV/atom"),
        _scatter(ev.forces.ravel(), ev.forces_model.ravel(), "force", report.total.forces.mae, "eV/Å"),
    ]
    if report.total.stress is not None:
        stressed = np.isfinite(ev.stress).all(axis=1)
        stress, stress_model = (x[stressed].ravel() / units.GPa for x in (ev.stress, ev.stress_model))
        pictures.append(_scatter(stress, stress_model, "stress", report.total.stress.mae, "GPa"))
    return pictures


def groups(_ev: Evaluation, report: Report) -> list[Picture]:
    """Errors of every group side by side; the shifted energies beside the plain ones."""
    if len(report.groups) < 2:
        return []
    n = len(report.groups)
    y = np.arange(n)
    names = [g.name for g in report.groups]
    left, energy = _figure(5.0, 1.3 + 0.27 * n)
    energy.barh(y - 0.2, [g.energy.mae for g in report.groups], 0.38, color=BLUE, label="as they are")
    energy.barh(
        y + 0.2,
        [g.energy_shifted.mae for g in report.groups],
        0.38,
        color=PALE,
        label="without the group's mean error",
    )
    right, force = _figure(5.0, 1.3 + 0.27 * n)
    force.barh(y, [g.forces.mae for g in report.groups], 0.6, color=ORANGE, label="MAE")
    force.plot(
        [g.forces.scale for g in report.groups], y, "|", ms=11, mew=2, color=GREY, label="rms reference force"
    )
    for figure, axes, title in ((left, energy, "energy MAE (meV/atom)"), (right, force, "force MAE (eV/Å)")):
        axes.set_yticks(y, names, fontsize=8.5)
        axes.set(title=title, ylim=(n - 0.4, -0.6))
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
    worst = max(report.groups, key=lambda g: g.energy.mae)
    hardest = max(report.groups, key=lambda g: g.forces.mae)
    return [
        Picture(
            left, f"Energy errors of {n} groups; the largest is {worst.energy.mae:.3g} meV/atom, {worst.name}"
        ),
        Picture(
            right, f"Force errors of {n} groups; the largest is {hardest.forces.mae:.3g} eV/Å, {hardest.name}"
        ),
    ]


def force_errors(ev: Evaluation, report: Report) -> list[Picture]:
    """Length of the force error against that of the force, and the errors by element."""
    return [_error_against_force(ev, report), _forces_by_element(report)]


def _error_against_force(ev: Evaluation, report: Report) -> Picture:
    figure, axes = _figure()
    length = np.linalg.norm(ev.forces, axis=1)
    error = np.linalg.norm(ev.forces_model - ev.forces, axis=1)
    seen = (length > 1e-3) & (error > 1e-4)  # the rest is zero by symmetry
    if seen.any():
        x, y = length[seen], error[seen]
        if len(x) > _MANY:
            axes.hexbin(
                x,
                y,
                xscale="log",
                yscale="log",
                gridsize=60,
                bins="log",
                mincnt=1,
                cmap="Blues",
                linewidths=0,
                rasterized=True,
            )
        else:
            axes.plot(x, y, ".", ms=4, color=BLUE, alpha=0.5)
            axes.set(xscale="log", yscale="log")
        bins = [b for b in report.force_bins if b.mean > 1e-3]
        means = [b.mean for b in bins]
        axes.plot(means, [b.median_error for b in bins], "o-", ms=4, color=ORANGE, label="median")
        axes.plot(means, [b.p90_error for b in bins], "s--", ms=4, color=RED, label="90 %")
        ends = np.array([x.min(), x.max()])
        axes.plot(ends, ends, ":", color=GREY, lw=1.2, label="error = force")
        axes.set_ylim(y.min() / 1.5, max(y.max(), x.max()) * 1.5)
        figure.legend(loc="outside lower center", ncols=3)
    axes.set(
        title="error against force, per atom", xlabel="|reference force| (eV/Å)", ylabel="|error| (eV/Å)"
    )
    return Picture(
        figure, "Length of the force error of every atom against its force; the table has the medians"
    )


def _forces_by_element(report: Report) -> Picture:
    names = [e.name for e in report.elements]
    figure, axes = _figure(max(4.6, 1.5 + 0.35 * len(names)))
    places = np.arange(len(names))
    axes.bar(places - 0.2, [e.forces.mae for e in report.elements], 0.38, color=BLUE, label="MAE")
    axes.bar(places + 0.2, [e.forces.rmse for e in report.elements], 0.38, color=PALE, label="RMSE")
    axes.plot(
        places,
        [e.forces.scale for e in report.elements],
        "_",
        ms=16,
        mew=2,
        color=GREY,
        label="rms reference force",
    )
    axes.set_xticks(places, names)
    axes.set(title="force components by element (eV/Å)")
    axes.grid(axis="x", visible=False)
    figure.legend(loc="outside lower center", ncols=3)
    errors = ", ".join(f"{e.name} {e.forces.mae:.3g}" for e in report.elements)
    return Picture(
        figure, f"Mean absolute errors of force components in eV/Å: {errors}", wide=len(names) > 20
    )


def elastic(ev: Evaluation, _report: Report) -> list[Picture]:
    """Stress against strain of the strained crystals."""
    pictures = []
    for strained in ev.strained:
        figure, axes = _figure()
        reference = strained.family.curves(strained.reference)
        model = strained.family.curves(strained.model)
        for name, colour, label in (
            ("C11", BLUE, "along"),
            ("C12", GREEN, "across"),
            ("C44", ORANGE, "shear"),
        ):
            axes.plot(*reference[name], "o", ms=4.5, mfc="none", color=colour)
            axes.plot(*model[name], color=colour, label=f"{label} ({name})")
        title = f"{strained.family.label} {strained.lattice}".strip()
        axes.set(title=title, xlabel="strain", ylabel="stress (GPa)")
        axes.locator_params(axis="x", nbins=5)
        axes.legend(title="circles: reference", title_fontsize=8.5)
        pictures.append(Picture(figure, f"Stress against strain of {title}, reference and model"))
    return pictures


def equations_of_state(ev: Evaluation, _report: Report) -> list[Picture]:
    """Energy against volume of the elemental crystals."""
    pictures = []
    for crystal in ev.crystals:
        figure, axes = _figure()
        eos = crystal.eos
        axes.plot(eos.volumes, 1000 * (eos.energies - eos.energies.min()), "-", color=BLUE, label="model")
        volumes, energies = crystal.reference
        axes.plot(
            volumes,
            1000 * (energies - energies.min()),
            "o",
            ms=5,
            mfc="none",
            color=GREY,
            label="reference frames",
        )
        axes.axvline(crystal.volume, ls=":", color=GREY, lw=1.2, label="reference, lowest frame")
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, crystal.volume * 0.97), max(high, crystal.volume * 1.03))
        title = f"{crystal.element} {crystal.lattice}"
        axes.set(title=title, xlabel="volume (Å³/atom)", ylabel="energy (meV/atom)")
        axes.locator_params(axis="x", nbins=6)
        axes.legend()
        found = "no minimum" if np.isnan(eos.volume) else f"the minimum is at {eos.volume:.2f} Å³/atom"
        pictures.append(Picture(figure, f"Energy against volume of {title}: {found}"))
    return pictures


def distances(_ev: Evaluation, report: Report) -> list[Picture]:
    """Shortest distance of every pair of elements, blank where a pair does not meet."""
    names = [e.name for e in report.elements]
    if len(names) < 2:
        return []
    table = np.full((len(names), len(names)), np.nan)
    for pair in report.pairs:
        i, j = sorted(names.index(e) for e in pair.pair.split("-"))
        table[j, i] = pair.shortest
    side = 1.4 + 0.5 * len(names)
    figure, axes = _figure(max(4.6, side + 0.9), max(3.3, side))
    image = axes.imshow(np.ma.masked_invalid(table), cmap="YlGnBu", vmin=1.0, vmax=4.0)
    for j, i in zip(*np.nonzero(np.isfinite(table)), strict=True):
        axes.text(i, j, f"{table[j, i]:.2f}", ha="center", va="center", fontsize=8,
                  color="white" if table[j, i] > 2.9 else "#222222")  # fmt: skip
    for j in range(len(names)):
        for i in range(j + 1):
            if not np.isfinite(table[j, i]):
                axes.text(i, j, "–", ha="center", va="center", color=GREY)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.grid(visible=False)
    axes.set_title("shortest distance in the data (Å)")
    figure.colorbar(image, ax=axes, shrink=0.7)
    alt = "Shortest distance of every pair of elements; the table has the numbers"
    return [Picture(figure, alt, wide=len(names) > 6)]


def routing(ev: Evaluation, _report: Report) -> list[Picture]:
    """Experts by element; nothing for models without such routing."""
    try:
        figure = plot_routing(Metadata.model_validate(ev.calculator.metadata))
    except PackageError:
        return []  # dense, shared experts only, or routed by composition: the facts of the model say which
    alt = "Periodic table with the strongest expert of every element, and the weights of all experts by layer"
    return [Picture(figure, alt, wide=True, paper=True)]


def _figure(width: float = 4.6, height: float = 3.6) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _scatter(x: Floats, y: Floats, name: str, mae: float, unit: str, unit_of_error: str = "") -> Picture:
    """Model against reference with the diagonal: few values as points, many as counts on a log scale."""
    figure, axes = _figure()
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    pad = 0.04 * (high - low) or 1e-3
    low, high = low - pad, high + pad
    if x.size > _MANY:
        picture = axes.hexbin(
            x,
            y,
            gridsize=70,
            bins="log",
            mincnt=1,
            cmap="viridis_r",
            extent=(low, high, low, high),
            linewidths=0,
            rasterized=True,
        )
        bar = figure.colorbar(picture, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("count", fontsize=8.5)
        bar.ax.tick_params(labelsize=8)
    else:
        axes.plot(x, y, ".", ms=4, color=BLUE, alpha=0.6)
    axes.plot([low, high], [low, high], color=GREY, lw=0.9, zorder=0)
    title = f"{name}, MAE {mae:.3g} {unit_of_error or unit}"
    axes.set(
        xlim=(low, high),
        ylim=(low, high),
        aspect="equal",
        title=title,
        xlabel=f"reference ({unit})",
        ylabel=f"model ({unit})",
    )
    return Picture(figure, f"Model against reference, {x.size:,} values: {title}")
