"""Processes of their own: what they answer, and what is said of those that fail."""

import sys

import numpy as np
import pytest
from ase.io import write

from moecalc import benchmark, testing
from moecalc.benchmark.costs import costs, count_graph, read_architecture
from moecalc.models import default_model_path
from moecalc.package.archive import read_metadata


def answer_of(code, **options):
    return benchmark.answer_of([sys.executable, "-c", code], **options)


def test_the_last_line_is_the_answer():
    assert answer_of("print('talk'); print('{\"a\": 1}')") == {"a": 1}


def test_a_process_runs_in_a_folder_and_an_environment(tmp_path):
    code = "import json, os; print(json.dumps([os.getcwd(), os.environ.get('X')]))"
    assert answer_of(code, environment={"X": "1"}, folder=tmp_path) == [str(tmp_path), "1"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('first\\nlast')", "last"),
        ("print('only output'); raise SystemExit(3)", "only output"),
        ("raise SystemExit(3)", r"the process ended with code 3 \(out of memory\?\)"),
    ],
)
def test_a_process_that_fails_says_why(code, message):
    with pytest.raises(benchmark.ProcessError, match=f"^{message}$"):
        answer_of(code)


def test_a_process_that_does_not_end_is_stopped():
    with pytest.raises(benchmark.ProcessError, match=r"^no end after 1 s$"):
        answer_of("import time; time.sleep(60)", seconds=1)


def test_a_worker_answers_every_line():
    code = "import sys; print('{}', flush=True)\nfor line in sys.stdin: print(len(line), flush=True)"
    worker = benchmark.Worker([sys.executable, "-c", code])
    assert worker.about == {}
    assert [worker.ask("ab"), worker.ask()] == [3, 1]
    worker.end()


def test_a_worker_that_ends_early_is_named():
    with pytest.raises(benchmark.ProcessError, match=r"python\S* ended with code 4$"):
        benchmark.Worker([sys.executable, "-c", "raise SystemExit(4)"])


def test_ceilings_of_a_process_of_their_own():
    found = benchmark.isolated_ceilings("float32", 1)
    assert min(found.gemm, found.stream) > 1e8


def test_sources_in_the_working_folder_are_not_what_is_timed(tmp_path, monkeypatch):
    (tmp_path / "moecalc").mkdir()
    (tmp_path / "moecalc" / "__init__.py").write_text("raise ImportError('these are sources')")
    monkeypatch.chdir(tmp_path)
    write("atoms.extxyz", benchmark.alloy(["W"], n=2))
    case = benchmark.Case(
        package=str(default_model_path()),
        structure="atoms.extxyz",
        copies=1,
        dtype=None,
        device="cpu",
        threads=1,
        steps=1,
    )
    assert benchmark.run_isolated(case).threads == 1


def test_costs_of_a_structure_are_those_of_its_graph():
    path = default_model_path()
    metadata = read_metadata(path)
    atoms = testing.bulk_alloy(repeat=1)
    i, j, vec = testing.brute_force_edges(atoms, metadata.cutoff)
    types = [metadata.elements.index(s) for s in atoms.symbols]
    architecture = read_architecture(path)
    cutoffs = (metadata.cutoff, metadata.angle_cutoff)
    expected = count_graph(architecture, np.array(types), np.stack([i, j]), vec, *cutoffs)
    counts, parts = benchmark.evaluation_costs(path, atoms)
    assert counts == expected
    assert parts == costs(architecture, expected)


def test_memory_is_told():
    assert 1 < benchmark.memory("VmRSS") <= benchmark.memory("VmHWM")
    assert benchmark.memory("NoSuchField") is None
