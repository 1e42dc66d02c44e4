"""Loading the native library: what fits is loaded, what does not is named in one line."""

import json
import re
import subprocess
import sys
import types

import pytest
import torch

from moecalc import _lib
from moecalc.package.metadata import FORMAT_VERSION


@pytest.fixture
def unloaded(monkeypatch):
    """Pretend that the library has not been loaded yet."""
    monkeypatch.delitem(sys.modules, "moecalc._C", raising=False)
    return monkeypatch


def import_error():
    with pytest.raises(ImportError) as caught:
        _lib.load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def assert_names_remedy(message):
    assert (
        "rebuild it with `pip install --no-build-isolation .` in the folder of moecalc's sources" in message
    )
    assert "make dev" in message


def test_library_loads_and_knows_its_build():
    library = _lib.load()
    assert library is _lib.load()
    info = json.loads(library.build_info())
    assert set(info) == {"moecalc", "torch", "compiler", "cuda", "cuda_kernels", "package_format"}
    assert info["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["moecalc"])
    assert info["package_format"] == FORMAT_VERSION


def test_torch_of_another_minor_version_is_refused_before_loading(unloaded):
    unloaded.setitem(sys.modules, "moecalc._build_info", types.SimpleNamespace(torch="2.12.1+cu130"))
    unloaded.setattr(torch, "__version__", "2.11.0")
    message = import_error()
    assert "compiled against torch 2.12.1+cu130, but torch 2.11.0 is installed" in message
    assert_names_remedy(message)
    assert "moecalc._C" not in sys.modules


def test_another_patch_version_or_build_of_torch_is_accepted(unloaded):
    major, minor = torch.__version__.split(".")[:2]
    unloaded.setitem(
        sys.modules, "moecalc._build_info", types.SimpleNamespace(torch=f"{major}.{minor}.9+other")
    )
    assert _lib.load().Evaluator is not None


@pytest.mark.parametrize("version", ["2.10.1", "2.15.0", "3.0.0+cpu"])
def test_unsupported_torch_is_refused(unloaded, version):
    unloaded.setattr(torch, "__version__", version)
    message = import_error()
    assert message.startswith(
        f"expected torch 2.11 to 2.14, got torch {version}: `pip install 'torch>=2.11,<2.15'`, then "
    )
    assert_names_remedy(message)


def test_unsupported_python_is_refused(unloaded):
    unloaded.setattr(sys, "version_info", types.SimpleNamespace(major=3, minor=15))
    message = import_error()
    assert message.startswith("expected Python 3.11 to 3.13, got Python 3.15: ")
    assert message.endswith("install moecalc in an environment of a supported Python")


def test_missing_build_is_named(unloaded):
    unloaded.setitem(sys.modules, "moecalc._build_info", None)
    message = import_error()
    assert f"has not been built for torch {torch.__version__}" in message
    assert_names_remedy(message)


def test_library_that_does_not_load_is_named_with_its_reason(unloaded):
    def fail(name):
        if name == "moecalc._C":
            raise ImportError("libc10.so: undefined symbol: _ZN3c10\nand more")
        return types.SimpleNamespace(torch=torch.__version__)

    unloaded.setattr(_lib, "import_module", fail)
    message = import_error()
    assert f"compiled against torch {torch.__version__}" in message
    assert "libc10.so: undefined symbol: _ZN3c10: rebuild" in message
    assert_names_remedy(message)


def test_loading_warns_of_nothing_and_prints_nothing(tmp_path):
    code = "from moecalc import _lib; _lib.load()"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
