"""What must be in the sources of the kernels, because no compiler complains where it is missing."""

import re
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "cpp" / "kernels" / "cuda"
WARP_WIDE = ("mma.sync", "ldmatrix.sync", "cp.async", "bar.sync")


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.cuh")), ids=lambda path: path.name)
def test_instructions_of_a_whole_warp_are_volatile(path):
    """Otherwise the compiler may move them into a branch that not all threads of the warp take."""
    for keyword, text in re.findall(r'\basm(\s+volatile)?\s*\(\s*"([^"]*)', path.read_text()):
        if text.startswith(WARP_WIDE):
            assert keyword.strip() == "volatile", text
