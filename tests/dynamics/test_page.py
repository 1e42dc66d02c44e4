"""The page of a run: what is in it, and what it says where something cannot be computed."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.geometry.rdf import get_rdf
from ase.io import write
from command_line import run
from pages import read_page

from moecalc import MoECalculator
from moecalc.dynamics import MDSettings, analysis, run_md
from moecalc.dynamics.analysis import energy_conservation, mean_squared_displacement, radial_distribution
from moecalc.page import NotComputed, Picture, Section, drawing
from moecalc.page.structure import draw_structure

SECTIONS = ["thermodynamics", "conservation", "distances", "motion", "structure", "experts"]


def tungsten(repeat=2):
    atoms = bulk("W", "bcc", a=3.2, cubic=True) * repeat
    atoms.symbols[: len(atoms) // 2] = "Mo"
    return atoms


def page_of(folder, atoms, package=None, **changes):
    """The page of a short run."""
    folder.mkdir(exist_ok=True)
    write(folder / "start.extxyz", atoms)
    settings = MDSettings(**({"ensemble": "nve", "steps": 12, "every": 1, "log_every": 1} | changes))
    run_md(package, folder / "start.extxyz", folder / "out", settings, device="cpu")
    return read_page(folder / "out/md.html")


@pytest.fixture(scope="module")
def nve(tmp_path_factory):
    return page_of(tmp_path_factory.mktemp("nve"), tungsten())


class TestPage:
    def test_it_has_every_section(self, nve):
        assert [name for name in nve.ids if name != "run"] == SECTIONS
        assert [section for section in ("run", *SECTIONS) if section not in nve.anchors] == []

    def test_pictures_say_what_they_show(self, nve):
        words = [alt for _, alt in nve.pictures]
        for start in (
            "Temperature over time, from ",
            "Potential energy over time, from ",
            "Pressure over time, from ",
            "total energy over time; the fitted line changes by ",
            "Radial distribution, all atoms: the highest peak is at 2.7",
            "Radial distribution, by pair of elements: ",
            "Mean squared displacement after 0.003 ps in Å²: Mo ",
            "Structure after 12 steps: 16 atoms, Mo8W8, periodic, coloured by element",
            "Weights of experts in layer 1, first gate: Mo ",
        ):
            assert any(alt.startswith(start) for alt in words), start

    def test_the_drift_of_the_energy_is_told(self, nve):
        assert "A line fitted to all of the run drifts by" in nve.shown
        assert "the rest scatters around it by" in nve.shown

    def test_what_was_run_is_told(self, nve):
        source = MoECalculator(device="cpu").metadata["source"]["sha256"]
        for text in ("16 atoms, Mo8W8", "metals10", "float32 on cpu", "nve: velocity Verlet", "12 of 1 fs; seed 1",
                     "Mo W here", f"SHA-256 {source[:8]}", "moecalc 0.1.0, ASE ", "arXiv:2506.01686"):  # fmt: skip
            assert text in nve.shown, text
        assert "--ensemble nve --steps 12 --every 1 --log-every 1 --device cpu" in nve.shown

    def test_a_volume_that_stays_is_left_out(self, nve):
        assert "Volume: left out, it does not change in this run." in nve.shown

    def test_colours_follow_the_scheme(self, nve):
        assert "prefers-color-scheme: dark" in nve.text

    def test_the_same_run_gives_the_same_page(self, tmp_path):
        page_of(tmp_path, tungsten(1))
        first = (tmp_path / "out/md.html").read_bytes()
        page_of(tmp_path, tungsten(1))  # goes on, with no steps left
        assert (tmp_path / "out/md.html").read_bytes() == first

    def test_the_command_writes_it(self, tmp_path):
        write(tmp_path / "start.extxyz", tungsten(1))
        result = run("md", "default", tmp_path / "start.extxyz", "-o", tmp_path / "out", "--steps", 2)
        assert result.exit_code == 0, result.output
        assert "out/md.html" in "".join(result.stdout.split())
        read_page(tmp_path / "out/md.html")

    def test_nvt_conserves_the_energy_less_the_heat_of_the_thermostat(self, tmp_path):
        page = page_of(tmp_path, tungsten(), ensemble="nvt", temperature=500.0, thermostat_time=5.0)
        assert "The total energy less the heat of the thermostat should not change." in page.shown
        log = analysis_log(tmp_path / "out")
        assert np.ptp(log["conserved_eV"]) < 0.1 * np.ptp(log["total_eV"])

    def test_npt_has_a_volume_and_no_conserved_quantity(self, tmp_path):
        page = page_of(tmp_path, tungsten(), ensemble="npt")
        assert any(alt.startswith("Volume over time") for _, alt in page.pictures)
        assert "Energy conservation: left out, ASE's LangevinBAOAB, which runs npt, has no" in page.shown

    def test_a_cluster_has_neither_pressure_nor_radial_distribution(self, tmp_path):
        page = page_of(tmp_path, Atoms("W4", np.eye(4)[:, :3] * 2.6))
        assert "Pressure and volume: left out, they need a structure that is periodic" in page.shown
        assert "Radial distribution: left out, it compares with the density" in page.shown
        assert "periodic along nothing" in page.shown

    def test_a_single_atom_has_neither_distances_nor_motion(self, tmp_path):
        page = page_of(tmp_path, bulk("W", "bcc", a=3.2))
        assert "Radial distribution: left out, it needs two atoms or more, this run has one." in page.shown
        assert "Mean squared displacement: left out, the motion of the centre of mass" in page.shown

    def test_a_short_run_has_no_motion_and_no_fit(self, tmp_path):
        page = page_of(tmp_path, tungsten(1), steps=2, every=100, log_every=100)
        assert "it needs 3 frames in the second half of the run, this run has 1: more --steps" in page.shown
        assert "a fit needs 3 lines of the log, this run has 1: more --steps" in page.shown

    def test_a_dense_model_has_no_routing(self, tmp_path):
        pytest.importorskip("torch")
        from moecalc.testing import random_config, write_random_package

        write_random_package(tmp_path / "dense.moe.pt", random_config(["W", "Mo"]))
        write(tmp_path / "start.extxyz", tungsten(1))
        run_md(
            tmp_path / "dense.moe.pt",
            tmp_path / "start.extxyz",
            tmp_path / "out",
            MDSettings(steps=2),
            device="cpu",
        )
        page = read_page(tmp_path / "out/md.html")
        assert "Routing: left out, dense has no routing to plot: it is a dense model, without" in page.shown

    def test_names_are_escaped(self, tmp_path):
        page = page_of(tmp_path / "<b>bold", tungsten(1), steps=1)
        assert "<b>bold" not in page.text
        assert "<b>bold" in page.shown

    def test_it_can_be_left_out(self, tmp_path):
        write(tmp_path / "start.extxyz", tungsten(1))
        run_md(
            None, tmp_path / "start.extxyz", tmp_path / "out", MDSettings(steps=1), device="cpu", page=False
        )
        assert not (tmp_path / "out/md.html").exists()


def analysis_log(folder):
    from moecalc.dynamics.records import read_log

    return read_log(folder)


class TestRadialDistribution:
    def test_it_is_that_of_ase(self):
        atoms = tungsten(6)
        atoms.rattle(0.1, seed=1)
        found = radial_distribution([atoms])
        n = len(found.distances)
        reach = found.distances[-1] + found.distances[0]
        assert reach == pytest.approx(8.0)
        assert np.abs(found.total - get_rdf(atoms, reach, n, no_dists=True)).max() < 1e-9
        for pair, values in found.pairs.items():
            expected = get_rdf(atoms, reach, n, elements=pair.split("-"), no_dists=True)
            assert np.abs(values - expected).max() < 1e-9, pair

    def test_atoms_without_order_give_one(self):
        places = np.random.default_rng(1).random((2000, 3))
        gas = Atoms("W2000", scaled_positions=places, cell=[30] * 3, pbc=True)
        assert radial_distribution([gas]).total[60:].mean() == pytest.approx(1, abs=0.02)

    def test_peaks_and_shortest_distances(self):
        found = radial_distribution([bulk("W", "bcc", a=3.2, cubic=True) * 3])
        assert found.first_peak("W-W") == pytest.approx(3.2 * 3**0.5 / 2, abs=0.03)
        assert found.shortest["W-W"] == pytest.approx(3.2 * 3**0.5 / 2)
        assert found.half_width == pytest.approx(4.8)

    def test_a_pair_that_does_not_meet_has_no_peak(self):
        found = radial_distribution([Atoms("WMo", [[0, 0, 0], [9, 9, 9]], cell=[18] * 3, pbc=True)])
        assert found.first_peak("Mo-W") is None
        assert "Mo-W" not in found.shortest

    def test_very_many_atoms_are_looked_at_less_far(self, monkeypatch):
        monkeypatch.setattr(analysis, "_MOST_PAIRS", 1e4)
        assert 3 < radial_distribution([tungsten(4)]).distances[-1] < 8

    def test_very_many_frames_are_thinned(self, monkeypatch):
        monkeypatch.setattr(analysis, "_PAIRS_IN_ALL", 1e4)
        assert radial_distribution([tungsten()] * 10).n_frames < 10

    @pytest.mark.parametrize("pbc", [False, (True, True, False)])
    def test_it_needs_a_volume(self, pbc):
        atoms = tungsten()
        atoms.pbc = pbc
        with pytest.raises(NotComputed, match="periodic in all directions, and this one is not"):
            radial_distribution([atoms])


def moving(velocities, steps=10, **options):
    """Frames of atoms that fly at constant velocities (A/ps), a frame each 0.1 ps."""
    frames = []
    for k in range(steps):
        atoms = Atoms(f"W{len(velocities)}", np.array(velocities) * 0.1 * k, **options)
        atoms.info["time_ps"] = 0.1 * k
        frames.append(atoms)
    return frames


class TestDisplacement:
    def test_free_flight_grows_with_the_square_of_the_time(self):
        found = mean_squared_displacement(moving([[2, 0, 0], [-2, 0, 0]]), fixed=False)
        assert found.times == pytest.approx(0.1 * np.arange(6))
        assert found.elements["W"] == pytest.approx(4 * found.times**2)

    def test_motion_of_all_is_none(self):
        found = mean_squared_displacement(moving([[2, 0, 0], [2, 0, 0]]), fixed=False)
        assert found.elements["W"] == pytest.approx(0)

    def test_motion_of_all_counts_where_atoms_are_fixed(self):
        found = mean_squared_displacement(moving([[2, 0, 0], [0, 0, 0]]), fixed=True)
        assert found.elements["W"] == pytest.approx(2 * found.times**2)

    def test_a_cell_that_grows_is_no_motion(self):
        frames = []
        for k in range(6):
            atoms = tungsten()
            atoms.set_cell(atoms.cell * (1 + 0.01 * k), scale_atoms=True)
            atoms.info["time_ps"] = 0.1 * k
            frames.append(atoms)
        found = mean_squared_displacement(frames, fixed=False)
        assert max(values.max() for values in found.elements.values()) < 1e-20

    def test_very_many_frames_are_thinned(self, tmp_path, monkeypatch):
        monkeypatch.setattr(analysis, "_MOST_FRAMES", 4)
        write(tmp_path / analysis.TRAJECTORY, moving([[1, 0, 0], [-1, 0, 0]], 20))
        frames = analysis.read_second_half(tmp_path, 20, 2)
        assert [round(10 * frame.info["time_ps"]) for frame in frames] == [10, 13, 16, 19]


class TestConservation:
    def test_a_line_is_found(self):
        times = np.linspace(0, 2, 21)
        found = energy_conservation({"time_ps": times, "conserved_eV": 5 + 0.03 * times}, 10)
        assert found.slope == pytest.approx(3.0)
        assert found.scatter == pytest.approx(0, abs=1e-9)

    def test_scatter_is_around_the_line(self):
        times = np.linspace(0, 2, 2000)
        wave = 1e-3 * np.sin(100 * np.pi * times)
        found = energy_conservation({"time_ps": times, "conserved_eV": wave}, 1)
        assert found.scatter == pytest.approx(0.5**0.5, rel=0.01)


class TestPictures:
    def test_a_long_log_is_drawn_as_blocks(self):
        from moecalc.dynamics.figures import Curve, draw_thermo

        times = np.linspace(0, 10, 50_000)
        with drawing():
            (picture,) = draw_thermo(times, [Curve("temperature", "K", 300 + np.sin(900 * times), "k")])
        assert len(picture.svg()) < 100_000

    def test_many_elements_are_drawn_around_each(self):
        from moecalc.dynamics.figures import draw_distribution

        atoms = bulk("W", "bcc", a=3.2, cubic=True) * 2
        atoms.symbols = ["Nb", "Mo", "Ta", "W"] * 4
        with drawing():
            words = [picture.alt for picture in draw_distribution(radial_distribution([atoms]))]
        assert [text.split(":")[0].split(", ")[1] for text in words] == [
            "all atoms", "around Mo", "around Nb", "around Ta", "around W"
        ]  # fmt: skip

    @pytest.mark.parametrize("atoms", [tungsten(6), bulk("W"), Atoms("W"), Atoms("H2O", np.eye(3))])
    def test_any_structure_is_drawn(self, atoms):
        with drawing():
            picture = draw_structure(atoms, "Structure")
            assert len(picture.svg()) < 400_000
        assert picture.alt.startswith(f"Structure: {len(atoms)} atom")

    def test_elements_whose_colours_are_alike_get_others(self):
        from moecalc.page.structure import _colors

        alike, apart = _colors(np.array([73, 74])), _colors(np.array([1, 8]))
        assert np.linalg.norm(np.subtract(alike[73], alike[74])) > 0.3
        assert apart[8] == pytest.approx((1, 0.051, 0.051))

    def test_settings_of_matplotlib_stay(self):
        import matplotlib as mpl

        before = dict(mpl.rcParams)
        with drawing():
            draw_structure(tungsten(), "Structure").svg()
        assert dict(mpl.rcParams) == before

    def test_the_same_picture_is_the_same_text(self):
        with drawing():
            first, second = (draw_structure(tungsten(), "Structure").source for _ in range(2))
        assert first == second

    def test_what_cannot_be_computed_is_listed_with_its_reason(self):
        def fill(section):
            raise NotComputed("Left out, for a reason.")

        section = Section("Title", "title")
        section.add(fill)
        assert section.omitted == ["Left out, for a reason."]
        assert section.pictures == list[Picture]()
