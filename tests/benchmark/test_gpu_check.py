"""benchmarks/gpu_check.sh, as far as it goes without a GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import moecalc

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def check():
    """The module gpu_check.py."""
    spec = importlib.util.spec_from_file_location("gpu_check", BENCHMARKS / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(*arguments):
    command = [BENCHMARKS / "gpu_check.sh", "--python", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.slow
def test_a_dry_run_goes_through_every_step(tmp_path):
    measured = ("--precisions", "fp32", "float64", "--largest", "1")
    done = run_script("--dry-run", "--out", tmp_path, "--", *measured)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = dict(line.split()[:2] for line in (tmp_path / "steps.txt").read_text().splitlines())
    expected = {"doctor": "ok", "tests": "ok", "sanitizer": "skipped", "times": "ok", "nsys": "skipped"}
    assert steps == expected
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    timed = {(row["model"], row["runs"]): row for row in results["times"]}
    assert set(timed) == {(m, r) for m in ("dense", "moe") for r in ("fp32", "float64", "fp32, ASE")}
    assert all(row["step_s"] > 0 and row["atoms"] == 24 for row in timed.values())
    assert timed["moe", "float64"]["backend"] == "cuda emulated float64"
    assert results["largest"]["moe"]["atoms"] == 24
    assert results["transfers"]["waits"] == 0
    assert "against dense" in done.stdout


def test_an_unknown_option_is_refused():
    done = run_script("--fast")
    assert done.returncode == 2
    assert "expected an option among" in done.stderr


def test_a_failed_measurement_is_reported_and_the_others_run(check, monkeypatch, tmp_path, capsys):
    def run(kind, spec, prefix=()):
        if kind == "transfers":
            return {"waits": 1, "copies_up": 1, "copies_down": 1, "launches": 9}
        if spec["precision"] == "tf32":
            return {"error": "no such instruction"}
        return {"atoms": 192 * spec["copies"], "step_s": 0.001, "buffer_bytes": 10**9}

    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check, "write_package", lambda *_, **__: None)
    monkeypatch.setattr(check, "describe", lambda **_: {"device": "none", "date": "today"})
    arguments = [
        "--dry-run",
        "--copies",
        "2",
        "--precisions",
        "fp32",
        "tf32",
        "--json",
        str(tmp_path / "x.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    assert check.main() == 1
    output = capsys.readouterr().out
    assert "no such instruction" in output
    assert "per step: 9 launches, 1 copies to the device, 1 back, 1 waits of the host" in output
    assert json.loads((tmp_path / "x.json").read_text())["transfers"]["waits"] == 1


def test_without_torch_transfers_are_left_out_and_said_so(check, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    counted = check.measure_transfers({})
    assert list(counted) == ["left_out"]

    def run(kind, spec, prefix=()):
        return counted if kind == "transfers" else {"atoms": 192, "step_s": 0.001}

    monkeypatch.setattr(check, "run", run)
    for model in check.MODELS:  # given, so that nothing has to be packaged
        (tmp_path / f"{model}.moe.pt").touch()
    arguments = ["--dry-run", "--precisions", "fp32", "--largest", "0", "--packages", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    assert check.main() == 0
    expected = "transfers per step: not counted: torch, whose profiler counts them, is not installed"
    assert expected in capsys.readouterr().out


def test_a_missing_cuda_library_is_named(check, monkeypatch, tmp_path):
    monkeypatch.setattr(moecalc, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(
        SystemExit, match=r"libmoecalc_cuda\.so: no such file: build moecalc with MOECALC_CUDA=1"
    ):
        check.describe(dry_run=False)


@pytest.mark.parametrize("fits", [0, 1, 2, 3, 37, 100, 1000])
def test_the_largest_system_is_found_within_five_percent(check, monkeypatch, fits):
    def run(kind, spec):
        return {"atoms": spec["copies"]} if spec["copies"] <= fits else {"error": "out of memory"}

    monkeypatch.setattr(check, "run", run)
    found = check.largest({}, 400)
    if fits == 0:
        assert found == {"error": "out of memory"}
    else:
        assert min(fits, 400) * 0.95 - 1 <= found["copies"] <= min(fits, 400)


def test_a_peer_needs_a_model(check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--peer-python", "python"])
    with pytest.raises(SystemExit):
        check.main()
    assert "expected --peer-python and --peer-model together" in capsys.readouterr().err
