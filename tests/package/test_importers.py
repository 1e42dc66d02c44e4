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


def named_heads(tmp_path, **aliases):
    """The multi-task checkpoint with aliases of its heads."""
    data = raw("D1_multitask")
    for head, alias in aliases.items():
        params_of(data)["model_dict"][head]["model_branch_alias"] = alias
    torch.save(data, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def test_without_a_choice_the_head_with_the_alias_default_is_taken_and_named(tmp_path):
    imported = load_checkpoint(named_heads(tmp_path, water_b=["Default", "liquid"]))
    assert imported.head == "water_b"
    assert imported.remarks == [
        "head water_b of water_a, water_b, because it has the alias Default; another is chosen with --head"
    ]


def test_a_chosen_head_comes_before_the_default(tmp_path):
    imported = load_checkpoint(named_heads(tmp_path, water_b=["Default"]), "water_a")
    assert (imported.head, imported.remarks) == ("water_a", [])


def test_heads_are_listed_with_their_aliases(tmp_path):
    path = named_heads(tmp_path, water_b=["ice", "liquid"])
    with pytest.raises(CheckpointError, match=r"with --head: water_a, water_b \(ice, liquid\)"):
        load_checkpoint(path)


def test_an_alias_of_two_heads_is_refused(tmp_path):
    path = named_heads(tmp_path, water_a=["Default"], water_b=["Default"])
    with pytest.raises(CheckpointError, match="head 'Default' means water_a and water_b in this checkpoint"):
        load_checkpoint(path)


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


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.warp_drive", 9),
        ("descriptor.add_case_embd", True),
        ("descriptor.repflow.add_edge_readout", True),
        ("descriptor.repflow.use_gated_mlp", True),
        ("descriptor.repflow.gated_mlp_norm", "rms"),
        ("descriptor.repflow.update_use_layernorm", True),
        ("fitting_net.use_tebd", [0.0]),
    ],
)
def test_unknown_options_that_are_not_off_are_refused(write, path, value):
    data = raw()
    *sections, option = path.removeprefix("model.").split(".")
    target = params_of(data)
    for section in sections:
        target = target[section]
    target[option] = value
    with pytest.raises(CheckpointError, match=rf"changed\.pt: option {path} = .* is not known to moecalc"):
        write(data)


@pytest.mark.parametrize("value", [None, False, 0, 0.0, "", "none", [], {}])
def test_unknown_options_that_are_off_change_nothing(write, value):
    data = raw()
    params_of(data)["descriptor"]["repflow"]["warp_drive"] = value
    write(data)


@pytest.mark.parametrize("option", ["seed", "trainable", "use_loc_mapping"])
def test_options_of_training_alone_may_have_any_value(write, option):
    data = raw()
    params_of(data)["descriptor"][option] = "anything"
    write(data)


@pytest.mark.parametrize(
    ("old", "new"), [("use_env_envelope", "use_exp_switch"), ("edge_use_dist", "edge_init_use_dist")]
)
def test_old_option_names_are_translated(tmp_path, old, new):
    data = raw()
    repflow = params_of(data)["descriptor"]["repflow"]
    repflow[old] = repflow.pop(new)
    assert repflow[old] is True
    torch.save(data, tmp_path / "x.pt")
    assert getattr(load_checkpoint(tmp_path / "x.pt").config.descriptor, new) is True


def test_old_and_new_option_name_that_contradict_are_refused(write):
    data = raw()
    params_of(data)["descriptor"]["repflow"]["use_env_envelope"] = False
    with pytest.raises(
        CheckpointError, match=r"use_env_envelope = False .* contradicts .*use_exp_switch = True"
    ):
        write(data)


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


EDGE = "model.Default.atomic_model.descriptor.repflows.edge_embd.bias"


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.half, torch.bfloat16, torch.complex64, torch.float32]
)
def test_weights_of_another_dtype_than_the_precision_are_refused(write, dtype):
    data = raw()
    data["model"][EDGE] = data["model"][EDGE].to(dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=rf"changed\.pt: tensor '{EDGE}' is {name}, expected float64"):
        write(data)


@pytest.mark.parametrize(
    "key", ["atomic_model.out_bias", "atomic_model.fitting_net.bias_atom_e", "min_nbor_dist"]
)
def test_biases_are_float64_whatever_the_precision(write, key):
    data = raw("G_float32")
    data["model"][f"model.Default.{key}"] = data["model"][f"model.Default.{key}"].float()
    with pytest.raises(CheckpointError, match=rf"{key}' is float32, expected float64"):
        write(data)


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.zeros(8, dtype=torch.float64).to_sparse(), "is a sparse tensor, expected a plain one"),
        (
            torch.zeros((), dtype=torch.float64).expand(10**6, 10**6),
            "repeats 8 bytes, expected at most 100,000,000",
        ),
        ([0.0] * 8, r"is \[0.0, .* \(list\), expected a tensor"),
        (None, r"is None \(NoneType\), expected a tensor"),
    ],
)
def test_what_is_no_plain_tensor_is_refused(write, value, what):
    data = raw()
    data["model"][EDGE] = value
    with pytest.raises(CheckpointError, match=rf"'{EDGE}' .*{what}"):
        write(data)


def test_tensors_that_are_not_contiguous_are_read(tmp_path):
    data = raw()
    wide = torch.stack([data["model"][EDGE], torch.full((8,), float("nan"), dtype=torch.float64)], 1)
    data["model"][EDGE] = wide[:, 0]
    torch.save(data, tmp_path / "x.pt")
    assert torch.equal(load_checkpoint(tmp_path / "x.pt").state["embedding.edge_bias"], raw()["model"][EDGE])


@pytest.mark.parametrize(
    "key",
    [
        "model.Default.atomic_model.out_bias",
        "model.Default.atomic_model.out_std",
        "model.Default.min_nbor_dist",
        "model.Default.atomic_model.descriptor.repflows.mean",
        "model.Default.atomic_model.descriptor.repflows.layers.1.angle_self_linear.bias",  # cannot reach the energy
        "model.Default.atomic_model.fitting_net.filter_layers._networks.0.layers.1.idt",
    ],
)
def test_nan_anywhere_is_refused(write, key):
    data = raw()
    value = data["model"][key].clone()
    value.view(-1)[0] = float("nan")
    data["model"][key] = value
    with pytest.raises(CheckpointError, match=r"tensor .* has non-finite values"):
        write(data)


def test_nan_in_another_head_is_refused(write):
    data = raw("D1_multitask")
    data["model"]["model.water_b.atomic_model.out_bias"] = torch.full(
        (1, 2, 1), float("nan"), dtype=torch.float64
    )
    with pytest.raises(
        CheckpointError, match=r"'model\.water_b\.atomic_model\.out_bias' has non-finite values"
    ):
        write(data, "water_a")


@pytest.mark.parametrize("value", [0.0, -0.3])
def test_standard_deviations_that_are_not_positive_are_refused(write, value):
    data = raw()
    data["model"]["model.Default.atomic_model.descriptor.repflows.stddev"].fill_(value)
    with pytest.raises(
        CheckpointError, match=r"repflows\.stddev' has a standard deviation of .*, expected positive"
    ):
        write(data)


def test_statistics_that_differ_between_neighbors_are_refused(write):
    data = raw()
    data["model"]["model.Default.atomic_model.descriptor.repflows.mean"][0, 3, 1] = 0.5
    with pytest.raises(CheckpointError, match=r"repflows\.mean' differs between neighbors of one element"):
        write(data)


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("A_dyn", "atomic_model.descriptor.repflows.layers.0.node_gate.matrix"),
        ("A_dyn", "atomic_model.descriptor.repflows.layers.2.node_self_mlp.matrix"),
        ("A_dyn", "atomic_model.fitting_net.filter_layers.networks.1.layers.0.matrix"),
        ("E1_moe_all", "atomic_model.descriptor.repflows.layers.0.node_self_mlp.matrix"),
        ("E1_moe_all", "atomic_model.descriptor.repflows.layers.0.node_self_mlp_moe.shared_experts.1.bias"),
        ("F1_pack_moe", "atomic_model.descriptor.repflows.layers.0.moe_phase1.edge_experts.extra"),
    ],
)
def test_tensors_that_nobody_reads_are_refused(write, model, key):
    data = raw(model)
    data["model"][f"model.Default.{key}"] = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(CheckpointError, match=rf"tensor 'model\.Default\.{key}' has no place in the model"):
        write(data)


def test_two_names_of_a_fitting_layer_that_differ_are_refused(write):
    data = raw()
    key = "model.Default.atomic_model.fitting_net.filter_layers._networks.0.layers.0.bias"
    data["model"][key] = data["model"][key] + 1.0
    with pytest.raises(
        CheckpointError, match=r"_networks\.0\.layers\.0\.bias' differs from .*expected two names of one"
    ):
        write(data)


@pytest.mark.parametrize(
    ("path", "value", "what"),
    [
        ("type_map", "OH", "expected a list of words"),
        ("type_map", ["O", "O"], "distinct element symbols: one is there twice"),
        ("type_map", ["O", ""], "distinct element symbols: one is empty"),
        ("type_map", [], "distinct element symbols: it is empty"),
        ("type_map", ["O", 1], "expected a list of words"),
        ("descriptor", None, "expected a dictionary"),
        ("descriptor.repflow", [1], "expected a dictionary"),
        ("descriptor.repflow.n_dim", True, "expected a whole number"),
        ("descriptor.repflow.n_dim", "16", "expected a whole number"),
        ("descriptor.repflow.n_dim", 16.5, "expected a whole number"),
        ("descriptor.repflow.n_dim", 10**9, "expected a whole number up to 10,000,000"),
        ("descriptor.repflow.e_sel", None, "expected a whole number"),
        ("descriptor.repflow.e_rcut", float("nan"), "expected a finite number"),
        ("descriptor.repflow.use_exp_switch", 1, "expected true or false"),
        ("descriptor.activation_function", None, "expected a word"),
        ("descriptor.activation_function", "silut:nan", "expected a finite threshold"),
        ("descriptor.exclude_types", [[0]], "expected a list of pairs"),
        ("fitting_net.neuron", 24, "expected a list of whole numbers"),
        ("fitting_net.neuron", [24, "24"], "expected a list of whole numbers"),
        ("fitting_net.resnet_dt", "yes", "expected true or false"),
        ("atom_exclude_types", [2], "has type index 2, expected 0 to 1"),
        ("pair_exclude_types", [[0, -1]], "has type index -1, expected 0 to 1"),
        ("info", "none", "expected a dictionary"),
    ],
)
def test_options_of_another_type_are_refused_by_path_and_value(write, path, value, what):
    data = raw()
    *sections, option = path.split(".")
    target = params_of(data)
    for section in sections:
        target = target[section]
    target[option] = value
    with pytest.raises(
        CheckpointError, match=rf"changed\.pt: option (model\.)?{path} (=|has) .*{what}|{what}"
    ):
        write(data)


@pytest.mark.parametrize("path", ["type_map", "descriptor", "descriptor.repflow.n_dim", "fitting_net.neuron"])
def test_missing_options_are_named(write, path):
    data = raw()
    *sections, option = path.split(".")
    target = params_of(data)
    for section in sections:
        target = target[section]
    del target[option]
    with pytest.raises(CheckpointError, match=rf"changed\.pt: option (model\.)?{path} is missing, expected"):
        write(data)


def test_sizes_that_the_tensors_do_not_have_are_refused_before_memory_is_taken(write):
    data = raw()
    params_of(data)["descriptor"]["repflow"]["n_dim"] = 9_000_000
    with pytest.raises(CheckpointError, match=r"has shape .*, expected \(.*9000000"):
        write(data)


@pytest.mark.parametrize("value", [None, "text", [1], 3])
def test_model_params_that_are_no_dictionary_are_refused(write, value):
    data = raw()
    data["model"]["_extra_state"]["model_params"] = value
    with pytest.raises(
        CheckpointError, match=r"_extra_state\.model_params = .*, expected a dictionary of options"
    ):
        write(data)


@pytest.mark.parametrize(("option", "layout"), [("n_experts", "moe"), ("use_moe", "0415_moe_pack")])
def test_expert_options_of_a_dense_file_are_refused(write, option, layout):
    data = raw()
    params_of(data)["descriptor"]["repflow"][option] = 4 if option == "n_experts" else True
    with pytest.raises(
        CheckpointError, match=rf"{option} = .* asks for experts of branch {layout}, but the tensors"
    ):
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
    with pytest.raises(CheckpointError, match=r"evil\.pt: not a readable checkpoint") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)  # torch advises to run the code
    assert "print, which is code" in str(caught.value)


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
