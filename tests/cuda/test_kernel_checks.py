"""Checks of the kernels' building blocks, each with a mutation of the sources that it must catch."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")


def compile_check(name: str, folder: Path, sources: Path, *flags: str) -> Path:
    program = folder / name
    subprocess.run(
        [
            *("g++", "-std=c++20", "-O1", "-Wno-psabi", *flags),
            *(f"-I{sources}", str(HERE / f"{name}.cpp"), "-o", str(program)),
        ],
        check=True,
    )
    return program


def mma_errors(folder: Path, sources: Path) -> dict[str, float]:
    """Largest error of a sum of 48 products by number format, and what one beyond the range of fp16 gives."""
    program = compile_check("mma_check", folder, sources)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    return {name: float(error) for name, error in map(str.split, lines)}


# Of sums in float32, and of the products that bf16x3 leaves out.
MMA_ERRORS = {"fp32-ffma": 2e-5, "fp32": 2e-5, "bf16x3": 4e-4, "tf32": 2e-5, "fp16": 2e-5}


@pytest.fixture
def mutated(tmp_path):
    """A copy of sources, of the kernels or of `folder`, in which a text, which must be there once, is exchanged."""

    def mutate(name: str, old: str, new: str, folder: str = "kernels") -> Path:
        sources = tmp_path / "mutated"
        shutil.copytree(ROOT / "cpp" / folder, sources / folder)
        path = sources / folder / "cuda" / name
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        return sources

    return mutate


def test_fragments_give_the_product(tmp_path):
    errors = mma_errors(tmp_path, ROOT / "cpp")
    assert all(errors[name] < bound for name, bound in MMA_ERRORS.items()), errors


def test_three_products_of_tf32_are_as_accurate_as_float32(tmp_path):
    errors = mma_errors(tmp_path, ROOT / "cpp")
    assert errors["fp32"] < 1.5 * errors["fp32-ffma"]


def test_a_factor_beyond_the_range_of_fp16_is_not_hidden(tmp_path):
    assert not math.isfinite(mma_errors(tmp_path, ROOT / "cpp")["beyond"])


TENSOR = ("fp32", "bf16x3", "tf32", "fp16")
SPLIT, HALVES = ("fp32", "bf16x3"), ("bf16x3", "fp16")
# Mistakes in where a lane loads its factors, with the formats that they spoil.
MISTAKES = {
    "row": ("tensor_cores.cuh", "load<Pair>(from + 8 * stride", "load<Pair>(from + 4 * stride", TENSOR),
    "column": ("tensor_cores.cuh", "lane % 4 * 2;", "lane % 4;", TENSOR),
    "lane of weights": ("formats.cuh", "column % 8 * 4 + row % 8 / 2", "column % 8 * 4 + row % 4", TENSOR),
    "register": ("tensor_cores.cuh", "(words, column / 4, ", "(words, column / 8, ", HALVES),
    "register of weights": (
        "formats.cuh",
        "row % 16 / 8 * 2 + row % 2",
        "row % 16 / 8 + row % 2 * 2",
        HALVES,
    ),
    "order of tf32": ("tensor_cores.cuh", "= rounded_tf32(second)", "= rounded_tf32(first)", ("tf32",)),
    "parts of tf32": (
        "tensor_cores.cuh",
        "split_tf32(second, to.part[0][place + 2], to.part[1][place + 2])",
        "split_tf32(second, to.part[1][place + 2], to.part[0][place + 2])",
        ("fp32",),
    ),
    "parts of a product": ("tensor_cores.cuh", "is_split && number == 1", "false", SPLIT),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_factors_from_a_wrong_place_are_found(tmp_path, mutated, mistake):
    *exchange, spoiled = MISTAKES[mistake]
    errors = mma_errors(tmp_path, mutated(*exchange))
    assert {name for name, bound in MMA_ERRORS.items() if errors[name] > 5 * bound} == set(spoiled), errors


def test_sums_that_tensor_cores_cut_off_are_found(tmp_path, mutated):
    sources = mutated(
        "tensor_cores.cuh", "kSumsBlocks = std::is_same_v<Format, Tf32x3>", "kSumsBlocks = false"
    )
    errors = mma_errors(tmp_path, sources)
    assert errors["fp32"] > 1.5 * errors["fp32-ffma"]


def test_fp16_that_stays_finite_is_found(tmp_path, mutated):
    sources = mutated("formats.cuh", "sign | 0x7c00u", "sign | 0x7bffu")
    assert math.isfinite(mma_errors(tmp_path, sources)["beyond"])


def test_a_write_beyond_a_shared_array_is_found(tmp_path):
    program = compile_check("red_zone_check", tmp_path, ROOT / "cpp", "-fsanitize=address")
    assert subprocess.run([program, "9"], check=False).returncode == 0
    beyond = subprocess.run([program, "10"], check=False, capture_output=True, text=True)
    assert beyond.returncode != 0
    assert "use-after-poison" in beyond.stderr


def steps(folder: Path, sources: Path) -> str:
    others = ["-idirafter", str(ROOT / "cpp"), "-idirafter", str(ROOT / "cpp/include")]
    program = compile_check("recording_check", folder, sources, *others)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def test_a_step_is_recorded_when_it_comes_again_and_replayed_until_something_changes(tmp_path):
    assert steps(tmp_path, ROOT / "cpp") == "drpdrpddr ddd ddd"


def test_a_step_that_is_replayed_for_another_request_is_found(tmp_path, mutated):
    sources = mutated(
        "step_recording.h",
        "  bool operator==(const StepKey&) const = default;",
        "  bool operator==(const StepKey& other) const { return list == other.list; }",
        folder="backends",
    )
    assert steps(tmp_path, sources) != "drpdrpddr ddd ddd"


# Largest errors of phi and phi', relative to the largest of 1 and the value: 24 bits, less those that the special
# functions and differences like 1 - sigmoid take.
ACTIVATION_ERRORS = {"silu": 4e-6, "silut": 2e-6, "tanh": 2e-6, "sigmoid": 5e-7, "gelu": 1e-5}


def activation_errors(folder: Path, sources: Path) -> tuple[dict[str, float], bool]:
    """Largest error of every activation, and whether NaN and large numbers pass as what they are."""
    program = compile_check("activation_check", folder, sources)
    *errors, bad = subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()
    return dict(zip(ACTIVATION_ERRORS, map(float, errors), strict=True)), bad == "0"


def test_activations_stay_within_the_errors_of_the_device(tmp_path):
    errors, good_at_the_ends = activation_errors(tmp_path, ROOT / "cpp")
    assert good_at_the_ends
    assert all(errors[name] < bound for name, bound in ACTIVATION_ERRORS.items()), errors


def test_a_wrong_digit_of_the_exponential_is_found(tmp_path, mutated):
    sources = mutated("special_functions.cuh", "-1.44269504088896f", "-1.4426f")
    errors, _ = activation_errors(tmp_path, sources)
    assert all(errors[name] > ACTIVATION_ERRORS[name] for name in ("silut", "tanh", "sigmoid")), errors


def test_a_special_function_with_fewer_bits_is_found(tmp_path, mutated):
    sources = mutated("special_functions.cuh", "0x1p-22);", "0x1p-16);")
    errors, _ = activation_errors(tmp_path, sources)
    assert all(errors[name] > ACTIVATION_ERRORS[name] for name in ("silut", "tanh", "sigmoid")), errors


def test_an_activation_that_hides_not_a_number_is_found(tmp_path, mutated):
    sources = mutated(
        "special_functions.cuh",
        "float x, float limit) {",
        "float x, float limit) {\n  if (x != x) return limit;",
    )
    _, good_at_the_ends = activation_errors(tmp_path, sources)
    assert not good_at_the_ends


def test_an_exponential_beyond_the_range_of_the_reciprocal_is_found(tmp_path, mutated):
    sources = mutated("special_functions.cuh", "115.0f", "-115.0f")
    errors, _ = activation_errors(tmp_path, sources)
    assert errors["silut"] > ACTIVATION_ERRORS["silut"]
