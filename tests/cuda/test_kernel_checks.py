"""Checks of the kernels' building blocks, each with a mutation of the sources that it must catch."""

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


def mma_errors(folder: Path, sources: Path) -> list[float]:
    """Largest errors of tf32 and bf16x3 products."""
    program = compile_check("mma_check", folder, sources)
    return [float(word) for word in subprocess.run([program], check=True, capture_output=True).stdout.split()]


@pytest.fixture
def mutated(tmp_path):
    """A copy of the sources of the kernels in which a text, which must be there once, is exchanged."""

    def mutate(name: str, old: str, new: str) -> Path:
        sources = tmp_path / "mutated"
        shutil.copytree(ROOT / "cpp/kernels", sources / "kernels")
        path = sources / "kernels/cuda" / name
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))
        return sources

    return mutate


def test_fragments_give_the_product(tmp_path):
    tf32, bf16x3 = mma_errors(tmp_path, ROOT / "cpp")
    assert tf32 < 2e-5
    assert bf16x3 < 4e-4


def test_swapped_tf32_fragments_are_found(tmp_path, mutated):
    sources = mutated(
        "product.cuh",
        "tf32(from[8 * stride]), tf32(from[4])",
        "tf32(from[4]), tf32(from[8 * stride])",
    )
    tf32, bf16x3 = mma_errors(tmp_path, sources)
    assert tf32 > 0.1
    assert bf16x3 < 4e-4


def test_bf16_fragments_of_the_wrong_row_are_found(tmp_path, mutated):
    sources = mutated(
        "product.cuh",
        "split(from[8 * stride], from[8 * stride + 1], parts",
        "split(from[4 * stride], from[4 * stride + 1], parts",
    )
    assert mma_errors(tmp_path, sources)[1] > 0.1


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


def test_a_step_that_is_replayed_for_another_request_is_found(tmp_path):
    sources = tmp_path / "mutated"
    shutil.copytree(ROOT / "cpp/backends", sources / "backends")
    path = sources / "backends/cuda/step_recording.h"
    text = path.read_text()
    assert text.count("  bool operator==(const StepKey&) const = default;") == 1
    same = "  bool operator==(const StepKey& other) const { return list == other.list; }"
    path.write_text(text.replace("  bool operator==(const StepKey&) const = default;", same))
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
