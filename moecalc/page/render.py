"""Pages from templates: `page.html.j2` is the frame, `parts.html.j2` has what pages consist of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moecalc.page.pictures import Picture


class NotComputed(Exception):  # noqa: N818 - no error: the page says it
    """What cannot be computed for this run, and why: the page shows the reason in its place."""


@dataclass
class Section:
    """A part of a page with a heading.

    Attributes:
        title: heading.
        name: anchor in the page.
        notes: paragraphs above the pictures.
        pictures: in order.
        header, rows: of a table below them; none without rows. The first column is text.
        omitted: what is left out, and why.
    """

    title: str
    name: str
    notes: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    omitted: list[str] = field(default_factory=list)

    def add(self, make: Callable[[Section], None]) -> None:
        """Let a function add to the section; what it cannot compute is listed with its reason."""
        try:
            make(self)
        except NotComputed as reason:
            self.omitted.append(str(reason))


def render_page(package: str, template: str, *, html: bool = True, **values: Any) -> str:
    """Text of a template.

    Args:
        package: module that has the template in its folder, for example "moecalc.report".
        template: name of the file.
        html: whether values are escaped.
        values: of the template; a missing one is an error.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("moecalc.page", ".")]),
        autoescape=html,  # noqa: S701 - Markdown has nothing to escape
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(sig=significant, count=_count)
    return environment.get_template(template).render(**values)


def significant(value: float | None, digits: int = 3) -> str:
    """A number for a table: three significant digits, no exponents in the usual range."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 10**digits:
        decimals = max(0, digits - 1 - int(f"{abs(value):e}".split("e")[1]))
        return f"{value:.{decimals}f}"
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e9 else f"{value:.{digits - 1}g}"


def _count(number: int) -> str:
    return f"{number:,}"
