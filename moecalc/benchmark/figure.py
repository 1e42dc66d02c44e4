"""Figure of a benchmark: time and memory against the number of atoms, and the shares of a step."""

from __future__ import annotations

from pathlib import Path

from moecalc.benchmark.results import Report, breakdown
from moecalc.errors import MoecalcError
from moecalc.files import replacing


def check_plot_path(path: str | Path) -> None:
    """Refuse a figure that could not be written, before minutes are spent on it.

    Raises:
        MoecalcError: a suffix that matplotlib does not write, or no such folder.
    """
    from matplotlib.figure import Figure

    path = Path(path)
    if path.suffix.lstrip(".").lower() not in Figure().canvas.get_supported_filetypes():
        raise MoecalcError(f"{path}: expected a file name that ends in .png, .pdf or .svg")
    if not path.parent.is_dir():
        raise MoecalcError(f"{path.parent}: no such folder, expected an existing one for the figure")


def save_plot(report: Report, path: str | Path) -> None:
    """Draw time per atom and memory against the number of atoms, and the shares of a step.

    The shares are those of the largest size.

    Raises:
        MoecalcError: as `check_plot_path`.
    """
    from matplotlib.figure import Figure

    check_plot_path(path)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    time_axes, memory_axes, share_axes = figure.subplots(1, 3)
    atoms = [size.atoms for size in report.sizes]
    per_atom = [1e6 * size.step_p50_s / size.atoms for size in report.sizes]
    upper = [1e6 * (size.step_p95_s - size.step_p50_s) / size.atoms for size in report.sizes]
    floor = [1e6 * size.floor_s / size.atoms for size in report.sizes if size.floor_s is not None]
    time_axes.errorbar(
        atoms, per_atom, yerr=[[0.0] * len(upper), upper], fmt="o-", capsize=3, label="median, 95 %"
    )
    if len(floor) == len(atoms):
        time_axes.plot(atoms, floor, "--", color="0.5", label="arithmetic floor")
    time_axes.set(xlabel="atoms", ylabel="µs per atom and step", xscale="log")
    time_axes.legend(frameon=False)
    peak = [size.peak_mb if size.peak_gpu_mb is None else size.peak_gpu_mb for size in report.sizes]
    if all(value is not None for value in peak):
        memory_axes.plot(atoms, peak, "o-")
    memory_axes.set(xlabel="atoms", ylabel="peak memory, MB", xscale="log")
    for axes in (time_axes, memory_axes):
        axes.set_xticks(atoms, [str(n) for n in atoms])
        axes.set_xticks([], minor=True)
        axes.margins(0.1)
        axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
    last = report.sizes[-1]
    shares = breakdown(last)
    share_axes.barh([row[0] for row in shares], [1e3 * row[1] for row in shares])
    share_axes.invert_yaxis()
    share_axes.set(xlabel=f"ms per step, {last.atoms} atoms")
    threads = f"{report.threads} thread{'s' * (report.threads > 1)}"
    figure.suptitle(f"{report.model}, {report.dtype} on {report.device}, {threads}", fontsize="medium")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
