"""Training with the fused kernels: gradients against autograd, the optimiser's loop, refusals."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from typer.testing import CliRunner

from moecalc._lib import load
from moecalc.cli import app
from moecalc.data import read_frames
from moecalc.errors import MoecalcError
from moecalc.keys import MIN_DISTANCE
from moecalc.nn import POSITIONS, ModelConfig
from moecalc.nn.model import evaluate
from moecalc.package.importers import load_checkpoint
from moecalc.training.fit import Fit, begin, element_energies, fit_frames
from moecalc.training.graphs import Frame, collate, to_frame
from moecalc.training.optimizer import Muon, make_optimizer, orthogonalized
from moecalc.training.options import LastStage, Options
from moecalc.training.packing import GROUP_TENSORS
from moecalc.training.repulsion import LARGEST, Repulsion
from moecalc.training.schedule import settings_at
from moecalc.training.supercells import smallest_cell

ELEMENTS = ["Cu", "Ni", "Al"]
EXAMPLES = Path(__file__).parents[2] / "examples" / "train"


def config(kind: str = "mlp", precision: str = "float64", **descriptor: Any) -> ModelConfig:
    """A small model; `kind` "dense" has no experts."""
    widths = {"n_dim": 16, "e_dim": 16, "a_dim": 16, "nlayers": 3}
    shells = {"e_rcut": 4.5, "e_rcut_smth": 3.5, "e_sel": 20, "a_rcut": 3.2, "a_rcut_smth": 2.6, "a_sel": 10}
    routers = {"r": {"n_routed_experts": 4, "top_k": 2, "n_shared_experts": 1}}
    positions = {name: {"router": "r", "kind": kind} for name in POSITIONS}
    return ModelConfig.model_validate(
        {
            "type_map": ELEMENTS,
            "descriptor": {**widths, **shells, "precision": precision, **descriptor},
            "fitting": {"neuron": [16, 16], "precision": precision},
            "moe": {} if kind == "dense" else {"routers": routers, "positions": positions},
        }
    )


def structures(n: int) -> list[Atoms]:
    """Rattled Cu-Ni crystals with the results of ASE's EMT."""
    made = []
    for k in range(n):
        atoms = bulk("Cu", cubic=True) * (2, 1, 1)
        atoms.symbols[k % 3 :: 3] = "Ni"
        atoms.rattle(0.15, seed=k)
        atoms.calc = EMT()
        results = {
            "energy": atoms.get_potential_energy(),
            "forces": atoms.get_forces(),
            "stress": atoms.get_stress(),
        }
        atoms.calc = SinglePointCalculator(atoms, **results)
        made.append(atoms)
    return made


def frames(n: int = 4) -> list[Frame]:
    """The same as frames of training."""
    return [to_frame(atoms, ELEMENTS, 4.5) for atoms in structures(n)]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Frames, and an input for them."""
    write(tmp_path / "train.extxyz", structures(5))
    model = config("linear", "float32").model_dump(mode="json", exclude={"type_map"})
    (tmp_path / "fit.json").write_text(json.dumps({"model": model, "fit": {"steps": 4, "batch_atoms": 8}}))
    return tmp_path / "train.extxyz", tmp_path / "fit.json"


def exact_loss(fit: Fit, batch: Any, energy_weight: float, virial_weight: float) -> torch.Tensor:
    """The loss of `StepFunction.gradients`, by autograd alone."""
    o = fit.options
    n_system = len(batch.sizes)
    arrays = (batch.types, batch.edge_index, batch.edge_vec, batch.system)
    types, edges, vectors, system = (torch.from_numpy(np.ascontiguousarray(x)) for x in arrays)
    out = evaluate(fit.model, types, edges, vectors, system, n_system, create_graph=True)
    sizes = torch.from_numpy(batch.sizes).double()

    def huber(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.huber_loss(x, torch.zeros_like(x), delta=o.huber)

    energy = (out.energy - torch.from_numpy(batch.energy)) / sizes
    force = out.forces - torch.from_numpy(batch.forces)
    virial = (out.virial - torch.from_numpy(batch.virial)) / sizes[:, None, None]
    return (
        energy_weight * huber(energy / o.energy_scale)
        + huber(force / o.force_scale)
        + virial_weight * huber(virial / o.virial_scale)
    )


def test_tensors_are_in_the_order_of_the_kernels() -> None:
    assert tuple(load().TRAINING_TENSORS) == GROUP_TENSORS


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dense", {}),
        ("mlp", {}),
        ("linear", {}),
        ("mlp", {"update_style": "res_avg"}),
        ("mlp", {"n_multi_edge_message": 2, "use_exp_switch": True, "edge_init_use_dist": True}),
        ("linear", {"smooth_edge_update": True, "nlayers": 4, "activation_function": "tanh"}),
        ("mlp", {"update_angle": False}),
    ],
)
def test_gradient_of_the_loss_equals_double_backward(kind: str, options: dict[str, Any]) -> None:
    fit = Fit(config(kind, **options), Options(displacement=1e-4, energy_scale=1.0, force_scale=1.0))
    batch = collate(frames(2))
    fit.step_function.gradients(batch, 0.7, 0.4)
    ours = {name: p.grad.clone() for name, p in fit.model.named_parameters() if p.grad is not None}
    fit.model.zero_grad()
    exact_loss(fit, batch, 0.7, 0.4).backward()
    for name, parameter in fit.model.named_parameters():
        if parameter.grad is None:
            assert name not in ours or not ours[name].any()
            continue
        scale = parameter.grad.abs().max()
        # what is left is O(h^2), of the differences
        torch.testing.assert_close(
            ours.get(name, torch.zeros_like(parameter)), parameter.grad, rtol=1e-4, atol=1e-5 * scale
        )


@pytest.mark.parametrize("kind", ["dense", "mlp", "linear"])
def test_predictions_equal_the_reference_model(kind: str) -> None:
    fit = Fit(config(kind), Options())
    batch = collate(frames(3))
    energy, forces, virial = fit.step_function.predict(batch)
    arrays = (batch.types, batch.edge_index, batch.edge_vec, batch.system)
    types, edges, vectors, system = (torch.from_numpy(np.ascontiguousarray(x)) for x in arrays)
    expected = evaluate(fit.model, types, edges, vectors, system, 3)
    np.testing.assert_allclose(energy, expected.energy, rtol=0, atol=1e-11)
    np.testing.assert_allclose(forces, expected.forces, rtol=0, atol=1e-11)
    np.testing.assert_allclose(virial, expected.virial, rtol=0, atol=1e-11)


def test_training_lowers_the_loss() -> None:
    data = frames(6)
    scales = {"energy_scale": 0.1, "force_scale": 0.3, "virial_scale": 0.3}
    options = Options(steps=100, warm_up=5, learning_rate=1e-2, batch_atoms=16, **scales)
    fit = Fit(config("mlp", "float32"), options)
    fit.model.readout.energy_shift.copy_(torch.from_numpy(element_energies(data, len(ELEMENTS))))
    batches = fit.batches(data)
    losses = [fit.step(next(batches))["loss"] for _ in range(100)]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])


def test_the_last_stage_has_settings_of_its_own() -> None:
    stage = LastStage(share=0.2, learning_rate=1e-4, energy_weight=30.0, virial_weight=0.7, average=0.9)
    options = Options(learning_rate=1e-2, last_learning_rate=1e-6, energy_weight=(0.1, 1.0), last_stage=stage)
    first, before, begun, last = (settings_at(options, at) for at in (0.0, 0.8 - 1e-9, 0.8, 1.0))
    assert (first.rate, first.energy_weight, first.average) == (1e-2, 0.1, options.average)
    assert (before.rate, before.energy_weight) == pytest.approx((1e-6, 1.0), rel=1e-6)
    assert (begun.energy_weight, begun.virial_weight, begun.average) == (30.0, 0.7, 0.9)
    assert (begun.rate, last.rate) == pytest.approx((1e-4, 1e-6))


def test_without_a_last_stage_the_settings_fall_over_all_steps() -> None:
    options = Options(learning_rate=1e-2, last_learning_rate=1e-6, energy_weight=(0.0, 1.0))
    middle = settings_at(options, 0.5)
    assert middle.rate == pytest.approx(0.5 * (1e-2 + 1e-6))
    assert middle.energy_weight == pytest.approx(0.5)


def test_hours_let_the_learning_rate_fall_over_all_calls(tmp_path: Path) -> None:
    data, counted = frames(4), []
    settings = Options(steps=1, batch_atoms=8, warm_up=1, learning_rate=1e-2, last_learning_rate=1e-5)
    first = Fit(config("mlp", "float32"), settings, hours=2.0)
    first.seconds = 3600.0  # of an earlier part
    first.save(tmp_path / "state.pt")
    second = Fit(config("mlp", "float32"), settings, hours=2.0)
    second.restore(tmp_path / "state.pt")
    assert second.progress == 0.5
    assert second.step(next(second.batches(data)))["rate"] == pytest.approx(0.5 * (1e-2 + 1e-5), rel=1e-3)
    second.seconds = 7200.0 - 1e-6  # one more step
    second.run(data, data[:1], tmp_path, stepped=lambda *at: counted.append(at))
    assert second.step_number == 2
    assert counted == [(7200, 7200), (7200, 7200)]


def test_a_state_from_before_the_time_was_kept_goes_on(tmp_path: Path) -> None:
    fit = Fit(config("mlp", "float32"), Options(steps=2))
    fit.save(tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["seconds"]
    torch.save(state, tmp_path / "state.pt")
    fit.restore(tmp_path / "state.pt")
    assert fit.seconds == 0.0


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan")])
def test_hours_that_are_not_positive_are_refused(
    hours: float, files: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(MoecalcError, match="expected more than 0 hours of training, got"):
        fit_frames(*files, tmp_path / "out", hours=hours)


def test_a_restarted_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    data, settings = frames(4), Options(steps=6, batch_atoms=8, warm_up=2)
    repulsion = Repulsion(ELEMENTS, data, 4.5)
    whole = Fit(config("mlp", "float32"), settings, repulsion)
    whole.run(data, data[:1], tmp_path / "whole", every=3)
    first = Fit(config("mlp", "float32"), settings, repulsion)
    batches = first.batches(data)
    for _ in range(3):  # in the middle of an epoch
        first.step(next(batches))
    first.save(tmp_path / "part.pt")
    second = Fit(config("mlp", "float32"), settings, repulsion)
    second.restore(tmp_path / "part.pt")
    batches = second.batches(data)
    for _ in range(3):
        second.step(next(batches))
    for one, two in zip(whole.parameters, second.parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def crystal_with_results(repeat: tuple[int, int, int]) -> Atoms:
    """A strained, ordered Cu3Ni crystal, repeated, with the results of ASE's EMT."""
    cell = bulk("Cu", cubic=True)
    cell.symbols[0] = "Ni"
    cell.set_cell(cell.cell.array @ np.array([[1.03, 0.01, 0], [0, 1, 0], [0, 0, 0.98]]), scale_atoms=True)
    atoms = cell * repeat
    atoms.info["dataset"] = "strained"
    atoms.calc = EMT()
    results = {name: atoms.calc.get_property(name, atoms) for name in ("energy", "forces", "stress")}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def test_a_supercell_is_reduced_to_its_repeated_part() -> None:
    whole, part = crystal_with_results((3, 2, 1)), smallest_cell(crystal_with_results((3, 2, 1)))
    assert len(part) == 4
    assert part.info["dataset"] == "strained_cell"
    part_results = dict(part.calc.results)
    part.calc = EMT()
    assert part.get_potential_energy() == pytest.approx(part_results["energy"], abs=1e-9)
    np.testing.assert_allclose(part.get_stress(), whole.get_stress(), atol=1e-9)
    np.testing.assert_allclose(part_results["stress"], whole.get_stress())
    np.testing.assert_allclose(part_results["forces"], whole.get_forces()[:4], atol=1e-9)


def test_a_cell_that_does_not_repeat_is_left_alone() -> None:
    atoms = structures(1)[0]
    assert smallest_cell(atoms) is atoms
    vacancy = crystal_with_results((2, 1, 1))
    vacancy.calc.results["forces"] = vacancy.get_forces() + np.eye(8, 3)  # the same places, other forces
    assert smallest_cell(vacancy) is vacancy


def test_radii_of_the_repulsion_leave_the_data_alone() -> None:
    data = frames(4)
    repulsion = Repulsion([*ELEMENTS, "W"], data, 4.5)
    close = [(f.types[f.edge_index], np.linalg.norm(f.edge_vec, axis=1)) for f in data]
    for pair, distance in close:
        assert (distance > repulsion.radius[pair[0], pair[1]]).all()
    assert repulsion.radius[3, 3] == pytest.approx(0.7 * 2 * 1.62)  # no data: the covalent rule


def test_structures_of_the_repulsion_have_close_pairs_that_moecalc_accepts() -> None:
    repulsion = Repulsion(ELEMENTS, frames(2), 4.5)
    rng = np.random.default_rng(0)
    for _ in range(5):
        distance = np.linalg.norm(repulsion.batch(rng).edge_vec, axis=1)
        assert MIN_DISTANCE <= distance.min() < 1.8


def test_loss_of_the_repulsion_is_zero_where_pairs_repel_enough_and_has_the_right_slope() -> None:
    repulsion = Repulsion(ELEMENTS, frames(2), 4.5)
    batch = repulsion.batch(np.random.default_rng(1))
    types, edges, vectors = (torch.from_numpy(x) for x in (batch.types, batch.edge_index, batch.edge_vec))
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    value, slope = repulsion.loss(types, edges, vectors, -LARGEST * unit, 2.0)
    assert value == 0.0
    assert not slope.any()
    g = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, slope = repulsion.loss(types, edges, vectors, g, 2.0)
    step = 1e-5 * torch.randn(g.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = [repulsion.loss(types, edges, vectors, g + sign * step, 2.0)[0] for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 2 == pytest.approx(float((slope * step).sum()), rel=1e-5)


def test_training_makes_close_pairs_repel() -> None:
    data = frames(4)
    options = Options(steps=120, warm_up=5, learning_rate=5e-3, repulsion_every=1)
    fit = Fit(config("linear", "float32"), options, Repulsion(ELEMENTS, data, 4.5))
    batches = fit.batches(data)
    losses = [fit.step(next(batches))["repulsion"] for _ in range(120)]
    assert np.median(losses[-30:]) < 0.5 * np.median(losses[:30])


def test_the_averaged_weights_can_be_packaged(tmp_path: Path) -> None:
    from moecalc.package import package_checkpoint

    fit = Fit(config("linear", "float32"), Options(steps=2, batch_atoms=8))
    fit.run(frames(2), frames(1), tmp_path, every=2)
    report = package_checkpoint(tmp_path / "state.averaged.pt", tmp_path / "m.moe.pt")
    assert report.verification.passed


@pytest.mark.parametrize(
    ("descriptor", "message"),
    [
        ({"a_dim": 12}, "multiples of"),
        ({"sequential_update": True}, "sequential_update"),
        ({"a_compress_rate": 2}, "uncompressed"),
        (
            {"add_chg_spin_ebd": True},
            "add_chg_spin_ebd = true: training with the fused kernels takes no charge",
        ),
    ],
)
def test_what_the_kernels_do_not_cover_is_refused(descriptor: dict[str, Any], message: str) -> None:
    with pytest.raises((RuntimeError, MoecalcError), match=message):
        Fit(config("dense", **descriptor), Options()).step_function.gradients(collate(frames(1)), 1.0, 1.0)


def test_the_command_fits_goes_on_and_names_the_next_step(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, input_file = files
    command = ["fit", str(source), "--input", str(input_file), "-o", str(tmp_path / "out"), "--every", "2"]
    first = CliRunner().invoke(app, [*command, "--pause-after", "0", "--validation", "0.2"])
    assert first.exit_code == 0, first.output
    assert "stopped at step 0 of 4" in first.output
    second = CliRunner().invoke(app, [*command, "--validation", "0.2"])
    assert second.exit_code == 0, second.output
    assert "stopped at step 4 of 4" in second.output
    assert "moecalc package" in second.output
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2


def test_frames_for_the_test_neither_train_nor_validate(files: tuple[Path, Path], tmp_path: Path) -> None:
    source, input_file = files
    command = ["fit", str(source), "--input", str(input_file), "-o", str(tmp_path / "out"), "--test", "0.4"]
    done = CliRunner().invoke(app, [*command, "--validation", "0.2"])
    assert done.exit_code == 0, done.output
    split = json.loads((tmp_path / "out" / "split.json").read_text())
    assert (len(split["train"]), len(split["valid"]), len(split["test"])) == (2, 1, 2)
    assert sorted(k for part in split.values() for k in part) == list(range(5))
    kept, all_frames = read_frames(tmp_path / "out" / "test.extxyz"), structures(5)
    for atoms, index in zip(kept, split["test"], strict=True):
        np.testing.assert_allclose(atoms.positions, all_frames[index].positions, atol=1e-7)
        assert atoms.get_potential_energy() == pytest.approx(all_frames[index].get_potential_energy())


@pytest.mark.parametrize(
    ("first", "message"),
    [(0.2, "keeps 1 other frames for the test than these 2"), (0.0, "keeps 0 other frames")],
)
def test_a_fit_goes_on_with_the_same_frames_for_the_test(
    first: float, message: str, files: tuple[Path, Path], tmp_path: Path
) -> None:
    fit_frames(*files, tmp_path / "out", test=first, pause_after=0.0)
    fit_frames(*files, tmp_path / "out", test=first, pause_after=0.0)
    with pytest.raises(MoecalcError, match=message):
        fit_frames(*files, tmp_path / "out", test=0.4)


def test_frames_that_an_older_fit_has_seen_are_no_test(files: tuple[Path, Path], tmp_path: Path) -> None:
    fit_frames(*files, tmp_path / "out", pause_after=0.0)
    (tmp_path / "out" / "split.json").unlink()
    with pytest.raises(MoecalcError, match="may have seen the frames for the test"):
        fit_frames(*files, tmp_path / "out", test=0.4)


def test_a_damaged_split_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    fit_frames(*files, tmp_path / "out", pause_after=0.0)
    (tmp_path / "out" / "split.json").write_text("[]")
    with pytest.raises(MoecalcError, match=r"split\.json: expected what an earlier call wrote"):
        fit_frames(*files, tmp_path / "out")


def test_the_command_makes_a_committee(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Fits of different weights that hold out the same frames; a second call goes on with each."""
    source, input_file = files
    command = ["fit", str(source), "--input", str(input_file), "-o", str(tmp_path / "out"), "--every", "2"]
    first = CliRunner().invoke(app, [*command, "--seeds", "2", "--pause-after", "0", "--validation", "0.2"])
    assert first.exit_code == 0, first.output
    assert first.output.count("stopped at step 0 of 4") == 2
    second = CliRunner().invoke(app, [*command, "--seeds", "2", "--validation", "0.2"])
    assert second.exit_code == 0, second.output
    assert second.output.count("stopped at step 4 of 4") == 2
    for seed in (1, 2):
        assert f"out/seed-{seed}/state.averaged.pt -o model-{seed}.moe.pt" in second.output
    checkpoints = [tmp_path / f"out/seed-{seed}/state.averaged.pt" for seed in (1, 2)]
    one, two = (torch.load(path, weights_only=False)["state_dict"] for path in checkpoints)
    assert not torch.equal(one["embedding.edge_matrix"], two["embedding.edge_matrix"])


def test_every_step_is_counted(files: tuple[Path, Path], tmp_path: Path) -> None:
    """For a bar with the time left; a fit that goes on begins where it is."""
    counted: list[tuple[int, int]] = []
    fit_frames(*files, tmp_path / "out", stepped=lambda step, last: counted.append((step, last)))
    assert counted == [(step, 4) for step in range(5)]
    counted.clear()
    fit_frames(*files, tmp_path / "out", stepped=lambda step, last: counted.append((step, last)))
    assert counted == [(4, 4)]


def test_the_members_of_a_committee_hold_out_the_same_frames(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = []
    monkeypatch.setattr(
        Fit, "run", lambda _self, _train, valid, *_: held_out.append([f.energy for f in valid])
    )
    for seed in (1, 2, None):
        fit_frames(*files, tmp_path / f"out{seed}", validation=0.4, seed=seed)
    assert held_out[0] == held_out[1] == held_out[2]
    assert len(held_out[0]) == 2


@pytest.mark.parametrize("place", [0, 1])
def test_the_command_shows_that_a_group_has_no_number(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    errors = {"energy": 0.1, "force": 0.2, "frames": 1}

    def validate(*_: object) -> dict[str, dict[str, float]]:
        groups = [errors, errors]
        groups[place] = {**errors, "force": float("nan")}
        return {"a": groups[0], "b": groups[1]}

    monkeypatch.setattr(Fit, "validate", validate)
    command = ["fit", str(files[0]), "--input", str(files[1]), "-o", str(tmp_path / "out"), "--every", "4"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "worst group nan eV/A" in result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ('{"fit": {}}', "expected JSON with `model` and `fit`"),
        ('{"model": {}, "fit": {"stepz": 1}}', "stepz"),
        ('{"model": {"descriptor": {}}}', "model: "),
    ],
)
def test_an_input_that_is_not_valid_is_refused(
    files: tuple[Path, Path], tmp_path: Path, text: str, message: str
) -> None:
    files[1].write_text(text)
    with pytest.raises(MoecalcError, match=message):
        fit_frames(files[0], files[1], tmp_path / "out")


def test_a_file_in_the_place_of_the_folder_is_told(files: tuple[Path, Path]) -> None:
    with pytest.raises(MoecalcError, match=r"fit\.json/out: not a folder to write to \(Not a directory\)"):
        fit_frames(*files, files[1] / "out")


def test_pressures_of_groups_that_contradict_their_energies_are_not_used(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    given = json.loads(files[1].read_text())
    given["fit"] |= {"steps": 1, "without_pressure": ["offset"]}
    files[1].write_text(json.dumps(given))
    errors = []
    for name, offset in (("right", 0.0), ("wrong", 1.0)):
        frames = structures(5)
        for atoms in frames:
            atoms.info["dataset"] = "offset"
            atoms.calc.results["stress"][:3] += offset
        write(tmp_path / "frames.extxyz", frames)
        fit_frames(tmp_path / "frames.extxyz", files[1], tmp_path / name, validation=0.0)
        errors.append(json.loads((tmp_path / name / "log.jsonl").read_text())["virial"])
    assert errors[0] > 0.0
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)


def test_gradient_without_pressure_is_that_of_the_loss_without_it() -> None:
    fit = Fit(config("mlp"), Options(displacement=1e-4))
    batch = collate([to_frame(structures(1)[0], ELEMENTS, 4.5, with_pressure=False)])
    batch.virial[0] += 5.0 * np.eye(3)
    result = fit.step_function.gradients(batch, 0.0, 1.0)
    gradients = [p.grad.clone() for p in fit.parameters if p.grad is not None]
    batch.virial[0] -= 7.0 * np.eye(3)
    fit.optimizer.zero_grad()
    assert fit.step_function.gradients(batch, 0.0, 1.0)["loss"] == pytest.approx(result["loss"], rel=1e-9)
    for one, parameter in zip(gradients, [p for p in fit.parameters if p.grad is not None], strict=True):
        torch.testing.assert_close(parameter.grad, one, rtol=1e-6, atol=1e-9)


def test_a_group_without_pressure_that_there_is_not_is_refused(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    given = json.loads(files[1].read_text())
    given["fit"]["without_pressure"] = ["mlern_Cu"]
    files[1].write_text(json.dumps(given))
    with pytest.raises(MoecalcError, match="without_pressure: expected groups of the frames, got mlern_Cu"):
        fit_frames(*files, tmp_path / "out")


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    Fit(config("dense"), Options()).save(tmp_path / "state.pt")
    with pytest.raises(MoecalcError, match="belongs to another model"):
        Fit(config("mlp"), Options()).restore(tmp_path / "state.pt")


@pytest.mark.parametrize("name", ["fit.json", "narrow.json"])
def test_the_example_input_trains(files: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    example = json.loads((EXAMPLES / name).read_text())
    example["fit"]["steps"] = 1
    example["fit"].pop("without_pressure", None)  # of groups that these frames are not of
    (tmp_path / "example.json").write_text(json.dumps(example))
    fit = fit_frames(files[0], tmp_path / "example.json", tmp_path / "out", validation=0.0)
    assert fit.step_number == 1


def test_the_example_start_is_of_the_example_input() -> None:
    start = load_checkpoint(EXAMPLES / "narrow.pt").config
    model = json.loads((EXAMPLES / "narrow.json").read_text())["model"]
    assert ModelConfig.model_validate({**model, "type_map": start.type_map}) == start


def test_a_fit_starts_from_the_weights_of_a_checkpoint(files: tuple[Path, Path], tmp_path: Path) -> None:
    """With the energies of atoms shifted to those of the frames, forces are the checkpoint's at first."""
    first = fit_frames(*files, tmp_path / "first", validation=0.0)
    trained = load_checkpoint(tmp_path / "first" / "state.averaged.pt")
    trained.state["readout.energy_shift"] += 3.0  # another zero
    start = begin(first.config, Options(), frames(), tmp_path / "second", start=trained).step_function
    with first.averaged_weights():
        for frame in frames():
            energies, forces, _ = start.predict(collate([frame]))
            _, same, _ = first.step_function.predict(collate([frame]))
            np.testing.assert_allclose(forces, same, atol=1e-5)
            assert abs(energies[0] - frame.energy) < 1.0


def test_the_input_of_a_start_needs_no_model(files: tuple[Path, Path], tmp_path: Path) -> None:
    fit_frames(*files, tmp_path / "first", validation=0.0)
    files[1].write_text(json.dumps({"fit": {"steps": 2, "batch_atoms": 8}}))
    start, out = tmp_path / "first" / "state.averaged.pt", tmp_path / "second"
    arguments = ["fit", str(files[0]), "--input", str(files[1]), "-o", str(out), "--start", str(start)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "stopped at step 2 of 2" in done.output


def test_a_start_of_another_architecture_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    fit_frames(*files, tmp_path / "first", validation=0.0)
    given = json.loads(files[1].read_text())
    given["model"]["descriptor"]["e_rcut"] = 4.2
    files[1].write_text(json.dumps(given))
    start = tmp_path / "first" / "state.averaged.pt"
    message = (
        r"fit\.json: model: descriptor\.e_rcut is 4\.2, but 4\.5 in .*state\.averaged\.pt: leave `model`"
    )
    with pytest.raises(MoecalcError, match=message):
        fit_frames(*files, tmp_path / "second", start=start)


def test_frames_with_elements_that_a_start_lacks_are_refused(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    fit_frames(*files, tmp_path / "first", validation=0.0)
    others = structures(2)
    for atoms in others:
        atoms.symbols[0] = "Au"
    write(tmp_path / "others.extxyz", others)
    start = tmp_path / "first" / "state.averaged.pt"
    with pytest.raises(MoecalcError, match="Au"):
        fit_frames(tmp_path / "others.extxyz", files[1], tmp_path / "second", start=start)


def test_frame_parameters_are_refused_by_name() -> None:
    with_fparam = config().model_copy(
        update={"fitting": config().fitting.model_copy(update={"numb_fparam": 2})}
    )
    with pytest.raises(
        MoecalcError, match="numb_fparam = 2: training with the fused kernels takes no charge"
    ):
        Fit(with_fparam, Options(steps=1))


def shared_fit(files: tuple[Path, Path], folder: Path, processes: int, **options: Any) -> Fit:
    """Three steps, by so many processes of one thread."""
    content = json.loads(files[1].read_text())
    content["fit"] |= {"repulsion": 0.0, "steps": 3, "warm_up": 1, **options}
    files[1].write_text(json.dumps(content))
    return fit_frames(*files, folder, validation=0.0, processes=processes, threads=1)


def test_processes_that_share_a_step_equal_one_with_all_their_batches(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    # two frames of a step in one batch, or in one of each process: the loss of a batch is a mean over frames
    options = {"optimizer": "adam", "learning_rate": 1e-4, "displacement": 1e-3}
    one = shared_fit(files, tmp_path / "one", 1, batch_atoms=16, **options)
    two = shared_fit(files, tmp_path / "two", 2, batch_atoms=8, **options)
    for of_one, of_two in zip(one.averaged, two.averaged, strict=True):
        torch.testing.assert_close(of_one, of_two, rtol=1e-3, atol=1e-4)


def test_processes_take_the_same_steps_in_every_run(files: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = (shared_fit(files, tmp_path / name, 2, repulsion=0.3) for name in ("first", "second"))
    for one, two in zip(first.parameters, second.parameters, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_a_process_that_ends_ends_the_fit(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(step: int, last: int) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(MoecalcError, match="a process of the fit has ended"):
        fit_frames(*files, tmp_path / "out", processes=2, threads=1, stepped=kill)
    assert not multiprocessing.active_children()


def test_no_processes_are_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(MoecalcError, match="expected at least 1 process, got 0"):
        fit_frames(*files, tmp_path / "out", processes=0)


def test_a_fit_does_not_go_on_with_another_optimizer(files: tuple[Path, Path], tmp_path: Path) -> None:
    shared_fit(files, tmp_path / "out", 1, optimizer="adam")
    with pytest.raises(MoecalcError, match=r"begun with the optimizer adam, the input has muon: give"):
        shared_fit(files, tmp_path / "out", 1, optimizer="muon")


@pytest.mark.parametrize("shape", [(3, 40, 16), (16, 48), (16, 16)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonalized(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.7
    assert values.max() < 1.3
    # the directions are those of the matrices
    torch.testing.assert_close(left.mT @ found @ right.mT, torch.diag_embed(values), rtol=0, atol=0.35)


def test_a_step_of_muon_is_as_long_for_a_small_gradient_as_for_a_large_one() -> None:
    gradient = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    lengths = []
    for size in (1e-6, 1e3):
        weights = torch.zeros(32, 16, requires_grad=True)
        optimizer = Muon([weights], 1e-3, lambda _: True)
        weights.grad = size * gradient
        optimizer.step()
        lengths.append(float(weights.detach().square().mean().sqrt()))
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-3)
    assert lengths[0] == pytest.approx(0.2 * 1e-3, rel=0.2)


def test_muon_turns_matrices_of_layers_and_of_the_fitting_net_alone() -> None:
    model = Fit(config("linear", "float32"), Options(steps=1)).model
    optimizer = make_optimizer("muon", model, 1e-3)
    assert isinstance(optimizer, Muon)
    turned = {name for name, p in model.named_parameters() if p.requires_grad and optimizer.is_matrix(p)}
    assert {"layers.0.node_edge_linear.matrix", "readout.net.layers.1.matrix"} <= turned
    assert all(name.endswith(".matrix") and not name.startswith("embedding") for name in turned)
