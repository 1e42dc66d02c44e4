"""From numbers and pictures to one HTML file, or to Markdown with a folder of pictures."""

from __future__ import annotations

import base64
from pathlib import Path

from moecalc.errors import MoecalcError
from moecalc.files import write_bytes, write_text
from moecalc.report.evaluation import Evaluation
from moecalc.report.numbers import Errors, Report, summarise

_SUFFIXES = {".html": "report.html.j2", ".md": "report.md.j2"}


def check_output(path: str | Path) -> Path:
    """The path, if a report can be written there.

    Raises:
        MoecalcError: another suffix than .html and .md, or no such folder.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise MoecalcError(f"{path}: expected a report that ends in .html or .md")
    if not path.parent.is_dir():
        raise MoecalcError(f"{path.parent}: no such folder, expected an existing one for the report")
    return path


def write_report(evaluation: Evaluation, path: str | Path) -> Report:
    """Write a report; the suffix chooses HTML (pictures inside) or Markdown (pictures in `<name>_files`).

    Returns:
        Its numbers.

    Raises:
        MoecalcError: another suffix, or no such folder.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    from moecalc.report.figures import draw

    path = check_output(path)
    report = summarise(evaluation)
    pictures = draw(evaluation, report)
    html = path.suffix.lower() == ".html"
    if html:
        links = {
            name: f"data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in pictures.items()
        }
    else:
        folder = path.with_name(f"{path.stem}_files")
        folder.mkdir(exist_ok=True)
        for name, png in pictures.items():
            write_bytes(folder / f"{name}.png", png)
        links = {name: f"{folder.name}/{name}.png" for name in pictures}
    environment = Environment(
        loader=PackageLoader("moecalc.report", "."),
        autoescape=html,  # noqa: S701 - Markdown has nothing to escape
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(sig=significant, r2=_r2, share=_share)
    template = environment.get_template(_SUFFIXES[path.suffix.lower()])
    write_text(path, template.render(r=report, pictures=links, ev=evaluation))
    return report


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


def _r2(errors: Errors) -> str:
    if errors.r2 is None:
        return "–"
    return f"{errors.r2:.4f}" if errors.r2 > -10 else "< -10"


def _share(pair: tuple[float, float]) -> str:
    """Deviation of the second number from the first, in per cent."""
    reference, value = pair
    return "–" if reference == 0 else f"{100 * (value - reference) / abs(reference):+.0f} %"
