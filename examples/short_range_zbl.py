"""The short-range guard in ASE: two atoms pushed together, and hot dynamics of an alloy with half of its volume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from common import ALLOY, BLUE, GREY, ORANGE, alloy, figure, options, save

from moecalc import MoECalculator
from moecalc.zbl import ZBL, guard_radii, guarded, shortest_distances


def main(output: Path, fast: bool = False) -> dict[str, float]:
    """Draw the energies of dimers, then compress, relax and heat an alloy.

    Returns:
        Energy drift in meV/atom and the shortest distance in Angstrom of the dynamics.
    """
    output.mkdir(parents=True, exist_ok=True)
    model = MoECalculator(dtype="float64")
    radii = guard_radii(ALLOY)
    guard = ZBL(radii)
    fig, panels = figure(3)
    r = np.linspace(0.8, 3.5, 60)
    for panel, symbol in zip(panels[:2], ("Nb", "W"), strict=True):
        pairs = [Atoms([symbol] * 2, [[0, 0, 0], [x, 0, 0]]) for x in r]
        plain = np.array([a["energy"] for a in model.calculate_batch(pairs, ["energy"])])
        total = plain + guard.pair(symbol, symbol, r)[0]
        panel.plot(r, total - plain[-1], color=ORANGE, label="model + guard")
        panel.plot(r, plain - plain[-1], color=BLUE, label="model")
        for x in radii[symbol, symbol]:
            panel.axvline(x, ls=":", color=GREY)
        panel.set(title=f"{symbol}-{symbol} dimer", xlabel="distance (Å)", ylabel="eV", ylim=(-3, 30))
        panel.legend()

    atoms = alloy(2 if fast else 3)
    atoms.set_cell(atoms.cell * 0.5 ** (1 / 3), scale_atoms=True)
    atoms.calc = guarded(model)
    atoms.rattle(0.02, seed=1)
    FIRE(atoms, logfile=None).run(fmax=0.5, steps=100)
    thermalize_momenta(atoms, temperature_K=3000, rng=np.random.default_rng(2))
    dynamics = VelocityVerlet(atoms, 1 * units.fs)
    time, energy, shortest = [], [], []

    def note() -> None:
        time.append(dynamics.get_time() / units.fs / 1000)
        energy.append(atoms.get_total_energy() / len(atoms))
        shortest.append(min(shortest_distances([atoms]).values()))

    dynamics.attach(note, interval=5)
    dynamics.run(50 if fast else 1000)
    panels[2].plot(time, shortest, color=BLUE)
    panels[2].set(
        title=f"{len(atoms)} atoms, half the volume", xlabel="time (ps)", ylabel="shortest distance (Å)"
    )
    save(fig, output / "short_range.png")
    results = {
        "drift (meV/atom)": 1000 * float(np.ptp(energy)),
        "shortest distance (A)": float(min(shortest)),
    }
    for name, value in results.items():
        print(f"{name}: {value:.3f}")
    return results


if __name__ == "__main__":
    main(**options(__doc__))
