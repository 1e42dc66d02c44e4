"""Threads belong to a calculator: no setting of the process changes, and they come back after a fork."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from ase.build import bulk
from process_settings import SETTINGS, python

from moecalc import MoECalculator
from moecalc.package.archive import read_metadata

FORK = """
import multiprocessing
from ase.build import bulk
from moecalc import MoECalculator

calc = MoECalculator(device="cpu")

def work(a):
    atoms = bulk("W", "bcc", a=a, cubic=True) * 2
    atoms.calc = calc
    return atoms.get_potential_energy()

if __name__ == "__main__":
    {before}
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(*pool.map(work, [3.1, 3.2]))
    print(work(3.1))
"""


USE_CALCULATOR = """
from moecalc import MoECalculator
atoms = bulk("W", "bcc", a=3.2, cubic=True) * 2
for threads in (None, 1, 3):
    atoms.calc = MoECalculator(device="cpu", threads=threads)
    atoms.rattle(0.01)
    atoms.get_forces(), atoms.get_stress()
"""


def atoms_of(n: int = 2):
    atoms = bulk("W", "bcc", a=3.2, cubic=True) * n
    atoms.rattle(0.05, seed=1)
    return atoms


# --- fork -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("openmp", [None, "1", "2"])
@pytest.mark.parametrize("before", ["pass", "work(3.1)"])
def test_a_forked_pool_gives_the_right_energies(tmp_path, openmp, before, energies_of):
    """Also where the parent has used its threads before."""
    script = tmp_path / "pool.py"
    script.write_text(FORK.format(before=before))
    output = python(f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')", openmp=openmp)
    values = [float(x) for x in output.split()]
    first, second = energies_of([bulk("W", "bcc", a=a, cubic=True) * 2 for a in (3.1, 3.2)])
    assert values == pytest.approx([first, second, first], abs=1e-3)


def test_a_child_that_is_forked_while_a_thread_computes_goes_on():
    code = """
import os, threading
from ase.build import bulk
from moecalc import MoECalculator
atoms = bulk("W", "bcc", a=3.2, cubic=True) * 3
atoms.calc = calc = MoECalculator(device="cpu", threads=2)
expected = atoms.get_potential_energy()
stop = False
def work():
    mine = atoms.copy()
    mine.calc = MoECalculator(device="cpu", threads=2)
    while not stop:
        mine.rattle(0.001)
        mine.get_forces()
other = threading.Thread(target=work)
other.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        calc.reset()
        os._exit(0 if abs(atoms.get_potential_energy() - expected) < 1e-3 else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
other.join()
"""
    python(code)


HELD = """
import os, shutil, sys, threading
from ase.build import bulk
from moecalc import MoECalculator
import moecalc.runtime as module

def fork(work):
    "Exit status of `work` in a child."
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def hold(lock):
    "A thread that holds `lock` until the returned function is called."
    held, over = threading.Event(), threading.Event()
    def keep():
        with lock:
            held.set()
            over.wait()
    thread = threading.Thread(target=keep)
    thread.start()
    held.wait()
    return lambda: (over.set(), thread.join())

shutil.copy(MoECalculator(device="cpu").path, "held.moe.pt")
atoms = bulk("W", "bcc", a=3.2, cubic=True) * 2
atoms.calc = calc = MoECalculator("held.moe.pt", device="cpu", threads=2)
expected = atoms.get_potential_energy()
"""


def run_held(tmp_path, monkeypatch, code: str) -> str:
    monkeypatch.chdir(tmp_path)
    return python(HELD + code)


def test_a_child_uses_a_calculator_that_a_thread_holds(tmp_path, monkeypatch):
    """What the thread was in the middle of is not trusted: results and list are made anew."""
    code = """
release = hold(calc._lock)
calc.results["energy"] = 0.0
calc.neighbor_list._pairs = calc.neighbor_list._pairs.concatenate([])
assert fork(lambda: abs(atoms.get_potential_energy() - expected) < 1e-9) == 0
release()
"""
    run_held(tmp_path, monkeypatch, code)


def test_a_child_uses_copies_of_a_calculator_that_threads_hold(tmp_path, monkeypatch):
    code = """
import copy, pickle
for other in (copy.deepcopy(calc), copy.copy(calc), pickle.loads(pickle.dumps(calc))):
    mine = atoms.copy()
    mine.calc = other
    release = hold(other._lock)
    assert fork(lambda: abs(mine.get_potential_energy() - expected) < 1e-9) == 0
    release()
"""
    run_held(tmp_path, monkeypatch, code)


def test_results_of_an_idle_calculator_stay_in_a_child(tmp_path, monkeypatch):
    code = """
del calc._model._evaluator
assert fork(lambda: atoms.get_potential_energy() == expected) == 0
"""
    run_held(tmp_path, monkeypatch, code)


def test_a_model_that_a_thread_evaluates_is_opened_again_in_a_child(tmp_path, monkeypatch):
    code = """
release = hold(calc._model._lock)
before = calc._model._evaluator
def work():
    calc.reset()
    right = abs(atoms.get_potential_energy() - expected) < 1e-9
    return right and calc._model._evaluator is not before
assert fork(work) == 0
release()
calc.reset()
assert abs(atoms.get_potential_energy() - expected) < 1e-9 and calc._model._evaluator is before
"""
    run_held(tmp_path, monkeypatch, code)


def test_a_changed_file_is_not_opened_again_in_a_child(tmp_path, monkeypatch):
    code = """
release = hold(calc._model._lock)
os.utime("held.moe.pt", (1, 1))
def work():
    calc.reset()
    return atoms.get_potential_energy()
assert fork(work) == 2
release()
"""
    output = run_held(tmp_path, monkeypatch, code)
    assert "PackageError" in output
    assert "held.moe.pt: the file was changed or removed since it was loaded" in output
    assert "multiprocessing.get_context('spawn')" in output


def test_a_child_opens_a_package_while_a_thread_was_opening_one(tmp_path, monkeypatch):
    code = """
release = hold(module._open_lock)
def work():
    atoms.calc = MoECalculator(device="cpu")
    return abs(atoms.get_potential_energy() - expected) < 1e-9
assert fork(work) == 0
release()
"""
    run_held(tmp_path, monkeypatch, code)


def test_a_child_has_the_precision_that_the_program_asked_of_torch(tmp_path, monkeypatch):
    """Evaluations of other threads, for which it was raised, do not end in the child."""
    code = """
import torch
from moecalc._torch_lib import load_torch_library
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
def evaluate(inside, over):
    with load_torch_library().CleanState():
        inside.set()
        over.wait()
inside, over = threading.Event(), threading.Event()
thread = threading.Thread(target=evaluate, args=(inside, over))
thread.start()
inside.wait()
precision = lambda: torch.backends.mkldnn.matmul.fp32_precision
assert precision() == "ieee", precision()
assert fork(lambda: precision() == "bf16") == 0
over.set()
thread.join()
assert precision() == "bf16"
"""
    run_held(tmp_path, monkeypatch, code)


def test_torchscript_in_a_forked_child_says_what_to_do():
    code = """
import os
from ase.build import bulk
from moecalc import MoECalculator
atoms = bulk("W", "bcc", a=3.2, cubic=True) * 2
atoms.calc = MoECalculator(device="cpu")
atoms.get_forces()
child = os.fork()
if child == 0:
    try:
        atoms.calc.reset()
        atoms.get_forces()
    except Exception as error:
        print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    output = python(code, MOECALC_BACKEND="torchscript", PYTHONWARNINGS="ignore")
    assert "backend 'torchscript' cannot be used in a forked process" in output
    assert "multiprocessing.get_context('spawn')" in output


# --- settings of the process ----------------------------------------------------------------------


@pytest.mark.parametrize("openmp", [None, "1", "2"])
def test_a_calculator_leaves_the_settings_of_the_process_alone(openmp):
    assert "unchanged" in python(SETTINGS.format(setup="", use=USE_CALCULATOR), openmp=openmp)


def test_torchscript_leaves_the_settings_of_the_process_alone():
    code = SETTINGS.format(setup="", use=USE_CALCULATOR)
    output = python(code, openmp="2", MOECALC_BACKEND="torchscript", PYTHONWARNINGS="ignore")
    assert "unchanged" in output


def test_numbers_of_torch_and_openmp_that_the_user_chose_stay():
    setup = "torch.set_num_threads(3)\n"
    assert "unchanged" in python(SETTINGS.format(setup=setup, use=USE_CALCULATOR), openmp="2")


def test_verification_gives_torch_its_threads_back(shared_calculator):
    from moecalc.package.verify import _small_structures

    before = torch.get_num_threads()
    with _small_structures():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


# --- the number of threads ------------------------------------------------------------------------


def test_threads_are_those_of_one_calculator(small_bulk):
    """Two calculators share a model, not their number of threads."""
    one, three = MoECalculator(device="cpu", threads=1), MoECalculator(device="cpu", threads=3)
    evaluator = one._model._evaluator
    assert evaluator is three._model._evaluator
    for calculator, expected in ((one, 1), (three, 3), (one, 1)):
        calculator.reset()
        calculator.get_forces(small_bulk)
        assert evaluator.num_threads == expected


@pytest.mark.parametrize("openmp", [None, "1", "3"])
def test_the_default_number_of_threads_is_that_of_openmp_or_the_cores(openmp):
    code = """
import os
from ase.build import bulk
from moecalc import MoECalculator
atoms = bulk("W", "bcc", a=3.2, cubic=True) * 2
atoms.calc = calculator = MoECalculator(device="cpu")
atoms.get_forces()
print(calculator._model._evaluator.num_threads, calculator.n_threads, len(os.sched_getaffinity(0)))
"""
    used, told, cores = (int(word) for word in python(code, openmp=openmp).split())
    assert used == told
    assert 1 <= used <= cores if openmp is None else used == int(openmp)


def test_threads_that_a_program_asks_of_torch_are_not_ours(small_bulk):
    calculator = MoECalculator(device="cpu")
    expected = calculator.n_threads
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(expected + 2)
        calculator.get_forces(small_bulk)
        assert calculator.n_threads == expected
    finally:
        torch.set_num_threads(before)


def test_as_many_threads_as_asked_for_run():
    code = """
import os, sys
from ase.build import bulk
from moecalc import MoECalculator
atoms = bulk("W", "bcc", a=3.2, cubic=True) * 2
atoms.calc = MoECalculator(device="cpu", threads=1)
atoms.get_forces()
before = len(os.listdir("/proc/self/task"))
for threads in (4, 2, 1):
    atoms.calc.set(threads=threads)
    atoms.get_forces()
    print(len(os.listdir("/proc/self/task")) - before)
"""
    assert python(code, openmp="1").split() == ["3", "1", "0"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_results_do_not_depend_on_threads(dtype):
    forces = []
    for threads in (1, 2, 3, 5):
        atoms = atoms_of()
        atoms.calc = MoECalculator(device="cpu", dtype=dtype, threads=threads)
        forces.append(atoms.get_forces())
    assert all(np.array_equal(forces[0], f) for f in forces[1:])


def test_threads_can_be_changed_later(small_bulk):
    atoms = small_bulk.copy()
    atoms.calc = MoECalculator(device="cpu", threads=1)
    energy = atoms.get_potential_energy()
    assert atoms.calc.set(threads=2) == {"threads": 2}
    assert atoms.calc.threads == 2
    assert atoms.get_potential_energy() == energy


@pytest.mark.parametrize("threads", [-1, 4097])
def test_a_senseless_number_is_refused_by_the_evaluator(shared_calculator, threads):
    with pytest.raises(RuntimeError, match=f"expected a number of threads from 1 to 4096, .* got {threads}"):
        shared_calculator._model._evaluator.num_threads = threads


def test_calculators_of_two_python_threads_do_not_disturb_each_other():
    structures = [atoms_of(), atoms_of(3)]
    dtypes = ["float32", "float64"]  # two evaluators
    expected = []
    for atoms, dtype in zip(structures, dtypes, strict=True):
        atoms.calc = MoECalculator(device="cpu", dtype=dtype, threads=2)
        expected.append(atoms.get_forces())
    wrong = []

    def work(k: int) -> None:
        atoms = structures[k].copy()
        atoms.calc = MoECalculator(device="cpu", dtype=dtypes[k], threads=2)
        for _ in range(10):
            atoms.calc.reset()
            if not np.array_equal(atoms.get_forces(), expected[k]):
                wrong.append(k)

    workers = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_idle_threads_sleep():
    code = """
import time
from ase.build import bulk
from moecalc import MoECalculator
atoms = bulk("W", "bcc", a=3.2, cubic=True) * 2
atoms.calc = MoECalculator(device="cpu", threads=2)
atoms.get_forces()
start = time.process_time()
time.sleep(0.5)
print(time.process_time() - start)
"""
    assert float(python(code)) < 0.05


def test_the_rounding_of_the_caller_changes_no_result_and_stays():
    """In no thread: each computes with the rounding of a fresh process."""
    code = """
import ctypes
import numpy as np
from ase.build import bulk
from moecalc import MoECalculator
libm = ctypes.CDLL("libm.so.6")
start = bulk("W", "bcc", a=3.2, cubic=True) * 2
start.rattle(0.05, seed=1)
start.calc = calculator = MoECalculator(device="cpu", dtype="float64")
expected = start.get_forces()
for rounding in (0, 0x800, 0x400):  # to nearest, upwards, downwards
    for threads in (1, 2):
        atoms = start.copy()
        atoms.calc = calculator
        calculator.set(threads=threads)
        calculator.reset()
        assert libm.fesetround(rounding) == 0
        forces = atoms.get_forces()
        assert libm.fegetround() == rounding
        libm.fesetround(0)
        assert np.array_equal(forces, expected), (rounding, threads)
"""
    python(code)


def test_the_default_model_is_what_the_energies_are_of(shared_calculator):
    assert read_metadata(Path(shared_calculator.path)).name == "metals10"


def test_a_child_that_is_forked_while_a_thread_uses_the_same_calculator_goes_on():
    """The thread holds the calculator's lock almost always, and is in the middle of a step."""
    code = """
import os, threading, time
from ase.build import bulk
from moecalc import MoECalculator
calc = MoECalculator(device="cpu", threads=2)
atoms = bulk("W", "bcc", a=3.2, cubic=True) * 2
atoms.calc = calc
expected = atoms.get_potential_energy()
stop = False
def work():
    seed = 0
    while not stop:
        mine = bulk("W", "bcc", a=3.1, cubic=True) * 3
        mine.rattle(0.01, seed=(seed := seed + 1))
        mine.calc = calc
        mine.get_forces()
other = threading.Thread(target=work)
other.start()
for _ in range(5):
    time.sleep(0.02)
    child = os.fork()
    if child == 0:
        os._exit(0 if abs(atoms.get_potential_energy() - expected) < 1e-3 else 1)
    assert os.waitpid(child, 0)[1] == 0
stop = True
other.join()
"""
    python(code)
