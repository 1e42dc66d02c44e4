"""moecalc report: the numbers, what it refuses, and the files it writes."""

import gzip
import json
import re

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from command_line import error_of, run
from pages import read_page

from moecalc import MoECalculator, testing
from moecalc.data import read_frames
from moecalc.errors import ElementError, MoecalcError, StructureError
from moecalc.page import drawing, significant
from moecalc.report import Report, evaluate, summarise, write_report
from moecalc.report.elastic import constants, equation_of_state, find_strained_cells, lattice_name
from moecalc.report.figures import draw


def labelled(atoms, group="all", energy=0.0, force=0.0, stress=0.0, model=None):
    """A frame whose reference is the model plus known errors, on every component: eV/atom, eV/A, eV/A^3."""
    calculator = model or MoECalculator(dtype="float64", device="cpu")
    (answer,) = calculator.calculate_batch([atoms], ["energy", "forces", "stress"])
    atoms = atoms.copy()
    atoms.info["dataset"] = group
    atoms.calc = SinglePointCalculator(
        atoms,
        energy=answer["energy"] - energy * len(atoms),
        forces=answer["forces"] - force,
        stress=answer["stress"] - stress,
    )
    return atoms


@pytest.fixture(scope="module")
def model():
    return MoECalculator(dtype="float64", device="cpu")


@pytest.fixture(scope="module")
def frames(model):
    """Two groups with known errors, and strained cells of W with errors of 10 % in the stress."""
    found = [
        labelled(
            testing.bulk_alloy(["Nb", "Mo"], repeat=1, seed=k), "alloy", 0.010, 0.1, 0.5 * units.GPa, model
        )
        for k in range(4)
    ]
    found += [
        labelled(
            testing.bulk_alloy(["Ta"], repeat=1, seed=k), "tantalum", (-1) ** k * 0.002, -0.2, 0.0, model
        )
        for k in range(4)
    ]
    for strain in np.linspace(-0.04, 0.04, 9):
        for i, j in ((0, 0), (1, 2)):
            atoms = bulk("W", "bcc", a=3.19, cubic=True)
            deformation = np.eye(3)
            deformation[i, j] += strain / (1 + (i != j))
            deformation[j, i] = deformation[i, j]
            atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
            (answer,) = model.calculate_batch([atoms], ["stress"])
            found.append(labelled(atoms, "strained", 0.0, 0.0, answer["stress"] / 11, model))
    return found


@pytest.fixture(scope="module")
def evaluation(model, frames):
    return evaluate(model, frames)


@pytest.fixture(scope="module")
def report(evaluation):
    return summarise(evaluation)


@pytest.fixture(scope="module")
def data(frames, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "test.extxyz"
    write(path, frames)
    return path


class TestNumbers:
    def test_constant_errors_are_found(self, report):
        group = report.groups[0]
        assert group.name == "alloy"
        assert (group.n_frames, group.n_atoms, group.elements) == (4, 8, ["Mo", "Nb"])
        assert [group.energy.mae, group.energy.mean] == pytest.approx([10.0] * 2)
        assert [group.forces.mae, group.forces.rmse, group.forces.largest] == pytest.approx([0.1] * 3)
        assert group.stress.mae == pytest.approx(0.5)

    def test_the_mean_error_is_shown_apart(self, report):
        alloy, tantalum = report.groups[:2]
        assert alloy.energy_shifted.mae == pytest.approx(0.0, abs=1e-9)
        assert tantalum.energy.mean == pytest.approx(0.0, abs=1e-9)
        assert tantalum.energy_shifted.mae == tantalum.energy.mae == pytest.approx(2.0)

    def test_total_counts_every_frame_once(self, report, frames):
        assert report.total.n_frames == len(frames)
        assert report.total.energy.mae == pytest.approx((4 * 10 + 4 * 2) / len(frames))

    def test_forces_by_element(self, report):
        assert {e.name: round(e.forces.mae, 6) for e in report.elements} == {
            "Mo": 0.1,
            "Nb": 0.1,
            "Ta": 0.2,
            "W": 0.0,
        }

    def test_energy_shift_of_an_element_that_compositions_determine(self, report):
        shifts = {e.name: e.shift for e in report.elements}
        assert shifts["Ta"] == pytest.approx(0.0, abs=1e-6)
        assert shifts["W"] == pytest.approx(0.0, abs=1e-6)

    def test_energy_shift_that_nothing_determines(self, report):
        """Nb and Mo occur only together, one to one."""
        shifts = {e.name: e.shift for e in report.elements}
        assert shifts["Nb"] is None
        assert shifts["Mo"] is None

    def test_worst_frames_by_their_place_in_the_file(self, report):
        assert {w.index for w in report.worst_energy[:4]} == {0, 1, 2, 3}
        assert {w.index for w in report.worst_force[:4]} == {4, 5, 6, 7}
        assert report.worst_force[0].force == pytest.approx(0.2 * 3**0.5)
        assert report.worst_energy[0].energy == pytest.approx(10.0)

    def test_force_bins_cover_all_atoms(self, report):
        assert sum(b.n_atoms for b in report.force_bins) == report.n_atoms

    def test_r2_of_a_perfect_and_of_a_constant_reference(self, evaluation):
        from moecalc.report.numbers import _errors

        x = np.array([1.0, 2.0, 3.0])
        assert _errors(x, x).r2 == 1
        assert _errors(x, np.ones(3)).r2 is None

    def test_elastic_constants_of_both(self, report):
        (family,) = report.elastic
        assert (family.cell, family.lattice, family.group) == ("W2", "bcc", "strained")
        assert family.model == pytest.approx(1.1 * np.array(family.reference), rel=1e-6)

    def test_equation_of_state_of_the_lowest_crystal(self, report):
        (crystal,) = report.crystals
        assert (crystal.element, crystal.lattice) == ("W", "bcc")
        assert crystal.volume_model == pytest.approx(16.24, abs=0.15)  # DFT: 16.23
        assert crystal.modulus_model == pytest.approx(305, rel=0.05)  # of DFT

    def test_distances(self, report):
        shortest = {p.pair: p.shortest for p in report.pairs}
        assert shortest["W-W"] == pytest.approx(3.19 * 3**0.5 / 2 * 0.973, abs=0.05)
        assert "Nb-Ta" in report.absent_pairs
        assert all(p.inner < p.outer < p.shortest for p in report.pairs)

    def test_limit_takes_frames_evenly(self, model, frames):
        chosen = evaluate(model, frames, limit=2)
        assert chosen.indices[:4] == [0, 3, 4, 7]
        assert len(chosen.strained) == 1, "elastic constants need all frames"

    def test_another_key(self, model, frames):
        assert set(evaluate(model, frames[:2], key="config_type").groups) == {"all"}

    def test_frames_without_stress(self, model, frames):
        bare = frames[0].copy()
        bare.calc = SinglePointCalculator(
            bare, energy=frames[0].calc.results["energy"], forces=np.zeros((2, 3))
        )
        report = summarise(evaluate(model, [bare]))
        assert report.total.stress is None

    def test_molecules_beside_crystals(self, model, frames):
        molecule = Atoms("W2", [[0, 0, 0], [2.4, 0, 0]])
        molecule.calc = SinglePointCalculator(molecule, energy=-1.0, forces=np.zeros((2, 3)))
        evaluation = evaluate(model, [frames[0], molecule, frames[1]])
        assert np.isnan(evaluation.stress_model[1]).all()
        assert np.isfinite(evaluation.stress_model[[0, 2]]).all()

    def test_dense_structures_are_remarked(self, model):
        dense = Atoms("WMo", [[0, 0, 0], [0.55] * 3], cell=[1.1] * 3, pbc=True)
        dense.calc = SinglePointCalculator(dense, energy=0.0, forces=np.zeros((2, 3)))
        fresh = MoECalculator(dtype="float64", device="cpu")
        assert "denser than what the model knows" in evaluate(fresh, [dense]).remarks[0]


class TestElastic:
    def test_constants_of_a_linear_stress(self):
        strain = np.linspace(-0.05, 0.05, 5)
        curves = {
            name: (strain, slope * strain) for name, slope in (("C11", 500), ("C12", 200), ("C44", 150))
        }
        assert constants(curves) == pytest.approx((500, 200, 150, 300))

    def test_too_few_strains(self, frames):
        few = [frames[k] for k in (8, 9, 10, 16, 17)]
        assert find_strained_cells(few, np.array([a.get_stress() for a in few])) == []

    @pytest.mark.parametrize(
        ("symbol", "lattice", "a"),
        [("W", "bcc", 3.2), ("Cu", "fcc", 3.6), ("Si", "diamond", 5.4), ("Ti", "hcp", 2.95)],
    )
    def test_lattices(self, symbol, lattice, a):
        c = {"c": 1.633 * a} if lattice == "hcp" else {}
        assert lattice_name(bulk(symbol, lattice, a=a, **c)) == lattice

    def test_no_lattice(self):
        assert lattice_name(bulk("Po", "sc", a=3.3)) == ""
        assert lattice_name(Atoms("W")) == ""

    def test_equation_of_state_without_minimum(self):
        eos = equation_of_state(bulk("W", cubic=True), lambda cells: [c.get_volume() for c in cells])
        assert np.isnan(eos.volume)
        assert np.isnan(eos.modulus)

    def test_equation_of_state_of_a_parabola(self):
        def energies(cells):
            return [0.5 * (c.get_volume() - 40.0) ** 2 / 40.0 for c in cells]

        eos = equation_of_state(bulk("W", a=3.17, cubic=True), energies)
        assert eos.volume == pytest.approx(20.0, abs=0.01)
        assert eos.modulus == pytest.approx(1 / units.GPa, rel=0.02)


class TestRefusals:
    def test_missing_file(self, tmp_path):
        with pytest.raises(MoecalcError, match="no such file, expected reference data"):
            read_frames(tmp_path / "x.extxyz")

    def test_empty_file(self, tmp_path):
        (tmp_path / "x.extxyz").touch()
        with pytest.raises(MoecalcError, match=r"x\.extxyz: (no frames|not readable)"):
            read_frames(tmp_path / "x.extxyz")

    def test_unreadable_file(self, tmp_path):
        (tmp_path / "x.extxyz").write_text("this is no structure\n")
        with pytest.raises(MoecalcError, match="ASE cannot read it as structures"):
            read_frames(tmp_path / "x.extxyz")

    def test_damaged_compression(self, tmp_path):
        (tmp_path / "x.extxyz.gz").write_bytes(b"no gzip")
        with pytest.raises(MoecalcError, match="ASE cannot read it as structures"):
            read_frames(tmp_path / "x.extxyz.gz")

    def test_no_frames(self, model):
        with pytest.raises(MoecalcError, match="expected frames, got none"):
            evaluate(model, [])

    @pytest.mark.parametrize("missing", ["energy", "forces"])
    def test_missing_reference(self, model, frames, missing):
        bare = frames[0].copy()
        values = {"energy": 1.0, "forces": np.zeros((2, 3))}
        del values[missing]
        bare.calc = SinglePointCalculator(bare, **values)
        with pytest.raises(MoecalcError, match=f"frame 1 has no {missing}: expected reference data"):
            evaluate(model, [frames[0], bare])

    def test_no_reference_at_all(self, model):
        with pytest.raises(MoecalcError, match="frame 0 has no energy and no forces"):
            evaluate(model, [bulk("W")])

    def test_reference_that_is_not_finite(self, model):
        atoms = bulk("W")
        atoms.calc = SinglePointCalculator(atoms, energy=np.nan, forces=np.zeros((1, 3)))
        with pytest.raises(MoecalcError, match="frame 0: expected finite energy and forces"):
            evaluate(model, [atoms])

    def test_unknown_elements(self, model, frames):
        with pytest.raises(
            ElementError, match=r"1 of 2 frames, the first is 1, .*\(Au; it knows .*--skip-unknown"
        ):
            evaluate(model, [frames[0], bulk("Au")])

    def test_unknown_elements_are_skipped_when_asked(self, model, frames):
        evaluation = evaluate(model, [bulk("Au"), frames[0]], skip_unknown=True)
        assert evaluation.skipped == [(0, "Au")]
        assert evaluation.indices == [1]

    def test_nothing_left(self, model):
        with pytest.raises(MoecalcError, match="no frame is left to evaluate, 1 of 1 were left out"):
            evaluate(model, [bulk("Au")], skip_unknown=True)

    def test_limit(self, model, frames):
        with pytest.raises(MoecalcError, match="expected a limit of at least 1 frame per group, got 0"):
            evaluate(model, frames, limit=0)

    def test_frame_that_cannot_be_evaluated(self, model, frames):
        overlap = Atoms("W2", [[0, 0, 0], [0.1, 0, 0]], cell=[5] * 3, pbc=True)
        overlap.calc = SinglePointCalculator(overlap, energy=0.0, forces=np.zeros((2, 3)))
        with pytest.raises(StructureError, match=r"^frame 2: .*0\.1"):
            evaluate(model, [*frames[:2], overlap])


class TestFiles:
    def test_html_is_one_file(self, evaluation, tmp_path):
        report = write_report(evaluation, tmp_path / "r.html")
        assert isinstance(report, Report)
        assert list(tmp_path.iterdir()) == [tmp_path / "r.html"]
        page = read_page(tmp_path / "r.html")
        assert len(page.pictures) == 11
        assert "prefers-color-scheme: dark" in page.text
        for expected in ("tantalum", "W2 bcc", "Worst frames", "atom-steps/s"):
            assert expected in page.shown

    def test_html_has_every_section(self, evaluation, tmp_path):
        write_report(evaluation, tmp_path / "r.html")
        sections = ["compared", "parity", "groups", "forces", "worst", "elastic", "eos", "distances", "model"]
        page = read_page(tmp_path / "r.html")
        assert page.ids == page.anchors == sections
        assert "left out" not in page.shown.lower()

    def test_html_says_what_was_compared(self, model, data, tmp_path):
        write_report(evaluate(model, data, limit=2), tmp_path / "r.html")
        shown = read_page(tmp_path / "r.html").shown
        for text in (
            "metals10.moe.pt: metals10",
            "6 of 26, at most 2 per group, taken evenly; 12 atoms",
            "3, by 'dataset' of the frames",
            "energy, forces, stress",
            "float64 on cpu",
            f"moecalc report default --data {data} --limit 2 --device cpu --dtype float64",
        ):
            assert text in shown, text

    def test_what_the_data_do_not_allow_is_said(self, model, frames, tmp_path):
        bare = frames[0].copy()
        bare.calc = SinglePointCalculator(bare, energy=-1.0, forces=np.ones((2, 3)))
        for name in ("r.html", "r.md"):
            write_report(evaluate(model, [bare]), tmp_path / name)
        pages = (read_page(tmp_path / "r.html").shown, (tmp_path / "r.md").read_text())
        for text in pages:
            assert "Stress: left out, the data have none." in text
            assert "Left out: the data have no cubic crystal with five strains or more" in text
            assert "Left out: the data have no bcc, fcc, hcp or diamond crystal of one element" in text

    def test_a_dense_model_has_no_routing(self, frames, tmp_path):
        pytest.importorskip("torch")
        package = tmp_path / "dense.moe.pt"
        testing.write_random_package(package, testing.random_config(["Nb", "Mo"]))
        write_report(evaluate(package, frames[:1]), tmp_path / "r.html")
        assert "Routing: left out, dense has no routing to plot" in read_page(tmp_path / "r.html").shown

    def test_pictures_are_the_same_each_time(self, evaluation, report):
        first, second = (draw(evaluation, report) for _ in range(2))
        with drawing():
            assert [p.source for p in first["parity"]] == [p.source for p in second["parity"]]

    def test_names_are_escaped(self, model, frames, tmp_path):
        frame = labelled(frames[0], "<b>bold</b>", model=model)
        write_report(evaluate(model, [frame]), tmp_path / "r.html")
        text = (tmp_path / "r.html").read_text()
        assert "<b>bold</b>" not in text
        assert "&lt;b&gt;bold" in text

    def test_markdown_has_a_folder_of_pictures(self, evaluation, tmp_path):
        write_report(evaluation, tmp_path / "r.md")
        text = (tmp_path / "r.md").read_text()
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert len(links) == 11
        for link in links:
            assert (tmp_path / link).read_bytes().startswith(b"\x89PNG")

    def test_tables_of_the_markdown_are_even(self, evaluation, tmp_path):
        write_report(evaluation, tmp_path / "r.md")
        for table in re.findall(r"(?:^\|.*\n)+", (tmp_path / "r.md").read_text(), flags=re.MULTILINE):
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table

    def test_a_single_frame_is_enough(self, model, frames, tmp_path):
        write_report(evaluate(model, frames[:1]), tmp_path / "r.html")
        assert (tmp_path / "r.html").stat().st_size > 10_000

    def test_compressed_data(self, data, tmp_path):
        packed = tmp_path / "x.extxyz.gz"
        packed.write_bytes(gzip.compress(data.read_bytes()))
        assert len(read_frames(packed)) == len(read_frames(data))

    @pytest.mark.parametrize(
        ("value", "text"),
        [(0, "0"), (None, "–"), (3.14159, "3.14"), (0.012345, "0.0123"), (12345.6, "12,346"), (-99.99, "-100.0"),
         (2.5e-7, "2.5e-07")],
    )  # fmt: skip
    def test_significant_digits(self, value, text):
        assert significant(value) == text


class TestCommand:
    def test_report(self, data, tmp_path):
        out, numbers = tmp_path / "r.md", tmp_path / "r.json"
        result = run("report", "default", "--data", data, "-o", out, "--json", numbers, "--dtype", "float64")
        assert result.exit_code == 0, result.output
        assert "tantalum" in result.stdout
        assert "W2 bcc" in result.stdout
        report = Report.model_validate_json(numbers.read_text())
        assert report.total.energy.mae == pytest.approx(48 / report.n_frames, rel=1e-3)
        assert "report: evaluating" in result.stderr
        assert json.loads(numbers.read_text())["model"] == "metals10"

    def test_suffix_is_checked_before_the_work(self, tmp_path):
        message = last_line(
            run("report", "default", "--data", tmp_path / "absent.xyz", "-o", tmp_path / "r.pdf")
        )
        assert "expected a report that ends in .html or .md" in message

    def test_folder_of_the_report(self, data, tmp_path):
        message = last_line(run("report", "default", "--data", data, "-o", tmp_path / "absent" / "r.html"))
        assert "absent: no such folder" in message

    def test_folder_of_the_numbers(self, data, tmp_path):
        arguments = ("-o", tmp_path / "r.html", "--json", tmp_path / "absent" / "r.json")
        assert "absent: no such folder" in last_line(run("report", "default", "--data", data, *arguments))

    def test_missing_data(self, tmp_path):
        message = last_line(
            run("report", "default", "--data", tmp_path / "x.extxyz", "-o", tmp_path / "r.html")
        )
        assert "no such file, expected reference data" in message


class TestGuardCommand:
    def test_lines_for_the_chosen_elements(self):
        result = run("zbl", "default", "--elements", "Cu, W")
        assert result.stdout.splitlines()[:2] == [
            "pair_style hybrid/overlay moe zbl 1.05 1.5 zbl 1.19 1.7 zbl 1.33 1.9",
            "pair_coeff * * moe default Cu W",
        ]

    def test_all_elements(self):
        assert len(run("zbl").stdout.splitlines()) == 2 + 10 * 11 // 2

    def test_data_narrow_the_guard(self, tmp_path):
        write(tmp_path / "x.extxyz", Atoms("W2", [[0, 0, 0], [1.8, 0, 0]]))
        result = run("zbl", "--elements", "W", "--data", tmp_path / "x.extxyz")
        assert result.stdout.startswith("pair_style hybrid/overlay moe zbl 1.19 1.7\n")

    def test_element_that_the_package_lacks(self):
        assert "has no Au, expected elements among Li N" in error_of(run("zbl", "--elements", "W,Au"))

    def test_missing_package(self, tmp_path):
        assert "x.moe.pt" in error_of(run("zbl", tmp_path / "x.moe.pt"))


def last_line(result):
    """The error of a command that printed its progress before."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: ")
    return line
