"""Molecular dynamics of 128 atoms of NbMoTaW in float32: is energy conserved, and does the barostat work?

A short thermostatted run brings the crystal to 600 K; then NVE (velocity Verlet, 1 fs) shows the energy conservation, and
NPT (Martyna-Tobias-Klein, isotropic cell) lets the volume relax at 600 K and zero pressure.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import units
from ase.io import Trajectory
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.velocitydistribution import Stationary
from ase.md.verlet import VelocityVerlet
from common import BLUE, GREEN, GREY, ORANGE, alloy, figure, options, save

from moecalc import MoECalculator

TEMPERATURE = 600.0  # K


def main(output: Path, fast: bool = False) -> dict[str, float]:
    """Equilibrate, run NVE and NPT, write trajectories and figures.

    Returns:
        Drift of the total energy over the NVE run and its scatter about that drift (meV/atom), mean temperature (K),
        mean pressure of the second half of the NPT run (GPa).
    """
    output.mkdir(parents=True, exist_ok=True)
    n_warm, n_nve, n_npt = (20, 40, 16) if fast else (100, 500, 400)
    atoms = alloy(2 if fast else 4)
    atoms.calc = MoECalculator(dtype="float32")
    rng = np.random.default_rng(5)
    # hotter than wanted, because a crystal at rest takes half of the kinetic energy as potential energy
    widths = np.sqrt(1.5 * units.kB * TEMPERATURE * atoms.get_masses())
    atoms.set_momenta(widths[:, None] * rng.standard_normal((len(atoms), 3)))
    warm_up = Langevin(
        atoms, 2 * units.fs, temperature_K=TEMPERATURE, friction=0.02 / units.fs, rng=rng, fixcm=False
    )
    warm_up.run(n_warm)
    Stationary(atoms)

    rows = []

    def record() -> None:
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        trace = float(atoms.get_stress(include_ideal_gas=True)[:3].mean())
        rows.append(
            (potential + kinetic, potential, atoms.get_temperature(), -trace / units.GPa, atoms.get_volume())
        )

    def run(dynamics: VelocityVerlet | IsotropicMTKNPT, n_steps: int, name: str) -> np.ndarray:
        rows.clear()
        with Trajectory(output / f"dynamics_{name}.traj", "w", atoms) as trajectory:
            dynamics.attach(record)
            dynamics.attach(trajectory.write, interval=10)
            dynamics.run(n_steps)
        return np.array(rows)

    nve = run(VelocityVerlet(atoms, 1 * units.fs), n_nve, "nve")
    npt_dynamics = IsotropicMTKNPT(
        atoms,
        2 * units.fs,
        temperature_K=TEMPERATURE,
        pressure_au=0.0,
        tdamp=100 * units.fs,
        pdamp=300 * units.fs,
    )
    npt = run(npt_dynamics, n_npt, "npt")

    n = len(atoms)
    time = np.arange(len(nve)) / 1000
    total = 1000 * (nve[:, 0] - nve[0, 0]) / n
    slope, offset = np.polyfit(time, total, 1)
    drift, scatter = abs(slope) * time[-1], float(np.std(total - slope * time - offset))
    late = npt[len(npt) // 2 :]
    print(f"{atoms.get_chemical_formula()}, {atoms.calc.dtype}")
    print(
        f"NVE  {n_nve} steps of 1 fs: drift {drift:.4f} meV/atom, scatter {scatter:.4f} meV/atom, {nve[:, 2].mean():.0f} K"
    )
    print(
        f"NPT  {n_npt} steps of 2 fs, second half: {late[:, 2].mean():.0f} K, {late[:, 3].mean():.2f} GPa, "
        f"{late[:, 4].mean() / n:.3f} A^3/atom"
    )
    print(f"neighbour list: {atoms.calc.neighbor_list.n_rebuilds} searches in {n_warm + n_nve + n_npt} steps")

    fig, (left, right) = figure(2)
    potential = 1000 * (nve[:, 1] - nve[:, 1].mean()) / n
    left.plot(time, potential, color=GREY, label="potential energy")
    left.plot(time, -(potential - total), color=ORANGE, alpha=0.8, label="kinetic energy")
    left.plot(time, total, color=BLUE, lw=2.2, label="total energy")
    left.set(title="NVE: energies, each about its level", xlabel="time (ps)", ylabel="meV/atom")
    left.set_ylim(top=1.7 * np.abs(potential).max())
    left.legend(loc="upper right", fontsize=8, ncols=2)
    right.plot(time, total, color=BLUE)
    right.plot(time, slope * time + offset, color="k", lw=1, ls="--")
    right.set(title=f"NVE: total energy, drift {drift:.4f} meV/atom", xlabel="time (ps)", ylabel="meV/atom")
    save(fig, output / "dynamics_nve.png")

    fig, panels = figure(3)
    time = np.arange(len(npt)) * 2 / 1000
    labels = ("temperature (K)", "pressure (GPa)", "volume (Å³/atom)")
    values = (npt[:, 2], npt[:, 3], npt[:, 4] / n)
    for panel, label, value, target, colour in zip(
        panels, labels, values, (TEMPERATURE, 0.0, None), (ORANGE, GREEN, BLUE), strict=True
    ):
        panel.plot(time, value, color=colour)
        if target is not None:
            panel.axhline(target, color="k", lw=1, ls="--")
        panel.set(title=f"NPT: {label.split(' (')[0]}", xlabel="time (ps)", ylabel=label)
    save(fig, output / "dynamics_npt.png")
    return {
        "drift (meV/atom)": float(drift),
        "scatter (meV/atom)": scatter,
        "temperature (K)": float(nve[:, 2].mean()),
        "NPT pressure (GPa)": float(late[:, 3].mean()),
    }


if __name__ == "__main__":
    main(**options(__doc__))
