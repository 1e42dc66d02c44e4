"""Running a model needs no torch: in processes where importing it fails, everything but packaging and training works."""

import os
import subprocess
import sys

import pytest
from ase import Atoms

from moecalc import testing
from moecalc.models import default_model_path

BLOCK = """
import sys

class Blocker:
    "Lets nobody import torch, nor what needs it."

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "e3nn", "deepmd"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

CLI = BLOCK + "from moecalc.cli import app\napp(sys.argv[1:])\n"


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"COLUMNS": "120"},
    )


def moecalc(*arguments):
    return python(CLI, *arguments)


def test_the_blocker_blocks():
    assert "No module named 'torch'" in python(BLOCK + "import torch").stderr


def test_the_calculator_runs():
    code = """
import moecalc
from moecalc import MoECalculator
from ase.build import bulk
atoms = bulk("W", cubic=True) * 2
atoms.rattle(0.05, seed=1)
atoms.calc = MoECalculator()
print(atoms.get_potential_energy(), abs(atoms.get_forces()).max() > 0.01, atoms.get_stress().shape)
"""
    without, with_torch = python(BLOCK + code), python(code)
    assert without.returncode == with_torch.returncode == 0, without.stderr
    assert without.stdout == with_torch.stdout
    assert "True (6,)" in without.stdout


@pytest.mark.parametrize(
    "module", ["benchmark", "doctor", "zbl", "lammps", "report", "dynamics", "data", "testing", "cli"]
)
def test_modules_of_a_run_are_imported(module):
    done = python(BLOCK + f"import moecalc.{module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    [
        "",
        "package",
        "inspect",
        "verify",
        "upgrade",
        "bench",
        "report",
        "zbl",
        "convert",
        "upcycle",
        "fit",
        "lammps",
        "doctor",
    ],
)
def test_every_command_has_its_help(command):
    done = moecalc(*command.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_inspect(tmp_path):
    done = moecalc("inspect", "default", "--plot", tmp_path / "x.png")
    assert done.returncode == 0, done.stderr
    assert "metals10" in done.stdout


def test_doctor():
    done = moecalc("doctor")
    assert done.returncode == 0, done.stdout
    assert "default model" in done.stdout


def test_bench(tmp_path):
    """Its measurements are in a process of its own, which inherits no blocker but the one on its path."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    testing.bulk_alloy(["Nb", "W"], repeat=1).write(tmp_path / "small.xyz")
    done = subprocess.run(
        [sys.executable, "-m", "moecalc.cli", "bench", "--steps", "1", "--structure", tmp_path / "small.xyz"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "120"},
    )
    assert done.returncode == 0, done.stderr
    assert "arithmetic floor" in done.stdout


def test_zbl():
    done = moecalc("zbl", "default", "--elements", "Nb,W")
    assert done.returncode == 0, done.stderr
    assert "pair_style" in done.stdout


def test_report(tmp_path):
    code = """
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from moecalc import MoECalculator
import ase.io
frames = []
for seed in range(3):
    atoms = bulk("W", cubic=True)
    atoms.rattle(0.05, seed=seed)
    atoms.calc = MoECalculator(device="cpu")
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    frames.append(atoms)
ase.io.write(sys.argv[1], frames)
"""
    done = python(BLOCK + code, tmp_path / "frames.extxyz")
    assert done.returncode == 0, done.stderr
    done = moecalc("report", "default", "--data", tmp_path / "frames.extxyz", "-o", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments",
    [
        ("package", "{x}.pt", "-o", "{x}-new.moe.pt"),
        ("verify", "default"),
        ("upgrade", "{x}.moe.pt", "-o", "{x}-new.moe.pt"),
        ("upcycle", "{x}.pt", "--input", "{x}.json", "-o", "{x}-new.pt"),
        ("fit", "{x}.extxyz", "--input", "{x}.json", "-o", "{x}"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands_that_need_torch_say_so(tmp_path, arguments):
    for name in ("x.pt", "x.json", "x.extxyz"):
        (tmp_path / name).touch()
    (tmp_path / "x.moe.pt").write_bytes(default_model_path().read_bytes())
    done = moecalc(*(text.format(x=tmp_path / "x") for text in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "error: this command needs torch: pip install 'moecalc[package]'"
    assert "Traceback" not in done.stderr


def test_the_torchscript_backend_says_that_it_needs_torch():
    code = "from moecalc import MoECalculator\nMoECalculator(device='cpu', backend='torchscript')"
    done = python(BLOCK + code)
    assert done.returncode == 1
    assert "moecalc's TorchScript backend needs torch, which is not installed" in done.stderr.splitlines()[-1]


def test_a_model_without_kernels_runs(tmp_path):
    """What is not covered by kernels is computed by the plain backend, not by torch."""
    config = testing.random_config(["Nb", "W"], activation_function="softplus")
    testing.write_random_package(tmp_path / "x.moe.pt", config)
    code = """
import warnings
from ase import Atoms
from moecalc import MoECalculator
warnings.simplefilter("ignore")
calc = MoECalculator(sys.argv[1])
print(calc._model.backend, calc.get_potential_energy(Atoms("NbW", [[0, 0, 0], [0, 0, 2.3]])))
"""
    done = python(BLOCK + code, tmp_path / "x.moe.pt")
    assert done.returncode == 0, done.stderr
    backend, energy = done.stdout.split()
    assert backend == "plain"
    import warnings

    from moecalc import MoECalculator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calculator = MoECalculator(tmp_path / "x.moe.pt", backend="torchscript", device="cpu")
    expected = calculator.get_potential_energy(Atoms("NbW", [[0, 0, 0], [0, 0, 2.3]]))
    assert float(energy) == pytest.approx(expected, abs=1e-4)


HEAVY = {"torch", "pydantic", "matplotlib", "scipy", "typer", "rich", "ase.io", "ase.db"}


def test_a_calculator_starts_without_what_it_does_not_need():
    code = f"import sys; import moecalc; moecalc.MoECalculator(); print(sorted({HEAVY} & set(sys.modules)))"
    done = python(code)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
