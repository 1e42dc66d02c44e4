"""From numbers and pictures to one HTML file, or to Markdown with a folder of pictures."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase

from moecalc.errors import MoecalcError, PackageError
from moecalc.files import display_text, write_bytes, write_text
from moecalc.models import default_model_path
from moecalc.package.metadata import Metadata
from moecalc.page import render_page
from moecalc.page.routing import routing_units
from moecalc.report.evaluation import MAX_CRYSTAL, RELAXED, Evaluation
from moecalc.report.numbers import Errors, Report, summarise

if TYPE_CHECKING:
    from moecalc.report.figures import Pictures

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
    from moecalc.report.figures import draw

    path = check_output(path)
    report = summarise(evaluation)
    pictures = draw(evaluation, report)
    html = path.suffix.lower() == ".html"
    shown: dict[str, Any] = pictures if html else _write_pictures(pictures, path)
    text = render_page(
        "moecalc.report",
        _SUFFIXES[path.suffix.lower()],
        html=html,
        r=report,
        pictures=shown,
        compared=_compared(evaluation, report),
        left_out=_left_out(report),
        r2=_r2,
        share=_share,
    )
    write_text(path, text)
    return report


def _write_pictures(pictures: Pictures, path: Path) -> dict[str, list[tuple[str, str]]]:
    """Write the pictures of a Markdown report beside it; their links and what they show."""
    folder = path.with_name(f"{path.stem}_files")
    folder.mkdir(exist_ok=True)
    links: dict[str, list[tuple[str, str]]] = {}
    for name, parts in pictures.items():
        for k, picture in enumerate(parts, 1):
            file = f"{name}.png" if len(parts) == 1 else f"{name}-{k}.png"
            write_bytes(folder / file, picture.png())
            links.setdefault(name, []).append((f"{folder.name}/{file}", picture.alt))
    return links


def _compared(evaluation: Evaluation, report: Report) -> list[tuple[str, str]]:
    """What was compared with what, and by which command."""
    calculator, metadata = evaluation.calculator, report.metadata
    frames = f"{report.n_frames:,} of {report.n_read:,}"
    if report.limit:
        frames += f", at most {report.limit} per group, taken evenly"
    if report.skipped:
        frames += f"; {len(report.skipped):,} with elements that the model does not know are left out"
    source = metadata.get("source", {})
    elements = " ".join(e.name for e in report.elements)
    rows = [
        ("package", f"{display_text(calculator.path.name)}: {report.model}"),
        (
            "elements",
            f"{elements} in the data, {' '.join(metadata['elements'])} in the package",
        ),
        ("checkpoint", f"{source.get('file', '')}, SHA-256 {source.get('sha256', '')}"),
        ("data", report.data or "frames from memory"),
        ("frames", f"{frames}; {report.n_atoms:,} atoms"),
        ("groups", f"{len(report.groups):,}, by {report.key!r} of the frames"),
        (
            "quantities",
            "energy, forces" + (", stress" if report.total.stress else "; the data have no stress"),
        ),
        ("precision", f"{report.speed.dtype} on {report.speed.device}, {report.speed.threads} threads"),
        ("versions", f"moecalc {report.moecalc}, ASE {ase.__version__}"),
        ("made", report.created),
    ]
    if evaluation.source:
        rows.append(("command", _command(evaluation)))
    return rows


def _left_out(report: Report) -> dict[str, str]:
    """What the data or the model do not allow, by part of the report, and why."""
    found = {}
    if report.total.stress is None:
        found["stress"] = "Stress: left out, the data have none."
    if not report.elastic:
        found["elastic"] = (
            "Left out: the data have no cubic crystal with five strains or more, within 6 %, along one axis "
            "and as many in shear, with stress."
        )
    if not report.crystals:
        found["eos"] = (
            "Left out: the data have no bcc, fcc, hcp or diamond crystal of one element and at most "
            f"{MAX_CRYSTAL} atoms whose forces are below {RELAXED:g} eV/Å."
        )
    try:
        routing_units(Metadata.model_validate(report.metadata))
    except PackageError as error:
        found["routing"] = f"Routing: left out, {error}."
    return found


def _command(evaluation: Evaluation) -> str:
    """The command that makes such a report."""
    path = evaluation.calculator.path
    package = "default" if path == default_model_path() else display_text(path)
    words = ["moecalc", "report", package, "--data", evaluation.source]
    if evaluation.key != "dataset":
        words += ["--key", evaluation.key]
    if evaluation.limit is not None:
        words += ["--limit", str(evaluation.limit)]
    words += ["--device", evaluation.calculator.device, "--dtype", evaluation.calculator.dtype]
    if evaluation.skipped:
        words.append("--skip-unknown")
    return shlex.join(words)


def _r2(errors: Errors) -> str:
    if errors.r2 is None:
        return "–"
    return f"{errors.r2:.4f}" if errors.r2 > -10 else "< -10"


def _share(pair: tuple[float, float]) -> str:
    """Deviation of the second number from the first, in per cent."""
    reference, value = pair
    return "–" if reference == 0 else f"{100 * (value - reference) / abs(reference):+.0f} %"
