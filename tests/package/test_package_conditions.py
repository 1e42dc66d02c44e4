"""Packages of models with charge, spin or frame parameters: fixed values, metadata, the scripted model."""

import pytest
import torch
from helpers import DATA, evaluate_atoms, graph_of
from typer.testing import CliRunner

from moecalc import MoECalculator, testing
from moecalc._jit import jit_load
from moecalc.cli import app
from moecalc.conditions import ConditionError, Conditions, FixedConditions
from moecalc.nn.model import prepare_graph
from moecalc.package import package_checkpoint, read_architecture, read_metadata, read_reference
from moecalc.package.importers import build_model, load_checkpoint

ORACLE = DATA / "oracle" / "models"
ELEMENTS = ["Nb", "Mo", "Ta", "W"]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """A package of H5 made on the command line, and what that printed."""
    path = tmp_path_factory.mktemp("fixed") / "fixed.moe.pt"
    options = ["--charge", "-1", "--spin", "2", "--fparam", "0.3,-0.4", "--elements", "O,H"]
    done = CliRunner().invoke(
        app, ["package", str(ORACLE / "H5_chgspin_fparam.pt"), "-o", str(path), *options]
    )
    assert done.exit_code == 0, done.output
    return path, done.output


def test_fixed_values_are_recorded_and_the_package_is_plain(fixed):
    metadata = read_metadata(fixed[0])
    assert metadata.format_version == 2
    assert metadata.conditions.fixed == FixedConditions(charge=-1, spin=2, fparam=[0.3, -0.4])
    assert not metadata.conditions.open
    assert read_reference(fixed[0])[0].conditions == Conditions()
    for inputs in (jit_load(fixed[0]).conditions, read_architecture(fixed[0]).conditions):
        assert not inputs.takes_charge_spin
        assert inputs.n_fparam == 0


def test_fixed_values_are_shown_by_package_and_inspect(fixed):
    shown = CliRunner().invoke(app, ["inspect", str(fixed[0])]).output
    for text in (fixed[1], shown):
        assert "charge -1, spin 2, fparam 0.3,-0.4" in text


def test_a_fixed_package_equals_the_full_model(fixed):
    atoms = testing.molecule(["O", "H"], distance=1.6)
    model = build_model(load_checkpoint(ORACLE / "H5_chgspin_fparam.pt"))
    expected = evaluate_atoms(model, atoms, Conditions(-1, 2, (0.3, -0.4)))
    atoms.calc = MoECalculator(fixed[0], device="cpu", dtype="float64")
    assert atoms.get_potential_energy() == pytest.approx(float(expected.energy), abs=1e-11)


def test_a_default_that_is_fixed_with_a_given_value_is_said(tmp_path):
    report = package_checkpoint(ORACLE / "H3_chgspin.pt", tmp_path / "model.moe.pt", charge=2, elements=["H"])
    assert report.metadata.conditions.fixed == FixedConditions(charge=2, spin=1)
    assert "spin 1 is the checkpoint's default, fixed with the others" in report.metadata.remarks


@pytest.mark.parametrize(
    ("checkpoint", "options", "message"),
    [
        ("H3_chgspin", ["--charge", "0.5"], "charge = 0.5, expected a whole number from -100 to 99"),
        ("H3_chgspin", ["--charge", "one"], "--charge 'one', expected one number"),
        ("H3_chgspin", ["--spin", "1,2"], "--spin '1,2', expected one number"),
        ("H3_chgspin", ["--spin", "100"], "spin = 100, expected a whole number from 0 to 99"),
        ("H3_chgspin", ["--fparam", "1,2"], "fparam = 1,2 was given, but this model takes no fparam: leave it out"),
        ("H1_fparam_default", ["--fparam", "1"], "fparam has 1 number (1), expected 2"),
        ("H1_fparam_default", ["--fparam", "1,nan"], "fparam has entry nan, expected finite numbers"),
        ("H1_fparam_default", ["--charge", "1"], "this model takes no charge: give fparam, if its two frame"),
        ("J_moe_chgspin", ["--charge", "1", "--fparam", "0,1"], "charge = 1 but fparam = 0,1, which is charge"),
        ("A_dyn", ["--charge", "0"], "charge = 0 was given, but this model takes no charge: leave it out"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_fixed_are_refused_in_one_line(tmp_path, checkpoint, options, message):
    out = tmp_path / "model.moe.pt"
    done = CliRunner().invoke(app, ["package", str(ORACLE / f"{checkpoint}.pt"), "-o", str(out), *options])
    assert done.exit_code == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not out.exists()


def test_fixing_reaches_python_too(tmp_path):
    with pytest.raises(ConditionError, match="charge = 101, expected a whole number"):
        package_checkpoint(ORACLE / "H3_chgspin.pt", tmp_path / "model.moe.pt", charge=101)


OPEN = {
    "both, pack": {
        "add_chg_spin_ebd": True, "default_chg_spin": (0, 1), "n_routed": 4, "route_on_charge_spin": True,
        "concat_output_tebd": True, "fitting": {"numb_fparam": 3, "dim_case_embd": 2}, "neuron": (21, 8),
    },
    "both": {"add_chg_spin_ebd": True, "n_routed": 4, "fitting": {"numb_fparam": 3}},
}  # fmt: skip


@pytest.fixture(scope="module", params=OPEN)
def open_package(request, tmp_path_factory):
    """A package with open conditions, and its configuration."""
    path = tmp_path_factory.mktemp("open") / "open.moe.pt"
    config = testing.random_config(ELEMENTS, **OPEN[request.param])
    testing.write_random_package(path, config, "float64")
    return path, config


def test_a_package_that_takes_conditions_says_so(open_package):
    path, config = open_package
    metadata = read_metadata(path)
    assert metadata.format_version == 2
    assert metadata.conditions == config.conditions()
    assert metadata.conditions.fixed is None
    assert metadata.routing.is_table != metadata.conditions.routed
    said = read_architecture(path).conditions
    assert said.takes_charge_spin
    assert (said.n_fparam, said.n_case) == (config.fitting.numb_fparam, config.fitting.dim_case_embd)
    assert said.routed == config.routes_on_charge_spin
    frame = read_reference(path)[0]
    assert frame.conditions.charge_spin == (0, 1)
    assert len(frame.fparam) == 3


def test_the_parts_of_a_package_serve_distinct_conditions_of_a_batch(open_package):
    """What an engine does (docs/developer/architecture.md): distinct conditions once; then the segments."""
    path, config = open_package
    model = jit_load(path)
    structures = [testing.molecule(ELEMENTS, seed=k) for k in range(3)]
    distinct = [Conditions(1, 2, (0.1, 0.2, 0.3)), Conditions(-2, 3, (0.4, 0.5, 0.6))]
    of_structure = torch.tensor([0, 1, 0])
    expected = [
        evaluate_atoms(model, a, distinct[k]).energies
        for a, k in zip(structures, of_structure.tolist(), strict=True)
    ]

    charge_spin = torch.tensor([c.charge_spin for c in distinct])
    shift = model.conditions.shift(charge_spin)
    constants = model.conditions.fitting_input(
        torch.tensor([c.fparam for c in distinct], dtype=torch.float64)
    )
    n_types, n_condition, n_atoms = len(ELEMENTS), len(distinct), len(structures[0])
    graphs = [graph_of(a, ELEMENTS, model.cutoff) for a in structures]
    types = torch.cat([t for t, _, _ in graphs])
    edge_index = torch.cat([e + n_atoms * k for k, (_, e, _) in enumerate(graphs)], 1)
    edge_vec = torch.cat([v for _, _, v in graphs])
    condition = of_structure.repeat_interleave(n_atoms)
    group, composition, of_group = types, torch.eye(n_types, dtype=torch.float64), None
    if model.conditions.routed:
        group = condition * n_types + types
        composition, of_group = composition.repeat(n_condition, 1), shift.repeat_interleave(n_types, 0)
    order, edge_order, t, edges, angles, *splits = prepare_graph(
        types,
        edge_index,
        edge_vec,
        group,
        len(composition),
        model.cutoff,
        model.angle_cutoff,
        model.pair_mask,
    )
    condition = condition[order]
    edge_input, sw, h, cos, asw = model.geometry(edge_vec[edge_order], t, edges, angles)
    v, e, a = model.embedding(t, edge_input, cos, shift, condition)
    features = model.embedding.group_features(composition, of_group)
    for _, layer in model.layers.named_children():
        v, e, a = layer(v, e, a, sw, h, asw, edges, angles, len(types), *splits, features)
    energies = model.readout(v, t, condition, constants, shift)
    found = torch.zeros_like(energies).index_copy(0, order, energies)
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-12)

    bias, skip = model.readout.net.first_layer(constants)
    assert bias.shape == skip.shape == (n_condition, config.fitting.neuron[0])
    assert bool((skip != 0).any()) == (config.fitting.neuron[0] == 21)


def test_inspect_shows_what_an_open_package_takes(open_package, tmp_path):
    path, config = open_package
    shown = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["inspect", str(path)]).output
    assert "format 2" in shown
    default = "default 0 and 1" if config.descriptor.default_chg_spin else "no default, must be given"
    assert f"taken (spin is the multiplicity 2S+1), {default}" in shown
    assert "3 taken, no default, must be given" in shown
    if config.routes_on_charge_spin:
        assert "routed by element, charge and spin" in shown
        done = CliRunner().invoke(app, ["inspect", str(path), "--plot", str(tmp_path / "routing.png")])
        assert "its experts depend on charge and spin, which were not fixed" in done.stderr


def test_one_row_of_the_charge_and_spin_tables_counts_as_active(open_package):
    path, config = open_package
    parameters = read_metadata(path).parameters
    assert parameters.total - parameters.active >= (199 + 99) * config.descriptor.n_dim
