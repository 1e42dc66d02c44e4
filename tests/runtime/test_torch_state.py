"""What a program sets for its own use of torch does not reach the numbers of moecalc.

The kernels have no torch in them: of what torch sets, only the arithmetic of the processor could reach them. The TorchScript backend,
packaging and training run torch.
"""

import contextlib
import sys
import threading

import numpy as np
import pytest
import torch
from ase.optimize import BFGS
from torch.utils._python_dispatch import TorchDispatchMode

from moecalc import MoECalculator, _clean, testing
from moecalc._jit import jit_load
from moecalc._torch_lib import load_torch_library
from moecalc.nn import ModelConfig
from moecalc.package import package_checkpoint, verify_package
from moecalc.package.importers import save_checkpoint
from moecalc.training.fit import Fit, Options
from moecalc.training.graphs import collate, to_frame

PROPERTIES = ("energy", "energies", "forces", "stress", "stresses")


class Zeros(TorchDispatchMode):
    """A dispatch mode that answers everything wrongly."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return torch.zeros_like(result) if isinstance(result, torch.Tensor) else result


@contextlib.contextmanager
def setting(get, set_, value):
    """A setting of the process, put back at the end."""
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def flush_denormal():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def deterministic():
    with setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True):
        yield


@contextlib.contextmanager
def grad_disabled():
    with setting(torch.is_grad_enabled, torch.set_grad_enabled, False):
        yield


@contextlib.contextmanager
def functorch():
    """As inside of a function that torch.func transforms."""
    from torch._C import _functorch

    _functorch._grad_increment_nesting()
    _functorch._vmap_increment_nesting(3, "error")
    try:
        yield
    finally:
        _functorch._vmap_decrement_nesting()
        _functorch._grad_decrement_nesting()


@contextlib.contextmanager
def legacy_inference_then_autocast():
    with torch.inference_mode(), torch.autocast("cpu", torch.float16), torch.no_grad():
        yield


CONTEXTS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "set_grad_enabled(False)": grad_disabled,
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "all of these": legacy_inference_then_autocast,
    "default dtype float64": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default dtype float16": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "deterministic algorithms": deterministic,
    "float32 products in bfloat16": lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "flushed denormals": flush_denormal,
    "torch.func": functorch,
    "dispatch mode": Zeros,
    "saved tensors hooks": lambda: torch.autograd.graph.saved_tensors_hooks(
        torch.zeros_like, torch.zeros_like
    ),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "no optimised TorchScript": lambda: torch.jit.optimized_execution(False),
}


WITHOUT_TORCH = ["all of these", "flushed denormals", "dispatch mode"]
"""Contexts for the kernels, which have no torch in them."""

CASES = [("torchscript", name) for name in CONTEXTS] + [
    (backend, name) for backend in ("fused", "cuda-emulation") for name in WITHOUT_TORCH
]


def results(calculator, atoms):
    return calculator.calculate_batch([atoms], PROPERTIES)[0]


def assert_same(found, expected):
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def choose(backend, patch):
    """Let the calculators to come use this backend; skips where it was not built."""
    if backend == "torchscript":
        try:
            load_torch_library()
        except ImportError as error:
            pytest.skip(str(error))
    patch.setenv("MOECALC_BACKEND", backend)


@pytest.fixture(scope="module", params=["fused", "torchscript", "cuda-emulation"])
def backend(request):
    return request.param


@pytest.fixture(scope="module")
def evaluated(backend):
    """A calculator of every backend, in the precision in which rounding shows, with results outside of any context."""
    with pytest.MonkeyPatch.context() as patch:
        choose(backend, patch)
        with contextlib.suppress(Warning):
            calculator = _quiet_calculator(dtype="float32")
    atoms = testing.bulk_alloy()
    return calculator, atoms, results(calculator, atoms)


def _quiet_calculator(**arguments):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MoECalculator(device="cpu", **arguments)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "name"), CASES, indirect=["backend"], scope="module")
def test_results_do_not_depend_on_the_context(name, evaluated):
    calculator, atoms, expected = evaluated
    with CONTEXTS[name]():
        found = results(calculator, atoms)
    assert_same(found, expected)
    assert np.abs(expected["forces"]).max() > 0.1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backend", "name"), [case for case in CASES if case[0] != "cuda-emulation"])
def test_a_calculator_that_is_made_in_the_context_is_right(name, backend, monkeypatch, tmp_path):
    atoms = testing.bulk_alloy(repeat=1)
    choose(backend, monkeypatch)
    path = tmp_path / "model.moe.pt"
    config = testing.random_config(n_routed=3, nlayers=2)
    testing.write_random_package(path, config)
    expected = results(MoECalculator(path, device="cpu", check=False), atoms)
    path.touch()  # a package is loaded again when the file is another
    with CONTEXTS[name]():
        found = results(MoECalculator(path, device="cpu", check=False), atoms)
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore")
def test_the_context_is_as_before_after_an_evaluation(evaluated):
    calculator, atoms, _ = evaluated
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        results(calculator, atoms)
        assert torch.is_inference_mode_enabled()
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.zeros(1).device.type == "meta"
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_settings_of_the_process_are_as_before_after_an_evaluation(evaluated):
    calculator, atoms, _ = evaluated
    with CONTEXTS["float32 products in bfloat16"](), CONTEXTS["default dtype float64"](), flush_denormal():
        results(calculator, atoms)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.get_default_dtype() == torch.float64
        assert float(torch.tensor([1e-310], dtype=torch.float64) * 1.0) == 0.0


def test_arithmetic_of_the_host_is_left_alone(evaluated):
    calculator, atoms, _ = evaluated
    with np.errstate(all="ignore"):
        results(calculator, atoms)
    assert 5e-324 * 1.0 > 0.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["fused", "torchscript"])
def test_a_relaxation_inside_inference_mode_does_not_converge_at_once(backend, monkeypatch):
    choose(backend, monkeypatch)
    atoms = testing.bulk_alloy()
    atoms.calc = MoECalculator(device="cpu", dtype="float64")
    with torch.inference_mode():
        assert not BFGS(atoms, logfile=None).run(fmax=0.01, steps=1)
        inside = atoms.get_forces()
    outside = atoms.copy()
    outside.calc = MoECalculator(device="cpu", dtype="float64", skin=0.0)
    np.testing.assert_allclose(inside, outside.get_forces(), rtol=0, atol=testing.ROUNDING)


def test_settings_of_another_thread_do_not_matter(evaluated):
    calculator, atoms, expected = evaluated
    entered, done = threading.Event(), threading.Event()

    def hold():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            entered.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(30)
    try:
        assert_same(results(calculator, atoms), expected)
    finally:
        done.set()
        thread.join()


def test_torchscript_gives_the_number_of_threads_back(monkeypatch):
    choose("torchscript", monkeypatch)
    before = torch.get_num_threads()
    calculator = _quiet_calculator(dtype="float64", threads=before + 1)
    results(calculator, testing.bulk_alloy(repeat=1))
    assert torch.get_num_threads() == before


# --- packaging and training ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    config = testing.random_config(n_routed=3, nlayers=2)
    save_checkpoint(folder / "model.pt", testing.random_potential(config), config)
    package_checkpoint(folder / "model.pt", folder / "outside.moe.pt")
    return folder / "model.pt"


MAIN = [
    "inference_mode",
    "autocast bfloat16",
    "all of these",
    "default dtype float64",
    "default device",
    "float32 products in bfloat16",
    "torch.func",
    "dispatch mode",
]
"""Contexts for what takes longer."""


@pytest.fixture(params=["library", "python"])
def cleaned(request, monkeypatch):
    """With the library that is linked to torch, and without: then Python does what it can."""

    def missing():
        raise ImportError("not built")

    if request.param == "python":
        monkeypatch.setattr(_clean, "load_torch_library", missing)
        return
    try:
        load_torch_library()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*MAIN, "flushed denormals", "set_grad_enabled(False)", "no_grad"])
def test_torch_is_clean_in_the_context_and_as_before_behind_it(name, cleaned):
    with CONTEXTS[name]():
        before = seen()
        with _clean.clean_torch():
            inside = seen()
        assert seen() == before
    assert inside == seen()


def seen():
    """What the program around and the work of moecalc can tell of the state of torch, on this thread and in the process."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.backends.mkldnn.matmul.fp32_precision in ("bf16", "tf32"),
        torch.empty(1).device.type,
        torch._C._functorch.peek_interpreter_stack() is None,
        torch._C._len_torch_dispatch_stack(),
        sys.float_info.min / 2 == 0.0,
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAIN)
def test_a_package_that_is_made_in_the_context_is_right(name, checkpoint, cleaned, tmp_path):
    out = tmp_path / "inside.moe.pt"
    with CONTEXTS[name]():
        report = package_checkpoint(checkpoint, out)
    outside = package_tensors(checkpoint.parent / "outside.moe.pt")
    inside = package_tensors(out)
    assert report.verification.passed
    assert inside.keys() == outside.keys()
    for key, value in outside.items():
        assert inside[key].dtype == value.dtype, key
        assert torch.equal(inside[key], value), key


def package_tensors(path):
    model = jit_load(path)
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["all of these", "dispatch mode"])
def test_verification_in_a_context_finds_the_same_deviations(name, checkpoint):
    path = checkpoint.parent / "outside.moe.pt"
    with CONTEXTS[name]():
        inside = verify_package(path)
    assert [c.value for c in inside.checks] == [c.value for c in verify_package(path).checks]


def fit_once():
    """A small model after two steps."""
    widths = {"n_dim": 16, "e_dim": 16, "a_dim": 16, "nlayers": 2, "a_compress_rate": 0}
    shells = {"e_rcut": 4.0, "e_rcut_smth": 3.0, "e_sel": 20, "a_rcut": 3.0, "a_rcut_smth": 2.5, "a_sel": 10}
    config = ModelConfig.model_validate(
        {
            "type_map": ["Nb", "W"],
            "descriptor": {**widths, **shells, "precision": "float32"},
            "fitting": {"neuron": [16, 16], "precision": "float32"},
            "moe": {},
        }
    )
    from ase.calculators.singlepoint import SinglePointCalculator

    atoms = testing.bulk_alloy(("Nb", "W"), repeat=1)
    atoms.calc = SinglePointCalculator(
        atoms, energy=-20.0, forces=np.full((2, 3), [[0.5], [-0.5]]), stress=np.full(6, 0.01)
    )
    fit = Fit(config, Options(steps=2, repulsion=0.0))
    batch = collate([to_frame(atoms, ["Nb", "W"], 4.0)])
    for _ in range(2):
        fit.step(batch)
    return fit


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MAIN)
def test_training_in_the_context_gives_the_same_weights(name):
    outside = fit_once()
    with CONTEXTS[name]():
        inside = fit_once()
    for a, b in zip(inside.parameters, outside.parameters, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
