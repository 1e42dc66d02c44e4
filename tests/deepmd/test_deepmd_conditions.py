"""Charge, spin and frame parameters in DeePMD-kit: the descriptor's own, training, and what comes after."""

import json
import shutil

import numpy as np
import pytest
import torch
from training_models import (
    MOE,
    TYPE_MAP,
    build,
    descriptor,
    evaluate,
    load,
    random_frames,
    save,
    train,
    training_input,
)

from moecalc import MoECalculator
from moecalc.conditions import Conditions
from moecalc.errors import CheckpointError
from moecalc.package import package_checkpoint
from moecalc.package.importers import build_model, load_checkpoint
from moecalc.package.reference import evaluate_structure
from moecalc.training.upcycle import upcycle

CHARGE_SPIN = {"add_chg_spin_ebd": True, "default_chg_spin": [0, 1]}
PAIRS = [(0, 1), (1, 2), (-2, 3)]
FPARAM = {"numb_fparam": 2, "default_fparam": [0.1, 0.2]}


def close(found, expected, atol=1e-10):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


def plain(path, atoms, charge_spin=None, fparam=None):
    """Answer of the reference model of a checkpoint."""
    model = build_model(load_checkpoint(path), torch.float64)
    given = Conditions(*(charge_spin or (None, None)), fparam)
    symbols = atoms.get_chemical_symbols()
    out = evaluate_structure(model, symbols, atoms.positions, atoms.cell.array, tuple(atoms.pbc), given)
    return float(out.energy), out.forces.numpy(), out.virial[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"concat_output_tebd": True, "use_tebd_bias": True},
        {"use_econf_tebd": True, "activation_function": "tanh"},
        {"repflow": {"n_dim": 100, "e_dim": 4, "a_dim": 4}},
        {"repflow": {"n_dim": 200, "e_dim": 4, "a_dim": 4}},
    ],
    ids=["plain", "tebd", "econf", "residual of the spin table", "residual of both tables"],
)
def test_charge_and_spin_without_experts_equal_deepmd_kit_s_dpa3(tmp_path, options):
    from moecalc.nn import MoEConfig
    from moecalc.training.upcycle import _descriptor_state

    dense, params = build(descriptor("dpa3", **CHARGE_SPIN, **options))
    path = save(dense, params, tmp_path / "dense.pt")
    model, _ = build(descriptor(**CHARGE_SPIN, **options))
    state = _descriptor_state(load_checkpoint(path), MoEConfig(), 0.0, torch.Generator())
    model.atomic_model.descriptor.load_state_dict(state)
    model.atomic_model.fitting_net.load_state_dict(dense.atomic_model.fitting_net.state_dict())
    model.atomic_model.out_bias.copy_(dense.atomic_model.out_bias)
    atoms = random_frames(1)[0]
    close(evaluate(model, atoms), evaluate(dense, atoms))
    for pair in PAIRS:
        expected = evaluate(dense, atoms, charge_spin=pair)
        close(evaluate(model, atoms, charge_spin=pair), expected)
        close(plain(path, atoms, pair), expected)


@pytest.mark.parametrize(
    "neuron", [(8, 8), (16, 8), (32, 8)], ids=["plain", "skip path", "doubling skip path"]
)
def test_frame_parameters_of_deepmd_kit_s_dpa3_are_read_as_they_are(tmp_path, neuron):
    # n_dim 12 and two frame parameters and a case embedding of two: first layers of 16 and 32 have a skip path
    fitting = FPARAM | {"dim_case_embd": 2}
    dense, params = build(descriptor("dpa3"), neuron=neuron, fitting=fitting)
    net = dense.atomic_model.fitting_net
    net.set_case_embd(1)
    net.fparam_avg.copy_(torch.tensor([0.4, -1.0]))
    net.fparam_inv_std.copy_(torch.tensor([2.0, 0.3]))
    path = save(dense, params, tmp_path / "dense.pt")
    atoms = random_frames(1)[0]
    close(plain(path, atoms, None, (0.1, 0.2)), evaluate(dense, atoms))
    expected = evaluate(dense, atoms, fparam=(0.7, -3.0))
    close(plain(path, atoms, None, (0.7, -3.0)), expected)
    package_checkpoint(path, tmp_path / "model.moe.pt", fparam=[0.7, -3.0])
    atoms.calc = MoECalculator(tmp_path / "model.moe.pt", device="cpu")
    assert atoms.get_potential_energy() == pytest.approx(expected[0], abs=1e-8)
    np.testing.assert_allclose(atoms.get_forces(), expected[1], atol=1e-8)


@pytest.mark.parametrize("routing", ["element", "configuration"])
def test_frames_of_a_batch_have_charges_of_their_own(routing):
    section = descriptor(moe=MOE | {"routing": routing}, concat_output_tebd=True, **CHARGE_SPIN)
    model, _ = build(section)
    frames = random_frames(3, sizes=(6,))
    types = torch.tensor([[TYPE_MAP.index(s) for s in atoms.symbols] for atoms in frames])
    coord = torch.tensor(np.array([atoms.positions.ravel() for atoms in frames]))
    box = torch.tensor(np.array([atoms.cell.array.ravel() for atoms in frames]))
    energies = model(coord, types, box, charge_spin=torch.tensor(PAIRS, dtype=torch.float64))[
        "energy"
    ].ravel()
    alone = [evaluate(model, a, charge_spin=p)[0] for a, p in zip(frames, PAIRS, strict=True)]
    assert energies.tolist() == pytest.approx(alone, abs=1e-10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0.5, 1.0), "fractions"),
        ((100, 1), "out of range"),
        ((0, -1), "out of range"),
        ((-101, 1), "out of range"),
    ],
)
def test_impossible_charges_are_refused(given, message):
    model, _ = build(descriptor(moe=MOE, **CHARGE_SPIN))
    with pytest.raises(RuntimeError, match=message):
        evaluate(model, random_frames(1)[0], charge_spin=given)


def test_charge_and_spin_without_default_must_be_given():
    model, _ = build(descriptor(moe=MOE, add_chg_spin_ebd=True))
    with pytest.raises(RuntimeError, match="needs charge_spin"):
        evaluate(model, random_frames(1)[0])


def test_serialization_keeps_the_charge_and_spin_embedding():
    from deepmd.pt.model.descriptor.base_descriptor import BaseDescriptor

    part = build(descriptor(moe=MOE, **CHARGE_SPIN))[0].atomic_model.descriptor
    again = BaseDescriptor.deserialize(part.serialize())
    assert again.get_default_chg_spin().tolist() == [0.0, 1.0]
    for key, value in part.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_sharing_a_descriptor_shares_the_charge_and_spin_embedding():
    first, second = (
        build(descriptor(moe=MOE, seed=seed, **CHARGE_SPIN))[0].atomic_model.descriptor for seed in (1, 2)
    )
    second.share_params(first, 0)
    assert second.charge_spin_embedding is first.charge_spin_embedding


def test_the_embedding_changes_no_other_initial_weight():
    without, given = (build(descriptor(moe=MOE, **x))[0].atomic_model.descriptor for x in ({}, CHARGE_SPIN))
    for key, value in without.state_dict().items():
        assert torch.equal(value, given.state_dict()[key])


@pytest.fixture(scope="module")
def charged_data(data_folder, tmp_path_factory):
    """The small data set with charges, multiplicities and two frame parameters."""
    folder = tmp_path_factory.mktemp("charged")
    shutil.copytree(data_folder / "data", folder / "data")
    random = np.random.default_rng(2)
    for energies in folder.rglob("energy.npy"):
        n = len(np.load(energies))
        pairs = np.array(PAIRS, dtype=float)[random.integers(0, len(PAIRS), n)]
        np.save(energies.parent / "charge_spin.npy", pairs)
        np.save(energies.parent / "fparam.npy", random.normal(size=(n, 2)))
    return folder


@pytest.mark.parametrize(
    ("name", "section", "fitting"),
    [
        ("charge", {"add_chg_spin_ebd": True}, {}),
        ("fparam", {}, {"numb_fparam": 2}),
        ("both", CHARGE_SPIN, FPARAM),
    ],
)
def test_training_restarts_and_packages(charged_data, tmp_path, name, section, fitting):
    config = training_input(charged_data, fitting=fitting, **section)
    whole = charged_data / name
    train(whole, config)
    resumed = charged_data / f"{name}-restarted"
    train(resumed, config, "--restart", str(whole / "model.ckpt-3.pt"))
    path = whole / "model.ckpt-6.pt"
    expected, found = (torch.load(p / path.name, weights_only=True)["model"] for p in (whole, resumed))
    assert all(torch.equal(found[k], v) for k, v in expected.items() if k != "_extra_state")
    first = torch.load(whole / "model.ckpt-3.pt", weights_only=True)["model"]
    changed = [k for k, v in expected.items() if k != "_extra_state" and not torch.equal(first[k], v)]
    assert ("charge_spin_embedding" in str(changed)) == (name != "fparam")

    model = load(path)
    given, fixed = {}, {}
    if name != "fparam":
        given["charge_spin"], fixed = (1, 2), {"charge": 1, "spin": 2}
    if name != "charge":
        given["fparam"] = fixed["fparam"] = (0.3, -0.8)
    atoms = random_frames(1)[0]
    answer = evaluate(model, atoms, **given)
    close(plain(path, atoms, **given), answer, 1e-8)
    package_checkpoint(path, tmp_path / "model.moe.pt", **fixed)
    atoms.calc = MoECalculator(tmp_path / "model.moe.pt", device="cpu")
    assert atoms.get_potential_energy() == pytest.approx(answer[0], abs=1e-8)
    np.testing.assert_allclose(atoms.get_forces(), answer[1], atol=1e-8)


def upcycled(folder, fitting=None, start_fitting=None, start=None, **section):
    dense, params = build(descriptor("dpa3", **section), fitting=fitting)
    path = save(dense, params, folder / "dense.pt")
    config = training_input(folder, fitting=start_fitting if start_fitting is not None else fitting)
    config["model"]["descriptor"] = descriptor(
        moe={"n_routed_experts": 4, "top_k": 2}, **(section if start is None else start)
    )
    (folder / "input.json").write_text(json.dumps(config))
    return dense, upcycle(path, folder / "input.json", folder / "start.pt")


def test_upcycling_keeps_charge_spin_and_frame_parameters(tmp_path):
    dense, remarks = upcycled(tmp_path, FPARAM, **CHARGE_SPIN)
    assert remarks == []
    model = load(tmp_path / "start.pt")
    atoms = random_frames(1)[0]
    given = {"charge_spin": (-2, 3), "fparam": (0.3, 0.4)}
    close(evaluate(model, atoms, **given), evaluate(dense, atoms, **given))
    close(evaluate(model, atoms), evaluate(dense, atoms))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": {}, **CHARGE_SPIN}, "descriptor.add_chg_spin_ebd = 0 in the input, expected True"),
        ({"start": CHARGE_SPIN}, "descriptor.add_chg_spin_ebd = True in the input, expected False"),
        ({"fitting": FPARAM, "start_fitting": {}}, "fitting_net.numb_fparam = 0 in the input, expected 2"),
    ],
)
def test_upcycling_refuses_an_input_that_takes_other_conditions(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        upcycled(tmp_path, **options)


def test_upcycling_says_when_charge_and_spin_came_as_frame_parameters(tmp_path):
    dense, remarks = upcycled(tmp_path, {"numb_fparam": 2}, add_chg_spin_ebd=True)
    assert "charge_spin.npy beside an equal fparam.npy" in remarks[0]
    given = {"charge_spin": (1, 2), "fparam": (1.0, 2.0)}
    atoms = random_frames(1)[0]
    close(evaluate(load(tmp_path / "start.pt"), atoms, **given), evaluate(dense, atoms, **given))


@pytest.mark.parametrize("routing", ["element", "configuration"])
def test_deeppot_evaluates_a_checkpoint_with_charge_and_spin(tmp_path, routing):
    """DeepPot compiles the model to TorchScript."""
    from deepmd.infer import DeepPot

    section = descriptor(moe=MOE | {"routing": routing}, concat_output_tebd=True, **CHARGE_SPIN)
    model, params = build(section, fitting=FPARAM)
    potential = DeepPot(save(model, params, tmp_path / "model.pt"))
    atoms = random_frames(1)[0]
    types = [TYPE_MAP.index(symbol) for symbol in atoms.symbols]
    frame = atoms.positions.reshape(1, -1), atoms.cell.array.reshape(1, -1), types
    given = {"charge_spin": (-2, 3), "fparam": (0.3, 0.4)}
    found = potential.eval(*frame, **{name: np.array([value], dtype=float) for name, value in given.items()})
    assert found[0][0, 0] == pytest.approx(evaluate(model, atoms, **given)[0], abs=1e-10)
    assert potential.eval(*frame)[0][0, 0] == pytest.approx(evaluate(model, atoms)[0], abs=1e-10)
