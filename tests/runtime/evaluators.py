"""Evaluators of random packages with every option, and their results for a few structures."""

from __future__ import annotations

import os
from contextlib import contextmanager

import numpy as np
from helpers import graph_of

from moecalc import _lib, testing
from moecalc._torch_lib import load_torch_library

ELEMENTS = ["Nb", "Mo", "Ta", "W"]

STRUCTURES = {
    "bulk": testing.bulk_alloy(ELEMENTS),
    "slab": testing.slab(ELEMENTS),
    "molecule": testing.molecule(ELEMENTS),
    "one atom": testing.one_atom_cell("W"),
    "isolated": testing.molecule(ELEMENTS)[:1],
}


@contextmanager
def environment(**values):
    """Environment variables, which an evaluator reads when it is made."""
    old = {name: os.environ.get(name) for name in values}
    os.environ.update({k: v for k, v in values.items() if v})
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def evaluator(path, dtype="float64", backend="", cpu="", keep=""):
    if backend == "torchscript":
        load_torch_library()
    with environment(MOECALC_BACKEND=backend, MOECALC_CPU=cpu, MOECALC_KEEP=keep):
        return _lib.load().Evaluator(str(path), "cpu", dtype)


def evaluate(model, atoms, extra=0.5, **kwargs):
    types, edge_index, vec = graph_of(atoms, model.elements, model.cutoff + extra)
    system = np.zeros(len(types), dtype=np.int64)
    return testing.evaluate_edges(model, types.numpy(), edge_index.numpy(), vec.numpy(), system, 1, **kwargs)


def assert_same(got, want, tolerance):
    for key in ("energies", "forces", "virial"):
        scale = max(1.0, np.abs(want[key]).max(initial=0.0))
        assert np.abs(got[key] - want[key]).max(initial=0.0) <= tolerance * scale, key


OPTIONS = {
    "dense": {},
    "wide": {"n_dim": 40, "e_dim": 24, "a_dim": 20},
    "all wider than 64 but angles": {"n_dim": 72, "e_dim": 88, "a_dim": 40, "n_routed": 3},
    "all wider than 64": {"n_dim": 136, "e_dim": 72, "a_dim": 72},
    "mlp": {"n_routed": 4},
    "merged linear": {"n_routed": 4, "kind": "linear"},
    "router per group": {"n_routed": 4, "shared_routers": True, "n_shared": 0},
    "no angles": {"n_routed": 3, "update_angle": False},
    "linear compression": {"n_routed": 3, "a_compress_use_split": False},
    "no compression": {"n_routed": 3, "a_compress_rate": 0},
    "two heads, res_incr": {"n_routed": 3, "n_multi_edge_message": 2, "update_style": "res_incr"},
    "res_avg, static, unsmooth": {"n_routed": 3, "update_style": "res_avg", "use_dynamic_sel": False, "smooth_edge_update": False},
    "polynomial switch, edges from the switch": {"n_routed": 3, "use_exp_switch": False, "edge_init_use_dist": False},
    "protected distance": {"env_protection": 0.1, "edge_init_use_dist": False},
    "configuration": {"n_routed": 4, "routing": "configuration", "kind": "linear"},
    "configuration mlp": {"n_routed": 4, "routing": "configuration"},
    "concatenated embedding": {"n_routed": 3, "concat_output_tebd": True, "use_tebd_bias": True},
    "one layer": {"n_routed": 3, "nlayers": 1},
    "two layers": {"n_routed": 3, "nlayers": 2},
    "five layers": {"nlayers": 5},
    "silu": {"activation_function": "silu"},
    "silut with a low threshold": {"activation_function": "silut:0.1"},
    "tanh": {"activation_function": "tanh"},
    "gelu": {"activation_function": "gelu"},
    "sigmoid": {"activation_function": "sigmoid", "update_style": "res_avg"},
    "relu": {"activation_function": "relu"},
    "relu6": {"activation_function": "relu6"},
    "linear": {"activation_function": "linear"},
}  # fmt: skip
