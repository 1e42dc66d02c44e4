"""moecalc md and relax: files in, files out, what goes on, and what is refused."""

import json
import re

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from ase.io import read, write
from command_line import error_of, run

from moecalc import MoECalculator
from moecalc.dynamics import MDSettings, RelaxSettings, relax, run_md
from moecalc.dynamics.md import degrees_of_freedom
from moecalc.dynamics.records import LOG, TRAJECTORY, read_log
from moecalc.errors import MoecalcError, StructureError

SHORT = ("--steps", 20, "--every", 10, "--log-every", 5, "--device", "cpu")


def tungsten():
    atoms = bulk("W", "bcc", a=3.2, cubic=True) * (2, 2, 2)
    atoms.symbols[:8] = "Mo"
    return atoms


@pytest.fixture
def structure(tmp_path):
    path = tmp_path / "start.extxyz"
    write(path, tungsten())
    return path


def settings(**changes):
    return MDSettings(**({"steps": 20, "every": 10, "log_every": 5} | changes))


def run_here(structure, folder, force=False, **changes):
    """A run without the pictures: tests/dynamics/test_page.py."""
    options = {"device": "cpu", "dtype": "float64", "force": force, "page": False}
    return run_md(None, structure, folder, settings(**changes), **options)


class TestMD:
    @pytest.mark.parametrize("name", ["start.cif", "POSCAR", "start.extxyz"])
    def test_a_structure_gives_trajectory_log_and_picture(self, tmp_path, name):
        write(tmp_path / name, tungsten())
        result = run("md", "default", tmp_path / name, "-o", tmp_path / "out", *SHORT)
        assert result.exit_code == 0, result.output
        assert result.stderr == ""  # no bar where there is no terminal
        assert result.stdout.startswith("nvt: 20 steps of 1 fs, ")
        frames = read(tmp_path / "out/trajectory.extxyz", ":")
        assert [frame.info["step"] for frame in frames] == [0, 10, 20]
        assert read_log(tmp_path / "out")["step"].tolist() == [0, 5, 10, 15, 20]
        assert (tmp_path / "out/md.png").read_bytes().startswith(b"\x89PNG")
        assert len(read(tmp_path / "out/final.extxyz")) == 16

    def test_frames_have_the_results_of_the_model(self, tmp_path, structure):
        run_here(structure, tmp_path / "out")
        frame = read(tmp_path / "out/trajectory.extxyz", "-1")
        again = frame.copy()
        again.calc = MoECalculator(device="cpu", dtype="float64")
        assert frame.get_potential_energy() == pytest.approx(again.get_potential_energy(), abs=1e-5)
        assert np.abs(frame.get_forces() - again.get_forces()).max() < 1e-5
        assert np.abs(frame.get_stress() - again.get_stress()).max() < 1e-5

    def test_nve_conserves_the_energy(self, tmp_path, structure):
        result = run_here(structure, tmp_path / "out", ensemble="nve", steps=100)
        assert abs(result.drift) < 0.1  # meV/atom

    def test_nvt_comes_to_the_temperature(self, tmp_path, structure):
        changes = {"temperature": 500.0, "thermostat_time": 20.0, "steps": 400}
        result = run_here(structure, tmp_path / "out", **changes)
        assert result.temperature == pytest.approx(500, rel=0.25)

    def test_npt_relieves_the_pressure(self, tmp_path, structure):
        changes = {"ensemble": "npt", "barostat_time": 200.0, "steps": 400}
        run_here(structure, tmp_path / "out", **changes)
        log = read_log(tmp_path / "out")
        assert abs(log["pressure_GPa"][-20:].mean()) < abs(log["pressure_GPa"][0]) / 2
        assert np.ptp(log["volume_A3"]) > 0

    def test_npt_full_changes_the_shape(self, tmp_path, structure):
        run_here(structure, tmp_path / "out", ensemble="npt", cell="full")
        cell = read(tmp_path / "out/final.extxyz").cell
        assert np.ptp(cell.lengths()) > 1e-6

    @pytest.mark.parametrize("ensemble", ["nve", "nvt", "npt"])
    def test_a_run_that_goes_on_is_the_run_that_was_not_interrupted(self, tmp_path, structure, ensemble):
        run_here(structure, tmp_path / "whole", ensemble=ensemble, steps=30)
        run_here(structure, tmp_path / "parts", ensemble=ensemble, steps=15)
        result = run_here(structure, tmp_path / "parts", ensemble=ensemble, steps=30)
        assert (result.started_at, result.steps) == (15, 30)
        whole, parts = read_log(tmp_path / "whole"), read_log(tmp_path / "parts")
        for name, values in whole.items():
            if ensemble == "npt" and name == "conserved_eV":  # ASE has none
                assert np.isnan(values).all()
            else:
                assert np.abs(parts[name] - values).max() < 1e-7, name
        assert len(read(tmp_path / "parts/trajectory.extxyz", ":")) == 4

    def test_what_was_written_after_the_last_state_is_written_again(self, tmp_path, structure):
        run_here(structure, tmp_path / "out", steps=10)
        for name in (LOG, TRAJECTORY):
            with (tmp_path / "out" / name).open("a") as file:
                file.write("half a li")
        run_here(structure, tmp_path / "out", steps=20)
        assert read_log(tmp_path / "out")["step"].tolist() == [0, 5, 10, 15, 20]
        assert len(read(tmp_path / "out/trajectory.extxyz", ":")) == 3

    def test_a_run_of_other_settings_is_not_continued(self, tmp_path, structure):
        run_here(structure, tmp_path / "out")
        with pytest.raises(MoecalcError, match=r"has a run with temperature 300.0: choose another folder"):
            run_here(structure, tmp_path / "out", temperature=400.0)
        run_here(structure, tmp_path / "out", temperature=400.0, force=True)

    def test_a_run_of_another_structure_is_not_continued(self, tmp_path, structure):
        run_here(structure, tmp_path / "out")
        write(structure, bulk("W", cubic=True))
        with pytest.raises(MoecalcError, match="has a run with structure_sha256"):
            run_here(structure, tmp_path / "out")

    def test_fewer_steps_than_were_taken_are_refused(self, tmp_path, structure):
        run_here(structure, tmp_path / "out")
        with pytest.raises(MoecalcError, match="has a run of 20 steps, expected at most the 10 asked for"):
            run_here(structure, tmp_path / "out", steps=10)

    def test_a_lost_log_is_told(self, tmp_path, structure):
        run_here(structure, tmp_path / "out")
        (tmp_path / "out/log.csv").write_text("")
        with pytest.raises(MoecalcError, match=r"log.csv: expected at least \d+ bytes of the run so far"):
            run_here(structure, tmp_path / "out", steps=30)

    @pytest.mark.parametrize("name", ["settings.json", "state.npz"])
    def test_a_damaged_file_of_a_run_is_told(self, tmp_path, structure, name):
        run_here(structure, tmp_path / "out")
        (tmp_path / "out" / name).write_text("[")
        with pytest.raises(MoecalcError, match=f"{name}: .*: begin anew with --force"):
            run_here(structure, tmp_path / "out", steps=30)

    def test_a_state_that_is_cut_short_is_told(self, tmp_path, structure):
        run_here(structure, tmp_path / "out")
        state = tmp_path / "out/state.npz"
        state.write_bytes(state.read_bytes()[:300])
        with pytest.raises(MoecalcError, match=r"state.npz: damaged .*: begin anew with --force"):
            run_here(structure, tmp_path / "out", steps=30)

    def test_a_state_without_all_arrays_is_told(self, tmp_path, structure):
        run_here(structure, tmp_path / "out")
        np.savez(tmp_path / "out/state.npz", step=3)
        with pytest.raises(MoecalcError, match=r"state.npz: damaged .*: begin anew with --force"):
            run_here(structure, tmp_path / "out", steps=30)

    @pytest.mark.parametrize("name", [LOG, TRAJECTORY])
    def test_files_of_something_else_are_kept(self, tmp_path, structure, name):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text("mine")
        for start in (run_here, lambda *paths: relax(None, *paths, RelaxSettings(), device="cpu")):
            with pytest.raises(MoecalcError, match=f"out has results .{name}.: choose another folder"):
                start(structure, tmp_path / "out")
        assert (tmp_path / "out" / name).read_text() == "mine"

    def test_the_structure_is_not_overwritten_by_the_trajectory(self, tmp_path, structure):
        own = structure.rename(tmp_path / TRAJECTORY)
        with pytest.raises(MoecalcError, match=r"is the structure .* itself, which would be lost"):
            run_here(own, tmp_path, force=True)
        with pytest.raises(MoecalcError, match=r"is the structure .* itself, which would be lost"):
            relax(None, own, tmp_path, RelaxSettings(), device="cpu", force=True)

    def test_a_relaxation_does_not_take_the_folder_of_a_run(self, tmp_path, structure):
        run_here(structure, tmp_path / "out")
        with pytest.raises(MoecalcError, match="out has a run of molecular dynamics: choose another folder"):
            relax(None, structure, tmp_path / "out", RelaxSettings(), device="cpu", force=True)

    def test_a_run_with_other_fixed_atoms_is_not_continued(self, tmp_path):
        atoms = tungsten()
        write(tmp_path / "POSCAR", atoms)
        run_here(tmp_path / "POSCAR", tmp_path / "out")
        atoms.set_constraint(FixAtoms([0]))
        write(tmp_path / "POSCAR", atoms)
        with pytest.raises(MoecalcError, match="has a run with structure_sha256"):
            run_here(tmp_path / "POSCAR", tmp_path / "out")

    def test_the_model_of_a_run_is_known_by_its_contents(self, tmp_path, structure):
        run_here(structure, tmp_path / "out")
        described = json.loads((tmp_path / "out/settings.json").read_text())
        assert described["model_digest"] == MoECalculator(device="cpu").metadata["digest"]

    def test_momenta_of_the_structure_are_used(self, tmp_path, structure):
        atoms = tungsten()
        momenta = np.random.default_rng(2).normal(size=(len(atoms), 3))
        atoms.set_momenta(momenta - momenta.mean(0))
        write(structure, atoms)
        run_here(structure, tmp_path / "out", ensemble="nve")
        kinetic = read_log(tmp_path / "out")["kinetic_eV"][0]
        assert kinetic == pytest.approx(atoms.get_kinetic_energy(), rel=1e-4)

    def test_new_velocities_have_the_temperature_and_neither_drift_nor_turn(self, tmp_path):
        atoms = Atoms("W3Mo", np.eye(4)[:, :3] * 2.6)
        write(tmp_path / "cluster.xyz", atoms)
        run_here(tmp_path / "cluster.xyz", tmp_path / "out", ensemble="nve", steps=1)
        start = read(tmp_path / "out/trajectory.extxyz", 0)
        # 6 of the 12 degrees of freedom
        assert 2 * start.get_temperature() == pytest.approx(300, rel=1e-4)
        assert read_log(tmp_path / "out")["temperature_K"][0] == pytest.approx(300)
        assert np.abs(start.get_momenta().sum(0)).max() < 1e-5
        assert np.abs(start.get_angular_momentum()).max() < 1e-5

    @pytest.mark.parametrize(
        ("atoms", "ensemble", "expected"),
        [
            (bulk("W", cubic=True), "nvt", 3),
            (bulk("W", cubic=True), "npt", 6),
            (Atoms("W2", [[0, 0, 0], [2.5, 0, 0]]), "nvt", 1),
            (Atoms("W3", [[0, 0, 0], [2.5, 0, 0], [5, 0, 0]]), "nve", 4),
            (Atoms("W3", [[0, 0, 0], [2.5, 0, 0], [0, 2.5, 0]]), "nve", 3),
            (Atoms("W"), "nve", 3),
            (Atoms("W2", [[0, 0, 0], [2.5, 0, 0]], constraint=FixAtoms([0])), "nvt", 3),
            (Atoms("W2", [[0, 0, 0], [2.5, 0, 0]], momenta=[[1, 0, 0], [1, 0, 0]]), "nvt", 6),
        ],
    )
    def test_motion_of_all_atoms_together_is_no_heat(self, atoms, ensemble, expected):
        assert degrees_of_freedom(atoms, ensemble) == expected

    def test_the_thermostat_knows_the_degrees_of_freedom(self, tmp_path):
        write(tmp_path / "two.extxyz", bulk("W", "bcc", a=3.2, cubic=True))
        changes = {"thermostat_time": 5.0, "steps": 2000, "log_every": 1, "every": 1000}
        result = run_here(tmp_path / "two.extxyz", tmp_path / "out", **changes)
        kinetic = read_log(tmp_path / "out")["kinetic_eV"].mean()
        assert kinetic == pytest.approx(1.5 * units.kB * 300, rel=0.2)  # 3 of 6 degrees of freedom
        assert result.temperature == pytest.approx(300, rel=0.2)

    def test_a_structure_that_cannot_move_is_refused(self, tmp_path):
        atoms = tungsten()
        atoms.set_constraint(FixAtoms(range(len(atoms))))
        write(tmp_path / "POSCAR", atoms)
        with pytest.raises(StructureError, match="expected atoms that can move, got a structure whose"):
            run_here(tmp_path / "POSCAR", tmp_path / "out")

    def test_fixed_atoms_stay(self, tmp_path):
        atoms = tungsten()
        atoms.set_constraint(FixAtoms([0]))
        write(tmp_path / "POSCAR", atoms)
        start = read(tmp_path / "POSCAR").positions[0]
        run_here(tmp_path / "POSCAR", tmp_path / "out")
        assert np.abs(read(tmp_path / "out/final.extxyz").positions[0] - start).max() < 1e-7
        with pytest.raises(StructureError, match="npt moves all atoms, got a structure with fixed ones"):
            run_here(tmp_path / "POSCAR", tmp_path / "other", ensemble="npt")

    def test_a_cluster_has_no_pressure(self, tmp_path):
        write(tmp_path / "cluster.xyz", Atoms("W4", np.eye(4)[:, :3] * 2.6))
        assert run_here(tmp_path / "cluster.xyz", tmp_path / "out").pressure is None
        with pytest.raises(StructureError, match="npt needs a structure that is periodic in all directions"):
            run_here(tmp_path / "cluster.xyz", tmp_path / "other", ensemble="npt")

    def test_atoms_that_fly_apart_are_told(self, tmp_path, structure):
        with pytest.raises(StructureError, match=r"step \d+: .*smaller --timestep"):
            run_here(
                structure, tmp_path / "out", timestep=200.0, temperature=5000.0, ensemble="nve", steps=200
            )

    def test_hydrogen_halves_the_default_timestep(self):
        assert MDSettings().timestep_of(molecule("H2O")) == 0.5
        assert MDSettings().timestep_of(bulk("W")) == 1.0
        assert MDSettings(timestep=2.0).timestep_of(bulk("W")) == 2.0

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--temperature", -3, "expected a temperature above 0, got -3.0"),
            ("--timestep", 0, "expected a timestep above 0, got 0.0"),
            ("--steps", 0, "expected steps of at least 1, got 0"),
            ("--every", 0, "expected every of at least 1, got 0"),
            ("--thermostat-time", 0, "expected a thermostat time above 0, got 0.0"),
            ("--pressure", "nan", "expected a finite pressure, got nan"),
        ],
    )
    def test_settings_that_mean_nothing_are_refused(self, tmp_path, structure, option, value, message):
        result = run("md", "default", structure, "-o", tmp_path / "out", option, value)
        assert error_of(result) == message

    def test_a_negative_seed_is_refused(self):
        with pytest.raises(MoecalcError, match="expected a seed of 0 or more, got -1"):
            MDSettings(seed=-1)

    @pytest.mark.parametrize(("name", "value"), [("ensemble", "nph"), ("cell", "cubic")])
    def test_unknown_choices_are_refused(self, name, value):
        with pytest.raises(MoecalcError, match=f"expected {name} .* or .*, got '{value}'"):
            MDSettings(**{name: value})

    @pytest.mark.parametrize("command", ["md", "relax"])
    def test_what_the_model_refuses_leaves_no_folder(self, tmp_path, command):
        write(tmp_path / "a.xyz", Atoms("WHe", [[0, 0, 0], [2.5, 0, 0]]))
        result = run(command, "default", tmp_path / "a.xyz", "-o", tmp_path / "out", "--device", "cpu")
        assert error_of(result).startswith("the structure contains He, expected only elements of the model")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("command", ["md", "relax"])
    def test_a_file_that_is_no_structure_is_told(self, tmp_path, command):
        (tmp_path / "a.cif").write_text("hello\n")
        result = run(command, "default", tmp_path / "a.cif", "-o", tmp_path / "out")
        assert error_of(result).endswith("a.cif: not a structure that ASE reads (AssertionError)")

    def test_a_missing_structure_is_told(self, tmp_path):
        result = run("md", "default", tmp_path / "absent.cif", "-o", tmp_path / "out")
        assert error_of(result).endswith("absent.cif: no such file, expected a structure that ASE reads")
        assert not (tmp_path / "out").exists()

    def test_a_file_in_the_place_of_the_folder_is_told(self, tmp_path, structure):
        (tmp_path / "out").write_text("")
        with pytest.raises(MoecalcError, match="out: not a folder to write to"):
            run_here(structure, tmp_path / "out")

    def test_the_structure_is_not_overwritten(self, tmp_path, structure):
        (tmp_path / "final.extxyz").write_bytes(structure.read_bytes())
        with pytest.raises(MoecalcError, match=r"final.extxyz is the structure"):
            run_here(tmp_path / "final.extxyz", tmp_path)


class TestRelax:
    @pytest.mark.parametrize("name", ["start.cif", "POSCAR", "start.extxyz"])
    def test_a_structure_relaxes_with_its_cell(self, tmp_path, name):
        write(tmp_path / name, tungsten())
        result = run("relax", "default", tmp_path / name, "-o", tmp_path / "out", "--cell", "full")
        assert result.exit_code == 0, result.output
        assert result.stderr == ""
        assert re.match(r"relaxed in \d+ steps: -[\d.]+ eV, ", result.stdout)
        relaxed = read(tmp_path / "out/relaxed.extxyz")
        assert np.linalg.norm(relaxed.get_forces(), axis=1).max() < 0.01
        assert np.abs(relaxed.get_stress()).max() < 0.2 * units.GPa
        assert len(read(tmp_path / "out/relaxed.cif")) == len(relaxed)
        assert (tmp_path / "out/relax.png").read_bytes().startswith(b"\x89PNG")
        steps = read_log(tmp_path / "out")["step"]
        assert len(read(tmp_path / "out/trajectory.extxyz", ":")) == len(steps) == steps[-1] + 1

    def test_the_cell_stays_by_default(self, tmp_path, structure):
        result = relax(None, structure, tmp_path / "out", RelaxSettings(), device="cpu")
        assert result.converged
        assert np.abs(read(tmp_path / "out/relaxed.extxyz").cell - tungsten().cell).max() < 1e-8

    @pytest.mark.parametrize("optimizer", ["fire", "lbfgs", "bfgs"])
    def test_a_pressure_is_reached(self, tmp_path, structure, optimizer):
        chosen = RelaxSettings(cell="isotropic", pressure=10.0, optimizer=optimizer)
        result = relax(None, structure, tmp_path / "out", chosen, device="cpu")
        assert result.pressure == pytest.approx(10.0, abs=0.2)

    def test_too_few_steps_end_with_code_1(self, tmp_path, structure):
        result = run("relax", "default", structure, "-o", tmp_path / "out", "--steps", 1)
        assert result.exit_code == 1
        assert result.stdout.startswith("not relaxed in 1 steps: ")
        assert "give more --steps" in result.stdout

    def test_results_are_not_overwritten(self, tmp_path, structure):
        command = ("relax", "default", structure, "-o", tmp_path / "out")
        assert run(*command).exit_code == 0
        assert "out has results (log.csv): choose another folder with -o, or overwrite" in error_of(
            run(*command)
        )
        assert run(*command, "--force").exit_code == 0

    def test_a_cluster_relaxes_without_a_cell(self, tmp_path):
        write(tmp_path / "cluster.xyz", Atoms("W4", np.eye(4)[:, :3] * 2.6))
        result = relax(None, tmp_path / "cluster.xyz", tmp_path / "out", RelaxSettings(), device="cpu")
        assert result.pressure is None
        assert not (tmp_path / "out/relaxed.cif").exists()
        with pytest.raises(StructureError, match="--cell full needs a structure that is periodic"):
            relax(None, tmp_path / "cluster.xyz", tmp_path / "b", RelaxSettings(cell="full"), device="cpu")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"fmax": 0.0}, "expected a fmax above 0, got 0.0"),
            ({"steps": 0}, "expected steps of at least 1, got 0"),
            ({"pressure": 1.0}, "a pressure needs a cell that relaxes: give --cell isotropic or --cell full"),
            ({"pressure": float("inf"), "cell": "full"}, "expected a finite pressure, got inf"),
            ({"optimizer": "sd"}, "expected optimizer fire, lbfgs or bfgs, got 'sd'"),
            ({"cell": "cubic"}, "expected cell fixed, isotropic or full, got 'cubic'"),
        ],
    )
    def test_settings_that_mean_nothing_are_refused(self, changes, message):
        with pytest.raises(MoecalcError) as caught:
            RelaxSettings(**changes)
        assert str(caught.value) == message

    def test_atoms_that_cannot_be_evaluated_are_told(self, tmp_path):
        write(tmp_path / "a.xyz", Atoms("W2", [[0, 0, 0], [0, 0, 0]]))
        with pytest.raises(StructureError, match=r"atoms 0 \(W\) and 1 \(W\)"):
            relax(None, tmp_path / "a.xyz", tmp_path / "out", RelaxSettings(), device="cpu")
        assert not (tmp_path / "out").exists()

    def test_a_step_that_cannot_be_evaluated_is_told(self, tmp_path, structure, monkeypatch):
        def refuse(*_):
            raise StructureError("atoms meet")

        monkeypatch.setattr("moecalc.dynamics.relaxation.pressure_of", refuse)
        with pytest.raises(StructureError, match="step 1: atoms meet: see the last frames of the trajectory"):
            relax(None, structure, tmp_path / "out", RelaxSettings(), device="cpu")

    def test_a_file_in_the_place_of_the_folder_is_told(self, tmp_path, structure):
        (tmp_path / "out").write_text("")
        with pytest.raises(MoecalcError, match="out: not a folder to write to"):
            relax(None, structure, tmp_path / "out", RelaxSettings(), device="cpu")
