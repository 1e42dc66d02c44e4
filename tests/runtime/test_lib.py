"""Loading the native library: it needs no torch, and what does not load is named in one line."""

import ast
import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from moecalc import _extras, _lib, keys
from moecalc.errors import MoecalcError
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
    assert "rebuild it with `pip install .` in the folder of moecalc's sources" in message
    assert "make dev" in message


def test_library_loads_and_knows_its_build():
    library = _lib.load()
    assert library is _lib.load()
    info = json.loads(library.build_info())
    assert set(info) == {"moecalc", "compiler", "package_format"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", info["moecalc"])
    assert info["package_format"] == FORMAT_VERSION


def test_gpus_are_counted():
    assert _lib.load().cuda_device_count() >= 0


def declared(body):
    """Public names of a module or class of a stub; of a class with what it has."""
    names = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            names[node.name] = set(declared(node.body))
        elif isinstance(node, ast.FunctionDef):
            names[node.name] = set()
        elif isinstance(node, ast.AnnAssign):
            names[node.target.id] = set()
    return {name: inside for name, inside in names.items() if not name.startswith("_")}


def test_the_stub_declares_what_the_module_has():
    """mypy watches over `_lib.Native`, which repeats the names."""
    stub = ast.parse(Path(_lib.__file__).with_name("_C.pyi").read_text(encoding="utf-8"))
    expected = declared(stub.body)
    for of_types_alone in ("Evaluation", "Facts", "GhostExchange"):
        del expected[of_types_alone]
    library = _lib.load()
    assert {name for name in dir(library) if not name.startswith("_")} == set(expected)
    for name in ("Evaluator", "LayerRunner", "Trainer"):
        found = {member for member in vars(getattr(library, name)) if not member.startswith("_")}
        assert found == expected[name], name


def test_python_and_the_library_agree_on_the_smallest_distance():
    assert _lib.load().MIN_DISTANCE == keys.MIN_DISTANCE


@pytest.mark.parametrize("minor", [10, 15])
def test_unsupported_python_is_refused(unloaded, minor):
    unloaded.setattr(sys, "version_info", types.SimpleNamespace(major=3, minor=minor))
    message = import_error()
    assert message.startswith(f"expected Python 3.11 to 3.14, got Python 3.{minor}: ")
    assert message.endswith("install moecalc in an environment of a supported Python")


def fail_with(error):
    def fail(name):
        raise error

    return fail


def test_missing_build_is_named(unloaded, tmp_path):
    unloaded.setattr(_lib, "import_module", fail_with(ModuleNotFoundError("no", name="moecalc._C")))
    unloaded.setattr(_lib, "__file__", str(tmp_path / "_lib.py"))
    message = import_error()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"has not been built for Python {version}" in message
    assert_names_remedy(message)


def test_sources_that_hide_the_installed_moecalc_are_named(unloaded, tmp_path):
    (tmp_path / "setup.py").touch()
    unloaded.setattr(_lib, "import_module", fail_with(ModuleNotFoundError("no", name="moecalc._C")))
    unloaded.setattr(_lib, "__file__", str(tmp_path / "moecalc" / "_lib.py"))
    message = import_error()
    assert f"imported from its sources in {tmp_path}, where nothing is built" in message
    assert message.endswith("run Python in another folder; else build it with `make dev`")


def test_a_build_for_another_python_is_named(unloaded, tmp_path):
    (tmp_path / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    unloaded.setattr(_lib, "import_module", fail_with(ModuleNotFoundError("no", name="moecalc._C")))
    unloaded.setattr(_lib, "__file__", str(tmp_path / "_lib.py"))
    message = import_error()
    assert "compiled for another Python (_C.cpython-399-x86_64-linux-gnu.so)" in message
    assert_names_remedy(message)


def test_library_that_does_not_load_is_named_with_its_reason(unloaded):
    error = ImportError("libmoecalc.so: undefined symbol: _ZN7moecalc\nand more")
    unloaded.setattr(_lib, "import_module", fail_with(error))
    message = import_error()
    assert "libmoecalc.so: undefined symbol: _ZN7moecalc: rebuild" in message
    assert_names_remedy(message)


def test_another_module_that_is_missing_is_not_blamed_on_the_build(unloaded):
    unloaded.setattr(_lib, "import_module", fail_with(ModuleNotFoundError("no numpy", name="numpy")))
    with pytest.raises(ModuleNotFoundError, match="no numpy"):
        _lib.load()


def test_loading_warns_of_nothing_prints_nothing_and_imports_no_torch(tmp_path):
    code = "import sys; from moecalc import _lib; _lib.load(); assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class TestTorch:
    """What `need_torch` says of the torch that packaging needs."""

    def message(self):
        with pytest.raises(MoecalcError) as caught:
            _extras.need_torch()
        return str(caught.value)

    def test_is_there(self):
        _extras.need_torch()

    def test_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        assert self.message() == "this command needs torch: pip install 'moecalc[package]'"

    def test_too_old(self, monkeypatch):
        import torch

        monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
        assert self.message().startswith(
            "this command needs torch 2.11 or newer, got torch 2.10.1+cpu: pip install"
        )

    def test_on_a_python_without_torchscript(self, monkeypatch):
        monkeypatch.setattr(sys, "version_info", types.SimpleNamespace(major=3, minor=14))
        assert self.message().startswith("this command needs Python 3.13 or older, got Python 3.14")

    def test_newer_than_tested(self, monkeypatch):
        import torch

        monkeypatch.setattr(torch, "__version__", "3.1.0")
        _extras.need_torch()
