"""The descriptor dpa3_moe in DeePMD-kit: options, numbers, derivatives, and what the trainer asks of it."""

import itertools
import logging
import warnings

import numpy as np
import pytest
import torch
from ase.neighborlist import neighbor_list
from training_models import TYPE_MAP, build, descriptor, evaluate, load, random_frames, save

from moecalc import MoECalculator
from moecalc.errors import CheckpointError
from moecalc.package import package_checkpoint
from moecalc.package.importers import load_checkpoint

MOE = {"n_routed_experts": 4, "n_shared_experts": 1, "top_k": 2}
STATIC = {"use_dynamic_sel": False, "smooth_edge_update": False, "e_sel": 60, "a_sel": 30}


@pytest.mark.parametrize(
    ("kind", "gate", "routing"),
    list(
        itertools.product(["mlp", "linear"], ["topk_softmax", "softmax_topk"], ["element", "configuration"])
    ),
)
def test_the_package_equals_deepmd_kit(tmp_path, kind, gate, routing):
    model, params = build(descriptor(moe=MOE | {"kind": kind, "gate": gate, "routing": routing}))
    package_checkpoint(save(model, params, tmp_path / "model.pt"), tmp_path / "model.moe.pt")
    calculator = MoECalculator(tmp_path / "model.moe.pt", device="cpu")
    for atoms in random_frames():
        energy, forces, virial = evaluate(model, atoms)
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-8)
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-8)
        stress = atoms.get_stress(voigt=False)
        np.testing.assert_allclose(-stress * atoms.get_volume(), virial, atol=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"repflow": STATIC},
        {"repflow": {"update_style": "res_avg", "edge_init_use_dist": False}},
        {"repflow": {"a_compress_rate": 0, "axis_neuron": 2}},
        {"repflow": {"sequential_update": True, "n_multi_edge_message": 2}},
        {"repflow": {"fix_stat_std": 0.5}, "concat_output_tebd": True, "use_tebd_bias": True},
        {"exclude_types": [[0, 1]], "use_econf_tebd": True, "activation_function": "tanh"},
    ],
    ids=["static", "res_avg", "no compression", "sequential", "tebd", "excluded pairs"],
)
def test_without_experts_it_equals_deepmd_kit_s_dpa3(tmp_path, options):
    from moecalc.nn import MoEConfig
    from moecalc.training.upcycle import _descriptor_state

    dense, params = build(descriptor("dpa3", **options))
    imported = load_checkpoint(save(dense, params, tmp_path / "dense.pt"))
    model, _ = build(descriptor(**options))
    state = _descriptor_state(imported, MoEConfig(), 0.0, torch.Generator())
    model.atomic_model.descriptor.load_state_dict(state)
    model.atomic_model.fitting_net.load_state_dict(dense.atomic_model.fitting_net.state_dict())
    model.atomic_model.out_bias.copy_(dense.atomic_model.out_bias)
    for atoms in random_frames():
        for a, b in zip(evaluate(model, atoms), evaluate(dense, atoms), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-10)


def test_deeppot_evaluates_a_checkpoint(tmp_path):
    from deepmd.infer import DeepPot

    model, params = build(descriptor(moe=MOE))
    potential = DeepPot(save(model, params, tmp_path / "model.pt"))
    atoms = random_frames(1)[0]
    types = [TYPE_MAP.index(symbol) for symbol in atoms.symbols]
    energy, forces, _ = potential.eval(atoms.positions.reshape(1, -1), atoms.cell.array.reshape(1, -1), types)
    expected = evaluate(model, atoms)
    assert energy[0, 0] == pytest.approx(expected[0], abs=1e-10)
    np.testing.assert_allclose(forces[0], expected[1], atol=1e-10)


def test_single_maps_can_be_mixtures_with_gates_of_their_own(tmp_path):
    moe = MOE | {"positions": ["node_self_mlp", "edge"]}
    model, params = build(descriptor(moe=moe))
    config = load_checkpoint(save(model, params, tmp_path / "model.pt")).config
    assert {name: entry.router for name, entry in config.moe.positions.items()} == {
        "node_self_mlp": "node_self_mlp",
        "edge_self_linear": "edge",
        "edge_angle_linear2": "edge",
    }


def test_frames_of_a_batch_do_not_see_each_other():
    model, _ = build(descriptor(moe=MOE | {"routing": "configuration"}))
    frames = random_frames(2, sizes=(6,))
    types = torch.tensor([[TYPE_MAP.index(s) for s in atoms.symbols] for atoms in frames])
    coord = torch.tensor(np.array([atoms.positions.ravel() for atoms in frames]))
    box = torch.tensor(np.array([atoms.cell.array.ravel() for atoms in frames]))
    energies = model(coord, types, box)["energy"].ravel().tolist()
    assert energies == pytest.approx([evaluate(model, atoms)[0] for atoms in frames], abs=1e-10)


@pytest.mark.parametrize("activation", ["silut:3.0", "silu", "tanh"])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_the_written_out_derivatives_are_those_of_autograd(monkeypatch, activation, kind):
    from moecalc.deepmd import compiled

    def gradients(model, atoms):
        model.train()
        types = torch.tensor([[TYPE_MAP.index(symbol) for symbol in atoms.symbols]])
        out = model(
            torch.tensor(atoms.positions).reshape(1, -1), types, torch.tensor(atoms.cell.array).reshape(1, 9)
        )
        loss = out["force"].square().sum() + out["energy"].sum() + out["virial"].square().sum()
        return [
            x for x in torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) if x is not None
        ]

    section = descriptor(moe=MOE | {"kind": kind}, activation_function=activation)
    atoms = random_frames(1)[0]
    expected = gradients(build(section)[0], atoms)
    # the formulas themselves, not their compilation
    monkeypatch.setattr(compiled, "_available", lambda: True)
    monkeypatch.setattr(compiled, "_run", lambda function, phi, *tensors: function(*tensors, *phi))
    model = build(section)[0]
    found = gradients(model, atoms)
    assert model.atomic_model.descriptor.layers[0].node_self_mlp.faster is not None
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_compiled_activations_give_the_same_forces(monkeypatch):
    from moecalc.deepmd import compiled

    atoms = random_frames(1)[0]
    section = descriptor(moe=MOE)
    model = build(section)[0]
    expected = evaluate(model, atoms)
    monkeypatch.setenv("MOECALC_COMPILE", "1")
    compiled._available.cache_clear()
    found = evaluate(model.train(), atoms)
    compiled._available.cache_clear()
    np.testing.assert_allclose(found[1], expected[1], atol=1e-12)
    torch.jit.script(model.eval())  # as DeePMD-kit does before it evaluates


def test_the_seed_fixes_the_weights():
    first, second = (build(descriptor(moe=MOE))[0].atomic_model.descriptor.state_dict() for _ in range(2))
    other = build(descriptor(moe=MOE, seed=2))[0].atomic_model.descriptor.state_dict()
    name = "layers.0.node_self_mlp.matrix"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name][0], first[name][1])


def test_serialization_keeps_the_model():
    from deepmd.pt.model.descriptor.base_descriptor import BaseDescriptor

    part = build(descriptor(moe=MOE, exclude_types=[[0, 1]]))[0].atomic_model.descriptor
    again = BaseDescriptor.deserialize(part.serialize())
    for key, value in part.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert again.exclude_types == [(0, 1)]


def test_statistics_of_the_data_equal_those_of_dpa3(data_folder):
    from deepmd.pt.utils.dataloader import DpLoaderSet
    from deepmd.pt.utils.stat import make_stat_input
    from deepmd.utils.data import DataRequirementItem

    systems = sorted(str(path) for path in (data_folder / "data/train").iterdir())
    data = DpLoaderSet(systems, 1, TYPE_MAP, seed=1)
    data.add_data_requirement([DataRequirementItem("energy", 1)])
    data.preload_and_modify_all_data_torch()
    sampled = make_stat_input(data.systems, data.dataloaders, 2)
    parts = [
        build(descriptor(kind, {"fix_stat_std": 0.0}))[0].atomic_model.descriptor
        for kind in ("dpa3", "dpa3_moe")
    ]
    for part in parts:
        part.compute_input_stats(sampled)
    torch.testing.assert_close(
        parts[1].geometry.stddev, parts[0].repflows.stddev[:, 0, :], atol=1e-12, rtol=0.0
    )


def test_elements_can_be_reordered_dropped_and_added(tmp_path):
    model, params = build(descriptor(moe=MOE))
    changed = load(save(model, params, tmp_path / "model.pt"))
    changed.change_type_map(["W", "Ta", "Nb"])
    atoms = random_frames(1)[0]
    atoms.symbols[:] = "Nb"
    atoms.symbols[0] = "W"
    expected = evaluate(model, atoms)
    found = evaluate(changed, atoms, ["W", "Ta", "Nb"])
    np.testing.assert_allclose(found[1], expected[1], atol=1e-10)
    assert changed.atomic_model.descriptor.get_ntypes() == 3


def test_a_residual_type_embedding_forbids_a_change_of_elements():
    model, _ = build(descriptor(repflow={"n_dim": 6}))
    with pytest.raises(ValueError, match="n_dim = 6 is once or twice the number of elements"):
        model.atomic_model.descriptor.change_type_map(["W", "Nb"])


def test_sharing_uses_the_same_parameters():
    first, second = (build(descriptor(moe=MOE, seed=seed))[0].atomic_model.descriptor for seed in (1, 2))
    second.share_params(first, 1)
    assert second.embedding.table is first.embedding.table
    assert second.layers is not first.layers
    second.share_params(first, 0)
    assert second.layers is first.layers


def test_an_unknown_level_of_sharing_is_refused():
    first, second = (build(descriptor(moe=MOE))[0].atomic_model.descriptor for _ in range(2))
    with pytest.raises(ValueError, match="cannot share level 2"):
        second.share_params(first, 2)


def test_a_full_neighbor_list_is_an_error():
    model, _ = build(descriptor(repflow=STATIC | {"e_sel": 4, "a_sel": 4}))
    with pytest.raises(RuntimeError, match="raise e_sel"):
        evaluate(model, random_frames(1)[0])


def test_more_neighbors_than_e_sel_are_kept(tmp_path):
    model, params = build(descriptor(repflow=STATIC | {"e_sel": 12, "a_sel": 12}))
    package_checkpoint(save(model, params, tmp_path / "model.pt"), tmp_path / "model.moe.pt")
    atoms = random_frames(1)[0]
    assert 12 < np.bincount(neighbor_list("i", atoms, 5.0)).max() < 24
    atoms.calc = MoECalculator(tmp_path / "model.moe.pt", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that training with dpa3 would have cut the list
        assert atoms.get_potential_energy() == pytest.approx(evaluate(model, atoms)[0], abs=1e-8)


def test_the_load_of_the_experts_is_logged(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("deepmd"), "propagate", True)
    model, _ = build(descriptor(moe=MOE))
    model.train()
    atoms = random_frames(1)[0]
    evaluate(model, atoms)
    with caplog.at_level(logging.INFO, logger="deepmd.moecalc"):
        model.eval()
    lines = [record.getMessage() for record in caplog.records if "load of layer" in record.getMessage()]
    assert len(lines) == 3
    assert "angle" in lines[0]
    assert "entropy" in lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moe": MOE | {"kind": "cubic"}}, "expected mlp or linear"),
        ({"moe": MOE | {"gate": "noisy"}}, "expected topk_softmax or softmax_topk"),
        ({"moe": MOE | {"routing": "atom"}}, "expected element or configuration"),
        ({"moe": MOE | {"positions": ["nodes"]}}, "expected a list of node, edge, angle"),
        ({"moe": MOE | {"top_k": -1}}, "expected 0 or more"),
        ({"moe": {"top_k": 1}}, "n_routed_experts"),
        ({"moe": MOE | {"capacity": 1}}, "capacity"),
        (
            {"add_chg_spin_ebd": True, "default_chg_spin": [0.5, 1.0]},
            "expected a whole charge from -100 to 99",
        ),
        ({"add_chg_spin_ebd": True, "default_chg_spin": [0.0]}, "expected a whole charge from -100 to 99"),
        ({"precision": "bfloat16"}, "expected one of default, float64"),
    ],
)
def test_the_argument_check_names_what_is_wrong(options, message):
    with pytest.raises(Exception, match=message):
        build(descriptor(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"moe": MOE | {"top_k": 9}}, "top_k = 9, expected at most n_routed_experts = 4"),
        ({"moe": MOE | {"positions": ["node", "node_self_mlp"]}}, "names node_self_mlp twice"),
        ({"repflow": {"smooth_edge_update": False}}, "smooth_edge_update = false with use_dynamic_sel"),
        ({"repflow": {"a_rcut": 5.5}}, "a_rcut = 5.5, expected at most e_rcut"),
        ({"repflow": {"a_sel": 601}}, "a_sel = 601, expected at most e_sel = 600"),
        ({"repflow": {"update_residual_init": "zero"}}, "expected const or norm"),
    ],
)
def test_inconsistent_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(descriptor(**options))


def test_it_cannot_be_compressed():
    with pytest.raises(NotImplementedError, match="moecalc package"):
        build(descriptor())[0].atomic_model.descriptor.enable_compression(1.0)


def test_exchange_between_ranks_is_refused():
    part = build(descriptor())[0].atomic_model.descriptor
    with pytest.raises(RuntimeError, match="runs in LAMMPS as a package only"):
        part(
            torch.zeros(1, 3),
            torch.zeros(1, 1, dtype=torch.long),
            torch.zeros(1, 1, 2, dtype=torch.long),
            comm_dict={},
        )


def test_a_checkpoint_with_options_of_a_newer_plugin_is_refused(tmp_path):
    model, params = build(descriptor(moe=MOE))
    params["descriptor"]["moe"]["capacity"] = 2
    path = save(model, params, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"moe.capacity is not an option"):
        load_checkpoint(path)
