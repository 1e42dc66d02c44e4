"""Each layer of the fused kernels alone: values against TorchScript's, gradients against finite differences (gradcheck)."""

import numpy as np
import pytest
import torch

from moecalc import _lib, testing
from moecalc._jit import jit_load
from moecalc.nn.model import angle_pairs
from moecalc.package.lower import lower
from moecalc.package.write import write_bare

ELEMENTS = ["Nb", "W"]
NAMES = ("v", "e", "a", "sw", "h", "asw")
OPTIONS = {
    "dense": {},
    "mixture": {"n_routed": 3},
    "two heads, res_avg": {"n_routed": 2, "n_multi_edge_message": 2, "update_style": "res_avg"},
    "static, unsmooth": {"use_dynamic_sel": False, "smooth_edge_update": False},
    "linear compression": {"a_compress_use_split": False},
    "tanh": {"activation_function": "tanh", "a_compress_rate": 0},
}


class Case:
    """A package, a graph in model order, and random inputs of its layers."""

    def __init__(self, path, options):
        config = testing.random_config(
            ELEMENTS, nlayers=3, **{"n_dim": 5, "e_dim": 4, "a_dim": 4, "axis_neuron": 2, **options}
        )
        low, _ = lower(testing.random_potential(config), config)
        write_bare(path, low)
        self.runner = _lib.load().LayerRunner(str(path), "float64")
        self.model = jit_load(path)
        atoms = testing.molecule(ELEMENTS)[:5]
        atoms = atoms[np.argsort([ELEMENTS.index(s) for s in atoms.symbols], kind="stable")]
        self.types = np.array([ELEMENTS.index(s) for s in atoms.symbols])
        i, j, vec = testing.brute_force_edges(atoms, config.descriptor.e_rcut)
        far = np.linalg.norm(vec, axis=1) >= config.descriptor.a_rcut
        order = np.lexsort((far, i))
        self.edge_index, self.vec, near = np.stack([i, j])[:, order], vec[order], ~far[order]
        self.angles = angle_pairs(torch.tensor(self.edge_index[0]), torch.tensor(near), len(atoms))
        n_edge, n_angle, d = len(vec), self.angles.shape[1], config.descriptor
        rng = np.random.default_rng(0)
        shapes = [
            (len(atoms), d.n_dim),
            (n_edge, d.e_dim),
            (n_angle, d.a_dim),
            (n_edge,),
            (n_edge, 3),
            (n_angle,),
        ]
        self.inputs = [torch.tensor(rng.normal(size=shape)) for shape in shapes]

    def fused(self, layer, inputs, gradients=()):
        arrays = [x.detach().numpy() for x in inputs]
        out = self.runner.run(
            self.types, self.edge_index, self.vec, layer, arrays, [g.detach().numpy() for g in gradients]
        )
        return [torch.tensor(x) for x in out]

    def scripted(self, layer, inputs):
        v, e, a, sw, h, asw = inputs
        centre_type = self.types[self.edge_index[0]]
        splits = [
            [int(np.searchsorted(t, k)) for k in range(len(ELEMENTS) + 1)]
            for t in (self.types, centre_type, centre_type[self.angles[0].numpy()])
        ]
        features = self.model.embedding.group_features(torch.eye(len(ELEMENTS), dtype=torch.float64))
        module = list(self.model.layers.children())[layer]
        return module(
            v,
            e,
            a,
            sw,
            h,
            asw,
            torch.tensor(self.edge_index),
            self.angles,
            len(self.types),
            *splits,
            features,
        )


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = Case(folder / f"{len(cache)}.moe.pt", OPTIONS[name])
        return cache[name]

    return get


class Layer(torch.autograd.Function):
    """The fused layer and its hand-derived backward, for autograd."""

    @staticmethod
    def forward(ctx, case, layer, *inputs):
        ctx.case, ctx.layer = case, layer
        ctx.save_for_backward(*inputs)
        return tuple(case.fused(layer, inputs))

    @staticmethod
    def backward(ctx, *gradients):
        inputs = ctx.saved_tensors
        ctx.case.fused(ctx.layer, inputs)
        return (None, None, *ctx.case.fused(ctx.layer, inputs, gradients))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_layer_equals_torchscripts(case, name, layer):
    c = case(name)
    for got, want in zip(c.fused(layer, c.inputs), c.scripted(layer, c.inputs), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_pass_gradcheck(case, name, layer):
    c = case(name)
    inputs = [x.clone().requires_grad_(True) for x in c.inputs]
    if layer == 2:  # the last layer has neither angles nor an edge update: those inputs pass through
        for k in (2, 5):
            inputs[k] = inputs[k].detach()

    def run(*x):
        v, e, a = Layer.apply(c, layer, *x)
        return (v, e, a) if layer < 2 else (v, e)

    assert torch.autograd.gradcheck(run, tuple(inputs), eps=1e-6, atol=1e-6, rtol=1e-6, nondet_tol=0.0)


def test_unknown_layer_is_refused(case):
    c = case("dense")
    with pytest.raises(RuntimeError, match=r"expected a layer in \[0, 3\), got 7"):
        c.fused(7, c.inputs)


def test_wrong_number_of_inputs_is_refused(case):
    c = case("dense")
    with pytest.raises(RuntimeError, match="expected 6 inputs and 0 or 3 gradients, got 5 and 0"):
        c.fused(0, c.inputs[:5])
