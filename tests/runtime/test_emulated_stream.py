"""The queue of the emulated target: a wait that is missing gives wrong numbers on the host too."""

import shutil
import subprocess
from pathlib import Path

import pytest

CPP = Path(__file__).parents[2] / "cpp"
COMPILER = shutil.which("g++") or shutil.which("clang++")

# Two values go through one staging buffer; the sum is made by a launch and read on the host.
PROGRAM = """
#include <cstdio>
#include "backends/cuda/emulated_stream.h"

int main(int, char** arguments) {
  const bool waits_after_upload = arguments[1][0] == '1';
  const bool waits_for_result = arguments[1][1] == '1';
  const bool result_to_staging = arguments[1][2] == '1';
  moecalc::cuda::EmulatedStream stream;
  double staging = 1.0;
  double device[3];
  double sum = 0.0;
  stream.poison(device, sizeof device);
  stream.copy_to_device(&device[0], &staging, sizeof staging);
  if (waits_after_upload) stream.synchronize();
  staging = 2.0;
  stream.copy_to_device(&device[1], &staging, sizeof staging);
  double factor = 10.0;
  stream.add([&device, factor] { device[2] = factor * (device[0] + device[1]); });
  factor = 0.0;  // a launch has its arguments
  double& result = result_to_staging ? staging : sum;
  stream.copy_to_host(&result, &device[2], sizeof result);
  if (waits_for_result) stream.synchronize();
  std::printf("%g", result);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("stream")
    (folder / "stream.cpp").write_text(PROGRAM)
    command = [COMPILER, "-std=c++20", "-O1", f"-I{CPP}", "-o", folder / "stream", folder / "stream.cpp"]
    subprocess.run(command, check=True)
    return folder / "stream"


def result(program, waits):
    done = subprocess.run([program, waits], capture_output=True, text=True, check=True)
    return done.stdout.lstrip("-")


def test_work_runs_in_order(program):
    assert result(program, "110") == "30"


def test_a_staging_buffer_reused_too_early_gives_wrong_numbers(program):
    assert result(program, "010") == "40"


def test_results_read_too_early_are_not_numbers(program):
    assert result(program, "100") == "nan"


def test_a_buffer_may_be_copied_back_to_before_it_was_sent(program):
    """The device does one after the other."""
    assert result(program, "111") == "30"
