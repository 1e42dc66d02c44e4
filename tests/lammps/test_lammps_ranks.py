"""pair_style moe on several ranks: what they send each other, and what a rank does that fails alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lammps_runs import LMP, MPIRUN, alloy, write_data
from stages import FORCES, METALS, START

from moecalc import _lib
from moecalc.models import default_model_path

PLUGIN = Path(__file__).parents[2] / "lammps_plugin"
EMULATION = {"MOECALC_BACKEND": "cuda-emulation"}

DRIVER = """
import json
from moecalc.lammps import lammps
engine = lammps(cmdargs=["-screen", "none", "-log", "none"])
for line in SCRIPT.strip().splitlines():
    engine.command(line)
counts = {name: engine.extract_pair(name) for name in ("exchanges", "messages", "rows", "bytes")}
counts["ghosts"] = engine.extract_global("nghost")
open(f"counts.{engine.extract_setting('world_rank')}.json", "w").write(json.dumps(counts))
engine.finalize()
"""


def counted(folder, ranks, commands, env=None):
    """What every rank has counted at the end of a run of 54 atoms."""
    write_data(folder / "data.alloy", alloy(METALS, (6, 3, 3)), METALS)
    script = "processors * 1 1\n" + START.format(before="", inputs="", temperature=300) + commands
    script = script.replace("clear\n", "")
    (folder / "drive.py").write_text(f"SCRIPT = {script!r}\n{DRIVER}")
    command = [str(MPIRUN), "-np", str(ranks), sys.executable, "drive.py"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"counts.{rank}.json").read_text()) for rank in range(ranks)]


def test_one_rank_sends_nothing(tmp_path):
    (alone,) = counted(tmp_path, 1, "run 2\n")
    assert {name: alone[name] for name in ("exchanges", "messages", "rows", "bytes")} == dict.fromkeys(
        ("exchanges", "messages", "rows", "bytes"), 0
    )


@pytest.mark.parametrize(
    "env",
    [{}, EMULATION, {**EMULATION, "MOECALC_DEVICE_MPI": "1"}],
    ids=["cpu", "emulation", "memory of the device"],
)
def test_two_ranks_count_what_they_send(tmp_path, env):
    """One message to the other rank per exchange, whichever side the ghosts are on."""
    both = counted(tmp_path, 2, "run 0\n", env)
    model = _lib.load().Evaluator(str(default_model_path()))
    width = model.facts.node_dim if hasattr(model.facts, "node_dim") else model.facts["node_dim"]
    for counts in both:
        assert counts["exchanges"] == 2 * (model.n_layers - 1)
        assert counts["messages"] == counts["exchanges"]
        assert counts["bytes"] == 8 * width * counts["rows"]
        assert 0 < counts["rows"] < counts["exchanges"] * counts["ghosts"]


@pytest.mark.parametrize("device_mpi", ["0", "1"])
def test_atoms_that_change_between_lists_are_sent(tmp_path, device_mpi):
    """Another type makes another list of nodes, while LAMMPS sends the same atoms: forces are those of one rank."""
    commands = (
        "neighbor 2.0 bin\nneigh_modify every 100 delay 100 check no\nrun 1\nset atom 3 type 1\nrun 1 pre no\n"
        "displace_atoms all random 0.05 0.05 0.05 77\nrun 0\n"
        "write_dump all custom dump.end id fx fy fz modify sort id format float %.17g\n"
    )
    forces = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        counted(folder, ranks, commands, {**EMULATION, "MOECALC_DEVICE_MPI": device_mpi})
        forces[ranks] = np.loadtxt(folder / "dump.end", skiprows=9)
    assert np.abs(forces[1] - forces[2]).max() < FORCES


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_alone_ends_all(tmp_path, failing):
    """Its memory suffices for the reference frames, not for its atoms, while the other waits in an exchange."""
    write_data(tmp_path / "data.alloy", alloy(METALS, (8, 4, 4)), METALS)
    script = "processors 2 1 1\n" + START.format(before="", inputs="", temperature=300) + "run 3\n"
    (tmp_path / "in.test").write_text(script.replace("clear\n", ""))
    little = ["-env", "MOECALC_DEVICE_MEMORY", str(MEMORY)]
    command = [str(MPIRUN)]
    for rank in (0, 1):
        command += [":"] if rank else []
        command += ["-np", "1", *(little if rank == failing else [])]
        command += [str(LMP), "-in", "in.test", "-log", "none"]
    for _ in range(3):  # MPICH's launcher may lose the last output of a run that aborts
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", **EMULATION},
            capture_output=True, text=True, check=False, timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode != 0
        text = " ".join(done.stdout.split())
        if "ERROR" in text:
            break
    assert f"atoms on rank {failing} (256 in all on 2 ranks): expected a system that fits" in text
    assert "Loop time" not in text


MEMORY = 32  # MiB

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "node.h"

int main(int, char** a) {
  std::printf("%d", LAMMPS_NS::sharers_of(std::atoi(a[1]), std::atoi(a[2]), std::atoi(a[3])));
}
"""


@pytest.mark.parametrize(
    ("rank", "n_ranks", "n_devices", "expected"),
    [(0, 1, 1, 1), (0, 4, 1, 4), (3, 4, 4, 1), (0, 5, 4, 2), (1, 5, 4, 1), (4, 5, 4, 2), (1, 2, 8, 1)],
)
def test_ranks_of_a_gpu_are_counted(tmp_path, rank, n_ranks, n_devices, expected):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "mpi.h").write_text("typedef int MPI_Comm;\n")
    (tmp_path / "program.cpp").write_text(PROGRAM)
    include = [f"-I{tmp_path}", f"-I{PLUGIN}"]
    subprocess.run(
        [compiler, "-std=c++20", *include, "-o", tmp_path / "program", tmp_path / "program.cpp"], check=True
    )
    command = [tmp_path / "program", str(rank), str(n_ranks), str(n_devices)]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) == expected
