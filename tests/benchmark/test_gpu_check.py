"""benchmarks/gpu_check.sh, as far as it goes without a GPU."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
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


def run_script(*arguments, script=BENCHMARKS / "gpu_check.sh", env=None):
    command = [script, "--python", sys.executable, *arguments]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


def steps_of(folder):
    return dict(line.split()[:2] for line in (folder / "steps.txt").read_text().splitlines())


@pytest.mark.slow
def test_a_dry_run_goes_through_every_step(tmp_path):
    measured = ("--precisions", "fp32", "float64", "--largest", "1")
    done = run_script("--dry-run", "--out", tmp_path, "--", *measured)
    assert done.returncode == 0, done.stdout + done.stderr
    ran = ("smoke", "times", "tests", "doctor")
    skipped = ("ncu", "profile", "sanitizer", "large", "ranks", "peers")
    assert steps_of(tmp_path) == dict.fromkeys(ran, "ok") | dict.fromkeys(skipped, "skipped")
    first = json.loads((tmp_path / "smoke.json").read_text())["smoke"]
    assert [(row["model"], row["runs"]) for row in first] == [
        (m, r) for m in ("dense", "moe") for r in ("fp32", "fp32-ffma", "bf16x3", "tf32", "fp16", "float64")
    ]
    results = json.loads((tmp_path / "times.json").read_text())
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


def test_a_budget_that_is_no_number_is_refused():
    done = run_script("--budget", "long")
    assert done.returncode == 2
    assert "expected --budget to be a number of seconds, got 'long'" in done.stderr


def test_a_peer_without_its_models_is_refused():
    done = run_script("--peer-python", "python")
    assert done.returncode == 2
    assert "expected --peer-python and --peer-models together" in done.stderr


def test_what_there_is_no_time_for_is_left_out_and_tells_in_the_exit_code(tmp_path):
    done = run_script("--dry-run", "--budget", "1", "--out", tmp_path)
    assert done.returncode == 3, done.stdout + done.stderr
    assert set(steps_of(tmp_path).values()) == {"skipped"}
    assert "no time left" in (tmp_path / "steps.txt").read_text()


def test_a_step_that_fails_tells_in_the_exit_code(tmp_path):
    script = stripped(tmp_path, "raise RuntimeError('broken')")
    done = run_script("--dry-run", "--skip-times", "--out", tmp_path / "out", script=script)
    assert done.returncode == 1
    assert steps_of(tmp_path / "out")["smoke"] == "FAILED"


def test_a_step_that_takes_too_long_is_ended_and_tells_in_the_exit_code(tmp_path):
    script = stripped(tmp_path, "import time; time.sleep(60)")
    done = run_script("--dry-run", "--skip-times", "--budget", "12", "--out", tmp_path / "out", script=script)
    assert done.returncode == 1
    assert steps_of(tmp_path / "out")["smoke"] == "TIME"


def stripped(folder, program):
    """The script in a folder of its own, with another gpu_check.py and a moecalc without libraries beside it."""
    (folder / "benchmarks").mkdir()
    (folder / "moecalc").mkdir()
    (folder / "moecalc" / "__init__.py").write_text("raise ImportError('the wrong one')\n")
    (folder / "benchmarks" / "gpu_check.py").write_text(program + "\n")
    script = folder / "benchmarks" / "gpu_check.sh"
    shutil.copy(BENCHMARKS / "gpu_check.sh", script)
    return script


def test_sources_without_libraries_do_not_hide_the_installed_moecalc(tmp_path):
    installed = Path(moecalc.__file__).parent
    done = run_script(
        "--skip-build", "--budget", "1", "--out", tmp_path / "out",
        script=stripped(tmp_path, ""), env={"PYTHONPATH": str(installed.parent)},
    )  # fmt: skip
    assert f"moecalc of {installed}" in done.stdout, done.stdout + done.stderr


def write_wheel(folder, name):
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


# not find_spec("pip"), which makes setuptools leave Python 3.11 its own distutils
@pytest.mark.skipif(not list(importlib.metadata.distributions(name="pip")), reason="needs pip")
def test_wheels_that_this_python_has_are_not_installed_again(tmp_path):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("numpy", "lonely_thing"):
        write_wheel(wheels, name)
    run_script("--dry-run", "--budget", "1", "--wheels", wheels, "--out", tmp_path / "out")
    installed = {path.name for path in (tmp_path / "out" / "wheels").iterdir()}
    assert "lonely_thing" in installed
    assert "numpy" not in installed


@pytest.mark.parametrize(("deviation", "failed"), [(1e-6, 0), (1.0, 1), (float("nan"), 1)])
def test_first_results_that_are_wrong_fail(check, monkeypatch, tmp_path, capsys, deviation, failed):
    class Model:
        backend = "cuda fp32"

        def __init__(self, spec):
            self.off = 0.0 if spec["precision"] == "float64" else deviation

        def evaluate(self, positions, cells):
            return {"forces": np.ones((24, 3)) * (1.0 + self.off)}

    class Steps:
        def __init__(self, spec):
            self.model, self.atoms, self.positions, self.cells = Model(spec), range(24), None, None

    monkeypatch.setattr(check, "Steps", Steps)
    monkeypatch.setattr(check, "write_package", lambda *_, **__: None)
    arguments = ["--dry-run", "--smoke", "--precisions", "fp32", "--json", str(tmp_path / "x.json")]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    assert check.main() == failed
    shown = "expected at most 0.0001" if failed else "dense fp32, cuda fp32: forces within 1.0e-06"
    assert shown in capsys.readouterr().out
    assert len(json.loads((tmp_path / "x.json").read_text())["smoke"]) == 2


def test_in_one_process_a_failure_leaves_the_others(check, monkeypatch):
    def broken(spec):
        raise RuntimeError("no such kernel\nlast line")

    monkeypatch.setitem(check.MEASUREMENTS, "time", broken)
    assert check.run("time", {"one_process": True}) == {"error": "last line"}


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


def test_every_time_is_printed_and_saved_before_the_next(check, monkeypatch, tmp_path, capsys):
    saved = tmp_path / "x.json"
    seen = []

    def run(kind, spec, prefix=()):
        if seen:
            known = json.loads(saved.read_text())["times"]
            assert len(known) == len(seen)
            assert capsys.readouterr().out == "dense fp32, 192 atoms: 1.000 ms/step\n"
        if seen or kind != "time":
            raise KeyboardInterrupt
        seen.append(kind)
        return {"atoms": 192, "step_s": 0.001}

    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check, "write_package", lambda *_, **__: None)
    arguments = ["--dry-run", "--precisions", "fp32", "--json", str(saved)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    with pytest.raises(KeyboardInterrupt):
        check.main()
    assert len(json.loads(saved.read_text())["times"]) == 1


def test_float64_is_left_out_where_it_does_not_fit(check, monkeypatch, tmp_path):
    def run(kind, spec, prefix=()):
        return {"left_out": ""} if kind == "transfers" else {"atoms": 192 * spec["copies"], "step_s": 0.001}

    monkeypatch.setattr(check, "run", run)
    monkeypatch.setattr(check, "write_package", lambda *_, **__: None)
    saved = tmp_path / "x.json"
    arguments = ["--dry-run", "--copies", "52", "260", "--precisions", "float64", "--largest", "0"]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments, "--json", str(saved)])
    assert check.main() == 0
    times = json.loads(saved.read_text())["times"]
    assert [row["atoms"] for row in times if row["runs"] == "float64"] == [9984, 9984]


def test_the_sanitizer_sees_three_formats(check, monkeypatch, capsys):
    def run(kind, spec, prefix=()):
        failed = spec["precision"] == "tf32" and "racecheck" in prefix
        return {"error": "a race"} if failed else {"energy": []}

    monkeypatch.setattr(check, "run", run)
    assert check._sanitize("compute-sanitizer", {}) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    assert "compute-sanitizer racecheck, tf32: a race" in lines
    assert "compute-sanitizer racecheck, bf16x3: clean" in lines


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
