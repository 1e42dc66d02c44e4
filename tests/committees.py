"""A committee of random models for the tests of calculator and pair style."""

from __future__ import annotations

from pathlib import Path

from moecalc import testing

METALS = ["Nb", "Mo", "Ta", "W"]


def write_members(folder: Path) -> list[Path]:
    """Write models of METALS whose cutoffs, widths, layers and orders of elements differ.

    The first has the smallest cutoff.
    """
    configs = [
        testing.random_config(METALS, n_routed=4, e_rcut=4.0, e_rcut_smth=3.2),
        testing.random_config(["W", "O", *METALS[:3]], e_rcut=5.0, e_rcut_smth=4.0, n_dim=12),
        testing.random_config([*METALS[::-1], "O"], n_routed=2, nlayers=2),
    ]
    paths = [folder / f"{name}.moe.pt" for name in "abc"]
    for seed, (path, config) in enumerate(zip(paths, configs, strict=True)):
        testing.write_random_package(path, config, "float64", seed)
    return paths
