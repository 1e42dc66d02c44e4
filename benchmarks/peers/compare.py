"""The same weights on the same structure through DeePMD-kit and through moecalc, in alternation.

See README.md beside this file.

python benchmarks/peers/compare.py --peer-venv PATH --checkpoint dpa3_l6_water.pt --structure water192.extxyz
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.data import atomic_masses, atomic_numbers

from moecalc.benchmark import (
    Ceilings,
    answer_of,
    evaluation_costs,
    isolated_ceilings,
    last_line,
    machine,
)

sys.path.insert(0, str(Path(__file__).parent))
import table

DRIVE = Path(__file__).with_name("drive.py")
TIME_LIMIT = 1800.0  # seconds for one process
SILENT = "no message (out of memory?)"


@dataclass
class Form:
    """One way to run one model.

    Attributes:
        key: short name in the JSON and the tables.
        code: "deepmd" or "moecalc"; engine: "lammps" or "python".
        checkpoint: "dynamic" or "static": which of the two checkpoints.
        suffix: of the model file that it reads.
    """

    key: str
    label: str
    code: str
    engine: str
    checkpoint: str
    suffix: str


FORMS = (
    Form("moecalc-lammps", "moecalc, LAMMPS", "moecalc", "lammps", "dynamic", ".moe.pt"),
    Form("moecalc-ase", "moecalc, ASE", "moecalc", "python", "dynamic", ".moe.pt"),
    Form("deepmd-torchscript", "DeePMD-kit, LAMMPS, TorchScript", "deepmd", "lammps", "dynamic", ".pth"),
    Form("deepmd-eager", "DeePMD-kit, eager Python", "deepmd", "python", "dynamic", ".pt"),
    Form("moecalc-lammps-static", "moecalc, LAMMPS", "moecalc", "lammps", "static", ".moe.pt"),
    Form("deepmd-aoti", "DeePMD-kit, LAMMPS, AOTInductor", "deepmd", "lammps", "static", ".pt2"),
    Form(
        "deepmd-torchscript-static",
        "DeePMD-kit, LAMMPS, TorchScript",
        "deepmd",
        "lammps",
        "static",
        ".pth",
    ),
)


def say(message: str) -> None:
    """Progress, apart from the results."""
    print(message, file=sys.stderr, flush=True)


class Peer:
    """The other code's environment."""

    def __init__(self, venv: Path, threads: int) -> None:
        self.python = venv / "bin" / "python"
        self.threads = threads
        libraries = sorted(venv.glob("lib/python3.*/site-packages/nvidia/cuda_runtime/lib"))
        self.environment = environment(threads)
        # its wheel is linked to the CUDA runtime also where it only uses the CPU
        path = [str(p) for p in libraries] + [p for p in [os.environ.get("LD_LIBRARY_PATH")] if p]
        if path:
            self.environment["LD_LIBRARY_PATH"] = ":".join(path)

    def version(self) -> str:
        """Its version, and a first check that the environment works."""
        code = "from importlib.metadata import version as v; print(v('deepmd-kit'), v('lammps'), v('torch'))"
        done = subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, check=False, env=self.environment
        )
        if done.returncode:
            raise RuntimeError(f"{self.python}: {last_line(done.stderr) or SILENT}")
        deepmd, lammps, torch = done.stdout.split()
        return f"DeePMD-kit {deepmd}, LAMMPS {lammps}, torch {torch}"

    def dp(self, *arguments: str | Path) -> None:
        """Run the command `dp`."""
        command = [self.python.with_name("dp"), *arguments]
        done = subprocess.run(
            [str(c) for c in command],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
            timeout=TIME_LIMIT,
        )
        if done.returncode:
            raise RuntimeError(f"dp {arguments[0]} failed: {last_line(done.stderr) or SILENT}")


def environment(threads: int) -> dict[str, str]:
    """Of all processes: so many threads, whoever asks."""
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "DP_INTRA_OP_PARALLELISM_THREADS": str(threads),
        "DP_INTER_OP_PARALLELISM_THREADS": "1",
    }


def prepare(form: Form, checkpoint: Path, folder: Path, peer: Peer) -> Path:
    """Model file of a form; made in the folder unless it is there already."""
    if form.suffix == ".pt":
        return checkpoint
    path = folder / (checkpoint.stem + form.suffix)
    if path.exists():
        return path
    say(f"making {path.name}")
    draft = folder / f"draft-{path.name}"  # a conversion that is interrupted must not look finished
    if form.suffix == ".moe.pt":
        from moecalc.package import package_checkpoint

        package_checkpoint(checkpoint, draft, name=checkpoint.stem)
    elif form.suffix == ".pth":
        peer.dp("--pt", "freeze", "-c", checkpoint, "-o", draft)
    else:
        frozen = prepare(Form("", "", "deepmd", "lammps", form.checkpoint, ".pth"), checkpoint, folder, peer)
        peer.dp("convert-backend", frozen, draft)
    draft.rename(path)
    return path


def write_structure(atoms: Atoms, elements: list[str], folder: Path) -> None:
    """The structure as LAMMPS and as NumPy read it, both in LAMMPS' orientation of the cell."""
    cell, _ = atoms.cell.standard_form()
    atoms = atoms.copy()
    atoms.set_cell(cell, scale_atoms=True)
    atoms.wrap()
    ase.io.write(folder / "structure.data", atoms, format="lammps-data", specorder=elements, units="metal")
    masses = [f"{k} {atomic_masses[atomic_numbers[e]]:.6f}" for k, e in enumerate(elements, start=1)]
    text = (folder / "structure.data").read_text(encoding="utf-8")
    if "Masses" not in text:
        text = text.replace("Atoms", "Masses\n\n" + "\n".join(masses) + "\n\nAtoms", 1)
    (folder / "structure.data").write_text(text, encoding="utf-8")
    np.savez(
        folder / "structure.npz",
        positions=atoms.positions,
        cell=atoms.cell.array,
        symbols=np.array(atoms.get_chemical_symbols()),
    )


def time_once(
    form: Form, model: Path, elements: list[str], folder: Path, peer: Peer, options: argparse.Namespace
) -> dict[str, Any]:
    """One timing in a process of its own.

    Raises:
        RuntimeError: the process failed; the message is its last line.
    """
    style, coefficients = ("deepmd " + str(model), " ".join(elements))
    if form.code == "moecalc":
        style, coefficients = "moe device cpu", f"{model} " + " ".join(elements)
    spec = {
        "code": form.code,
        "engine": form.engine,
        "model": str(model),
        "arrays": str(folder / "structure.npz"),
        "data": str(folder / "structure.data"),
        "log": str(folder / f"{form.key}.log"),
        "pair_style": style,
        "pair_coeff": coefficients,
        "warm_up": options.warm_up,
        "steps": options.steps,
    }
    ours = form.code == "moecalc"
    command = [sys.executable if ours else str(peer.python), str(DRIVE), json.dumps(spec)]
    process_environment = environment(options.threads) if ours else peer.environment
    return answer_of(command, process_environment, folder=folder, seconds=TIME_LIMIT)


def count(package: Path, atoms: Atoms) -> dict[str, Any]:
    """Sizes of the graph and the arithmetic of one evaluation."""
    sizes, parts = evaluation_costs(package, atoms)
    return {"graph": vars(sizes), "cost": {name: vars(cost) for name, cost in parts.items()}}


def deviations(results: dict[str, dict[str, Any]]) -> None:
    """Energy and forces of every form against moecalc's of the same checkpoint, in LAMMPS."""
    for form in FORMS:
        reference = results.get("moecalc-lammps" if form.checkpoint == "dynamic" else "moecalc-lammps-static")
        mine = results.get(form.key)
        if not reference or not mine or "energy" not in mine or "energy" not in reference:
            continue
        forces, expected = np.array(mine["forces"]), np.array(reference["forces"])
        mine["energy_deviation"] = abs(mine["energy"] - reference["energy"]) / (len(expected) / 3)
        mine["force_deviation"] = float(np.abs(forces - expected).max() / np.abs(expected).max())
    for result in results.values():
        result.pop("forces", None)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--peer-venv", type=Path, required=True, help="virtual environment with deepmd-kit[lmp]"
    )
    parser.add_argument("--checkpoint", type=Path, help="official DPA3, dynamic selection (.pt)")
    parser.add_argument("--static-checkpoint", type=Path, help="the same with static selection (.pt)")
    parser.add_argument(
        "--structure", type=Path, required=True, help="periodic structure, any file that ASE reads"
    )
    parser.add_argument(
        "--folder", type=Path, help="keeps the converted models for the next run; default: temporary"
    )
    parser.add_argument("--forms", help=f"of {','.join(f.key for f in FORMS)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="timings of each form, in turn (default 5)")
    parser.add_argument("--steps", type=int, default=10, help="steps of one timing (default 10)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before it (default 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--write-docs", type=Path, help="page whose results section is replaced")
    options = parser.parse_args()
    for path in (options.checkpoint, options.static_checkpoint, options.structure):
        if path is not None and not path.is_file():
            parser.error(f"{path}: no such file")
    if options.checkpoint is None and options.static_checkpoint is None:
        parser.error("expected --checkpoint, --static-checkpoint or both")
    if not (options.peer_venv / "bin" / "python").exists():
        parser.error(f"{options.peer_venv}: no virtual environment there (no bin/python)")
    for name in ("rounds", "steps", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}, expected at least 1")
    keys = [form.key for form in FORMS]
    options.forms = keys if options.forms is None else options.forms.split(",")
    for key in options.forms:
        if key not in keys:
            parser.error(f"--forms {key}, expected some of {', '.join(keys)}")
    return options


def main() -> int:
    """Convert the models, time all forms, print the table, write JSON and docs; 1 if a form failed."""
    options = parse()
    checkpoints = {"dynamic": options.checkpoint, "static": options.static_checkpoint}
    peer = Peer(options.peer_venv.absolute(), options.threads)
    results: dict[str, dict[str, Any]] = {}
    models: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="moecalc-peers-") as temporary:
        scratch = Path(temporary)
        folder = (options.folder or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        atoms = ase.io.read(options.structure)
        assert isinstance(atoms, Atoms)
        try:
            peer_version = peer.version()
        except RuntimeError as error:
            say(f"error: {error}: expected deepmd-kit[lmp] in that environment")
            return 2
        for form in FORMS:
            if form.key not in options.forms or checkpoints[form.checkpoint] is None:
                continue
            results[form.key] = {
                "label": form.label,
                "checkpoint": form.checkpoint,
                "step_s": [],
                "peak_mb": [],
                "first_s": [],
            }
            try:
                models[form.key] = prepare(form, checkpoints[form.checkpoint].absolute(), folder, peer)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                results[form.key]["error"] = str(error)
                say(f"{form.key} left out: {error}")
        from moecalc.package import read_metadata

        any_checkpoint = next(c for c in checkpoints.values() if c is not None)
        package = prepare(FORMS[0], any_checkpoint.absolute(), folder, peer)
        elements = read_metadata(package).elements
        write_structure(atoms, elements, scratch)
        ceilings: list[Ceilings] = []
        started = time.time()
        for turn in range(options.rounds):
            ceilings.append(isolated_ceilings("float32", options.threads, environment(options.threads)))
            for form in FORMS:
                if form.key not in models or "error" in results[form.key]:
                    continue
                say(f"round {turn + 1} of {options.rounds}, {time.time() - started:.0f} s: {form.key}")
                entry = results[form.key]
                try:
                    once = time_once(form, models[form.key], elements, scratch, peer, options)
                except RuntimeError as error:
                    # one form that fails must not cost the others
                    entry["error"] = str(error)
                    say(f"{form.key} failed: {error}")
                    continue
                for name in ("step_s", "peak_mb", "first_s"):
                    entry[name].append(once[name])
                entry["energy"], entry["forces"] = once["energy"], once["forces"]
                entry["loaded_mb"] = once["loaded_mb"]
        deviations(results)
        record = {
            "date": dt.datetime.now(dt.UTC).date().isoformat(),
            "machine": machine().model_dump(),
            "peer": peer_version,
            "threads": options.threads,
            "rounds": options.rounds,
            "steps": options.steps,
            "structure": options.structure.name,
            "gemm": [c.gemm for c in ceilings],
            "stream": [c.stream for c in ceilings],
            **count(package, atoms),
            "forms": results,
        }
    text = table.markdown(record)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.write_docs:
        table.write_docs(record, options.write_docs)
    return int(any("error" in r for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
