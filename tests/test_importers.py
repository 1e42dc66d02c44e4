"""Importers: every layout against the code that defines it, and every refusal."""

import copy

import numpy as np
import pytest
import torch
from helpers import DATA, evaluate_atoms, frames

from moecalc import testing
from moecalc.errors import CheckpointError
from moecalc.package.importers import build_model, load_checkpoint, save_checkpoint

ORACLE = DATA / "oracle" / "models"


@pytest.fixture(scope="module")
def models():
    """Eager models by file and head, built once."""
    cache = {}

    def get(path, head=None):
        if (path, head) not in cache:
            cache[path, head] = build_model(load_checkpoint(path, head), torch.float64)
        return cache[path, head]

    return get


@pytest.mark.parametrize("frame", frames("deepmd"), ids=lambda f: f"{f.model}-{f.frame}")
def test_model_equals_the_code_that_defines_the_layout(models, frame):
    out = evaluate_atoms(models(DATA / "deepmd" / f"{frame.model}.pt"), frame.atoms)
    assert abs(float(out.energy) - frame.energy) < testing.ORACLE_ENERGY
    assert np.abs(out.energies.numpy() - frame.energies).max() < testing.ORACLE_ENERGY
    assert np.abs(out.forces.numpy() - frame.forces).max() < testing.ORACLE_FORCES
    assert np.abs(out.virial[0].numpy() - frame.virial).max() < testing.ORACLE_VIRIAL


@pytest.mark.parametrize(
    ("file", "head", "layout"),
    [
        ("A_dyn", None, "dpa3"),
        ("D1_multitask", "water_a", "dpa3"),
        ("E1_moe_all", None, "moe"),
        ("F1_pack_moe", None, "0415_moe_pack"),
    ],
)
def test_layout_is_detected_from_the_file(file, head, layout):
    assert load_checkpoint(ORACLE / f"{file}.pt", head).layout == layout


def test_elements_without_data_are_told_from_the_trainers_list():
    assert load_checkpoint(ORACLE / "E1_moe_all.pt").trained_elements == ["O", "H"]


def raw(name="A_dyn"):
    return copy.deepcopy(torch.load(ORACLE / f"{name}.pt", weights_only=True))


@pytest.fixture
def write(tmp_path):
    """Save a changed checkpoint and import it."""

    def run(data, head=None):
        path = tmp_path / "changed.pt"
        torch.save(data, path)
        return build_model(load_checkpoint(path, head))

    return run


def params_of(data):
    return data["model"]["_extra_state"]["model_params"]


def test_elements_with_zero_bias_count_as_untrained_without_the_list(tmp_path):
    data = raw()
    params_of(data)["info"] = {}
    data["model"]["model.Default.atomic_model.out_bias"][0, 1] = 0.0
    torch.save(data, tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt").trained_elements == ["O"]


def test_elements_without_statistics_count_as_untrained(tmp_path):
    data = raw("C4_fixstd0_compress2_silut3")
    params_of(data)["info"] = {}
    data["model"]["model.Default.atomic_model.descriptor.repflows.stddev"][3] = 0.1
    torch.save(data, tmp_path / "x.pt")
    assert "Cl" not in load_checkpoint(tmp_path / "x.pt").trained_elements


def test_bare_state_dict_is_accepted(tmp_path):
    torch.save(raw()["model"], tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt").layout == "dpa3"


def test_older_list_form_of_packed_experts_is_read(tmp_path):
    data = raw("F1_pack_moe")
    state = data["model"]
    for key in [k for k in state if k.endswith(("routing_matrix", "routing_bias"))]:
        value = state.pop(key)
        prefix, kind = key.rsplit(".", 1)
        for e in range(value.shape[-1]):
            name = "matrix" if kind == "routing_matrix" else "bias"
            state[f"{prefix}.routing_experts.{e}.mlp.{name}"] = value[..., e].clone()
    torch.save(data, tmp_path / "x.pt")
    old, new = load_checkpoint(tmp_path / "x.pt").state, load_checkpoint(ORACLE / "F1_pack_moe.pt").state
    assert old.keys() == new.keys()
    assert all(torch.equal(old[k], new[k]) for k in old)


def test_heads_are_listed_when_none_is_chosen():
    with pytest.raises(CheckpointError, match="choose one of its heads with --head: water_a, water_b"):
        load_checkpoint(ORACLE / "D1_multitask.pt")


def test_unknown_head_is_refused_with_the_list():
    with pytest.raises(CheckpointError, match=r"head 'steam' is not in this checkpoint.*water_a, water_b"):
        load_checkpoint(ORACLE / "D1_multitask.pt", "steam")


def test_heads_are_found_regardless_of_case_and_by_alias(tmp_path):
    data = raw("D1_multitask")
    params_of(data)["model_dict"]["water_b"]["model_branch_alias"] = ["ice"]
    torch.save(data, tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt", "Ice").head == "water_b"
    assert load_checkpoint(tmp_path / "x.pt", "WATER_A").head == "water_a"


def test_head_of_a_single_task_file_is_refused():
    with pytest.raises(CheckpointError, match="--head 'x' was given, but this checkpoint is single-task"):
        load_checkpoint(ORACLE / "A_dyn.pt", "x")


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("descriptor", "type", "se_e2_a"),
        ("fitting_net", "numb_aparam", 1),
        ("fitting_net", "type", "dos"),
        ("fitting_net", "use_aparam_as_mask", True),
        ("fitting_net", "atom_ener", [1.0, None]),
        (None, "type", "linear_ener"),
        (None, "spin", {"use_spin": [True, False]}),
        (None, "modifier", {"type": "dipole_charge"}),
        (None, "use_srtab", "zbl.txt"),
        (None, "bridging_method", "ZBL"),
    ],
)
def test_unsupported_options_are_refused_by_name(write, section, option, value):
    data = raw()
    target = params_of(data)[section] if section else params_of(data)
    target[option] = value
    name = f"{section or 'model'}.{option}"
    with pytest.raises(CheckpointError, match=rf"option {name} = .* is not supported, expected"):
        write(data)


@pytest.mark.parametrize("section", ["descriptor", "fitting_net"])
def test_half_precision_is_refused(write, section):
    data = raw()
    params_of(data)[section]["precision"] = "bfloat16"
    with pytest.raises(CheckpointError, match=f"{section}.precision = 'bfloat16' is not supported"):
        write(data)


def test_expert_parallel_partial_file_of_branch_moe_is_refused(write):
    data = raw("E1_moe_all")
    state = data["model"]
    for key in [k for k in state if "_moe.experts.3." in k]:
        del state[key]
    params_of(data)["descriptor"]["repflow"]["moe_ep_size"] = 2
    with pytest.raises(CheckpointError, match=r"3 experts for a gate of 4 \(option moe_ep_size = 2\)"):
        write(data)


def test_expert_parallel_partial_file_of_the_pack_branch_is_refused(write):
    data = raw("F1_pack_moe")
    for key in [k for k in data["model"] if k.endswith(("routing_matrix", "routing_bias"))]:
        data["model"][key] = data["model"][key][..., :2].clone()
    with pytest.raises(CheckpointError, match="2 routed experts in the file, expected n_routing_experts = "):
        write(data)


def test_unknown_options_become_remarks(tmp_path):
    data = raw()
    params_of(data)["descriptor"]["repflow"]["warp_drive"] = 9
    torch.save(data, tmp_path / "x.pt")
    assert load_checkpoint(tmp_path / "x.pt").remarks == [
        "unknown option repflow.warp_drive = 9 was not used"
    ]


def test_missing_tensor_is_named(write):
    data = raw()
    del data["model"]["model.Default.atomic_model.descriptor.repflows.edge_embd.bias"]
    with pytest.raises(CheckpointError, match=r"no tensor '.*repflows\.edge_embd\.bias'"):
        write(data)


def test_wrong_shape_is_named(write):
    data = raw()
    key = "model.Default.atomic_model.descriptor.repflows.edge_embd.bias"
    data["model"][key] = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=r"'embedding.edge_bias' has shape \(3,\), expected \(8,\)"):
        write(data)


def test_diverged_weights_are_refused(write):
    data = raw()
    data["model"]["model.Default.atomic_model.descriptor.repflows.edge_embd.bias"][0] = float("nan")
    with pytest.raises(CheckpointError, match=r"'embedding.edge_bias' has non-finite values"):
        write(data)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pt: no such file"):
        load_checkpoint(tmp_path / "gone.pt")


def test_file_that_is_no_checkpoint_is_refused(tmp_path):
    path = tmp_path / "notes.pt"
    path.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"notes\.pt: not a readable checkpoint"):
        load_checkpoint(path)


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"model": print}, path)
    with pytest.raises(CheckpointError, match=r"evil\.pt: not a readable checkpoint"):
        load_checkpoint(path)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    torch.save({"model": {"_extra_state": {"model_params": {}}, "w": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no DPA3 descriptor in this checkpoint"):
        load_checkpoint(tmp_path / "x.pt")


def test_state_dict_without_parameters_of_the_model_is_refused(tmp_path):
    torch.save({"model": {"w": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"no _extra_state.model_params"):
        load_checkpoint(tmp_path / "x.pt")


def test_package_given_as_checkpoint_is_refused():
    from moecalc.models import default_model_path

    with pytest.raises(CheckpointError, match="expected a trained checkpoint"):
        load_checkpoint(default_model_path())


@pytest.mark.parametrize("kwargs", [{}, {"n_routed": 3, "kind": "linear", "routing": "configuration"}])
def test_own_form_comes_back_unchanged(tmp_path, kwargs):
    config = testing.random_config(**kwargs)
    model = testing.random_potential(config)
    save_checkpoint(tmp_path / "own.pt", model, config, ["Nb", "W"])
    imported = load_checkpoint(tmp_path / "own.pt")
    again = build_model(imported)
    assert imported.trained_elements == ["Nb", "W"]
    atoms = testing.molecule()
    assert torch.equal(evaluate_atoms(again, atoms).forces, evaluate_atoms(model, atoms).forces)


def test_newer_own_form_is_refused(tmp_path):
    torch.save({"moecalc_checkpoint": 2, "config": {}, "state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="form 2 is newer than this moecalc reads"):
        load_checkpoint(tmp_path / "x.pt")


def test_invalid_own_configuration_is_refused_by_field(tmp_path):
    config = testing.random_config().model_dump()
    config["descriptor"]["n_dim"] = -1
    torch.save({"moecalc_checkpoint": 1, "config": config, "state_dict": {}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"config: descriptor\.n_dim: .* greater than 0"):
        load_checkpoint(tmp_path / "x.pt")


def test_own_state_that_does_not_fit_is_refused(tmp_path):
    config = testing.random_config()
    torch.save(
        {"moecalc_checkpoint": 1, "config": config.model_dump(), "state_dict": {"x": torch.ones(1)}},
        tmp_path / "x.pt",
    )
    with pytest.raises(CheckpointError, match=r"missing .*embedding.*, unexpected \['x'\]"):
        build_model(load_checkpoint(tmp_path / "x.pt"))
