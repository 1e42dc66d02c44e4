"""Damaged checkpoints of every layout: refused in one line that names the file, or read; never a traceback.

Set MOECALC_MUTATIONS to the number of damages per layout (300 take a minute), MOECALC_SEED to another seed.
"""

import os

import numpy as np
import pytest
import torch
from mutations import LAYOUTS, fresh, mutate, outcome, reference_of, source_of

NUMBER = int(os.environ.get("MOECALC_MUTATIONS", "60"))
SEED = int(os.environ.get("MOECALC_SEED", "20260"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_checkpoints_are_refused_in_one_line_or_read(tmp_path, layout):
    source, head = source_of(layout, tmp_path), LAYOUTS[layout][1]
    data = torch.load(source, weights_only=True)
    reference = reference_of(source, head)
    path = tmp_path / "damaged.pt"
    counts = {"refused": 0, "harmless": 0, "changed": 0}
    for i in range(NUMBER):
        seed = SEED + i
        damaged = fresh(data)
        what = mutate(damaged, head, np.random.default_rng(seed))
        torch.save(damaged, path)
        try:
            result, _ = outcome(path, head, reference)
        except Exception as error:
            error.add_note(f"MOECALC_SEED={seed} MOECALC_MUTATIONS=1, layout {layout}: {what}")
            raise
        counts[result] += 1
    print(f"{layout}: seeds {SEED} to {SEED + NUMBER - 1}: {counts}")  # noqa: T201 - for `pytest -s`
    assert counts["refused"] > NUMBER // 4
