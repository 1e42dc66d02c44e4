"""Tables of compare.py's results, and the results section of docs/performance.md.

python benchmarks/peers/table.py compare.json --write-docs docs/performance.md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from moecalc.benchmark import replace_section

BEGIN = "<!-- results of benchmarks/peers/compare.py: begin -->"
END = "<!-- results of benchmarks/peers/compare.py: end -->"


def median(record: dict[str, Any], key: str) -> float | None:
    """Median time per step of a form, or None where there is none."""
    times = record["forms"].get(key, {}).get("step_s") or []
    return statistics.median(times) if times else None


def markdown(record: dict[str, Any]) -> str:
    """Times, memory and agreement of all forms, the ratios that matter, and the arithmetic."""
    graph, machine = record["graph"], record["machine"]
    plural = "s" if record["threads"] > 1 else ""
    about = (
        f"{record['structure']}: {graph['atoms']} atoms, {graph['edges']:,} edges, {graph['angles']:,} angles, float32; 1 rank, "
        f"{record['threads']} thread{plural} on {machine['cpu']} ({machine['cores']} cores); moecalc {machine['moecalc']}, "
        f"against {record['peer']}; {record['date']}. Medians of {record['rounds']} timings of {record['steps']} steps, "
        "in turn; range in brackets. Memory: peak above the loaded process."
    )
    lines = [
        about,
        "",
        "| selection | form | s per step | atom steps/s | first step, s | memory, MB | energy deviation, eV/atom | force deviation |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, form in record["forms"].items():
        step = median(record, key)
        if step is None:
            lines.append(
                f"| {form['checkpoint']} | {form['label']} | failed: {form.get('error', 'not run')} | | | | | |"
            )
            continue
        low, high = min(form["step_s"]), max(form["step_s"])
        deviation = form.get("energy_deviation")
        force = form.get("force_deviation")
        lines.append(
            f"| {form['checkpoint']} | {form['label']} | {step:.3f} ({low:.3f}-{high:.3f}) | {graph['atoms'] / step:,.0f} | "
            f"{statistics.median(form['first_s']):.1f} | {statistics.median(form['peak_mb']):,.0f} | "
            f"{'-' if deviation is None else format(deviation, '.0e')} | {'-' if force is None else format(force, '.0e')} |"
        )
        if "error" in form:
            lines.append(f"| | | stopped after {len(form['step_s'])}: {form['error']} | | | | | |")
    lines += ["", "| ratio | wanted | measured |", "|---|---|---|"]
    lines += [f"| {name} | {wanted} | {value} |" for name, wanted, value in ratios(record)]
    return "\n".join(lines)


def ratios(record: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What is asked of moecalc, and what came out."""
    total = {
        field: sum(cost[field] for cost in record["cost"].values())
        for field in ("forward", "backward", "recompute")
    }
    floor = (total["forward"] + total["backward"]) / max(record["gemm"])
    again = floor + total["recompute"] / max(record["gemm"])
    found = []
    for name, wanted, ours, theirs in (
        (
            "TorchScript in LAMMPS / moecalc in LAMMPS",
            "at least 10",
            "moecalc-lammps",
            "deepmd-torchscript",
        ),
        (
            "AOTInductor in LAMMPS / moecalc in LAMMPS, static",
            "at least 4",
            "moecalc-lammps-static",
            "deepmd-aoti",
        ),
        (
            "TorchScript in LAMMPS / moecalc in LAMMPS, static",
            "",
            "moecalc-lammps-static",
            "deepmd-torchscript-static",
        ),
        ("eager Python / moecalc in LAMMPS", "at least 5", "moecalc-lammps", "deepmd-eager"),
        ("eager Python / moecalc in ASE", "", "moecalc-ase", "deepmd-eager"),
    ):
        a, b = median(record, ours), median(record, theirs)
        if a is not None and b is not None:
            found.append((name, wanted, f"{b / a:.1f}"))
    key = "moecalc-lammps" if median(record, "moecalc-lammps") is not None else "moecalc-lammps-static"
    step = median(record, key)
    if step is not None:
        work = (total["forward"] + total["backward"]) / 1e9
        found += [
            (
                f"moecalc in LAMMPS / forward and backward ({work:.1f} GFLOP) at {max(record['gemm']) / 1e9:.0f} GFLOP/s = {floor:.3f} s",
                "",
                f"{step / floor:.2f}",
            ),
            (
                f"the same, with values computed again in the backward ({work + total['recompute'] / 1e9:.1f} GFLOP) = {again:.3f} s",
                "at most 3",
                f"{step / again:.2f}",
            ),
        ]
        found.append(
            (
                "peak memory above the loaded process, MB",
                "at most 400",
                f"{statistics.median(record['forms'][key]['peak_mb']):.0f}",
            )
        )
    return found


def write_docs(record: dict[str, Any], page: Path) -> None:
    """Replace the section between the two marks of a page.

    Raises:
        ValueError: the page does not have them.
    """
    replace_section(page, BEGIN, END, markdown(record))


def main() -> int:
    """Print the tables of a JSON file, or write them into the docs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, help="written by compare.py --json")
    parser.add_argument("--write-docs", type=Path, help="page whose results section is replaced")
    arguments = parser.parse_args()
    record = json.loads(arguments.json.read_text(encoding="utf-8"))
    print(markdown(record))
    if arguments.write_docs:
        write_docs(record, arguments.write_docs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
