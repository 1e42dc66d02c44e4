"""Draw docs/images/speed.svg: moecalc beside DeePMD-kit and SNAP, from the tables of docs/performance.md.

python docs/speed_picture.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("svg")  # before pyplot, which would look for a screen

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

DOCS = Path(__file__).parent
PAGE = DOCS / "performance.md"
PICTURE = DOCS / "images" / "speed.svg"
OURS, THEIRS = "#00796b", "#9e9e9e"
# selection and form of the table beside DeePMD-kit, and what the picture calls them
FORMS = {
    ("dynamic", "moecalc, LAMMPS"): "moecalc, LAMMPS",
    ("dynamic", "moecalc, ASE"): "moecalc, ASE",
    ("static", "DeePMD-kit, LAMMPS, AOTInductor"): "DeePMD-kit, AOTInductor\nin LAMMPS, static selection",
    ("dynamic", "DeePMD-kit, eager Python"): "DeePMD-kit, Python",
    ("dynamic", "DeePMD-kit, LAMMPS, TorchScript"): "DeePMD-kit, TorchScript\nin LAMMPS",
}
# forms of the table beside SNAP
SIMPLE = {
    "moecalc, default model": "moecalc, default model",
    "SNAP": "SNAP, 2Jmax 6",
    "qSNAP": "qSNAP, 2Jmax 6",
}


class Row(NamedTuple):
    """A form in the picture: seconds per step, and megabytes above the loaded process where measured."""

    label: str
    seconds: float
    megabytes: float | None = None

    def __str__(self) -> str:
        if self.megabytes is None:
            return f"{1e3 * self.seconds:.0f} ms"
        return f"{self.seconds:.2f} s, {self.megabytes:,.0f} MB"


def cells(text: str, columns: int) -> list[list[str]]:
    """Rows of all tables with so many columns."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]
    return [row for row in rows if len(row) == columns]


def measured(text: str) -> list[Row]:
    """Forms of the same model of water in the table of docs/performance.md.

    Raises:
        KeyError: a form is not in the table.
    """
    found = {
        (row[0], row[1]): (float(row[2].split()[0]), float(row[5].replace(",", "")))
        for row in cells(text, 8)
        if re.match(r"\d", row[2])
    }
    return [Row(label, *found[key]) for key, label in FORMS.items()]


def beside_snap(text: str) -> list[Row]:
    """The default model and SNAP in the table of docs/performance.md, by processor time.

    Raises:
        KeyError: a form is not in the table.
    """
    found = {row[0]: 1e-3 * float(row[2].split()[0]) for row in cells(text, 4) if row[0] in SIMPLE}
    return [Row(label, found[key]) for key, label in SIMPLE.items()]


def numbers(rows: list[Row]) -> str:
    """What the picture shows, as text: written into the file, where a test finds it."""
    return "; ".join(f"{row.label}: {row}" for row in rows).replace("\n", " ")


def bars(axis: Axes, rows: list[Row], title: str) -> None:
    """Bars of time with the numbers beside them, moecalc in colour."""
    places = range(len(rows), 0, -1)
    seconds = [row.seconds for row in rows]
    colours = [OURS if row.label.startswith("moecalc") else THEIRS for row in rows]
    drawn = axis.barh(places, seconds, color=colours, height=0.7)
    axis.bar_label(drawn, [str(row) for row in rows], padding=4)
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlim(0, 1.5 * max(seconds))
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.tick_params(left=False, bottom=False, labelbottom=False)
    axis.set_yticks(places, [row.label for row in rows])


def draw(same: list[Row], simple: list[Row], path: Path) -> None:
    """Two panels: the same model in several forms, and the default model beside simpler potentials."""
    settings = {"svg.hashsalt": "moecalc", "font.size": 11, "font.family": "DejaVu Sans"}
    with mpl.rc_context(settings):
        heights = [len(same), len(simple)]
        figure, axes = plt.subplots(2, 1, figsize=(6.4, 4.5), layout="constrained", height_ratios=heights)
        figure.get_layout_engine().set(hspace=0.06)
        bars(axes[0], same, "192 atoms of water, 2 cores: a step, and its memory")
        bars(axes[1], simple, "500 atoms of copper, 1 core: processor time of a step")
        about = {"Date": None, "Description": numbers([*same, *simple])}
        figure.savefig(path, metadata=about, facecolor="white")
        plt.close(figure)


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    draw(measured(page), beside_snap(page), PICTURE)
