"""Charge, spin and frame parameters in the reference model, folded models, and imported checkpoints."""

import copy

import numpy as np
import pytest
import torch
from helpers import DATA, graph_of
from helpers import evaluate_atoms as answer

from moecalc import testing
from moecalc._jit import jit_script
from moecalc.conditions import Conditions, fix
from moecalc.nn import MoEPotential
from moecalc.nn.conditions import ConditionEmbedding
from moecalc.package.importers import build_model, load_checkpoint, set_precision
from moecalc.package.lower import lower
from moecalc.package.reference import condition_tensors

ELEMENTS = ["Nb", "Mo", "Ta", "W"]
CHARGE_SPIN = {"add_chg_spin_ebd": True}
G2 = {**CHARGE_SPIN, "fparam_is_charge_spin": True, "fitting": {"numb_fparam": 2}}
THREE = {"numb_fparam": 3, "dim_case_embd": 2}
PACK = {**CHARGE_SPIN, "n_routed": 4, "route_on_charge_spin": True}

OPTIONS = {
    "frame parameters": {"fitting": {"numb_fparam": 2}},
    "charge and spin": CHARGE_SPIN,
    "both, case embedding": {**CHARGE_SPIN, "fitting": THREE},
    "one input for both, mlp": {**G2, "n_routed": 4},
    "charge and spin, case embedding": {**CHARGE_SPIN, "fitting": {"dim_case_embd": 2}},
    # widths as the first layer counts them: 8 features, 3 frame parameters, 2 of the case embedding
    "skip path": {**CHARGE_SPIN, "fitting": THREE, "neuron": (13, 6)},
    "doubling skip path": {"fitting": THREE, "neuron": (26, 6)},
    "skip path, concatenated embedding": {
        **CHARGE_SPIN, "fitting": THREE, "neuron": (21,), "concat_output_tebd": True,
    },
    "skip path without time step": {"fitting": {**THREE, "resnet_dt": False}, "neuron": (13, 6)},
    "no hidden layer": {**CHARGE_SPIN, "fitting": THREE, "neuron": ()},
    "concatenated embedding, bias": {**CHARGE_SPIN, "concat_output_tebd": True, "use_tebd_bias": True},
    "econf": {**CHARGE_SPIN, "use_econf_tebd": True, "concat_output_tebd": True},
    "bare routing, linear": {**CHARGE_SPIN, "n_routed": 4, "kind": "linear"},
    "pack": PACK,
    "pack, one input for both": {**G2, "n_routed": 4, "route_on_charge_spin": True, "shared_routers": True},
    "pack, linear": {**PACK, "kind": "linear"},
    "configuration": {**CHARGE_SPIN, "n_routed": 4, "routing": "configuration"},
    "configuration on charge and spin": {**PACK, "routing": "configuration"},
}  # fmt: skip


def model_of(name, **more):
    config = testing.random_config(ELEMENTS, **{"nlayers": 2, **OPTIONS[name], **more})
    return testing.random_potential(config), config


def values_of(config, charge=0, spin=1, scale=1.0):
    """Conditions that a configuration takes."""
    pair = (charge, spin) if config.descriptor.add_chg_spin_ebd else (None, None)
    n = config.fitting.numb_fparam
    fparam = tuple(scale * (0.3 + 0.2 * k) for k in range(n)) if n else None
    if config.fparam_is_charge_spin:
        fparam = (float(charge), float(spin))
    return Conditions(*pair, fparam)


def difference(a, b):
    return max(float((getattr(a, k) - getattr(b, k)).abs().max()) for k in ("energies", "forces", "virial"))


@pytest.fixture(scope="module")
def atoms():
    return testing.bulk_alloy(ELEMENTS)


@pytest.mark.parametrize("name", OPTIONS)
def test_scripted_model_equals_eager(name, atoms):
    model, config = model_of(name)
    given = values_of(config, 1, 2)
    assert difference(answer(jit_script(model), atoms, given), answer(model, atoms, given)) < 1e-12


@pytest.mark.parametrize("name", OPTIONS)
def test_energy_depends_on_what_is_given(name, atoms):
    model, config = model_of(name)
    first, second = (answer(model, atoms, values_of(config, *x)) for x in ((0, 1, 1.0), (1, 2, 2.0)))
    assert abs(float(first.energy - second.energy)) > 1e-4


@pytest.mark.parametrize("name", OPTIONS)
def test_folded_model_equals_unfolded(name, atoms):
    model, config = model_of(name)
    given = values_of(config, -2, 3)
    low, routing = lower(model, config, ["W", "Nb"], given)
    part = testing.bulk_alloy(["Nb", "W"])
    assert difference(answer(low, part), answer(model, part, given)) < 1e-12
    assert not low.conditions.takes_charge_spin
    assert low.conditions.n_fparam == low.conditions.n_case == 0
    assert routing.level == "configuration" or routing.is_table


@pytest.mark.parametrize("name", OPTIONS)
def test_pruned_model_with_open_conditions_equals_full(name):
    model, config = model_of(name)
    low, _ = lower(model, config, ["W", "Nb"])
    part = testing.bulk_alloy(["Nb", "W"])
    given = values_of(config, -2, 3)
    assert difference(answer(low, part, given), answer(model, part, given)) < 1e-12


@pytest.mark.parametrize("name", ["both, case embedding", "skip path", "skip path, concatenated embedding"])
@pytest.mark.parametrize("what", ["charge and spin", "frame parameters"])
def test_part_of_the_conditions_can_be_folded(name, what, atoms):
    model, config = model_of(name)
    given = values_of(config, 1, 2)
    folded, left = Conditions(1, 2), Conditions(fparam=given.fparam)
    if what == "frame parameters":
        folded, left = left, folded
    low, _ = lower(model, config, None, folded)
    assert difference(answer(low, atoms, left), answer(model, atoms, given)) < 1e-12
    assert difference(answer(jit_script(low), atoms, left), answer(model, atoms, given)) < 1e-12


@pytest.mark.parametrize("name", OPTIONS)
def test_a_batch_of_mixed_conditions_equals_single_evaluations(name):
    model, config = model_of(name)
    structures = [
        testing.molecule(["Nb", "W"]),
        testing.molecule(["Mo", "Ta"], seed=5),
        testing.molecule(["Nb", "W"]),
    ]
    given = [values_of(config, *x) for x in ((0, 1, 1.0), (3, 4, 0.2), (-5, 6, 3.0))]
    alone = torch.cat([answer(model, a, c).energies for a, c in zip(structures, given, strict=True)])
    parts = [graph_of(a, ELEMENTS, model.cutoff) for a in structures]
    n = len(structures[0])
    charge_spin, fparam = condition_tensors(given)
    together = model(
        torch.cat([t for t, _, _ in parts]),
        torch.cat([e + n * k for k, (_, e, _) in enumerate(parts)], 1),
        torch.cat([v for _, _, v in parts]),
        torch.arange(3).repeat_interleave(n), 3, charge_spin, fparam,
    )  # fmt: skip
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["both, case embedding", "pack", "skip path"])
def test_forces_can_be_differentiated_again(name):
    config = testing.random_config(
        ELEMENTS, **{"nlayers": 2, "n_dim": 8, "e_dim": 4, "a_dim": 4, "axis_neuron": 2, **OPTIONS[name],
                     "activation_function": "tanh"}
    )  # fmt: skip
    model = testing.random_potential(config)
    small = testing.molecule(ELEMENTS)[:4]
    types, edge_index, vec = graph_of(small, ELEMENTS, model.cutoff)
    charge_spin, fparam = condition_tensors([values_of(config, 1, 2)])
    weight = model.conditions.embedding.mix_matrix

    def energy(x, w):
        return torch.func.functional_call(
            model, {"conditions.embedding.mix_matrix": w},
            (types, edge_index, x, torch.zeros_like(types), 1, charge_spin, fparam),
        ).sum()  # fmt: skip

    inputs = (vec.clone().requires_grad_(True), weight.detach().clone().requires_grad_(True))
    assert torch.autograd.gradcheck(energy, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(energy, inputs, fast_mode=True)


@pytest.mark.parametrize("n_dim", [8, 100, 200, 400])
def test_charge_and_spin_embedding_follows_the_formula_and_its_residual_rule(n_dim):
    torch.manual_seed(3)
    module = ConditionEmbedding(n_dim, "silu").double()
    charge, spin = -7, 4
    c, s = module.charge_matrix[charge + 100].clone(), module.spin_matrix[spin].clone()
    for row, index, width in ((c, charge + 100, 200), (s, spin, 100)):
        if n_dim == width:
            row[index] += 1
        if n_dim == 2 * width:
            row[index] += 1
            row[width + index] += 1
    expected = torch.nn.functional.silu(torch.cat([c, s]) @ module.mix_matrix + module.mix_bias)
    torch.testing.assert_close(module(torch.tensor([[charge, spin]]))[0], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("neuron", [(9, 5), (13, 5), (26, 5), (13,)])
@pytest.mark.parametrize("resnet_dt", [True, False])
def test_fitting_net_reads_features_then_frame_parameters_then_case(neuron, resnet_dt):
    """SPEC section 12: [d, (f - avg) * inv_std, case], with every skip path counted on that width."""
    config = testing.random_config(ELEMENTS, fitting={**THREE, "resnet_dt": resnet_dt}, neuron=neuron)
    model = testing.random_potential(config)
    net, inputs = model.readout.net, model.conditions
    v = torch.randn(5, 8, dtype=torch.float64)
    f = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 0.1]], dtype=torch.float64)
    condition = torch.tensor([0, 1, 1, 0, 1])
    normalised = (f - inputs.fparam_avg) * inputs.fparam_inv_std
    x = torch.cat([v, normalised[condition], inputs.case_embedding.expand(5, 2)], 1)
    for layer in net.layers:
        y = layer.phi(x @ layer.matrix + layer.bias)
        if layer.has_idt:
            y = y * layer.idt
        if y.size(1) == x.size(1):
            y = y + x
        elif y.size(1) == 2 * x.size(1):
            y = y + torch.cat([x, x], 1)
        x = y
    expected = (x @ net.out_matrix + net.out_bias)[:, 0]
    found = net(v, torch.zeros(5, dtype=torch.int64), condition, inputs.fitting_input(f))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("concat", [False, True])
def test_pack_layout_is_a_model_whose_type_table_has_the_charge_and_spin_embedding(kind, concat, atoms):
    """`0415_moe_pack` routes on Y + c, embeds Y + c and appends Y + c: all of them read the table."""
    options = {"n_routed": 4, "kind": kind, "concat_output_tebd": concat, "use_tebd_bias": True}
    config = testing.random_config(ELEMENTS, **{**PACK, **options})
    model = testing.random_potential(config)
    e = model.conditions.embedding
    mixed = torch.cat([e.charge_matrix[100 - 2], e.spin_matrix[3]]) @ e.mix_matrix + e.mix_bias
    plain = MoEPotential(testing.random_config(ELEMENTS, **options))
    set_precision(plain, "float64", "float64")
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("conditions.")}
    for owner in ("embedding", "readout.net"):
        state[f"{owner}.table.bias"] = state[f"{owner}.table.bias"] + e.phi(mixed)
    plain.load_state_dict(state)
    given = Conditions(-2, 3)
    assert difference(answer(model, atoms, given), answer(plain, atoms)) < 1e-12
    bare = MoEPotential(testing.random_config(ELEMENTS, **{**PACK, **options, "route_on_charge_spin": False}))
    set_precision(bare, "float64", "float64")
    bare.load_state_dict(model.state_dict())
    assert difference(answer(bare, atoms, given), answer(model, atoms, given)) > 1e-6


def test_fixing_charge_and_spin_drops_experts_that_are_no_longer_reached():
    config = testing.random_config(ELEMENTS, **{**PACK, "n_routed": 12, "top_k": 1, "n_shared": 0})
    model = testing.random_potential(config)
    open_model, _ = lower(model, config)
    low, _ = lower(model, config, None, Conditions(2, 3))
    assert open_model.layers[0].node_self_mlp.matrix.size(0) == 12
    assert low.layers[0].node_self_mlp.matrix.size(0) <= len(ELEMENTS)


@pytest.mark.parametrize("name", ["charge and spin", "frame parameters"])
def test_a_model_says_what_it_was_not_given(name, atoms):
    model, _ = model_of(name)
    with pytest.raises(RuntimeError, match=r"this model takes .*: expected (charge_spin|fparam)"):
        answer(model, atoms)


def test_condition_inputs_stay_in_double_precision():
    model, _ = model_of("both, case embedding")
    set_precision(model, "float32", "float32")
    given = condition_tensors([Conditions(1, 2, (0.1, 0.2, 0.3))])
    assert model.conditions.shift(given[0]).dtype == torch.float64
    assert model.conditions.fitting_input(given[1]).dtype == torch.float64


# --- checkpoints -----------------------------------------------------------------------------------


def checkpoint(name):
    return torch.load(DATA / "oracle" / "models" / f"{name}.pt", weights_only=True)


def imported(tmp_path, data):
    path = tmp_path / "edited.pt"
    torch.save(data, path)
    found = load_checkpoint(path)
    return build_model(found, torch.float64), found


def add_charge_spin(data, seed=0):
    """Add a charge and spin embedding to a checkpoint; returns c of charge -2, multiplicity 3."""
    state, generator = data["model"], torch.Generator().manual_seed(seed)
    descriptor = state["_extra_state"]["model_params"]["descriptor"]
    n_dim = descriptor["repflow"]["n_dim"]
    descriptor["add_chg_spin_ebd"] = True

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.3

    prefix = "model.Default.atomic_model.descriptor."
    table = "embedding.embedding.embedding_net.layers.0.matrix"
    chg = state[f"{prefix}chg_{table}"] = draw(200, n_dim)
    spin = state[f"{prefix}spin_{table}"] = draw(100, n_dim)
    matrix = state[f"{prefix}mix_cs_mlp.matrix"] = draw(2 * n_dim, n_dim)
    bias = state[f"{prefix}mix_cs_mlp.bias"] = draw(n_dim)
    z = torch.cat([chg[98], spin[3]]) @ matrix + bias
    kind, _, threshold = descriptor["activation_function"].partition(":")
    assert kind == "silut"
    t = float(threshold)
    s = 1 / (1 + np.exp(-t))
    slope = s + t * s * (1 - s)
    return torch.where(z < t, z * torch.sigmoid(z), torch.tanh(slope * (z - t)) + t * s)


def add_fparam(data, values):
    """Add two frame parameters to a checkpoint; returns what they add to the first layer (n_0) for `values`."""
    state = data["model"]
    fitting = state["_extra_state"]["model_params"]["fitting_net"]
    fitting["numb_fparam"] = 2
    prefix = "model.Default.atomic_model.fitting_net."
    average = state[prefix + "fparam_avg"] = torch.tensor([0.3, -0.2], dtype=torch.float64)
    inverse = state[prefix + "fparam_inv_std"] = torch.tensor([1.5, 0.7], dtype=torch.float64)
    rows = torch.randn(
        2, fitting["neuron"][0], dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )
    for names in ("networks", "_networks"):
        key = f"{prefix}filter_layers.{names}.0.layers.0.matrix"
        state[key] = torch.cat([state[key], rows])
    return ((torch.tensor(values, dtype=torch.float64) - average) * inverse) @ rows


def shift_plain(name, c, added):
    """The checkpoint without conditions whose table and first bias have them by hand."""
    data = checkpoint(name)
    prefix = "model.Default.atomic_model."
    data["model"][prefix + "descriptor.type_embedding.embedding.embedding_net.layers.0.matrix"] += c
    for names in ("networks", "_networks"):
        key = f"{prefix}fitting_net.filter_layers.{names}.0.layers.0.bias"
        data["model"][key] = data["model"][key] + added
    return data


def test_pack_checkpoint_of_one_input_for_both_reads_as_the_formulas_say(tmp_path):
    data = checkpoint("F1_pack_moe")
    c = add_charge_spin(data)
    added = add_fparam(data, [-2.0, 3.0])
    model, found = imported(tmp_path, data)
    assert found.config.fparam_is_charge_spin
    assert found.config.routes_on_charge_spin
    assert found.config.conditions().charge_spin.default is None
    plain, _ = imported(tmp_path, shift_plain("F1_pack_moe", c, added))
    atoms = testing.bulk_alloy(found.config.type_map)
    given = Conditions(-2, 3, (-2.0, 3.0))
    assert difference(answer(model, atoms, given), answer(plain, atoms)) < 1e-12


def test_moe_checkpoint_routes_on_the_bare_table(tmp_path, atoms):
    data = checkpoint("E1_moe_all")
    add_charge_spin(data)
    _, found = imported(tmp_path, data)
    assert not found.config.routes_on_charge_spin
    assert found.config.conditions().fparam is None


def test_official_checkpoint_with_all_that_touches_the_table(tmp_path):
    """Type embedding bias and concatenated embedding: both get the charge and spin embedding."""
    name = "C1_polysw_tebdbias_concat_heads2_norm"
    data = checkpoint(name)
    c = add_charge_spin(data)
    model, found = imported(tmp_path, data)
    plain, _ = imported(tmp_path, shift_plain(name, c, 0.0))
    atoms = testing.bulk_alloy(found.config.type_map)
    assert difference(answer(model, atoms, Conditions(-2, 3)), answer(plain, atoms)) < 1e-12


def test_stored_default_counts_more_than_the_option(tmp_path):
    data = checkpoint("A_dyn")
    add_fparam(data, [0.0, 0.0])
    data["model"]["_extra_state"]["model_params"]["fitting_net"]["default_fparam"] = [0.0, 1.0]
    assert imported(tmp_path, data)[1].config.fitting.default_fparam == [0.0, 1.0]
    key = "model.Default.atomic_model.fitting_net.default_fparam_tensor"
    data["model"][key] = torch.tensor([0.5, 0.25], dtype=torch.float64)
    assert imported(tmp_path, data)[1].config.fitting.default_fparam == [0.5, 0.25]


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (
            ("descriptor", "default_chg_spin"),
            [0.5, 1.0],
            "default_chg_spin: charge = 0.5, expected a whole number",
        ),
        (
            ("descriptor", "default_chg_spin"),
            [0.0],
            "default_chg_spin: charge_spin has 1 number, expected two",
        ),
        (
            ("fitting_net", "default_fparam"),
            [1.0],
            r"default_fparam = \[1.0\], expected numb_fparam = 2 numbers",
        ),
        (
            ("fitting_net", "numb_aparam"),
            1,
            r"fitting_net.numb_aparam = 1 \(int\) is not supported, expected 0",
        ),
    ],
)
def test_checkpoints_with_impossible_values_are_refused(tmp_path, where, value, message):
    data = checkpoint("A_dyn")
    add_charge_spin(data)
    add_fparam(data, [0.0, 0.0])
    params = data["model"]["_extra_state"]["model_params"]
    params[where[0]][where[1]] = value
    with pytest.raises(Exception, match=message):
        imported(tmp_path, data)


def test_missing_embedding_of_a_checkpoint_is_named(tmp_path):
    data = checkpoint("A_dyn")
    add_charge_spin(data)
    del data["model"]["model.Default.atomic_model.descriptor.mix_cs_mlp.bias"]
    with pytest.raises(Exception, match=r"no tensor 'model.Default.atomic_model.descriptor.mix_cs_mlp.bias'"):
        imported(tmp_path, data)


def test_folding_leaves_the_full_model_as_it_was(atoms):
    model, config = model_of("both, case embedding")
    given = values_of(config, 1, 2)
    before = copy.deepcopy(model.state_dict())
    lower(model, config, None, fix(config.conditions(), 1, 2, given.fparam)[0])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
