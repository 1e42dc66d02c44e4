"""Packaging: pruning, verification, the file and its refusals, and the evaluator on what came out."""

import json
import zipfile

import numpy as np
import pytest
import torch
from helpers import DATA, evaluate_atoms

from moecalc import MoECalculator, testing
from moecalc._jit import jit_load
from moecalc.errors import ElementError, PackageError
from moecalc.models import default_model_path
from moecalc.package import build as build_module
from moecalc.package import (
    check_archive,
    package_checkpoint,
    read_metadata,
    read_reference,
    read_verification,
    verify_package,
)
from moecalc.package.importers import build_model, load_checkpoint, save_checkpoint
from moecalc.package.metadata import Check, VerificationReport
from moecalc.package.reference import CUTOFF_GAP
from moecalc.package.verify import _strain_step

ELEMENTS = ["Nb", "Mo", "Ta", "W"]
ORACLE = DATA / "oracle" / "models"


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Package of a random potential; returns the path and the eager float64 model."""
    folder = tmp_path_factory.mktemp("packages")

    def run(name, dtype=None, **kwargs):
        config = testing.random_config(ELEMENTS, **kwargs)
        model = testing.random_potential(config)
        save_checkpoint(folder / f"{name}.pt", model, config)
        path = folder / f"{name}.moe.pt"
        package_checkpoint(folder / f"{name}.pt", path, dtype=dtype)
        return path, model

    return run


@pytest.fixture(scope="module")
def mixture(make):
    """A package with experts everywhere."""
    return make("mixture", n_routed=4)


KINDS = {
    "mole": {"n_routed": 4, "kind": "linear"},
    "paper gate": {"n_routed": 4, "gate": "softmax_topk"},
    "configuration": {"n_routed": 4, "routing": "configuration", "kind": "linear"},
    "sequential, no compression": {"n_routed": 3, "sequential_update": True, "a_compress_rate": 0},
    "no angles": {"n_routed": 3, "update_angle": False},
    "one layer": {"n_routed": 3, "nlayers": 1},
}


@pytest.mark.filterwarnings("ignore:.*evaluated through TorchScript")  # sequential updates
@pytest.mark.parametrize("kind", KINDS)
def test_calculator_equals_the_eager_model(make, kind):
    path, model = make(kind.replace(" ", "_").replace(",", ""), **KINDS[kind])
    calc = MoECalculator(path, device="cpu")
    for atoms in (testing.bulk_alloy(ELEMENTS), testing.slab(ELEMENTS), testing.molecule(ELEMENTS)):
        out = evaluate_atoms(model, atoms)
        atoms.calc = calc
        assert abs(atoms.get_potential_energy() - float(out.energy)) < 1e-10
        assert np.abs(atoms.get_forces() - out.forces.numpy()).max() < 1e-10


def test_batch_at_configuration_level_equals_single_structures(make):
    path, _ = make("configuration_mlp", n_routed=4, routing="configuration")
    calc = MoECalculator(path, device="cpu")
    structures = [testing.molecule(["Nb", "W"]), testing.bulk_alloy(["Mo"]), testing.molecule(ELEMENTS)]
    for atoms, batched in zip(structures, calc.calculate_batch(structures), strict=True):
        atoms.calc = calc
        assert abs(atoms.get_potential_energy() - batched["energy"]) < 1e-10
        assert np.abs(atoms.get_forces() - batched["forces"]).max() < 1e-10


def test_nonlinear_experts_at_configuration_level_are_remarked_on(make):
    path, _ = make("configuration_remark", n_routed=2, routing="configuration")
    assert any("numerically unstable" in remark for remark in read_metadata(path).remarks)


def test_merged_experts_leave_one_matrix_per_element(make):
    path, _ = make("merged", n_routed=6, kind="linear")
    layer = next(iter(jit_load(path).layers.children()))
    assert layer.node_self_mlp.matrix.shape == (len(ELEMENTS), 8, 8)


def test_pruned_default_model_gives_the_same_answers_and_is_smaller(tmp_path):
    source = DATA.parent.parent / "examples" / "data" / "metals10.pt"
    report = package_checkpoint(source, tmp_path / "refractory.moe.pt", elements=ELEMENTS)
    atoms = testing.bulk_alloy(ELEMENTS)
    full, pruned = (
        MoECalculator(p, dtype="float64", device="cpu")
        for p in (default_model_path(), tmp_path / "refractory.moe.pt")
    )
    energies, forces = [], []
    for calc in (full, pruned):
        atoms.calc = calc
        energies.append(atoms.get_potential_energy())
        forces.append(atoms.get_forces())
    assert abs(energies[1] - energies[0]) < testing.SAME_MODEL * len(atoms)
    assert np.abs(forces[1] - forces[0]).max() < testing.SAME_MODEL
    assert report.size_bytes < default_model_path().stat().st_size
    assert report.metadata.parameters.total < report.metadata.parameters.checkpoint
    assert report.pruned["experts_after"] < report.pruned["experts_before"]
    assert report.pruned["elements"] == ["Li", "N", "Si", "Ni", "Cu", "Ge"]


def test_elements_keep_the_order_of_the_request(tmp_path):
    package_checkpoint(ORACLE / "E1_moe_all.pt", tmp_path / "x.moe.pt", elements=["H", "O"])
    assert read_metadata(tmp_path / "x.moe.pt").elements == ["H", "O"]


def test_default_dtype_is_the_checkpoints(tmp_path):
    package_checkpoint(ORACLE / "G_float32.pt", tmp_path / "x.moe.pt", elements=["O"])
    assert read_metadata(tmp_path / "x.moe.pt").dtype == "float32"


def test_float32_package_agrees_with_float64_model(make):
    path, model = make("single", dtype="float32", n_routed=3)
    atoms = testing.bulk_alloy(ELEMENTS)
    out = evaluate_atoms(model, atoms)
    atoms.calc = MoECalculator(path, device="cpu")
    assert atoms.calc.dtype == "float32"
    scale = float(out.forces.abs().max())
    assert np.abs(atoms.get_forces() - out.forces.numpy()).max() < 5e-6 * max(1.0, scale)


def test_metadata_say_what_was_packaged(mixture):
    metadata = read_metadata(mixture[0])
    assert metadata.elements == ELEMENTS
    assert (metadata.cutoff, metadata.angle_cutoff, metadata.n_layers) == (4.5, 3.5, 3)
    assert metadata.source.layout == "moecalc"
    assert len(metadata.source.sha256) == 64
    assert metadata.units == {"energy": "eV", "length": "Angstrom"}
    assert 0 < metadata.parameters.active < metadata.parameters.total
    routing = metadata.routing.layers[0]["node_self_mlp"]
    assert (routing.n_routed, routing.n_shared, routing.top_k) == (4, 1, 2)
    assert [len(ids) for ids in routing.experts] == [3] * len(ELEMENTS)


def test_routing_of_the_metadata_is_the_models(mixture):
    path, model = mixture
    ids, weights = model.layers[1].routers["edge_self_linear"](model.embedding.table())
    described = read_metadata(path).routing.layers[1]["edge_self_linear"]
    assert described.experts == ids.tolist()
    np.testing.assert_allclose(described.weights, weights.detach().numpy(), atol=1e-12)


def test_verification_is_stored_and_passes_again(mixture):
    stored = read_verification(mixture[0])
    assert stored.passed
    assert {c.name.split(" (")[0] for c in stored.checks} >= {
        "pruned vs full model",
        "scripted vs reference",
        "finite-difference forces",
        "finite-difference virial",
        "rotation",
        "translation",
        "permutation",
    }
    assert verify_package(mixture[0]).passed


def test_reference_frames_hold_every_element(mixture):
    assert {s for frame in read_reference(mixture[0]) for s in frame.symbols} == set(ELEMENTS)


def test_wrong_reference_fails_the_verification(mixture, monkeypatch):
    from moecalc.package import verify

    frames = read_reference(mixture[0])
    frames[2].forces[0][0] += 1e-6
    monkeypatch.setattr(verify, "read_reference", lambda _: frames)
    report = verify_package(mixture[0])
    assert [c.name for c in report.failures()] == [
        "scripted vs reference (float64)",
        "evaluator float64 on cpu",
    ]


def test_failed_verification_writes_nothing(tmp_path, monkeypatch):
    failed = VerificationReport(checks=[Check(name="rotation", value=1.0, tolerance=1e-10)])
    monkeypatch.setattr(build_module, "verify_package", lambda *_: failed)
    with pytest.raises(
        PackageError, match=r"was not written: verification failed \(rotation: 1.0e\+00 > 1.0e-10\)"
    ):
        package_checkpoint(ORACLE / "A_dyn.pt", tmp_path / "x.moe.pt")
    assert list(tmp_path.iterdir()) == []


def test_not_a_number_fails_a_check():
    assert not Check(name="x", value=float("nan"), tolerance=1.0).passed


def test_packages_are_reproducible(tmp_path):
    paths = [tmp_path / f"{k}" / "x.moe.pt" for k in range(2)]
    for path in paths:
        path.parent.mkdir()
        package_checkpoint(ORACLE / "A_dyn.pt", path)
    contents = []
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            contents.append({n: archive.read(n) for n in archive.namelist() if not n.endswith(".json")})
    assert contents[0] == contents[1]


def test_package_holds_no_path_of_the_machine(mixture):
    body = mixture[0].read_bytes()
    assert str(DATA.parent.parent).encode() not in body
    assert str(mixture[0].parent).encode() not in body


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"elements": ["O", "Xx"]},
            ElementError,
            "element 'Xx' is not in this model, expected some of: O, H",
        ),
        ({"elements": ["O", "O"]}, ElementError, "expected distinct symbols"),
        ({"elements": []}, ElementError, "at least one"),
        ({"dtype": "float16"}, PackageError, "dtype 'float16', expected float32 or float64"),
    ],
)
def test_impossible_requests_are_refused(tmp_path, kwargs, error, message):
    with pytest.raises(error, match=message):
        package_checkpoint(ORACLE / "A_dyn.pt", tmp_path / "x.moe.pt", **kwargs)


def test_other_file_names_are_refused(tmp_path):
    with pytest.raises(PackageError, match=r"expected a file name that ends in \.moe\.pt"):
        package_checkpoint(ORACLE / "A_dyn.pt", tmp_path / "x.pt")


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(PackageError, match="no such folder"):
        package_checkpoint(ORACLE / "A_dyn.pt", tmp_path / "gone" / "x.moe.pt")


def test_type_map_entries_that_are_no_elements_are_refused(tmp_path):
    data = torch.load(ORACLE / "A_dyn.pt", weights_only=True)
    data["model"]["_extra_state"]["model_params"]["type_map"] = ["OW", "H"]
    torch.save(data, tmp_path / "x.pt")
    with pytest.raises(ElementError, match=r"type_map entry 'OW' is not an element symbol.*--elements H"):
        package_checkpoint(tmp_path / "x.pt", tmp_path / "x.moe.pt")


def damage(kind, body):
    if kind == "truncated":
        return body[: len(body) // 2]
    if kind == "bit-flipped":
        return body[:5000] + bytes([body[5000] ^ 4]) + body[5001:]
    if kind == "stamp-flipped":
        at = body.rindex(b"crc32=") + 7
        return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
    return b"#!/bin/sh\necho hello\n"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "incomplete file .*truncated copy.*copy it again"),
        ("bit-flipped", "damaged file .checksum .* copy it again"),
        ("stamp-flipped", "damaged file .* copy it again"),
        (
            "foreign",
            r"not a moecalc package but a text file that begins with .*; expected a file \*\.moe\.pt",
        ),
    ],
)
def test_damaged_packages_are_told_apart(mixture, tmp_path, kind, message):
    path = tmp_path / "x.moe.pt"
    path.write_bytes(damage(kind, mixture[0].read_bytes()))
    with pytest.raises(PackageError, match=rf"x\.moe\.pt: {message}") as info:
        check_archive(path)
    assert "\n" not in str(info.value)
    with pytest.raises(PackageError, match=rf"x\.moe\.pt: {message}"):
        MoECalculator(path)


def test_every_flipped_byte_is_found(mixture, tmp_path):
    body = mixture[0].read_bytes()
    path = tmp_path / "x.moe.pt"
    for at in np.random.default_rng(0).integers(0, len(body), 60):
        path.write_bytes(body[:at] + bytes([body[at] ^ 16]) + body[at + 1 :])
        with pytest.raises(PackageError):
            check_archive(path)


def test_plain_checkpoint_is_no_package():
    with pytest.raises(PackageError, match=r"A_dyn\.pt: not a moecalc package"):
        check_archive(ORACLE / "A_dyn.pt")


def test_newer_format_is_refused(mixture, tmp_path, monkeypatch):
    from moecalc.package import archive

    path = tmp_path / "x.moe.pt"
    records = {"format_version": "3", "metadata.json": json.dumps({})}
    archive.write_archive(path, jit_load(mixture[0]), records)
    with pytest.raises(PackageError, match=r"package format 3 is newer than this moecalc .* upgrade moecalc"):
        check_archive(path)
    with pytest.raises(PackageError, match="package format 3 is newer"):
        MoECalculator(path)


def test_untrained_elements_are_marked_and_refused(tmp_path):
    package_checkpoint(ORACLE / "E1_moe_all.pt", tmp_path / "x.moe.pt")
    assert read_metadata(tmp_path / "x.moe.pt").trained_elements == ["O", "H"]
    atoms = testing.molecule(["O", "Na"])
    atoms.calc = MoECalculator(tmp_path / "x.moe.pt", device="cpu")
    with pytest.raises(ElementError, match=r"Na.*allow_untrained=True"):
        atoms.get_potential_energy()


def test_shipped_package_is_the_example_checkpoint():
    metadata = read_metadata(default_model_path())
    source = DATA.parent.parent / "examples" / "data" / "metals10.pt"
    imported = load_checkpoint(source)
    assert metadata.elements == imported.config.type_map
    atoms = testing.bulk_alloy(ELEMENTS)
    out = evaluate_atoms(build_model(imported, torch.float64), atoms)
    atoms.calc = MoECalculator(dtype="float64", device="cpu")
    # routing weights are rounded to float32 in the package
    assert np.abs(atoms.get_forces() - out.forces.numpy()).max() < 1e-6


@pytest.mark.parametrize("cutoff", [2.0, 4.5, 6.0, 9.0])
def test_strains_of_the_verification_take_no_pair_across_a_cutoff(cutoff):
    assert 2.0 * _strain_step(cutoff) * cutoff < CUTOFF_GAP
