"""The fitting net of the CPU kernels against the TorchScript of the same package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluators import ELEMENTS, STRUCTURES, assert_same, evaluate, evaluator

from moecalc import testing
from moecalc.package.importers import set_precision
from moecalc.package.lower import lower
from moecalc.package.write import write_bare

FITTING = {
    "two equal layers": {"neuron": [24, 24]},
    "layers that double": {"neuron": [8, 16, 32]},
    "no residual": {"neuron": [20, 13, 7]},
    "one neuron": {"neuron": [1]},
    "one layer": {"neuron": [30]},
    "no layer": {"neuron": []},
    "without time steps": {"neuron": [24, 24], "resnet_dt": False},
    "concatenated type table": {"neuron": [24, 24], "concat_output_tebd": True},
    "concatenated, residual of the input": {"neuron": [16, 32], "concat_output_tebd": True},
    "case embedding": {"neuron": [24, 24], "dim_case_embd": 3},
    "case embedding and table, residual of the input": {
        "neuron": [19, 38],
        "dim_case_embd": 3,
        "concat_output_tebd": True,
    },
    "an element without energy": {"neuron": [24, 24], "atom_exclude_types": [1]},
    "tanh": {"activation_function": "tanh"},
    "silu": {"activation_function": "silu"},
    "silut": {"activation_function": "silut:0.1"},
    "gelu": {"activation_function": "gelu"},
    "sigmoid": {"activation_function": "sigmoid"},
    "relu": {"activation_function": "relu"},
    "relu6": {"activation_function": "relu6"},
    "linear": {"activation_function": "linear"},
}


def package(path, fitting, dtype="float64", fitting_dtype="float64"):
    """A random potential whose fitting net has these options and precision."""
    options = dict(fitting)
    descriptor = {k: options.pop(k) for k in ("concat_output_tebd",) if k in options}
    config = testing.random_config(ELEMENTS, n_routed=3, **descriptor)
    config = config.model_copy(update={"fitting": config.fitting.model_copy(update=options)})
    model = testing.random_potential(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        net = model.readout.net
        if options.get("dim_case_embd"):
            net.case_embedding.copy_(torch.randn(options["dim_case_embd"]))
        for layer in net.layers:
            if layer.has_idt:
                layer.idt.copy_(torch.randn(layer.idt.shape))
    set_precision(model, dtype, fitting_dtype)
    low, _ = lower(model, config)
    write_bare(path, low)
    return path


@pytest.mark.parametrize("name", FITTING)
def test_the_readout_equals_torchscripts(tmp_path, name):
    path = package(tmp_path / "x.moe.pt", FITTING[name])
    kernels, reference = evaluator(path, backend="fused"), evaluator(path, backend="torchscript")
    for atoms in STRUCTURES.values():
        assert_same(evaluate(kernels, atoms), evaluate(reference, atoms), 1e-12)
        alone = evaluate(kernels, atoms, forces=False, virial=False)
        assert_same(
            {**alone, "forces": 0, "virial": 0},
            {**evaluate(reference, atoms), "forces": 0, "virial": 0},
            1e-12,
        )


@pytest.mark.parametrize("cpu", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize(
    ("dtype", "fitting"), [("float32", "float32"), ("float32", "float64"), ("float64", "float32")]
)
def test_the_readout_has_its_own_precision(tmp_path, cpu, dtype, fitting):
    path = package(tmp_path / "x.moe.pt", FITTING["two equal layers"], dtype, fitting)
    kernels, reference = evaluator(path, "", "fused", cpu), evaluator(path, "", "torchscript")
    for atoms in STRUCTURES.values():
        assert_same(evaluate(kernels, atoms), evaluate(reference, atoms), 5e-6)


def test_an_activation_without_kernel_is_computed_without_it(tmp_path):
    path = package(tmp_path / "x.moe.pt", {"activation_function": "softplus"})
    plain, reference = evaluator(path), evaluator(path, backend="torchscript")
    assert (plain.backend, plain.backend_reason) == ("plain", "activation softplus")
    assert_same(evaluate(plain, STRUCTURES["bulk"]), evaluate(reference, STRUCTURES["bulk"]), 1e-11)


def test_excluded_elements_have_no_energy(tmp_path):
    path = package(tmp_path / "x.moe.pt", FITTING["an element without energy"])
    atoms = STRUCTURES["bulk"]
    energies = evaluate(evaluator(path), atoms)["energies"]
    assert np.array_equal(energies == 0.0, atoms.symbols == ELEMENTS[1])
