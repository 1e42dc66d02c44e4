"""Record what DeePMD-kit finds: `python record.py`, where deepmd-kit[lmp]==3.2.0 and torch 2.11 are installed (minutes)."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "lammps")]

from lammps_runs import write_data  # noqa: E402
from model_devi_cases import (  # noqa: E402
    DEVI_CASES,
    ELEMENTS,
    MEMBERS,
    PAIR_CASES,
    checkpoints,
    script,
    structures,
    write_system,
)

DP = [sys.executable, "-m", "deepmd", "--pt"]


def run(folder: Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_system(folder / "system", structures())
        files = [str(file) for file in checkpoints()]
        for case, options in DEVI_CASES.items():
            run(folder, *DP, "model-devi", "-m", *files, "-s", "system", "-o", f"dp_{case}.out", *options)
            shutil.copy(folder / f"dp_{case}.out", HERE)

        for member, file in zip(MEMBERS, files, strict=True):
            run(folder, *DP, "freeze", "-c", file, "-o", f"{member}.pth")
        write_data(folder / "data.system", structures()[0], ELEMENTS)
        frozen = " ".join(f"{member}.pth" for member in MEMBERS)
        for case in PAIR_CASES:
            (folder / "in.test").write_text(script(case, f"deepmd {frozen}"))
            run(folder, str(Path(sys.executable).with_name("lmp")), "-in", "in.test", "-log", "none")
            shutil.copy(folder / f"{case}.out", HERE / f"pair_{case}.out")


if __name__ == "__main__":
    main()
