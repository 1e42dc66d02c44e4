"""The fused CPU kernels against the TorchScript of the same package, for every option and instruction set."""

import numpy as np
import pytest
from evaluators import ELEMENTS, OPTIONS, STRUCTURES, assert_same, environment, evaluate, evaluator

from moecalc import MoECalculator, _lib, testing
from moecalc.package.lower import lower
from moecalc.package.write import write_bare


@pytest.mark.parametrize("name", OPTIONS)
def test_fused_equals_torchscript(write, name):
    path = write(**OPTIONS[name])
    fused, reference = evaluator(path, backend="fused"), evaluator(path, backend="torchscript")
    for atoms in STRUCTURES.values():
        assert_same(evaluate(fused, atoms), evaluate(reference, atoms), 1e-11)


@pytest.mark.parametrize("name", OPTIONS)
def test_plain_equals_torchscript(write, name):
    path = write(**OPTIONS[name])
    plain, reference = evaluator(path, backend="plain"), evaluator(path, backend="torchscript")
    assert (plain.backend, reference.backend) == ("plain", "torchscript")
    for atoms in STRUCTURES.values():
        got, want = (evaluate(model, atoms, atom_virial=True) for model in (plain, reference))
        assert_same(got, want, 1e-11)
        assert np.abs(got["atom_virial"] - want["atom_virial"]).max(initial=0.0) < 1e-11


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_kept_for_the_backward_does_not_change_the_results(write, name, dtype):
    path = write(**OPTIONS[name])
    kept, again = evaluator(path, dtype), evaluator(path, dtype, keep="0")
    for atoms in (STRUCTURES["bulk"], STRUCTURES["slab"]):
        one, two = evaluate(kept, atoms), evaluate(again, atoms)
        assert np.array_equal(one["forces"], two["forces"])


@pytest.mark.parametrize("keep", ["much", "-1", "nan", "1 MB"])
def test_unusable_amount_to_keep_is_refused(write, keep):
    with pytest.raises(
        RuntimeError, match=f"expected MOECALC_KEEP to be a number of MiB per thread, got '{keep}'"
    ):
        evaluator(write(), keep=keep)


@pytest.mark.parametrize("cpu", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_instruction_set_gives_the_same(write, cpu, dtype):
    path = write(**OPTIONS["mlp"])
    fused, reference = evaluator(path, dtype, cpu=cpu), evaluator(path, backend="torchscript")
    if fused.backend != f"fused {cpu}":
        pytest.skip(f"this processor has no {cpu}")
    for atoms in STRUCTURES.values():
        assert_same(evaluate(fused, atoms), evaluate(reference, atoms), 1e-11 if dtype == "float64" else 5e-6)


def test_float32_forces_are_as_accurate_as_torchs(write):
    path = write(**OPTIONS["wide"])
    exact = evaluate(evaluator(path, "float64"), STRUCTURES["bulk"])
    errors = [
        np.abs(
            evaluate(evaluator(path, "float32", backend), STRUCTURES["bulk"])["forces"] - exact["forces"]
        ).max()
        for backend in ("fused", "torchscript")
    ]
    assert errors[0] < 3 * errors[1]


def test_per_atom_virials_equal_torchscripts(write):
    path = write(**OPTIONS["mlp"])
    fused, reference = (
        evaluate(evaluator(path, backend=b), STRUCTURES["slab"], atom_virial=True)
        for b in ("fused", "torchscript")
    )
    assert np.abs(fused["atom_virial"] - reference["atom_virial"]).max() < 1e-11


def test_energies_alone_are_the_same(write):
    model = evaluator(write(**OPTIONS["mlp"]))
    full = evaluate(model, STRUCTURES["bulk"])
    alone = evaluate(model, STRUCTURES["bulk"], forces=False, virial=False)
    assert np.array_equal(full["energies"], alone["energies"])


def test_results_do_not_depend_on_what_was_evaluated_before(write):
    model = evaluator(write(**OPTIONS["mlp"]))
    first = evaluate(model, STRUCTURES["molecule"])
    for atoms in STRUCTURES.values():
        evaluate(model, atoms)
    again = evaluate(model, STRUCTURES["molecule"])
    assert np.array_equal(first["forces"], again["forces"])


def test_results_do_not_depend_on_the_number_of_threads(write):
    model = evaluator(write(**OPTIONS["mlp"]))
    forces = []
    for n in (1, 2, 3):
        model.num_threads = n
        forces.append(evaluate(model, STRUCTURES["bulk"])["forces"])
    assert np.array_equal(forces[0], forces[1])
    assert np.array_equal(forces[0], forces[2])


def test_excluded_pairs_stay_excluded(tmp_path):
    config = testing.random_config(ELEMENTS, n_routed=3, exclude_types=[(0, 1), (2, 2)])
    low, _ = lower(testing.random_potential(config), config)
    write_bare(tmp_path / "x.moe.pt", low)
    fused, reference = (evaluator(tmp_path / "x.moe.pt", backend=b) for b in ("fused", "torchscript"))
    assert_same(evaluate(fused, STRUCTURES["bulk"]), evaluate(reference, STRUCTURES["bulk"]), 1e-11)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sequential_update": True}, "sequential_update"),
        ({"activation_function": "softplus"}, "activation softplus"),
    ],
)
def test_options_without_kernels_run_by_the_plain_backend_and_say_so(write, options, reason):
    path = write(**options)
    model, reference = evaluator(path), evaluator(path, backend="torchscript")
    assert (model.backend, model.backend_reason) == ("plain", reason)
    for atoms in STRUCTURES.values():
        assert_same(evaluate(model, atoms), evaluate(reference, atoms), 1e-11)


def test_calculator_warns_once_of_the_slower_path(write):
    path = write(sequential_update=True)
    with pytest.warns(
        UserWarning, match=r"evaluated by the plain backend, several times slower .*sequential_update"
    ):
        calc = MoECalculator(path, check=False, device="cpu")
    assert MoECalculator(path, check=False, device="cpu").elements == calc.elements


def test_demanding_fused_kernels_where_there_are_none_is_refused(write):
    with pytest.raises(RuntimeError, match="the fused kernels do not cover sequential_update"):
        evaluator(write(sequential_update=True), backend="fused")


def test_unknown_backend_is_refused(write):
    with pytest.raises(
        RuntimeError,
        match="expected MOECALC_BACKEND to be 'fused', 'plain', 'torchscript' or 'cuda-emulation', got 'magic'",
    ):
        evaluator(write(), backend="magic")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MOECALC_CPU", "sse", "expected MOECALC_CPU to be 'avx512', 'avx2' or 'generic', got 'sse'"),
        ("MOECALC_DEVICE_MEMORY", "12GB", "expected MOECALC_DEVICE_MEMORY to be a number of MiB, got '12GB'"),
        ("MOECALC_CUDA_GRAPHS", "no", "expected MOECALC_CUDA_GRAPHS to be '0' or '1', got 'no'"),
        (
            "MOECALC_EMULATION_REVERSED",
            "yes",
            "expected MOECALC_EMULATION_REVERSED to be '0' or '1', got 'yes'",
        ),
    ],
)
def test_settings_are_read_strictly(write, variable, value, message):
    with environment(**{variable: value}), pytest.raises(RuntimeError, match=message):
        _lib.load().Evaluator(str(write()), "cpu")


def test_the_backend_may_be_given_instead_of_its_variable(write):
    path = str(write())
    assert _lib.load().Evaluator(path, "cpu", backend="plain").backend == "plain"
    with environment(MOECALC_BACKEND="cuda-emulation"):
        assert _lib.load().Evaluator(path, "cpu", backend="plain").backend == "plain"
    with pytest.raises(RuntimeError, match=r"expected `backend` to be 'fused', 'plain'.*, got 'magic'"):
        _lib.load().Evaluator(path, "cpu", backend="magic")


def test_diverged_weights_do_not_pass_as_numbers(tmp_path):
    config = testing.random_config(ELEMENTS)
    model = testing.random_potential(config)
    model.layers[1].edge_self_linear.bias.data[0, 0] = np.nan
    low, _ = lower(model, config)
    write_bare(tmp_path / "x.moe.pt", low)
    with pytest.raises(
        RuntimeError, match=r"expected `layers\.1\.edge_self_linear\.bias` to be finite, got NaN"
    ):
        evaluator(tmp_path / "x.moe.pt")


def test_numbers_that_overflow_in_an_evaluation_do_not_pass(tmp_path):
    config = testing.random_config(ELEMENTS)
    low, _ = lower(testing.random_potential(config), config)
    net = low.readout.net
    net.layers[-1].bias.data.fill_(100.0)
    net.out_matrix.data.zero_()
    net.out_matrix.data[0, 0] = net.out_bias.data[0] = 1.7e308
    write_bare(tmp_path / "x.moe.pt", low)
    with pytest.raises(RuntimeError, match="expected finite energies, got"):
        evaluate(evaluator(tmp_path / "x.moe.pt"), STRUCTURES["bulk"])
