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


ANGLE_FORWARD = "_Z10run_kernelINS0_12AngleForwardEE_kernels_tf32_cu"


def sass(*code, symbol=ANGLE_FORWARD):
    """Lines as of cuobjdump, of (text, stall, scoreboard set, scoreboards waited for)."""
    lines = ["arch = sm_90", f"\t\tFunction : {symbol}"]
    for index, (text, stall, written, waits) in enumerate(code):
        control = stall | written << 5 | 7 << 8 | waits << 11
        lines.append(f"        /*{16 * index:04x}*/                   {text} ;  /* 0x{0:016x} */")
        lines.append(f"        /* 0x{control << 41:016x} */")
    return lines


def kernel(lint, *code, symbol=ANGLE_FORWARD):
    (found,) = lint.kernels_of(sass(*code, symbol=symbol))
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


BARRIER = ("BAR.SYNC.DEFER_BLOCKING 0x0", 5, 7, 0)


def a_loop(code, body):
    """`code` and a loop after it."""
    return [*code, *body, (f"@P0 BRA {16 * len(code):#x}", 5, 7, 0)]


def tile_code(extra=0):
    """A kernel with every part that the model knows, and `extra` instructions after each product."""
    code = a_loop([], [LOAD, ("STS.128 [R3], R4", 2, 7, 0)])
    code = a_loop([*code, BARRIER], [("LDS.128 R4, [R3]", 2, 0, 0), ("FADD R2, R2, R4", 4, 7, 1)])
    for activations in (0, 16, 32):
        code = a_loop([*code, BARRIER], PRODUCT * 4)
        code += [EXPONENTIAL] * activations + [("FADD R2, R2, R4", 4, 7, 0)] * extra
    # as layer 0 has them: without a product
    return [*code, BARRIER, *[EXPONENTIAL] * 16, BARRIER, *[EXPONENTIAL] * 32, ("EXIT", 5, 7, 0)]


SMALL_LOOPS = (
    ("LDG", "FADD", "LDS"),
    ("LDG", "FFMA", "LDS"),
    ("LDG", "FFMA", "CALL"),
    ("LDG", "FFMA"),
    ("MUFU", "LDG", "FFMA"),
    ("LDG", "DFMA", "DADD"),
    ("LDG", "DADD", "DMUL"),
    ("LDG", "FADD"),
    ("STG", "FFMA"),
    ("STG", "DFMA", "MUFU"),
    ("STG", "DFMA"),
    ("STG", "MUFU", "FADD"),
)


def small_code():
    """A kernel with every part that the model knows of kernels without tiles."""
    code = [("NOP", 1, 7, 0)]
    for operations in SMALL_LOOPS:
        code = a_loop(code, [(f"{operation} R2, R4", 2, 7, 0) for operation in operations])
    begin = 16 * len(code)
    code += [BARRIER]
    code = a_loop(code, [LOAD, ("STS.128 [R3], R4", 2, 7, 0)])
    code = a_loop([*code, BARRIER], PRODUCT * 4)
    return [*code, (f"@P0 BRA {begin:#x}", 5, 7, 0), ("EXIT", 5, 7, 0)]


def step_kernels(lint, extra=0):
    """All kernels of a step in one format."""
    kernels = []
    for name in (*lint.KERNELS, *lint.SMALL):
        code = tile_code(extra) if name in lint.KERNELS else small_code()
        word, _, switch = name.partition("<")
        argument = f"NS0_7Float32ELb{switch[0]}" if switch else "NS0_7Float32"
        symbol = f"_Z10run_kernelINS0_{len(word)}{word}I{argument}EEEvT__kernels_tf32_cu"
        kernels.append(kernel(lint, *code, symbol=symbol))
    return kernels


def test_parts_of_a_kernel_are_found(lint):
    parts = lint.Parts(kernel(lint, *tile_code()))
    assert parts.staged(4).instructions == 3 * 4
    assert parts.summed(10, 5).instructions == 3 * 5
    # 129 instructions have 128 multiplications of each thread, so four rows of 64 weights
    assert parts.activated(64, 8).instructions == 129 / 4 * 8 + 32
    assert parts.activated(32, 8).special == 16
    assert parts.activated(64, 0).instructions == 32
    assert parts.plain(32, 8).instructions == 129 / 4 * 4


# Products of 32 rows, 32 columns and 8 inputs, or 16, in the formats of the kernels.
TENSOR_PRODUCTS = {
    "tf32": ("HMMA.1688.F32.TF32", 8),
    "tf32x3": ("HMMA.1688.F32.TF32", 24),
    "bf16x3": ("HMMA.16816.F32.BF16", 24),
    "fp16": ("HMMA.16816.F32", 8),
}


def tensor_loop(lint, number_format):
    operation, count = TENSOR_PRODUCTS[number_format]
    code = a_loop([], [(f"{operation} R4, R8, R12, R4", 4, 7, 0)] * count)
    (loop,) = lint.Parts(kernel(lint, *code, symbol=ANGLE_FORWARD.replace("tf32", number_format))).loops
    return loop


@pytest.mark.parametrize("number_format", TENSOR_PRODUCTS)
def test_a_product_of_tensor_cores_counts_as_what_it_replaces(lint, number_format):
    inputs = 16 if "16816" in TENSOR_PRODUCTS[number_format][0] else 8
    loop = tensor_loop(lint, number_format)
    assert lint.multiplications(loop.body, loop.products) == 32 * inputs


def test_three_products_keep_tensor_cores_busy_three_times_as_long(lint):
    one, three = (tensor_loop(lint, name).product.tensor for name in ("tf32", "tf32x3"))
    assert three == pytest.approx(3 * one)


def test_tensor_cores_multiply_16_bits_twice_as_fast(lint):
    slow, fast = (tensor_loop(lint, name).product.tensor for name in ("tf32", "fp16"))
    assert fast == pytest.approx(slow / 2)


def test_a_loop_with_activations_is_no_product(lint):
    assert lint.Parts(kernel(lint, *a_loop([], [*PRODUCT, EXPONENTIAL]))).loops == []


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"), [(168, 20_000, 3), (128, 20_000, 4), (32, 100_000, 2)]
)
def test_registers_and_shared_memory_limit_the_blocks(lint, registers, shared, blocks):
    assert lint.blocks_of(registers, shared) == blocks


def test_a_step_has_its_sum_and_the_time_per_atom(lint):
    kernels = step_kernels(lint)
    registers = {kernel.name: 168 for kernel in kernels}
    rows = lint.step_rows(kernels, registers)
    *of_kernels, launches, step, per_atom = rows
    names = [f"{name} tf32" for name in (*lint.KERNELS, *lint.SMALL)]
    assert [row["kernel of a step"] for row in of_kernels] == names
    assert all(row["ms"] > 0 for row in of_kernels)
    assert all(row["blocks"] == 3 for row in of_kernels[: len(lint.KERNELS)])
    assert step["ms"] == pytest.approx(sum(row["ms"] for row in [*of_kernels, launches]), abs=0.11)
    assert per_atom["ms"] == pytest.approx(step["ms"] / 10, abs=0.01)
    assert step["first estimate"] == pytest.approx(72, abs=0.1)


def test_more_instructions_make_a_step_slower(lint):
    registers = {kernel.name: 168 for kernel in step_kernels(lint)}
    short, long = (lint.step_rows(step_kernels(lint, extra), registers)[-2]["ms"] for extra in (0, 400))
    assert long > 1.05 * short


def test_a_format_of_which_a_kernel_is_missing_has_no_step(lint):
    assert lint.step_rows(step_kernels(lint)[1:], {}) == []


def test_a_slice_of_a_product_is_staged_and_multiplied(lint):
    parts = lint.Parts(kernel(lint, *small_code()))
    staged, product = parts.per("STS", ("LDG",)), lint.cost_of(parts.loops[0].body, 8)
    rounds = 2048 / lint.multiplications(parts.loops[0].body, 1)
    straight = 3  # two barriers and the jump
    expected = staged.instructions * 8 + product.instructions * rounds + straight
    assert parts.sliced().instructions == pytest.approx(expected)


def test_small_kernels_take_as_long_as_their_memory_at_least(lint):
    work = lint.Small(1, 128, lambda parts: parts.per("LDG", ("FFMA", "LDS")), 1e6)
    found = kernel(lint, *small_code())
    assert lint.small_milliseconds(found, work, 4) == pytest.approx(1e3 * 1e4 * 1e6 / lint.MEMORY_RATE)


def test_a_part_that_is_not_found_is_named(lint):
    with pytest.raises(
        ValueError, match="AngleForward tf32: expected a loop that stages in the machine code"
    ):
        lint.Parts(kernel(lint, *PRODUCT, BACK)).staged(1)
