"""benchmarks/cuda_cycles.py, on machine code made by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "cuda_cycles.py"


@pytest.fixture(scope="module")
def lint():
    spec = importlib.util.spec_from_file_location("cuda_cycles", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_cycles"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def sass(*code):
    """Lines as of cuobjdump, of (text, stall, scoreboard set, scoreboards waited for)."""
    lines = ["arch = sm_90", "\t\tFunction : _Z10run_kernelINS0_12AngleForwardEE_kernels_tf32_cu"]
    for index, (text, stall, written, waits) in enumerate(code):
        control = stall | written << 5 | 7 << 8 | waits << 11
        lines.append(f"        /*{16 * index:04x}*/                   {text} ;  /* 0x{0:016x} */")
        lines.append(f"        /* 0x{control << 41:016x} */")
    return lines


def kernel(lint, *code):
    (found,) = lint.kernels_of(sass(*code))
    return found


LOAD = ("LDG.E R2, [R4.64]", 2, 0, 0)
SPILL = ("LDL R3, [R1]", 2, 1, 0)
ACTIVATE = ("MUFU.EX2 R2, R2", 1, 1, 0b1)
BACK = ("@P0 BRA 0x0", 5, 7, 0)


def test_a_kernel_has_its_name_and_loop(lint):
    found = kernel(lint, LOAD, ACTIVATE, BACK, ("EXIT", 5, 7, 0))
    assert (found.name, found.architecture, found.bytes) == ("AngleForward tf32", "sm_90", 64)
    assert [len(body) for body in found.inner_loops] == [3]
    assert list(lint.findings(found)) == []


def test_cycles_wait_for_what_the_assembler_wrote(lint):
    found = kernel(lint, LOAD, ACTIVATE, BACK)
    # the load's latency, the issue of the rest, the jump; then the last result
    assert lint.cycles(found.code, rounds=1) == max(42 + 1 + 5 + 8, 42 + 20)
    free = kernel(lint, LOAD, ("MUFU.EX2 R2, R2", 1, 1, 0), BACK)
    assert lint.cycles(free.code, rounds=8) < lint.cycles(found.code, rounds=8)


def test_a_spill_in_a_hot_loop_is_found(lint):
    found = kernel(lint, LOAD, SPILL, ACTIVATE, BACK)
    assert list(lint.findings(found)) == ["1 spills in the loop at 0x0"]


def test_a_spill_elsewhere_is_not(lint):
    assert list(lint.findings(kernel(lint, SPILL, ("EXIT", 5, 7, 0)))) == []


def test_a_predicated_product_is_found(lint):
    (finding,) = lint.findings(kernel(lint, ("@!P1 HMMA.1688.F32.TF32 R4, R8, R12, R4", 4, 7, 0)))
    assert finding.startswith("1 predicated HMMA")


def test_code_that_grew_too_large_is_found(lint, monkeypatch):
    monkeypatch.setattr(lint, "MOST_BYTES", 32)
    (finding,) = lint.findings(kernel(lint, LOAD, ACTIVATE, BACK))
    assert finding.startswith("expected at most 0 KiB of code")


PRODUCT = [("FFMA R2, R4, R5, R2", 1, 7, 0)] * 32
EXPONENTIAL = ("MUFU.EX2 R2, R2", 1, 1, 0)


def test_a_template_with_a_switch_has_two_names(lint):
    symbol = "_Z10run_kernelINS0_5NodesINS0_7Float32ELb{}EEEEEvT__kernels_float32_cu"
    assert [lint.shown_name(symbol.format(k)) for k in (0, 1)] == ["Nodes<0> float32", "Nodes<1> float32"]


def test_the_epilogue_is_what_follows_a_product_until_a_barrier(lint):
    epilogue = [EXPONENTIAL] * 8
    found = kernel(lint, *PRODUCT, BACK, *epilogue, ("BAR.SYNC.DEFER_BLOCKING 0x0", 5, 7, 0), *epilogue)
    row = lint.row_of(found)
    assert (row["product instr"], row["epilogue instr"], row["activations"]) == (33, 8, 8)
    assert row["epilogue cycles"] == round(lint.cycles(found.code[33:41], 1))


def test_the_start_is_what_precedes_a_product_since_a_barrier(lint):
    barrier = ("BAR.SYNC.DEFER_BLOCKING 0x0", 5, 7, 0)
    found = kernel(lint, EXPONENTIAL, barrier, LOAD, *PRODUCT, ("@P0 BRA 0x30", 5, 7, 0))
    assert lint.row_of(found)["start cycles"] == round(lint.cycles(found.code[2:3], 1))


def test_calls_are_not_on_the_path(lint):
    call = [("CALL.REL.NOINC 0x80", 5, 7, 0), ("BRA 0x50", 5, 7, 0)]
    found = kernel(lint, ("@P0 BRA 0x30", 5, 7, 0), *call, EXPONENTIAL, EXPONENTIAL, ("EXIT", 5, 7, 0))
    assert [i.operation for i in lint.path(found, 0)] == ["BRA", "MUFU", "MUFU"]


def test_registers_are_those_of_the_kernel(lint):
    lines = " Function _Z10run_kernelINS0_12AngleForwardEE_kernels_tf32_cu:\n  REG:168 STACK:0 SHARED:0\n"
    assert lint.registers_of(lines) == {"AngleForward tf32": 168}


@pytest.fixture
def row(lint):
    return lint.row_of(kernel(lint, *PRODUCT, BACK, *[EXPONENTIAL] * 8, ("EXIT", 5, 7, 0)), registers=100)


def test_a_kernel_is_within_the_limits_that_were_written_of_it(lint, row):
    assert list(lint.beyond([row], lint.limits_of([row]))) == []


@pytest.mark.parametrize("name", ["registers", "product cycles", "epilogue cycles"])
def test_a_kernel_that_got_worse_is_found(lint, row, name):
    worse = row | {name: row[name] * 1.1 + 1}
    (finding,) = lint.beyond([worse], lint.limits_of([row]))
    assert finding.startswith("AngleForward tf32: expected at most")
    assert f"for '{name}'" in finding


def test_a_kernel_without_limits_is_found(lint, row):
    (finding,) = lint.beyond([row], {"EdgeForward tf32": {}})
    assert "got none: add them with --write-limits" in finding


def test_a_format_without_limits_passes(lint, row):
    assert list(lint.beyond([row], {"AngleForward float64": {}})) == []


def test_a_missing_library_is_named(lint, capsys):
    with pytest.raises(SystemExit):
        lint.main(["missing.so", "--cuobjdump", "cuobjdump"])
    assert "missing.so: no such file" in capsys.readouterr().err


def test_a_missing_cuobjdump_is_named(lint, monkeypatch, capsys):
    monkeypatch.setattr(lint.shutil, "which", lambda program: None)
    with pytest.raises(SystemExit):
        lint.main([str(FILE)])
    assert "expected cuobjdump on the PATH, got none" in capsys.readouterr().err


def test_a_library_without_kernels_is_refused(lint, capsys):
    assert lint.main([str(FILE), "--cuobjdump", "true"]) == 2
    assert "expected kernels for sm_90" in capsys.readouterr().err
