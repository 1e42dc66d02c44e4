"""The reference model: formulas that no reference frame covers, derivatives, scripting."""

import copy

import pytest
import torch
from helpers import evaluate_atoms, graph_of

from moecalc import testing
from moecalc._jit import jit_script
from moecalc.nn import DescriptorConfig, RouterConfig
from moecalc.nn.activation import Activation
from moecalc.nn.moe import ExpertLinear, MoERouter, RowExperts
from moecalc.nn.repflow import RepFlowLayer
from moecalc.package.lower import lower
from moecalc.package.metadata import worst

ELEMENTS = ["Nb", "Mo", "Ta", "W"]


def molecule():
    return testing.molecule(ELEMENTS)


def max_difference(a, b):
    return worst(
        float((a.energy - b.energy).abs().max()),
        float((a.forces - b.forces).abs().max()),
        float((a.virial - b.virial).abs().max()),
    )


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("silu", torch.nn.functional.silu),
        ("tanh", torch.tanh),
        ("relu", torch.relu),
        ("gelu", lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        ("relu6", torch.nn.functional.relu6),
        ("softplus", torch.nn.functional.softplus),
        ("sigmoid", torch.sigmoid),
        ("linear", lambda x: x),
        ("none", lambda x: x),
    ],
)
def test_activation_is_the_one_of_its_name(name, reference):
    x = torch.linspace(-8, 8, 41, dtype=torch.float64)
    torch.testing.assert_close(Activation(name)(x), reference(x))


@pytest.mark.parametrize("name", ["silut:2.5", "custom_silu:2.5"])
def test_silut_joins_silu_with_equal_value_and_slope(name):
    phi = Activation(name)
    x = torch.tensor([2.5 - 1e-7, 2.5 + 1e-7], dtype=torch.float64, requires_grad=True)
    y = phi(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert abs(y[1] - y[0] - 2e-7 * slope[0]) < 1e-12
    assert abs(slope[1] - slope[0]) < 1e-6


def test_unknown_activation_is_refused_by_name():
    with pytest.raises(ValueError, match="activation_function 'swoosh', expected one of silu"):
        Activation("swoosh")


def test_topk_softmax_gate_normalises_over_the_selected_experts():
    router = MoERouter(4, 5, 2, 1)
    y = torch.randn(3, 4)
    ids, weights = router(y)
    logits = y @ router.gate
    top, expected = torch.topk(logits, 2)
    assert torch.equal(ids[:, :2], expected)
    assert torch.equal(ids[:, 2], torch.full((3,), 5))
    torch.testing.assert_close(weights[:, :2], torch.softmax(top, 1))
    assert torch.equal(weights[:, 2], torch.ones(3))


def test_softmax_topk_gate_keeps_weights_of_the_full_softmax():
    router = MoERouter(4, 5, 2, 0, "softmax_topk")
    y = torch.randn(3, 4)
    _, weights = router(y)
    torch.testing.assert_close(weights, torch.topk(torch.softmax(y @ router.gate, 1), 2).values)
    assert (weights.sum(1) < 1).all()


def explicit_mixture(x, group, module: ExpertLinear, route, kind):
    """SPEC section 7 and section 10, row by row."""
    ids, weights = route
    rows = []
    for row, g in zip(x, group, strict=True):
        z = [row @ module.matrix[e] + module.bias[e] for e in ids[g]]
        p = weights[g]
        if kind == "mlp":
            rows.append(sum(w * module.phi(u) for w, u in zip(p, z, strict=True)))
        else:
            rows.append(module.phi(sum(w * u for w, u in zip(p, z, strict=True))))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_experts_equal_the_formula_row_by_row(kind):
    torch.manual_seed(1)
    module = RowExperts(5, 3, "silu", 7, "r", kind).double()
    router = MoERouter(4, 6, 2, 1).double()
    route = router(torch.randn(3, 4, dtype=torch.float64))
    x = torch.randn(9, 5, dtype=torch.float64)
    y = module(x, [0, 4, 4, 9], {"r": route})
    torch.testing.assert_close(y, explicit_mixture(x, [0] * 4 + [2] * 5, module, route, kind))


def test_experts_that_no_row_routes_to_are_not_touched():
    module = RowExperts(5, 3, "silu", 4, "r")
    with torch.no_grad():
        module.matrix[3] = float("nan")
    route = (torch.tensor([[0, 1], [2, 3]]), torch.full((2, 2), 0.5))
    assert torch.isfinite(module(torch.randn(6, 5), [0, 6, 6], {"r": route})).all()


OPTIONS = {
    "dense": {},
    "mlp": {"n_routed": 4},
    "mole": {"n_routed": 4, "kind": "linear"},
    "paper gate": {"n_routed": 4, "gate": "softmax_topk", "n_shared": 0},
    "router per group": {"n_routed": 4, "shared_routers": True},
    "sequential": {"sequential_update": True},
    "sequential mixture": {"n_routed": 3, "sequential_update": True},
    "no angles": {"n_routed": 3, "update_angle": False},
    "linear compression": {"n_routed": 3, "a_compress_use_split": False},
    "no compression": {"n_routed": 3, "a_compress_rate": 0},
    "two heads, res_incr": {"n_routed": 3, "n_multi_edge_message": 2, "update_style": "res_incr"},
    "res_avg, static, unsmooth": {
        "n_routed": 3,
        "update_style": "res_avg",
        "use_dynamic_sel": False,
        "smooth_edge_update": False,
    },
    "polynomial switch": {"n_routed": 3, "use_exp_switch": False, "edge_init_use_dist": False},
    "configuration": {"n_routed": 4, "routing": "configuration", "kind": "linear"},
    "configuration mlp": {"n_routed": 4, "routing": "configuration"},
    "concatenated embedding": {"n_routed": 3, "concat_output_tebd": True, "use_tebd_bias": True},
    "one layer": {"n_routed": 3, "nlayers": 1},
    "econf": {"use_econf_tebd": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_scripted_model_equals_eager(name):
    model = testing.random_potential(testing.random_config(ELEMENTS, **OPTIONS[name]))
    atoms = testing.bulk_alloy(ELEMENTS)
    assert max_difference(evaluate_atoms(jit_script(model), atoms), evaluate_atoms(model, atoms)) < 1e-12


@pytest.mark.parametrize("name", OPTIONS)
def test_lowered_model_equals_full(name):
    config = testing.random_config(ELEMENTS, **OPTIONS[name])
    model = testing.random_potential(config)
    low, _ = lower(model, config, ["W", "Nb"])
    atoms = testing.bulk_alloy(["Nb", "W"])
    assert max_difference(evaluate_atoms(low, atoms), evaluate_atoms(model, atoms)) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "sequential mixture", "polynomial switch"])
def test_forces_can_be_differentiated_again(name):
    config = testing.random_config(
        ELEMENTS, n_dim=4, e_dim=4, a_dim=4, axis_neuron=2, activation_function="tanh", **{
            k: v for k, v in OPTIONS[name].items() if k != "n_dim"
        }
    )  # fmt: skip
    model = testing.random_potential(config)
    atoms = testing.molecule(ELEMENTS)[:4]
    types, edge_index, vec = graph_of(atoms, ELEMENTS, model.cutoff)
    system = torch.zeros_like(types)

    def energy(x):
        return model(types, edge_index, x, system, 1).sum()

    x = vec.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(energy, (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(energy, (x,), fast_mode=True)


def test_configuration_routing_follows_the_composition_of_each_structure():
    config = testing.random_config(ELEMENTS, n_routed=4, routing="configuration")
    model = testing.random_potential(config)
    first, second = testing.molecule(["Nb", "W"]), testing.molecule(["Mo", "Ta"], seed=5)
    alone = [evaluate_atoms(model, a) for a in (first, second)]
    t1, e1, v1 = graph_of(first, ELEMENTS, model.cutoff)
    t2, e2, v2 = graph_of(second, ELEMENTS, model.cutoff)
    system = torch.cat([torch.zeros_like(t1), torch.ones_like(t2)])
    together = model(torch.cat([t1, t2]), torch.cat([e1, e2 + len(t1)], 1), torch.cat([v1, v2]), system, 2)
    torch.testing.assert_close(together, torch.cat([a.energies for a in alone]), rtol=0, atol=1e-12)


def test_configuration_routing_uses_the_mean_type_embedding():
    config = testing.random_config(ELEMENTS, n_routed=4, routing="configuration")
    model = testing.random_potential(config)
    fractions = torch.tensor([[0.25, 0.5, 0.0, 0.25]], dtype=torch.float64)
    table = model.embedding.table()
    expected = 0.25 * table[0] + 0.5 * table[1] + 0.25 * table[3]
    torch.testing.assert_close(model.embedding.group_features(fractions)[0], expected)


def test_order_of_edges_does_not_matter():
    model = testing.random_potential(testing.random_config(ELEMENTS, n_routed=3))
    types, edge_index, vec = graph_of(molecule(), ELEMENTS, model.cutoff)
    system = torch.zeros_like(types)
    shuffled = torch.randperm(vec.size(0))
    torch.testing.assert_close(
        model(types, edge_index[:, shuffled], vec[shuffled], system, 1),
        model(types, edge_index, vec, system, 1),
        rtol=0,
        atol=1e-12,
    )


def test_edges_beyond_the_cutoff_are_dropped():
    model = testing.random_potential(testing.random_config(ELEMENTS, n_routed=3))
    atoms = testing.bulk_alloy(ELEMENTS)
    system = torch.zeros(len(atoms), dtype=torch.int64)
    near = model(*graph_of(atoms, ELEMENTS, model.cutoff), system, 1)
    far = model(*graph_of(atoms, ELEMENTS, model.cutoff + 1.0), system, 1)
    torch.testing.assert_close(near, far, rtol=0, atol=1e-12)


def test_no_atoms_give_no_energy():
    model = testing.random_potential(testing.random_config(ELEMENTS, n_routed=3))
    none = torch.zeros(0, dtype=torch.int64)
    energies = model(
        none, torch.zeros((2, 0), dtype=torch.int64), torch.zeros((0, 3), dtype=torch.float64), none, 1
    )
    assert energies.shape == (0,)


def test_dead_updates_of_the_last_layers_do_not_exist():
    config = testing.random_config(ELEMENTS, nlayers=3).descriptor
    assert [config.layer_is_live(k) for k in range(3)] == [(True, True), (True, False), (False, False)]
    layer = RepFlowLayer(config, testing.random_config(ELEMENTS).moe, 2)
    assert not hasattr(layer, "edge_self_linear")


def test_training_step_changes_every_parameter():
    config = testing.random_config(ELEMENTS, n_routed=2)
    model = testing.random_potential(config)
    model.train()
    types, edge_index, vec = graph_of(testing.bulk_alloy(ELEMENTS), ELEMENTS, model.cutoff)
    x = vec.clone().requires_grad_(True)
    energy = model(types, edge_index, x, torch.zeros_like(types), 1).sum()
    (g,) = torch.autograd.grad(energy, x, create_graph=True)
    (energy**2 + (g**2).sum()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert idle == []


def test_deep_copies_do_not_share_weights():
    model = testing.random_potential(testing.random_config(ELEMENTS))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embedding.edge_bias.add_(1.0)
    assert not torch.equal(other.embedding.edge_bias, model.embedding.edge_bias)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a_rcut": 9.0}, "a_rcut = 9.0, expected at most e_rcut = 4.5"),
        ({"e_rcut_smth": 4.5}, "e_rcut_smth = 4.5, expected below e_rcut = 4.5"),
        ({"axis_neuron": 20}, "axis_neuron = 20, expected at most"),
        ({"a_compress_e_rate": 9}, "exceed n_dim"),
        ({"a_compress_rate": 8}, "leaves no columns"),
        ({"update_style": "res_avg", "sequential_update": True}, "expected res_residual"),
        ({"activation_function": "swoosh"}, "expected one of silu"),
        ({"e_rcutt": 1.0}, "e_rcutt"),
    ],
)
def test_inconsistent_descriptor_options_are_refused(change, message):
    good = testing.random_config(ELEMENTS).descriptor.model_dump()
    with pytest.raises(ValueError, match=message):
        DescriptorConfig.model_validate({**good, **change})


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"n_routed_experts": 2, "top_k": 3}, "top_k = 3, expected at most n_routed_experts = 2"),
        ({"n_routed_experts": 2, "top_k": 0}, "expected at least one active expert"),
    ],
)
def test_impossible_routers_are_refused(router, message):
    with pytest.raises(ValueError, match=message):
        RouterConfig.model_validate(router)
