"""Frozen models of DeePMD-kit: the same numbers as DeePMD-kit's, and no code of the file runs."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from helpers import DATA, evaluate_atoms, frames

from moecalc import MoECalculator, testing
from moecalc.errors import CheckpointError
from moecalc.package import package_checkpoint
from moecalc.package.importers import build_model, load_checkpoint

FROZEN = DATA / "frozen" / "dpa3.pth"


def test_a_frozen_model_gives_the_numbers_of_deepmd_kit(tmp_path):
    imported = load_checkpoint(FROZEN)
    model = build_model(imported, torch.float64)
    assert imported.layout == "dpa3"
    assert imported.remarks == ["read from a frozen model (.pth)"]
    for frame in frames("frozen"):
        out = evaluate_atoms(model, frame.atoms)
        assert abs(float(out.energy) - frame.energy) < testing.ORACLE_ENERGY
        assert np.abs(out.forces.numpy() - frame.forces).max() < testing.ORACLE_FORCES
        assert np.abs(out.virial[0].numpy() - frame.virial).max() < testing.ORACLE_VIRIAL


def test_a_frozen_model_is_packaged(tmp_path):
    report = package_checkpoint(FROZEN, tmp_path / "frozen.moe.pt")
    assert "read from a frozen model (.pth)" in report.metadata.remarks
    assert report.metadata.source.file == "dpa3.pth"
    frame = frames("frozen")[0]
    frame.atoms.calc = MoECalculator(tmp_path / "frozen.moe.pt", device="cpu", allow_untrained=True)
    assert frame.atoms.get_potential_energy() == pytest.approx(frame.energy, abs=1e-8)


def test_torchscript_is_not_asked_to_load_it(monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load was called"))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    load_checkpoint(FROZEN)


def test_head_of_a_frozen_model_is_refused():
    with pytest.raises(CheckpointError, match=r"--head 'x' was given, but this checkpoint is single-task"):
        load_checkpoint(FROZEN, "x")


def rewritten(target, changes):
    """A copy of the frozen model with other records; None leaves one out."""
    with zipfile.ZipFile(FROZEN) as source, zipfile.ZipFile(target, "w") as copy:
        for info in source.infolist():
            inner = info.filename.partition("/")[2]
            content = changes.get(inner, source.read(info))
            if content is not None:
                copy.writestr(info.filename, content, compress_type=info.compress_type)
    return target


class _Harmful:
    def __reduce__(self):
        return print, ("code of the file ran",)


def test_a_frozen_model_with_code_in_its_pickle_is_refused(tmp_path, capsys):
    path = rewritten(tmp_path / "x.pth", {"data.pkl": pickle.dumps(_Harmful(), protocol=2)})
    with pytest.raises(CheckpointError, match=r"x\.pth: frozen model holds __builtin__\.print"):
        load_checkpoint(path)
    assert "code of the file ran" not in capsys.readouterr().out


def test_a_frozen_model_without_options_is_refused(tmp_path):
    with zipfile.ZipFile(FROZEN) as archive:
        name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        content = archive.read(name).replace(b"model_def_script", b"model_def_scrapt")
    path = rewritten(tmp_path / "x.pth", {"data.pkl": content})
    with pytest.raises(CheckpointError, match="EnergyModel without model_def_script, expected a DPA3 model"):
        load_checkpoint(path)


@pytest.mark.parametrize("record", ["data.pkl", "data/3"])
def test_a_frozen_model_without_one_of_its_records_is_refused(tmp_path, record):
    path = rewritten(tmp_path / "x.pth", {record: None})
    with pytest.raises(CheckpointError, match=rf"x\.pth: .*{record}"):
        load_checkpoint(path)


def test_a_frozen_model_with_a_data_modifier_is_refused(tmp_path):
    path = rewritten(tmp_path / "x.pth", {"extra/data_modifier.pth": b"something"})
    with pytest.raises(CheckpointError, match="data modifier, which adds energies"):
        load_checkpoint(path)


def test_another_torchscript_file_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"a TorchScript archive of Linear without model_def_script"):
        load_checkpoint(tmp_path / "x.pth")


def test_damaged_frozen_models_are_refused_in_one_line_or_read(tmp_path):
    content = bytearray(FROZEN.read_bytes())
    with zipfile.ZipFile(FROZEN) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("/data.pkl"))
        pickled = bytearray(archive.read(info))
    seed = 20260
    random = np.random.default_rng(seed)
    print("seed", seed)  # noqa: T201 - shown where it fails
    path = tmp_path / "damaged.pth"
    messages = []
    for i in range(60):
        if i % 3:  # the pickle, with a right checksum
            damaged = bytearray(pickled)
            for at in random.integers(len(damaged), size=3):
                damaged[at] = random.integers(256)
            rewritten(path, {"data.pkl": bytes(damaged)})
        elif i % 2:
            path.write_bytes(content[: random.integers(1, len(content))])
        else:
            damaged = bytearray(content)
            damaged[random.integers(len(damaged))] ^= 255
            path.write_bytes(damaged)
        try:
            build_model(load_checkpoint(path))
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 20
    assert all(str(path) in message and len(message.splitlines()) == 1 for message in messages)


def test_a_package_given_as_checkpoint_is_called_a_package(tmp_path):
    from moecalc.models import default_model_path

    copy = tmp_path / "renamed.pth"
    copy.write_bytes(default_model_path().read_bytes())
    with pytest.raises(CheckpointError, match=r"renamed\.pth: a package of moecalc already"):
        load_checkpoint(copy)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("frozen.pb", "TensorFlow backend"),
        ("model.hlo", "JAX backend"),
        ("model.pd", "Paddle backend"),
        ("model.dp", "reference backend"),
    ],
)
def test_models_of_other_backends_are_called_by_name(tmp_path, name, what):
    (tmp_path / name).write_bytes(b"\x0a\x05model")
    with pytest.raises(CheckpointError, match=rf"{what}, expected the \.pt checkpoint of a training"):
        load_checkpoint(tmp_path / name)


def test_an_aotinductor_model_is_called_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr("model/data/aotinductor/model/a.cpp", "")
    with pytest.raises(CheckpointError, match=r"an AOTInductor model of DeePMD-kit, expected the \.pt"):
        load_checkpoint(tmp_path / "x.pt2")


def test_a_checkpoint_that_was_zipped_again_is_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(10**6)}}, buffer)
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name), compress_type=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 10**5
    with pytest.raises(
        CheckpointError, match=r"bomb\.pt: record .* is compressed .* do not zip checkpoints again"
    ):
        load_checkpoint(tmp_path / "bomb.pt")


def test_records_that_are_there_twice_are_refused(tmp_path):
    rewritten(tmp_path / "x.pth", {})
    with (
        zipfile.ZipFile(tmp_path / "x.pth", "a") as archive,
        pytest.warns(UserWarning, match="Duplicate name"),
    ):
        archive.writestr(next(n for n in archive.namelist() if n.endswith("/data.pkl")), b"other")
    with pytest.raises(CheckpointError, match=r"data\.pkl' is in the archive twice, expected once"):
        load_checkpoint(tmp_path / "x.pth")
