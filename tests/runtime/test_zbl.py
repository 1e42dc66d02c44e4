"""The short-range guard for ASE; its agreement with LAMMPS is in lammps/test_lammps_zbl.py."""

import itertools

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import FIRE

from moecalc import MoECalculator, testing
from moecalc.errors import ElementError, MoecalcError, StructureError
from moecalc.zbl import COULOMB, ZBL, guard_radii, guarded, lammps_commands, pair_of, shortest_distances

METALS = ["Nb", "Mo", "Ta", "W"]


@pytest.fixture
def close_pairs():
    """A crystal so dense that pairs lie below, between and beyond the radii."""
    return testing.bulk_alloy(a=2.0, amplitude=0.15)


@pytest.fixture
def guard():
    return ZBL(guard_radii(METALS))


def energies(calculator):
    def of(structures):
        found = []
        for atoms in structures:
            atoms.calc = calculator
            found.append(atoms.get_potential_energy())
        return found

    return of


def test_below_the_inner_radius_the_force_is_that_of_screened_nuclei():
    guard = ZBL({("Si", "W"): (1.0, 1.5)})
    r, step = np.array([0.7, 0.9]), 1e-4

    def screened(r):
        x = r * (14**0.23 + 74**0.23) / 0.46850
        terms = (0.18175, 3.19980), (0.50986, 0.94229), (0.28022, 0.40290), (0.02817, 0.20162)
        return COULOMB * 14 * 74 / r * sum(c * np.exp(-d * x) for c, d in terms)

    slope = (screened(r + step) - screened(r - step)) / (2 * step)
    assert guard.pair("W", "Si", r)[1] == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations_with_replacement(("Li", "Cu", "W"), 2)))
def test_energy_force_and_its_slope_vanish_at_the_outer_radius(a, b):
    radii = guard_radii(["Li", "Cu", "W"])
    guard, outer = ZBL(radii), radii[pair_of(a, b)][1]
    energy, slope = guard.pair(a, b, np.array([outer - 1e-3, outer, outer + 1e-3]))
    scale = guard.pair(a, b, np.array([outer - 0.1]))[0][0]
    assert np.abs(energy[1:]).max() == 0
    assert abs(energy[0]) < 1e-4 * scale
    assert abs(slope[0]) < 1e-2 * scale


def test_it_is_repulsive_at_every_distance(guard):
    r = np.linspace(0.5, 2.5, 400)
    for a, b in itertools.combinations_with_replacement(METALS, 2):
        energy, slope = guard.pair(a, b, r)
        assert slope.max() <= 0
        assert energy.min() >= 0


def test_forces_are_derivatives(guard, close_pairs):
    close_pairs.calc = guard
    forces = close_pairs.get_forces()
    assert np.abs(forces).max() > 1
    found = testing.finite_difference_forces(energies(guard), close_pairs.copy(), 1e-4, [0, 3])
    assert np.abs(found - forces[[0, 3]]).max() < testing.FINITE_DIFFERENCE


def test_stress_is_a_derivative(guard, close_pairs):
    close_pairs.calc = guard
    stress = close_pairs.get_stress()
    found = testing.finite_difference_stress(energies(guard), close_pairs.copy(), 1e-4)
    assert np.abs(found - stress).max() < testing.FINITE_DIFFERENCE


def test_energies_sum_to_the_energy(guard, close_pairs):
    close_pairs.calc = guard
    assert close_pairs.get_potential_energies().sum() == pytest.approx(close_pairs.get_potential_energy())


def test_images_in_a_small_cell_count(guard):
    one = bulk("W", "bcc", a=1.9)
    one.calc = guard
    many = bulk("W", "bcc", a=1.9) * 3
    many.calc = guard
    assert many.get_potential_energy() == pytest.approx(27 * one.get_potential_energy(), rel=1e-12)


def test_a_crystal_does_not_feel_it(shared_calculator):
    atoms = testing.bulk_alloy()
    plain = shared_calculator.calculate_batch([atoms], ["energy", "forces", "stress"])[0]
    atoms.calc = guarded(MoECalculator(dtype="float64", device="cpu"))
    assert atoms.get_potential_energy() == pytest.approx(plain["energy"], abs=1e-10)
    assert np.abs(atoms.get_forces() - plain["forces"]).max() < 1e-10
    assert np.abs(atoms.get_stress() - plain["stress"]).max() < 1e-12


@pytest.mark.filterwarnings("ignore:an atom has:UserWarning")
def test_it_adds_to_the_model(guard, close_pairs):
    close_pairs.calc = guarded(MoECalculator(dtype="float64", device="cpu"))
    total = close_pairs.get_potential_energy(), close_pairs.get_forces(), close_pairs.get_stress()
    properties = ["energy", "forces", "stress"]
    (plain,) = MoECalculator(dtype="float64", device="cpu").calculate_batch([close_pairs], properties)
    for name, value in zip(properties, total, strict=True):
        assert np.allclose(value, plain[name] + guard.get_property(name, close_pairs), atol=1e-9)


def test_a_molecule_has_energy_and_forces_but_no_stress(guard):
    atoms = Atoms("W2", [[0, 0, 0], [1.5, 0, 0]], calculator=guard)
    assert atoms.get_potential_energy() > 1
    assert atoms.get_forces()[0, 0] < -1
    assert "stress" not in guard.results


class TestRadii:
    def test_shortest_distances_of_images_and_pairs(self):
        found = shortest_distances([bulk("W", "bcc", a=3.0), Atoms("LiW", [[0, 0, 0], [2.5, 0, 0]])])
        assert found == {("Li", "W"): pytest.approx(2.5), ("W", "W"): pytest.approx(3 * 3**0.5 / 2)}

    def test_outer_radius_lies_below_the_data(self):
        radii = guard_radii(["Mo", "W"], {("Mo", "Mo"): 1.883})
        assert radii["Mo", "Mo"] == (1.19, 1.7)

    def test_without_data_it_is_a_share_of_the_covalent_radii(self):
        assert guard_radii(["W", "Cu"]) == {
            ("W", "W"): (1.33, 1.9), ("Cu", "W"): (1.19, 1.7), ("Cu", "Cu"): (1.05, 1.5),
        }  # fmt: skip

    def test_far_pairs_do_not_widen_the_guard(self):
        assert guard_radii(["W"], {("W", "W"): 3.5}) == guard_radii(["W"])

    def test_unknown_element(self):
        with pytest.raises(ElementError, match="expected a chemical element, got 'Xx'"):
            guard_radii(["W", "Xx"])

    @pytest.mark.parametrize("radii", [(1.5, 1.5), (0.0, 1.0), (1.0, np.inf)])
    def test_order(self, radii):
        with pytest.raises(MoecalcError, match="expected 0 < inner < outer radius for W-W"):
            ZBL({("W", "W"): radii})


class TestRejections:
    def test_element_without_radii(self, guard):
        with pytest.raises(ElementError, match="no radii for Cu, expected Nb Mo Ta W"):
            Atoms("Cu", calculator=guard).get_potential_energy()

    def test_pair_without_radii(self):
        guard = ZBL({("W", "W"): (1.0, 1.5), ("Mo", "Mo"): (1.0, 1.5)})
        with pytest.raises(ElementError, match="no radii for Mo-W"):
            Atoms("WMo", [[0, 0, 0], [2, 0, 0]], calculator=guard).get_potential_energy()

    def test_element_of_a_pair(self, guard):
        with pytest.raises(ElementError, match="no radii for Cu"):
            guard.pair("Cu", "W", np.array([1.0]))

    def test_no_structure(self, guard):
        with pytest.raises(MoecalcError, match="expected a structure, got none"):
            guard.calculate()

    def test_closer_than_moecalc_allows(self, guard):
        with pytest.raises(StructureError, match=r"0\.4"):
            Atoms("W2", [[0, 0, 0], [0.4, 0, 0]], calculator=guard).get_potential_energy()

    def test_commands_for_a_pair_without_radii(self):
        with pytest.raises(ElementError, match="no radii for Mo-W"):
            lammps_commands(["W", "Mo"], {("W", "W"): (1, 2), ("Mo", "Mo"): (1, 2)})


class TestCommands:
    def test_one_style_for_equal_radii(self):
        assert lammps_commands(["W"], guard_radii(["W"])) == (
            "pair_style hybrid/overlay moe zbl 1.33 1.9\n"
            "pair_coeff * * moe default W\n"
            "pair_coeff 1 1 zbl 74 74 # W-W\n"
        )

    def test_several_styles_are_numbered(self):
        text = lammps_commands(["W", "Cu"], guard_radii(["W", "Cu"]), "my.moe.pt", "dtype float64")
        assert text.splitlines() == [
            "pair_style hybrid/overlay moe dtype float64 zbl 1.05 1.5 zbl 1.19 1.7 zbl 1.33 1.9",
            "pair_coeff * * moe my.moe.pt W Cu",
            "pair_coeff 1 1 zbl 3 74 74 # W-W",
            "pair_coeff 1 2 zbl 2 74 29 # W-Cu",
            "pair_coeff 2 2 zbl 1 29 29 # Cu-Cu",
        ]


class TestHotDynamics:
    """The default model with the guard where there are no data."""

    def test_3000_kelvin(self):
        atoms = testing.bulk_alloy(repeat=3, amplitude=0.05)
        atoms.calc = guarded(MoECalculator(device="cpu"))
        rng = np.random.default_rng(3)
        thermalize_momenta(atoms, temperature_K=3000, rng=rng)
        start = atoms.get_potential_energy()
        dynamics = Langevin(
            atoms, 1 * units.fs, temperature_K=3000, friction=0.02 / units.fs, fixcm=False, rng=rng
        )
        temperatures = []
        dynamics.attach(lambda: temperatures.append(atoms.get_temperature()), interval=10)
        dynamics.run(300)
        assert np.isfinite(atoms.positions).all()
        assert 2000 < np.mean(temperatures[-15:]) < 4000
        # equipartition allows about 3/2 kT of potential energy per atom
        assert abs(atoms.get_potential_energy() - start) / len(atoms) < 1.0
        assert min(shortest_distances([atoms]).values()) > 1.3

    @pytest.mark.filterwarnings("ignore:an atom has:UserWarning")
    def test_half_the_volume(self):
        atoms = testing.bulk_alloy(repeat=3, amplitude=0.05)
        atoms.set_cell(atoms.cell * 0.5 ** (1 / 3), scale_atoms=True)
        atoms.calc = guarded(MoECalculator(device="cpu"))
        before = atoms.get_potential_energy()
        FIRE(atoms, logfile=None).run(fmax=0.5, steps=100)
        assert atoms.get_potential_energy() < before
        assert min(shortest_distances([atoms]).values()) > 1.3
