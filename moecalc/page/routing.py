"""Figure and table of a package's routing: which experts each element uses.

Two positions of a layer are compared only when one gate serves both: expert 2 of one gate has nothing in
common with expert 2 of another. Positions with the same routing are therefore one *unit*, everything else is
drawn apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moecalc.errors import PackageError
from moecalc.files import replacing
from moecalc.keys import short_name
from moecalc.page.pictures import Picture
from moecalc.typing import Floats, Ints

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from moecalc.package.metadata import Metadata

Colour = tuple[float, float, float]

# Inches. A heat map column must hold an element symbol, a row an expert number.
_TABLE_CELL = 0.62
_COLUMN = (0.15, 0.34)
_ROW = (0.055, 0.2)
_MAP_HEIGHT = 1.3
_WIDE_COLUMN = 0.5
_MARGIN = 0.55
_MAX_WIDTH = 16.0
_OTHER_ROW = 9.6
_PAPER = "#f2f2f0"
_INK = "#222222"


@dataclass(frozen=True)
class RoutingUnit:
    """Positions of one layer that share a gate.

    Attributes:
        layer: counted from 1.
        positions: names, in the order of the layer.
        weights: (n_elements, n_routed) weight of every routed expert, 0 where an element does not use it.
        n_shared: experts that every element uses with weight 1.
    """

    layer: int
    positions: tuple[str, ...]
    weights: Floats
    n_shared: int

    @property
    def label(self) -> str:
        """Short names of the positions, or their number where there are too many for a panel."""
        names = [short_name(p) for p in self.positions]
        return ", ".join(names) if len(names) <= 4 else f"{len(names)} positions"

    @property
    def dominant(self) -> Ints:
        """(n_elements,) routed expert of the largest weight."""
        return self.weights.argmax(axis=1)

    @property
    def share(self) -> Floats:
        """(n_elements,) weight of the dominant expert over the weight of all routed experts."""
        total: Floats = self.weights.sum(axis=1)
        share: Floats = self.weights.max(axis=1) / np.where(total > 0, total, 1.0)
        return share


def routing_units(metadata: Metadata) -> list[list[RoutingUnit]]:
    """Routing tables of a package, positions with equal tables joined; one list per layer.

    Raises:
        PackageError: the model is dense, has shared experts only, or routes by composition.
    """
    routing = metadata.routing
    if not routing.is_moe:
        raise PackageError(f"{metadata.name} has no routing to plot: it is a dense model, without experts")
    if routing.on_charge_spin:
        raise PackageError(
            f"{metadata.name} has no routing to plot: its experts depend on charge and spin, which were not "
            "fixed"
        )
    if routing.level == "configuration":
        raise PackageError(
            f"{metadata.name} has no routing to plot: its experts depend on the composition of the "
            "structure, not on the element"
        )
    layers = []
    for index, layer in enumerate(routing.layers, start=1):
        units: dict[tuple[object, ...], RoutingUnit] = {}
        for name, position in layer.items():
            if position.n_routed == 0:
                continue
            weights = np.zeros((len(metadata.elements), position.n_routed))
            for row, (experts, values) in enumerate(zip(position.experts, position.weights, strict=True)):
                for expert, weight in zip(experts, values, strict=True):
                    if expert < position.n_routed:
                        weights[row, expert] += weight
            key = (position.n_shared, weights.shape, weights.tobytes())
            names = (*units[key].positions, name) if key in units else (name,)
            units[key] = RoutingUnit(index, names, weights, position.n_shared)
        layers.append(list(units.values()))
    if not any(layers):
        raise PackageError(f"{metadata.name} has no routing to plot: all of its experts are shared")
    return layers


def routing_of(metadata: Metadata, elements: Sequence[str]) -> Metadata:
    """The metadata as if the package had been made for these of its elements alone."""
    rows = [metadata.elements.index(element) for element in elements]
    layers = [
        {
            name: position.model_copy(
                update={
                    "experts": [position.experts[row] for row in rows],
                    "weights": [position.weights[row] for row in rows],
                }
            )
            for name, position in layer.items()
        }
        for layer in (metadata.routing.layers if metadata.routing.is_table else [])
    ]
    return metadata.model_copy(
        update={
            "elements": list(elements),
            "trained_elements": [e for e in elements if e in metadata.trained_elements],
            "routing": metadata.routing.model_copy(update={"layers": layers or metadata.routing.layers}),
        }
    )


def routing_table(metadata: Metadata) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table: experts of every element and their weights, per layer and gate.

    Raises:
        PackageError: as `routing_units`.
    """
    rows = []
    for units in routing_units(metadata):
        for unit in units:
            rows.append(
                [f"layer {unit.layer}: {unit.label}", *(_experts_text(weights) for weights in unit.weights)]
            )
    return ["gate", *metadata.elements], rows


def draw_routing(metadata: Metadata) -> list[Picture]:
    """One picture a layer: the weights of the routed experts (rows) of every element (columns), by gate.

    Made within `moecalc.page.drawing`.

    Raises:
        PackageError: as `routing_units`.
    """
    return [_draw_layer(k, units, metadata.elements) for k, units in enumerate(routing_units(metadata), 1)]


def _draw_layer(number: int, units: list[RoutingUnit], symbols: list[str]) -> Picture:
    from matplotlib.figure import Figure as NewFigure

    width, left = 4.6, 0.35
    heights = [float(np.clip(0.2 * unit.weights.shape[1], 0.2, 2 * _MAP_HEIGHT)) for unit in units]
    total = 0.8 + sum(heights) + 0.3 * len(units)
    columns = min(width - left - 0.15, _WIDE_COLUMN * len(symbols))
    figure = NewFigure(figsize=(width, total))
    figure.text(0.5, 1 - 0.1 / total, f"layer {number}", fontsize=11, ha="center", va="top")
    top = 0.4
    for unit, height in zip(units, heights, strict=True):
        figure.text(left / width, 1 - top / total, unit.label, fontsize=8.5, va="top")
        top += 0.2
        bounds = (left / width, 1 - (top + height) / total, columns / width, height / total)
        draw_weights(figure.add_axes(bounds), unit.weights, symbols, labels=unit is units[-1])
        top += height + 0.1
    if not units:
        figure.text(left / width, 1 - top / total, "no experts", fontsize=8.5, va="top")
    first = (
        [f"{s} {_experts_text(w)}" for s, w in zip(symbols, units[0].weights, strict=True)] if units else []
    )
    shown = "; ".join(first) or "no experts"
    return Picture(figure, f"Weights of experts in layer {number}, first gate: {shown}")


def _experts_text(weights: Floats) -> str:
    order = [k for k in np.argsort(-weights, kind="stable").tolist() if weights[k] >= 0.005]
    return ", ".join(f"{k}: {weights[k]:.0%}" for k in order) or "–"


def plot_routing(metadata: Metadata, layer: int = 1, position: str | None = None) -> Figure:
    """Periodic table coloured by dominant expert, and the element x expert weights of every layer.

    Args:
        metadata: of a package with routing by element.
        layer: layer that the periodic table shows, counted from 1.
        position: position that it shows; default: the first one of the layer.

    Returns:
        The figure, its size chosen by the number of elements, experts and layers.

    Raises:
        PackageError: no routing to plot, or no such layer or position.
    """
    from matplotlib.figure import Figure as NewFigure

    layers = routing_units(metadata)
    shown = _choose(layers, layer, position)
    order = np.argsort([_number(e) or 999 for e in metadata.elements], kind="stable")
    symbols = [metadata.elements[i] for i in order]
    n_experts = max(u.weights.shape[1] for units in layers for u in units)

    # heat maps: one block per layer, as many side by side as fit
    column = float(np.clip(11.0 / (len(layers) * len(symbols)), *_COLUMN))
    block_width = max(column * len(symbols), 1.9) + 0.45
    n_columns = int(np.clip((_MAX_WIDTH - 2 * _MARGIN) // block_width, 1, len(layers)))
    row = float(np.clip(_MAP_HEIGHT / n_experts, *_ROW))
    block_heights = [sum(row * u.weights.shape[1] + 0.26 for u in units) + 0.6 for units in layers]
    rows = [block_heights[k : k + n_columns] for k in range(0, len(layers), n_columns)]
    table_width, table_height = 18 * _TABLE_CELL, (_OTHER_ROW + 0.1) * _TABLE_CELL
    extra = [s for s in symbols if _number(s) is None]
    if extra:
        table_height += _TABLE_CELL
    width = max(table_width, n_columns * block_width) + 2 * _MARGIN
    caption = _caption(metadata, layers, shown, int((width - 2 * _MARGIN) * 15.5))
    caption_height = 0.17 * (caption.count("\n") + 1) + 0.3
    height = 0.95 + table_height + 0.55 + sum(max(r) for r in rows) + caption_height
    figure = NewFigure(figsize=(width, height), facecolor="white")

    def axes(left: float, top: float, w: float, h: float) -> Axes:
        """Axes by their upper left corner in inches from the upper left corner of the figure."""
        return figure.add_axes((left / width, 1 - (top + h) / height, w / width, h / height))

    def text(left: float, top: float, words: str, size: float, **style: Any) -> None:
        figure.text(left / width, 1 - top / height, words, fontsize=size, va="top", color=_INK, **style)

    text(_MARGIN, 0.25, f"{metadata.name}: experts by element", 15, weight="bold")
    text(_MARGIN, 0.58, f"dominant expert in layer {shown.layer}, {shown.label}", 10.5)
    table = axes(_MARGIN, 0.95, table_width, table_height)
    draw_periodic_table(table, metadata.elements, shown, metadata.trained_elements)
    top = 0.95 + table_height + 0.1
    text(_MARGIN, top, "weight of every expert", 12, weight="bold")
    colour_bar = axes(_MARGIN + 2.3, top + 0.03, 1.8, 0.13)
    colour_bar.imshow(np.linspace(0, 1, 256)[None], aspect="auto", cmap=_weight_map(), extent=(0, 1, 0, 1))
    colour_bar.set_yticks([])
    colour_bar.set_xticks([0, 0.5, 1])
    colour_bar.tick_params(labelsize=7, length=2, pad=1)
    _frame(colour_bar)
    top += 0.45
    for k, units in enumerate(layers):
        left = _MARGIN + 0.15 + (k % n_columns) * block_width
        y = top
        text(left, y, f"layer {k + 1}", 10, weight="bold")
        y += 0.22
        for i, unit in enumerate(units):
            text(left, y + 0.03, unit.label, 7.5)
            y += 0.2
            ax = axes(left, y, column * len(symbols), row * unit.weights.shape[1])
            draw_weights(ax, unit.weights[order], symbols, labels=i == len(units) - 1)
            y += row * unit.weights.shape[1] + 0.06
        if not units:
            text(left, y + 0.03, "no experts", 7.5)
        if k % n_columns == n_columns - 1:
            top += max(rows[k // n_columns])
    text(_MARGIN, height - caption_height + 0.05, caption, 8.5)
    return figure


def save_routing(metadata: Metadata, path: str | Path) -> None:
    """Write `plot_routing` to a file; the suffix chooses the format (png, pdf, svg).

    Raises:
        PackageError: no routing to plot, a format that matplotlib does not write, or no such folder.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    figure = plot_routing(metadata)
    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in formats:
        raise PackageError(f"{path}: expected a picture file that ends in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise PackageError(f"{path.parent}: no such folder, expected an existing one for the picture")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=160)


def draw_periodic_table(ax: Axes, elements: list[str], unit: RoutingUnit, trained: list[str]) -> None:
    """Periodic table: elements of the model in the colour of their dominant expert.

    The colour is paler where that expert has less of the weight.

    Args:
        ax: square cells need an aspect of 18 : 9.7.
        elements: (n_elements,) symbols; those that are no chemical elements are put below the table.
        unit: whose weights to show, rows as `elements`.
        trained: elements that training data covered; the others get a dashed frame.
    """
    from ase.data import chemical_symbols
    from matplotlib.patches import Rectangle

    colours = _expert_colours(unit.weights.shape[1])
    known = {symbol: i for i, symbol in enumerate(elements)}
    places = {chemical_symbols[z]: (*_place(z), z) for z in range(1, 119)}
    others = [e for e in elements if _number(e) is None]
    places |= {e: (3 + k, _OTHER_ROW, 0) for k, e in enumerate(others)}
    for symbol, (x, y, number) in places.items():
        index = known.get(symbol)
        if index is None:
            ax.add_patch(Rectangle((x + 0.04, y + 0.04), 0.92, 0.92, facecolor=_PAPER, edgecolor="none"))
            ax.text(x + 0.5, y + 0.5, symbol, ha="center", va="center", fontsize=8, color="#b8b8b4")
            continue
        expert, share = int(unit.dominant[index]), float(unit.share[index])
        face = _blend(colours[expert], 0.25 + 0.75 * share)
        ink = "white" if _luminance(face) < 0.55 else _INK
        ax.add_patch(
            Rectangle(
                (x + 0.04, y + 0.04), 0.92, 0.92, facecolor=face, edgecolor=colours[expert], linewidth=1.0
            )
        )
        if symbol not in trained:
            ax.add_patch(
                Rectangle(
                    (x + 0.09, y + 0.09), 0.82, 0.82, fill=False, edgecolor=ink, linewidth=0.9, linestyle="--"
                )
            )
        if number:
            ax.text(x + 0.12, y + 0.13, str(number), ha="left", va="top", fontsize=5.5, color=ink)
        ax.text(x + 0.5, y + 0.48, symbol, ha="center", va="center", fontsize=12, weight="bold", color=ink)
        ax.text(
            x + 0.5, y + 0.87, f"{expert}: {share:.0%}", ha="center", va="bottom", fontsize=6.5, color=ink
        )
    _draw_legend(ax, unit, colours, any(e not in trained for e in elements))
    ax.set_xlim(0, 18)
    ax.set_ylim(_OTHER_ROW + 0.1 + (1 if others else 0), 0)
    ax.set_axis_off()


def _draw_legend(ax: Axes, unit: RoutingUnit, colours: list[Colour], untrained: bool) -> None:
    """Experts and how many elements each dominates, in the gap above the transition metals."""
    from matplotlib.patches import Rectangle

    counts = np.bincount(unit.dominant, minlength=len(colours))
    entries = [(k, colours[k]) for k in range(len(colours)) if counts[k]]
    # at most 9.6 columns x 3 rows of free space
    n_rows = 4 if len(entries) <= 16 else 8
    pitch = 0.65 if n_rows == 4 else 0.325
    for i, (k, colour) in enumerate(entries):
        x, y = 2.5 + 2.4 * (i // n_rows), 0.2 + pitch * (i % n_rows)
        size = 0.62 * pitch
        ax.add_patch(Rectangle((x, y), size, size, facecolor=colour, edgecolor="none"))
        ax.text(
            x + size + 0.12,
            y + size / 2,
            f"expert {k} ({counts[k]})",
            va="center",
            fontsize=8 if n_rows == 4 else 6,
            color=_INK,
        )
    if untrained:
        ax.add_patch(
            Rectangle((0.1, 8.2), 0.4, 0.4, fill=False, edgecolor=_INK, linewidth=0.9, linestyle="--")
        )
        ax.text(0.65, 8.4, "untrained", va="center", fontsize=8, color=_INK)


def draw_weights(ax: Axes, weights: Floats, symbols: list[str], *, labels: bool = True) -> None:
    """Heat map of weights, elements along x and experts down y; numbers where a cell has room for them.

    Args:
        ax: its size decides nothing; cells fill it.
        weights: (n_elements, n_experts).
        symbols: (n_elements,) labels.
        labels: whether to write the symbols below.
    """
    n_elements, n_experts = weights.shape
    ax.imshow(weights.T, aspect="auto", cmap=_weight_map(), vmin=0.0, vmax=1.0, interpolation="nearest")
    position = ax.get_position()
    figure = ax.get_figure()
    assert figure is not None
    cell_width = position.width * figure.bbox.width / 72 / n_elements * 72 / figure.dpi
    cell_height = position.height * figure.bbox.height / 72 / n_experts * 72 / figure.dpi
    if cell_width > 0.24 and cell_height > 0.13:
        for i, k in zip(*np.nonzero(weights > 0.005), strict=True):
            ink = "white" if weights[i, k] > 0.6 else _INK
            ax.text(i, k, f"{weights[i, k]:.2f}".lstrip("0"), ha="center", va="center", fontsize=6, color=ink)
    step = 1 if cell_height > 0.1 else max(1, n_experts // 4)
    ax.set_yticks(range(0, n_experts, step))
    ax.tick_params(axis="both", labelsize=6.5, length=0, pad=2)
    ax.set_xticks(range(n_elements))
    if labels:
        ax.set_xticklabels(symbols, fontsize=7 if cell_width > 0.2 else 5.5)
    else:
        ax.set_xticklabels([])
    if cell_width > 0.12:
        ax.set_xticks(np.arange(n_elements + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(n_experts + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=0.6)
        ax.tick_params(which="minor", length=0)
    _frame(ax)


def _frame(ax: Axes) -> None:
    for spine in ax.spines.values():
        spine.set_linewidth(0.5)
        spine.set_color("#9a9a96")


def _choose(layers: list[list[RoutingUnit]], layer: int, position: str | None) -> RoutingUnit:
    if not 1 <= layer <= len(layers):
        raise PackageError(f"layer {layer}, expected 1 to {len(layers)}")
    units = layers[layer - 1]
    if position is None and units:
        return units[0]
    for unit in units:
        if position in unit.positions:
            return unit
    names = ", ".join(p for unit in units for p in unit.positions) or "another layer: this one has no experts"
    raise PackageError(f"position {position!r} in layer {layer}, expected {names}")


def _caption(metadata: Metadata, layers: list[list[RoutingUnit]], shown: RoutingUnit, width: int) -> str:
    n_shared = {u.n_shared for units in layers for u in units}
    joined = any(len(u.positions) > 1 for units in layers for u in units)
    gates = (
        "positions served by one gate in one panel"
        if joined
        else "one panel per position, each has its own gate"
    )
    sentences = [
        (
            f"Colour and number: the routed expert with the largest weight in layer {shown.layer}, "
            f"{shown.label}."
        ),
        (
            "The percentage is its share of the weights of all routed experts, and pale cells have a small "
            "share."
        ),
        (
            f"Below: weights of all routed experts, {gates}; expert numbers have a meaning within one panel "
            "only."
        ),
    ]
    if n_shared == {0}:
        sentences.append("No shared experts.")
    else:
        counts = " or ".join(str(n) for n in sorted(n_shared))
        noun = "expert" if n_shared == {1} else "experts"
        sentences.append(f"Not shown: {counts} shared {noun} per position, of weight 1 for every element.")
    if len({frozenset(p for u in units for p in u.positions) for units in layers}) > 1:
        sentences.append("Positions missing in the last layers cannot reach the energy, or are dense.")
    if len(metadata.trained_elements) < len(metadata.elements):
        sentences.append("Dashed: no training data covered the element.")
    return "\n".join(textwrap.wrap(" ".join(sentences), width))


def _number(symbol: str) -> int | None:
    from ase.data import atomic_numbers

    number: int | None = atomic_numbers.get(symbol)
    return number or None


def _place(number: int) -> tuple[float, float]:
    """Column and row, from 0, of an element in the 18-column table; f-block in two rows below."""
    starts = ((1, 2), (3, 8), (11, 8), (19, 18), (37, 18), (55, 32), (87, 32))
    period = max(i for i, (first, _) in enumerate(starts) if number >= first)
    offset = number - starts[period][0]
    length = starts[period][1]
    if length == 32 and 2 <= offset < 17:
        return 2.0 + (offset - 2) + 1.0, 7.4 + (period - 5)
    before = {2: 1, 8: 2, 18: 2, 32: 2}[length]
    if offset < before:
        return float(offset), float(period)
    return float(18 - (length - offset)), float(period)


def _expert_colours(n: int) -> list[Colour]:
    """Distinct colours; adjacent experts of a large set differ in hue and in lightness."""
    from matplotlib import colormaps
    from matplotlib.colors import hsv_to_rgb, to_rgb

    # hues that differ under the common colour-vision deficiencies as well
    few = ("#3a78b4", "#e08a2c", "#3d9a6c", "#b5476b", "#7a67b8", "#8f8a3a", "#4fa9b8", "#a0644a")
    if n <= len(few):
        return [to_rgb(c) for c in few[:n]]
    if n <= 20:
        return [to_rgb(colormaps["tab20"](k)) for k in range(n)]
    value = ((0.75, 0.85), (0.55, 0.65), (0.95, 0.95))
    return [to_rgb(tuple(hsv_to_rgb((k / n, value[k % 3][0], value[k % 3][1])))) for k in range(n)]


def _blend(colour: Colour, amount: float) -> Colour:
    r, g, b = (1 - amount + amount * c for c in colour)
    return r, g, b


def _luminance(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def _weight_map() -> str:
    return "Blues"
