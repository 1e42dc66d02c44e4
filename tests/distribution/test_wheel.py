"""The wheels work in a fresh environment: without torch, without compilers, without this working tree.

`make test-wheel` builds them and says in MOECALC_WHEELS where they are. Nothing of moecalc or of the other tests is imported here, so that the
release workflow can run this file with any Python that has pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHEELS = os.environ.get("MOECALC_WHEELS")
LARGEST_WHEEL = 40e6  # bytes; PyPI takes 100 MB
# What shell scripts and MPI's launcher call; a PATH of these has no compiler.
TOOLS = ("sh", "bash", "env", "uname", "hostname", "cat", "sed", "dirname", "basename", "ldd")

pytestmark = pytest.mark.skipif(WHEELS is None, reason="make test-wheel")


def wheel_of(distribution: str, tag: str) -> Path:
    (found,) = Path(WHEELS).resolve().glob(f"{distribution}-*-{tag}-*.whl")
    return found


@pytest.fixture(scope="session")
def wheels() -> list[Path]:
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return [wheel_of("moecalc", f"{python}-{python}"), wheel_of("moecalc_lammps", "py3-none")]


class Environment:
    """An environment with the wheels, and a PATH that has its programs and no compiler."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "venv/bin"
        self.home = folder / "home"
        self.tools = folder / "tools"
        for made in (self.home, self.tools):
            made.mkdir()
        for tool in TOOLS:
            if (found := shutil.which(tool)) is not None:
                (self.tools / tool).symlink_to(found)
        venv.create(folder / "venv", with_pip=True, symlinks=True)

    def run(self, *command: str | Path, code: int = 0) -> str:
        """What a command prints; fails unless it exits with `code`."""
        done = subprocess.run(
            list(map(str, command)), env=self.variables(), cwd=self.home, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{command}: exit code {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout

    def python(self, *arguments: str | Path) -> str:
        return self.run(self.bin / "python", *arguments)

    def variables(self) -> dict[str, str]:
        """No settings of the developer's, but where pip looks and what the processor needs."""
        kept = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "OPENBLAS_", "SSL_", "LANG"))}
        return {
            **kept, "PATH": f"{self.bin}:{self.tools}", "HOME": str(self.home), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
        }  # fmt: skip


@pytest.fixture(scope="session")
def environment(tmp_path_factory, wheels) -> Environment:
    made = Environment(tmp_path_factory.mktemp("wheel"))
    made.python("-m", "pip", "install", "-q", *wheels)
    return made


def test_wheels_are_for_machines_older_than_this_one(wheels):
    assert all("manylinux" in wheel.name for wheel in wheels), wheels
    assert wheels[0].stat().st_size < LARGEST_WHEEL


def test_torch_and_compilers_are_not_there(environment):
    assert "torch" not in environment.python("-m", "pip", "list")
    for program in ("gcc", "g++", "cc", "c++", "nvcc", "cmake"):
        assert shutil.which(program, path=environment.variables()["PATH"]) is None


def test_libraries_need_the_system_alone(environment):
    """Nothing of torch, CUDA, OpenMP; of LAMMPS and MPI, whose symbols the plugin uses, only what the process has."""
    here = environment.python("-c", "import moecalc; print(moecalc.__path__[0])").strip()
    libraries = [*Path(here).glob("*.so"), *Path(here).glob("_lammps/*.so")]
    assert {"libmoecalc.so", "moeplugin.so", "pair_moe.so"} <= {library.name for library in libraries}
    known = (
        "linux-vdso",
        "ld-linux",
        "libc.so",
        "libm.so",
        "libstdc++",
        "libgcc_s",
        "libdl.so",
        "libpthread",
        "librt.so",
        "libmoecalc.so",
    )
    for library in libraries:
        for line in environment.run("ldd", library).splitlines():
            assert Path(line.split()[0]).name.startswith(known), f"{library}: {line}"
            assert "not found" not in line, f"{library}: {line}"


def test_licences_are_those_of_their_parts(environment):
    text = "from importlib import metadata; print(*(metadata.metadata(n)['License-Expression'] for n in ('moecalc', 'moecalc-lammps')))"
    assert environment.python("-c", text).split() == ["MIT", "GPL-2.0-only"]


def test_calculator_runs(environment):
    shown = environment.python(
        "-c",
        "import sys; from ase.build import bulk; from moecalc import MoECalculator\n"
        "atoms = bulk('W', 'bcc', a=3.2, cubic=True); atoms.calc = MoECalculator(device='cpu')\n"
        "print(atoms.get_potential_energy(), abs(atoms.get_forces()).max(), 'torch' in sys.modules)",
    )
    energy, force, torch = shown.split()
    assert -50 < float(energy) < 0
    assert float(force) < 1e-3
    assert torch == "False"


def test_example_runs(environment):
    environment.python(ROOT / "examples/relax_alloy.py", "--fast", "--output", environment.home)
    assert (environment.home / "relax_alloy.traj").stat().st_size > 1000


@pytest.mark.parametrize("ranks", [1, 2])
def test_lammps_runs(environment, ranks):
    command = [
        environment.bin / "lmp",
        "-in",
        ROOT / "examples/lammps/in.two_ranks",
        "-log",
        "none",
        "-var",
        "steps",
        "5",
    ]
    shown = environment.run(*([environment.bin / "mpirun", "-np", str(ranks)] if ranks > 1 else []), *command)
    assert "Loop time of" in shown
    assert f"on {ranks} procs" in shown


def test_lammps_is_driven_from_python(environment):
    shown = environment.python(ROOT / "examples/lammps/driver.py")
    assert float(shown.split("difference of forces")[1].split()[0]) < 1e-8


def test_doctor_is_content(environment):
    shown = environment.run(environment.bin / "moecalc", "doctor")
    assert "libmoecalc.so" in shown


def test_bench_runs(environment):
    shown = environment.run(environment.bin / "moecalc", "bench", "--steps", "3")
    assert "atoms" in shown


def test_packaging_says_what_it_needs(environment):
    checkpoint = ROOT / "examples/data/metals10.pt"
    shown = environment.run(environment.bin / "moecalc", "package", checkpoint, "-o", "out.moe.pt", code=2)
    assert "pip install 'moecalc[package]'" in " ".join(shown.split())
