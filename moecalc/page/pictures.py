"""Pictures of a page: SVG whose colours follow the reader's light or dark scheme, or PNG on white."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS: Final = {
    "ink": "#1c2330",
    "blue": "#1f5fa8",
    "orange": "#d9730d",
    "green": "#2e8b57",
    "red": "#b5343c",
    "purple": "#7a4fa8",
    "grey": "#7d7d7d",
    "pale": "#9dbfe3",
}
"""Colours for pictures, as they are on a light page."""

_ON_DARK: Final = {
    "ink": "#e4e8ef",
    "blue": "#6aa9ee",
    "orange": "#f09a4a",
    "green": "#5cc28a",
    "red": "#ee7f86",
    "purple": "#b796e8",
    "grey": "#a3a3a3",
    "pale": "#3d5f87",
}
_INK: Final = COLORS["ink"]
_STYLE: Final[dict[Any, Any]] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.formatter.use_mathtext": True,
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.facecolor": "none",
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "moecalc",  # the same picture is the same file
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}
_RASTER_DPI: Final = 150
_PIXELS_PER_INCH: Final = 84


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows in words.

    Attributes:
        figure: made within `drawing`.
        alt: for those who do not see it, and for programs.
        caption: below it; may be empty.
        wide: it keeps its width on a narrow screen, where it scrolls; others are as wide as a column.
        paper: it is made for white paper, and stays so on a dark page.
    """

    figure: Figure
    alt: str
    caption: str = ""
    wide: bool = False
    paper: bool = False

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        if self.paper:
            return _data_uri("image/png", self.png())
        return _data_uri("image/svg+xml", self.svg().encode())

    @property
    def width(self) -> int:
        """Pixels in which the text of the picture is as large as that of a page."""
        return round(_PIXELS_PER_INCH * float(self.figure.get_figwidth()))

    def svg(self) -> str:
        """SVG on no ground, in colours that follow the scheme. The same figure is the same text."""
        buffer = io.StringIO()
        with drawing():
            self.figure.savefig(buffer, format="svg", dpi=_RASTER_DPI, metadata={"Date": None})
        text = buffer.getvalue()
        for name, color in COLORS.items():
            text = text.replace(color, f"var(--{name})")
        return text.replace("<defs>", f"<defs><style>{_scheme()}</style>", 1)

    def png(self) -> bytes:
        """PNG on white."""
        buffer = io.BytesIO()
        with drawing():
            self.figure.savefig(buffer, format="png", dpi=130, facecolor="white")
        return buffer.getvalue()


@contextmanager
def drawing() -> Iterator[None]:
    """The style of the pages; the settings of matplotlib are as before afterwards."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        yield


def _scheme() -> str:
    light, dark = (
        "".join(f"--{name}:{color};" for name, color in colors.items()) for colors in (COLORS, _ON_DARK)
    )
    return f":root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
