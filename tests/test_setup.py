"""What setup.py finds of CUDA, and what it says where something is missing."""

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
