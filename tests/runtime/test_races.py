"""No two threads of the emulated CUDA kernels use the same memory between two barriers, if one of them writes.

Needs the library of `python setup.py build_races`; `make test-cuda-checks` builds it and runs this.
"""

import ctypes
from pathlib import Path

import pytest
from evaluators import ELEMENTS, OPTIONS, environment, evaluate

import moecalc
from moecalc import _lib, testing

STRUCTURES = {
    "bulk": testing.bulk_alloy(ELEMENTS, repeat=1),
    "molecule": testing.molecule(ELEMENTS, n_atoms=4),
    "isolated": testing.molecule(ELEMENTS)[:1],
}
WIDE = ["all wider than 64 but angles", "all wider than 64"]
CHOSEN = [
    "dense",
    "mlp",
    "no angles",
    "linear compression",
    "two heads, res_incr",
    "res_avg, static, unsmooth",
    "polynomial switch, edges from the switch",
    "configuration mlp",
    "concatenated embedding",
    "one layer",
    "gelu",
]
# Every block of the kernels that multiply has at least so many, whatever the structure.
N_BARRIER = 12


class Detector:
    """What the library has beside the evaluator."""

    def __init__(self, library):
        self._library = library
        library.moecalc_races.restype = ctypes.c_char_p
        library.moecalc_leave_out_barrier.argtypes = [ctypes.c_int64]
        library.moecalc_races()

    def found(self):
        """Lines since the last call."""
        return self._library.moecalc_races().decode().splitlines()

    def leave_out(self, barrier):
        self._library.moecalc_leave_out_barrier(barrier)


@pytest.fixture(scope="module")
def detector():
    library = ctypes.CDLL(str(Path(moecalc.__file__).with_name("libmoecalc.so")))
    if not hasattr(library, "moecalc_races"):
        pytest.skip("this build has no race detector: make test-cuda-checks")
    return Detector(library)


@pytest.fixture
def leave_out(detector):
    """Leave a barrier out of every block, until the test ends."""
    yield detector.leave_out
    detector.leave_out(-1)


def run(path, atoms, dtype="float64", precision="fp32", reversed_order=""):
    with environment(MOECALC_BACKEND="cuda-emulation", MOECALC_EMULATION_REVERSED=reversed_order):
        model = _lib.load().Evaluator(str(path), "cpu", dtype, precision)
    evaluate(model, atoms)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", CHOSEN)
def test_there_are_no_races(detector, write, name, structure):
    run(write(**OPTIONS[name]), STRUCTURES[structure])
    assert detector.found() == []


@pytest.mark.parametrize("name", WIDE)
def test_there_are_no_races_in_wide_layers(detector, write, name):
    run(write(**OPTIONS[name]), STRUCTURES["molecule"])
    assert detector.found() == []


@pytest.mark.parametrize("precision", ["fp32", "fp32-ffma", "bf16x3", "tf32", "fp16"])
@pytest.mark.parametrize(("name", "structure"), [("mlp", "bulk"), ("all wider than 64", "molecule")])
def test_there_are_no_races_in_float32(detector, write, name, structure, precision):
    run(write(**OPTIONS[name]), STRUCTURES[structure], "float32", precision)
    assert detector.found() == []


@pytest.mark.parametrize("barrier", range(N_BARRIER))
def test_a_barrier_that_is_left_out_is_found(detector, leave_out, write, barrier):
    leave_out(barrier)
    run(write(**OPTIONS["mlp"]), STRUCTURES["bulk"])
    assert detector.found()


def test_threads_in_the_other_order_race_as_well(detector, leave_out, write):
    leave_out(1)
    run(write(**OPTIONS["mlp"]), STRUCTURES["bulk"], reversed_order="1")
    assert detector.found()


def test_a_finding_names_kernel_memory_and_places(detector, leave_out, write):
    leave_out(1)
    run(write(**OPTIONS["mlp"]), STRUCTURES["bulk"])
    found = [line for line in detector.found() if "AngleForward" in line]
    assert found
    assert all(" in shared memory, at 0x" in line or " in global memory, at 0x" in line for line in found)
