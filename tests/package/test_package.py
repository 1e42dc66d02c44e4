"""Packaging: pruning, verification, the file and its refusals, and the evaluator on what came out."""

import json
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from alterations import MODEL, edit_json, pack, records_of
from helpers import DATA, evaluate_atoms

from moecalc import MoECalculator, testing
from moecalc._jit import jit_load, jit_script
from moecalc.benchmark import costs
from moecalc.errors import ElementError, MoecalcError, PackageError
from moecalc.models import default_model_path
from moecalc.package import (
    archive,
    check_archive,
    package_checkpoint,
    read_architecture,
    read_metadata,
    read_reference,
    read_verification,
    upgrade_package,
    verify_package,
)
from moecalc.package import build as build_module
from moecalc.package.architecture import describe, index_tensors
from moecalc.package.importers import build_model, load_checkpoint, save_checkpoint
from moecalc.package.lower import lower, make_contiguous, with_finished_tables
from moecalc.package.metadata import Check, VerificationReport
from moecalc.package.reference import CUTOFF_GAP
from moecalc.package.verify import _strain_step
from moecalc.package.write import write_bare

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


@pytest.mark.filterwarnings("ignore:.*evaluated by the plain backend")  # sequential updates have no kernels
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
        with zipfile.ZipFile(path) as package:  # metadata and verification have the time in them
            names = [
                n for n in package.namelist() if not n.endswith(("/metadata.json", "/verification.json"))
            ]
            contents.append({n: package.read(n) for n in names})
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


def test_newer_format_is_refused(mixture, tmp_path):
    path = tmp_path / "x.moe.pt"
    archive.write_archive(path, jit_load(mixture[0]), {"format_version": "3", "metadata.json": "{}"})
    with pytest.raises(PackageError, match=r"package format 3 is newer than this moecalc .* upgrade moecalc"):
        check_archive(path)
    with pytest.raises(PackageError, match="package format 3 is newer"):
        MoECalculator(path)


# --- what the runtime reads --------------------------------------------------------------------------

OPTIONS = {
    "experts": {"n_routed": 4},
    "merged": {"n_routed": 4, "kind": "linear"},
    "gates": {"n_routed": 4, "routing": "configuration", "gate": "softmax_topk", "shared_routers": True},
    "no angles": {"update_angle": False},
    "compressed by products": {"a_compress_use_split": False},
    "static": {
        "use_dynamic_sel": False, "smooth_edge_update": False, "edge_init_use_dist": False, "env_protection": 0.1,
    },
    "increments": {"update_style": "res_incr", "activation_function": "softplus", "concat_output_tebd": True},
    "charge, spin and frame parameters": {
        "add_chg_spin_ebd": True, "n_routed": 4, "route_on_charge_spin": True,
        "fitting": {"numb_fparam": 3, "dim_case_embd": 2},
    },
    "a fitting net of time steps": {
        "fitting": {"dim_case_embd": 2, "resnet_dt": True}, "neuron": (8, 16, 16),
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=OPTIONS)
def written(request, tmp_path_factory):
    """A lowered model, and the package of it."""
    path = tmp_path_factory.mktemp("written") / "x.moe.pt"
    config = testing.random_config(ELEMENTS, **OPTIONS[request.param])
    low, _ = lower(testing.random_potential(config, dtype="float32"), config, ELEMENTS[1:])
    write_bare(path, low)
    return low, path


def test_every_tensor_is_found_by_its_name(written):
    low, path = written
    tensors = archive.read_tensors(path)
    assert set(tensors) == set(low.state_dict())
    for name, value in low.state_dict().items():
        assert archive.read_tensor(path, tensors[name]).dtype == value.numpy().dtype
        np.testing.assert_array_equal(archive.read_tensor(path, tensors[name]), value.numpy(), err_msg=name)


def test_the_architecture_is_that_of_the_eager_and_of_the_scripted_model(written):
    low, path = written
    assert read_architecture(path) == describe(low) == describe(torch.jit.load(path))


def test_the_architecture_says_what_the_model_is(written):
    low, path = written
    said = read_architecture(path)
    assert said.elements == ELEMENTS[1:]
    assert (said.cutoff, said.angle_cutoff, said.routing_level) == (
        low.cutoff,
        low.angle_cutoff,
        low.routing_level,
    )
    assert said.dtype == said.readout.dtype == "float32"
    for layer, module in zip(said.layers, low.layers, strict=True):
        for name in (
            "n_head",
            "axis",
            "edge_norm",
            "angle_norm",
            "keep_far_edges",
            "with_angles",
            "vc_dim",
            "ec_dim",
        ):
            assert getattr(layer, name) == getattr(module, name)
        for name, position in layer.positions.items():
            assert position.experts == getattr(module, name).matrix.size(0)
            assert not position.routed or position.router in layer.routers


def test_the_same_model_gives_the_same_bytes(written, tmp_path):
    low, path = written
    write_bare(tmp_path / "x.moe.pt", low)
    assert (tmp_path / "x.moe.pt").read_bytes() == path.read_bytes()


def test_the_digest_is_that_of_the_records_that_a_model_is_computed_from(written):
    with zipfile.ZipFile(written[1]) as package:
        entries = {name: package.getinfo(name) for name in package.namelist()}
        lines = [
            f"{name.removeprefix('model/')} {entry.file_size} {entry.CRC:08x}\n"
            for name, entry in sorted(entries.items())
            if "/extra/" not in name or name.endswith(("/architecture.json", "/tensors.json"))
        ]
        digest = json.loads(package.read("model/extra/metadata.json"))["digest"]
    assert digest == f"{zlib.crc32(''.join(lines).encode()):08x}"


def test_tensors_that_are_views_get_records_of_their_own(tmp_path):
    config = testing.random_config(ELEMENTS)
    low, _ = lower(testing.random_potential(config), config)
    low.embedding.table.table = torch.randn(8, 4, dtype=torch.float64).t()
    low.geometry.mean = torch.randn(8, 4, dtype=torch.float64)[2:6]
    scripted = jit_script(low)
    with pytest.raises(PackageError, match=r"expected tensor embedding\.table\.table in row-major order"):
        archive.write_archive(tmp_path / "x.moe.pt", scripted, {})
    make_contiguous(scripted)
    archive.write_archive(tmp_path / "x.moe.pt", scripted, {})
    tensors = archive.read_tensors(tmp_path / "x.moe.pt")
    for name in ("embedding.table.table", "geometry.mean"):
        assert tensors[name].offset == 0
        found = archive.read_tensor(tmp_path / "x.moe.pt", tensors[name])
        np.testing.assert_array_equal(found, low.state_dict()[name].numpy())


def test_a_tensor_within_a_larger_record_is_found(tmp_path):
    config = testing.random_config(ELEMENTS)
    low, _ = lower(testing.random_potential(config), config)
    low.geometry.mean = torch.randn(8, 4, dtype=torch.float64)[2:6]
    archive.write_archive(tmp_path / "x.moe.pt", jit_script(low), {})
    tensor = archive.read_tensors(tmp_path / "x.moe.pt")["geometry.mean"]
    assert tensor.offset == 2 * 4 * 8
    np.testing.assert_array_equal(
        archive.read_tensor(tmp_path / "x.moe.pt", tensor), low.geometry.mean.numpy()
    )


def test_models_that_are_not_lowered_are_told_apart(tmp_path):
    full = testing.random_potential(testing.random_config(ELEMENTS, n_routed=2))
    for module in (full, torch.nn.Identity()):
        with pytest.raises(PackageError, match="expected a lowered MoEPotential to describe"):
            archive.write_archive(tmp_path / "x.moe.pt", jit_script(module), {})
    finished = with_finished_tables(full)
    archive.write_archive(tmp_path / "x.moe.pt", jit_script(finished), {})
    table = archive.read_tensors(tmp_path / "x.moe.pt")["embedding.table.table"]
    found = archive.read_tensor(tmp_path / "x.moe.pt", table)
    np.testing.assert_array_equal(found, full.embedding.table().detach().numpy())


@pytest.mark.parametrize(
    "code", [b"cposix\nsystem\n.", b"ctorch\nHalfStorage\n.", b"]K\x01aQ.", b"garbage", b""]
)
def test_pickles_of_other_things_are_not_indexed(code):
    with pytest.raises(PackageError, match=r"expected data\.pkl of a scripted model"):
        index_tensors(code, {})


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it fails
from moecalc import package, testing
from moecalc.benchmark import costs
path = sys.argv[1]
frames = package.read_reference(path)
assert package.read_metadata(path).elements and frames and package.read_verification(path).checks
assert package.read_architecture(path).n_dim == 8
assert costs.read_architecture(path).fitting[-1] == 1
assert len(testing.brute_force_edges(testing.molecule(), 3.0)[0])
"""


def test_packages_are_read_without_torch(mixture):
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH, str(mixture[0])], check=True)


# --- older packages ----------------------------------------------------------------------------------

OLD = DATA / "packages" / "format1.moe.pt"  # written at commit 6617a43, before there were conditions


def test_older_packages_are_to_be_upgraded():
    remedy = (
        r"format1\.moe\.pt: package format 1 has no architecture record: "
        rf"moecalc upgrade \S*{OLD.name} -o NEW\.moe\.pt"
    )
    for read in (check_archive, read_metadata, read_architecture, costs.read_architecture):
        with pytest.raises(PackageError, match=remedy):
            read(OLD)


def test_an_upgraded_package_is_the_same_model(tmp_path):
    new = tmp_path / "new.moe.pt"
    steps = []
    report = upgrade_package(OLD, new, steps.append)
    assert steps == ["reading the package", "writing the package", "reference frames"]
    assert report.size_bytes == new.stat().st_size
    assert report.metadata == read_metadata(new)
    old = json.loads(archive.read_record(OLD, "metadata.json"))
    said = json.loads(archive.read_record(new, "metadata.json"))
    assert said | {"format_version": 1, "digest": ""} == old | {"digest": ""}
    assert archive.read_record(new, "reference.json") == archive.read_record(OLD, "reference.json")
    before, after = jit_load(OLD).state_dict(), jit_load(new).state_dict()
    assert before.keys() == after.keys() == archive.read_tensors(new).keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    atoms = testing.molecule(["H", "O"], distance=1.5)
    expected = evaluate_atoms(jit_load(OLD).double(), atoms)
    atoms.calc = MoECalculator(new, device="cpu", dtype="float64")
    assert np.abs(atoms.get_forces() - expected.forces.numpy()).max() < 1e-6


def test_upgrades_of_a_package_with_conditions_and_of_this_format(tmp_path):
    path, stripped = tmp_path / "x.moe.pt", tmp_path / "old.moe.pt"
    options = {"add_chg_spin_ebd": True, "n_routed": 3, "fitting": {"numb_fparam": 2}}
    testing.write_random_package(path, testing.random_config(ELEMENTS, **options), "float64")
    with pytest.raises(PackageError, match=r"expected a package of an older format, got format 2: use it"):
        upgrade_package(path, tmp_path / "new.moe.pt")
    records = {n: c for n, c in records_of(path).items() if n not in MODEL}
    stripped.write_bytes(pack(records))
    with pytest.raises(PackageError, match="package format 2 has no architecture record: moecalc upgrade"):
        read_metadata(stripped)
    upgrade_package(stripped, tmp_path / "new.moe.pt")
    assert read_architecture(tmp_path / "new.moe.pt") == read_architecture(path)
    assert archive.read_tensors(tmp_path / "new.moe.pt") == archive.read_tensors(path)


def test_an_upgrade_that_gives_other_numbers_writes_nothing(tmp_path):
    def shift(frames):
        frames[0]["energy"] += 1.0
        return frames

    altered = tmp_path / "old.moe.pt"
    altered.write_bytes(edit_json(OLD, "reference.json", shift))
    with pytest.raises(PackageError, match=r"new\.moe\.pt was not written: ") as error:
        upgrade_package(altered, tmp_path / "new.moe.pt")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [altered]


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("new.pt", r"expected a file name that ends in \.moe\.pt"),
        ("gone/new.moe.pt", "no such folder"),
        ("old.moe.pt", "is the package .* itself, which would be lost"),
    ],
)
def test_places_that_no_upgrade_can_go_to_are_refused(tmp_path, new, message):
    old = tmp_path / "old.moe.pt"
    old.write_bytes(OLD.read_bytes())
    with pytest.raises(MoecalcError, match=message):
        upgrade_package(old, tmp_path / new)
    assert old.read_bytes() == OLD.read_bytes()


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
