"""Foreign files are called by their names; a command that is refused, stopped or killed loses nothing."""

import gzip
import io
import json
import lzma
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from typer.testing import CliRunner

from moecalc import MoECalculator, files, testing
from moecalc._lib import load
from moecalc.cli import app
from moecalc.errors import CheckpointError, MoecalcError, PackageError
from moecalc.files import PREFIX, check_outputs, describe, display_text, from_text, replacing, write_text
from moecalc.models import default_model_path
from moecalc.package import check_archive
from moecalc.package.importers import load_checkpoint, save_checkpoint

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>GitHub</title></head></html>\n"


def of_tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pt"), io.BytesIO())
    return buffer.getvalue()


def of_zip(*names):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return buffer.getvalue()


def of_numpy(save, *arrays):
    buffer = io.BytesIO()
    save(buffer, *arrays)
    return buffer.getvalue()


def of_safetensors():
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return len(header).to_bytes(8, "little") + header + b"\0\0\0\0"


FOREIGN = {
    "pointer": (LFS, "Git LFS pointer, not the file itself: run `git lfs pull`"),
    "page": (PAGE, "HTML page, not the file itself"),
    "empty": (b"", "empty file"),
    "gzip": (gzip.compress(b"x"), "compressed with gzip: unpack it first"),
    "xz": (lzma.compress(b"x"), "compressed with xz: unpack it first"),
    "tar": (of_tar(), "tar archive: unpack it first"),
    "zip": (
        of_zip("README", "model.pt"),
        "zip archive of other files ('README', 'model.pt'): unpack it first",
    ),
    "npz": (of_numpy(np.savez, np.zeros(2)), "NumPy arrays (.npz)"),
    "npy": (of_numpy(np.save, np.zeros(2)), "NumPy array (.npy)"),
    "pickled numpy": (pickle.dumps(np.zeros(3)), "pickled NumPy arrays"),
    "pickle": (pickle.dumps({"a": 1}), "pickled Python object"),
    "safetensors": (of_safetensors(), "safetensors file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5 file"),
    "onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xaa", "ONNX model"),
    "frozen graph": (
        b"\n7\n\x06t_coord\x12\x0bPlaceholder*\x0b\n\x05dtype\x12\x02\x30\x02",
        "TensorFlow (.pb)",
    ),
    "pt2": (of_zip("model/archive_format", "model/models/model.json"), "torch.export (.pt2)"),
    "json": (b'{"model": {"type_map": ["W"]}}', "JSON text"),
    "yaml": (b"model:\n  type_map: [W]\n", "text file that begins with 'model:'"),
    "link as text": (b"../other/model.pt", "'../other/model.pt' in it, perhaps a link"),
    "zeros": (bytes(5000), "filled with zeros"),
}


@pytest.fixture(params=FOREIGN)
def foreign(request, tmp_path):
    """A file that is something else, and how it should be called."""
    content, name = FOREIGN[request.param]
    path = tmp_path / "model.moe.pt"
    path.write_bytes(content)
    return path, name


def test_a_foreign_file_given_as_checkpoint_is_named(foreign):
    path, name = foreign
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert name in message
    assert "\n" not in message
    assert "weights_only" not in message


def test_a_foreign_file_given_as_package_is_named(foreign):
    path, name = foreign
    with pytest.raises(PackageError) as caught:
        check_archive(path)
    assert name in str(caught.value)
    assert str(caught.value).startswith(f"{path}: not a moecalc package but ")


@pytest.mark.parametrize("kind", ["pointer", "page", "empty", "gzip", "xz"])
def test_the_calculator_and_lammps_name_what_is_met_most(kind, tmp_path):
    content, name = FOREIGN[kind]
    path = tmp_path / "model.moe.pt"
    path.write_bytes(content)
    with pytest.raises(PackageError) as caught:
        MoECalculator(path, device="cpu")
    assert name in str(caught.value)
    with pytest.raises(load().Error) as native:  # what the pair style prints
        load().check_archive(str(path))
    assert name in str(native.value)


def test_a_folder_is_called_a_folder(tmp_path):
    (tmp_path / "model.ckpt-1000.pt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"a folder: give one of its files, such as model.ckpt-1000.pt"):
        load_checkpoint(tmp_path)
    with pytest.raises(PackageError, match="a folder"):
        check_archive(tmp_path)
    with pytest.raises(PackageError, match="a folder"):
        MoECalculator(tmp_path, device="cpu")
    with pytest.raises(load().Error, match="not a moecalc package but a folder"):
        load().check_archive(str(tmp_path))


def test_a_link_to_nothing_is_called_so(tmp_path):
    (tmp_path / "model.pt").symlink_to("gone.pt")
    assert describe(tmp_path / "model.pt") == "a link to nothing"


def test_a_checkpoint_given_as_package_is_told_how_to_become_one(checkpoint):
    command = f"moecalc package {checkpoint} -o {checkpoint.stem}.moe.pt"
    with pytest.raises(
        PackageError, match=rf"not a moecalc package but a checkpoint of torch .*`{re.escape(command)}`"
    ):
        check_archive(checkpoint)


def test_a_checkpoint_with_the_name_of_a_package_is_not_to_be_replaced_by_it(checkpoint, tmp_path):
    path = tmp_path / "my model.moe.pt"
    shutil.copy(checkpoint, path)
    with pytest.raises(PackageError, match=re.escape(f"`moecalc package '{path}' -o MODEL.moe.pt`")):
        check_archive(path)


def test_the_command_that_a_refused_checkpoint_suggests_makes_a_package(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint, "my model.pt")
    refused = run("inspect", "my model.pt")
    assert refused.exit_code == 2
    _, *suggested = shlex.split(refused.stderr.split("`")[1])
    assert run(*suggested).exit_code == 0
    check_archive("my model.moe.pt")


def test_the_advice_to_load_unsafely_is_never_quoted(tmp_path):
    torch.save({"model": np.zeros(3), "path": Path("x")}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "model.pt")
    message = str(caught.value)
    assert "which is code" in message
    assert "weights_only" not in message
    assert len(message.splitlines()) == 1


def test_a_truncated_checkpoint_is_one_line(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    for size in (1, 100, len(content) // 2, len(content) - 30):
        (tmp_path / "cut.pt").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"cut\.pt: ") as caught:
            load_checkpoint(tmp_path / "cut.pt")
        assert len(str(caught.value).splitlines()) == 1


# --- outputs that are inputs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.pt"
    config = testing.random_config(["Nb", "W"], n_routed=2, nlayers=2)
    save_checkpoint(path, testing.random_potential(config), config)
    return path


def run(*arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("link", ["same", "symbolic", "hard", "relative"])
def test_packaging_onto_the_checkpoint_is_refused(link, checkpoint, tmp_path, monkeypatch):
    source = tmp_path / "model.moe.pt"
    source.write_bytes(checkpoint.read_bytes())
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "other.moe.pt"
    if link == "symbolic":
        out.symlink_to(source)
    elif link == "hard":
        out.hardlink_to(source)
    else:
        out = source if link == "same" else Path("../") / tmp_path.name / "model.moe.pt"
    result = run("package", source, "-o", out, "--force")
    assert result.exit_code == 2
    assert "itself, which would be lost" in result.stderr
    assert source.read_bytes() == checkpoint.read_bytes()


def frames_file(path, n=3):
    made = []
    for seed in range(n):
        atoms = testing.bulk_alloy(("Nb", "W"), repeat=1, seed=seed)
        atoms.calc = SinglePointCalculator(atoms, energy=-20.0, forces=np.zeros((2, 3)), stress=np.zeros(6))
        made.append(atoms)
    write(path, made, format="extxyz")
    return path


def test_a_report_onto_its_data_is_refused(tmp_path):
    data = frames_file(tmp_path / "data.extxyz")
    before = data.read_bytes()
    result = run("report", "default", "--data", data, "-o", tmp_path / "r.html", "--json", data)
    assert result.exit_code == 2
    assert f"--json {data} is the --data {data} itself" in result.stderr
    assert data.read_bytes() == before


def test_results_of_a_benchmark_onto_its_structure_are_refused(tmp_path):
    data = frames_file(tmp_path / "data.extxyz", 1)
    result = run("bench", "default", "--structure", data, "--json", data)
    assert result.exit_code == 2
    assert "is the --structure" in result.stderr


def test_two_outputs_that_are_one_file_are_refused(tmp_path):
    with pytest.raises(MoecalcError, match="are one file"):
        check_outputs([("--json", tmp_path / "a"), ("--plot", tmp_path / "x" / ".." / "a")], [])


def test_conversion_onto_its_frames_is_refused(tmp_path):
    data = frames_file(tmp_path / "valid.extxyz")
    before = data.read_bytes()
    result = run("convert", data, tmp_path, "--force")
    assert result.exit_code == 2
    assert "itself, which would be lost" in result.stderr
    assert data.read_bytes() == before


def test_a_fit_onto_its_input_is_refused(tmp_path):
    data = frames_file(tmp_path / "train.extxyz")
    (tmp_path / "log.jsonl").write_text("{}")
    result = run("fit", data, "--input", tmp_path / "log.jsonl", "-o", tmp_path)
    assert result.exit_code == 2
    assert "is the --input" in result.stderr


# --- writing ---------------------------------------------------------------------------------------


def test_what_was_there_stays_when_writing_fails(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(TypeError), replacing(path) as temporary:
        temporary.write_text(12)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link_and_permissions_stay(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "target").chmod(0o640)
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o640


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "new", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640


def test_what_a_killed_run_left_is_removed_a_day_later(tmp_path):
    old, fresh = tmp_path / f"{PREFIX}old", tmp_path / f"{PREFIX}fresh.pt"
    old.mkdir()
    (old / "draft").write_text("x")
    fresh.write_text("x")
    past = time.time() - 2 * files._STALE
    os.utime(old, (past, past))
    write_text(tmp_path / "a", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [fresh.name, "a"]


# --- processes that end early -----------------------------------------------------------------------


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **changes}


def command(*arguments):
    return [sys.executable, "-m", "moecalc.cli", *map(str, arguments)]


def limit_file_size(n_bytes):
    """Runs in the child: writing beyond fails with EFBIG, as ENOSPC does on a full disk."""

    def apply():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    return apply


@pytest.mark.parametrize("n_bytes", [0, 100_000])
def test_a_full_disk_while_packaging_is_one_line_and_leaves_nothing(n_bytes, checkpoint, tmp_path):
    out = tmp_path / "model.moe.pt"
    out.write_text("old")
    done = subprocess.run(
        command("package", checkpoint, "-o", out, "--force"),
        capture_output=True, text=True, check=False, env=environment(PYTHONDONTWRITEBYTECODE="1"),
        preexec_fn=limit_file_size(n_bytes),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("packaging:")]
    assert errors == [f"error: {out} was not written: File too large; what was there before is unchanged"]
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("model.moe.pt", "old")]


def test_a_full_disk_while_converting_leaves_the_old_data_set(tmp_path):
    data = frames_file(tmp_path / "data.extxyz")
    assert run("convert", data, tmp_path / "set").exit_code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "set").rglob("*") if p.is_file()}
    done = subprocess.run(
        command("convert", data, tmp_path / "set", "--force", "--seed", "5"),
        capture_output=True, text=True, check=False, env=environment(PYTHONDONTWRITEBYTECODE="1"),
        preexec_fn=limit_file_size(10),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'set'} was not written: ")
    assert {p: p.read_bytes() for p in (tmp_path / "set").rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.extxyz", "set"]


def heed_signals():
    """As at a terminal: `nohup` and shells that start something in the background have these ignored."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def stopped(arguments, number, marker):
    """Run a command and send a signal once it has printed `marker`."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        preexec_fn=heed_signals,  # noqa: PLW1509 - takes no lock
    )  # fmt: skip
    seen = []
    for line in process.stderr:
        seen.append(line)
        if marker in line:
            process.send_signal(number)
            break
    _, rest = process.communicate(timeout=120)
    return process.returncode, "".join(seen) + rest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_while_packaging_leaves_nothing(number, checkpoint, tmp_path):
    out = tmp_path / "model.moe.pt"
    code, text = stopped(["package", checkpoint, "-o", out], number, "evaluator in float64")
    assert code == 128 + number, text
    name = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert text.splitlines()[-1] == f"error: {name}; temporary files were removed"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("marker", ["compiling", "evaluator in float32", "isolated atoms"])
def test_a_killed_packaging_leaves_the_old_package_or_the_new(marker, checkpoint, tmp_path):
    out = tmp_path / "model.moe.pt"
    out.write_bytes(default_model_path().read_bytes())
    stopped(["package", checkpoint, "-o", out, "--force"], signal.SIGKILL, marker)
    check_archive(out)
    assert all(p == out or p.name.startswith(PREFIX) for p in tmp_path.iterdir())


def test_signals_are_the_host_s_after_a_command():
    before = signal.getsignal(signal.SIGTERM)
    run("--version")
    assert signal.getsignal(signal.SIGTERM) == before


def fit_files(folder):
    frames_file(folder / "train.extxyz", 4)
    widths = {"n_dim": 16, "e_dim": 16, "a_dim": 16, "nlayers": 2, "a_compress_rate": 0}
    shells = {"e_rcut": 4.0, "e_rcut_smth": 3.0, "e_sel": 20, "a_rcut": 3.0, "a_rcut_smth": 2.5, "a_sel": 10}
    model = {
        "descriptor": {**widths, **shells, "precision": "float32"},
        "fitting": {"neuron": [16, 16]},
        "moe": {},
    }
    options = {"steps": 2000, "batch_atoms": 2, "repulsion": 0.0}
    (folder / "fit.json").write_text(json.dumps({"model": model, "fit": options}))
    return [
        "fit",
        folder / "train.extxyz",
        "--input",
        folder / "fit.json",
        "-o",
        folder / "out",
        "--every",
        "2",
    ]


def test_a_killed_fit_goes_on(tmp_path):
    arguments = fit_files(tmp_path)
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    log = tmp_path / "out" / "log.jsonl"
    for n_lines in (3, 9):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not log.exists() or log.read_text().count("\n") < n_lines):
            time.sleep(0.01)
        process.kill()
        process.wait()
        state = torch.load(tmp_path / "out" / "state.pt", weights_only=True)
        assert state["step"] >= 2
        load_checkpoint(tmp_path / "out" / "state.averaged.pt")
        process = subprocess.Popen(
            command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
        )
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"", "an empty file"),
        (LFS, "a Git LFS pointer"),
        ("cut", "PytorchStreamReader"),
        ("pickle", "could run code"),
        ("other", "KeyError"),
    ],
    ids=["empty", "pointer", "cut", "pickle", "other"],
)
def test_a_state_that_is_none_is_one_line(content, name, tmp_path):
    arguments = fit_files(tmp_path)
    (tmp_path / "out").mkdir()
    state = tmp_path / "out" / "state.pt"
    if content == "cut":
        torch.save({"config": torch.zeros(1000)}, state)
        content = state.read_bytes()[:1500]
    elif content == "pickle":
        torch.save({"config": Path("x")}, state)
        content = state.read_bytes()
    elif content == "other":
        torch.save({"model": {}}, state)
        content = state.read_bytes()
    state.write_bytes(content)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith(f"error: {state}: not the state of a fit (")
    assert name in result.stderr
    assert "remove it to begin anew" in result.stderr
    assert state.read_bytes() == content


# --- text that the locale cannot express -------------------------------------------------------------

PLAIN = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def in_plain_locale(*arguments):
    return subprocess.run(
        command(*arguments), capture_output=True, check=False, env=environment(**PLAIN, COLUMNS="120")
    )


def test_notes_and_paths_in_any_script_work_in_the_plain_locale(checkpoint, tmp_path):
    folder = tmp_path / "Jülich"
    folder.mkdir()
    source, out = folder / "modèle.pt", folder / "模型.moe.pt"
    source.write_bytes(checkpoint.read_bytes())
    done = in_plain_locale("package", source, "-o", out, "--note", "Größe µ", "--license", "©")
    assert done.returncode == 0, done.stderr
    for arguments in (
        ["inspect", out],
        ["inspect", out, "--json"],
        ["inspect", out, "--plot", folder / "é.png"],
        ["convert", frames_file(folder / "données.extxyz"), folder / "été"],
        [
            "report",
            out,
            "--data",
            folder / "données.extxyz",
            "-o",
            folder / "ü.html",
            "--json",
            folder / "ü.json",
        ],
        ["bench", out, "--steps", "1", "--structure", folder / "données.extxyz", "--json", folder / "b.json"],
    ):
        done = in_plain_locale(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
        if arguments[-1] == "--json":
            metadata = json.loads(done.stdout)
            assert (metadata["note"], metadata["license"]) == ("Größe µ", "©")
            assert metadata["name"] == "模型"
            assert metadata["source"]["file"] == "modèle.pt"


def test_errors_name_the_path_in_the_plain_locale(tmp_path):
    done = in_plain_locale("inspect", tmp_path / "modèle.moe.pt")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(b"error: ")
    assert b"no such file" in done.stderr


def test_text_survives_the_way_to_utf8_and_back():
    hidden = "mod\udcc3\udca8le"  # what Python makes of UTF-8 in the plain locale
    assert display_text(hidden) == "modèle"
    assert from_text("modèle") == "modèle"


def test_the_default_model_is_a_package():
    assert describe(default_model_path()) == "a moecalc package (.moe.pt)"
