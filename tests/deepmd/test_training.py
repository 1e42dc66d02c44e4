"""`dp --pt` with the descriptor dpa3_moe: training, restart, fine-tuning, several heads, and what comes after."""

import json

import numpy as np
import pytest
import torch
from training_models import (
    MOE,
    TYPE_MAP,
    build,
    descriptor,
    dp,
    evaluate,
    load,
    random_frames,
    save,
    train,
    training_input,
)

from moecalc import MoECalculator
from moecalc.package import package_checkpoint
from moecalc.training.upcycle import upcycle


def tensors(path):
    state = torch.load(path, weights_only=True)["model"]
    return {k: v for k, v in state.items() if k != "_extra_state"}


def losses(folder):
    lines = [
        line.split() for line in (folder / "lcurve.out").read_text().splitlines() if not line.startswith("#")
    ]
    return {int(line[0]): line[1:] for line in lines}


@pytest.fixture(scope="module")
def trained(data_folder):
    """Six steps of training, with a checkpoint after three; its folder and its log."""
    folder = data_folder / "whole"
    return folder, train(folder, training_input(data_folder))


def test_training_logs_losses_and_the_load_of_the_experts(trained):
    folder, log = trained
    assert (folder / "model.ckpt-6.pt").exists()
    assert sorted(losses(folder)) == [1, 2, 4, 6]
    assert "dpa3_moe load of layer 2: node" in log


def test_restart_equals_uninterrupted_training(trained, data_folder):
    whole, _ = trained
    folder = data_folder / "restarted"
    log = train(folder, training_input(data_folder), "--restart", str(whole / "model.ckpt-3.pt"))
    assert "Going through the data of 3 finished steps" in log
    expected, found = tensors(whole / "model.ckpt-6.pt"), tensors(folder / "model.ckpt-6.pt")
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert losses(folder) == {step: line for step, line in losses(whole).items() if step > 3}


def test_the_package_of_a_trained_model_equals_dp_test(trained, tmp_path):
    folder, _ = trained
    package_checkpoint(folder / "model.ckpt-6.pt", tmp_path / "model.moe.pt")
    model = load(folder / "model.ckpt-6.pt")
    calculator = MoECalculator(tmp_path / "model.moe.pt", device="cpu")
    for atoms in random_frames():
        atoms.calc = calculator
        energy, forces, _ = evaluate(model, atoms)
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-8)
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-8)


def test_dp_tests_shows_and_freezes_the_checkpoint(trained, data_folder):
    folder, _ = trained
    log = dp(folder, "test", "-m", "model.ckpt.pt", "-s", str(data_folder / "data/valid"))
    assert "Force  RMSE" in log
    assert "missing keys" not in log
    assert "'type': 'dpa3_moe'" in dp(folder, "show", "model.ckpt.pt", "descriptor")
    dp(folder, "freeze", "-c", ".", "-o", "frozen.pth")
    assert (folder / "frozen.pth").exists()


def test_neighbor_statistics_choose_the_selection(data_folder):
    folder = data_folder / "auto"
    folder.mkdir()
    repflow = {"e_sel": "auto:1.1", "a_sel": "auto", "use_dynamic_sel": False}
    config = training_input(data_folder, steps=1, repflow=repflow)
    (folder / "input.json").write_text(json.dumps(config))
    dp(folder, "train", "input.json")
    chosen = json.loads((folder / "out.json").read_text())["model"]["descriptor"]["repflow"]
    assert chosen["e_sel"] % 4 == 0
    assert 8 <= chosen["a_sel"] < chosen["e_sel"] < 60


def test_neighbor_statistics_warn_of_a_small_selection(data_folder):
    folder = data_folder / "small"
    folder.mkdir()
    config = training_input(data_folder, steps=1, repflow={"e_sel": 20, "a_sel": 4, "use_dynamic_sel": False})
    (folder / "input.json").write_text(json.dumps(config))
    log = dp(folder, "train", "input.json")
    assert "repflow.e_sel = 20, but an atom of the training data has" in log
    assert "repflow.a_sel = 4, but an atom of the training data has" in log


def test_training_continues_from_an_upcycled_dense_model(data_folder, tmp_path):
    dense, params = build(descriptor("dpa3"))
    path = save(dense, params, tmp_path / "dense.pt")
    config = training_input(data_folder, steps=2)
    config["training"]["disp_freq"] = 1
    (tmp_path / "input.json").write_text(json.dumps(config))
    upcycle(path, tmp_path / "input.json", tmp_path / "start.pt")
    log = train(data_folder / "upcycled", config, "--init-model", str(tmp_path / "start.pt"))
    assert "Saved model to model.ckpt-2.pt" in log


def test_an_upcycled_model_can_be_fine_tuned_to_other_elements(data_folder, tmp_path):
    dense, params = build(descriptor("dpa3"), ["W", "Ta", "Nb"])
    path = save(dense, params, tmp_path / "dense.pt")
    config = training_input(data_folder, steps=1)
    (tmp_path / "input.json").write_text(json.dumps(config))
    remarks = upcycle(path, tmp_path / "input.json", tmp_path / "start.pt")
    assert "train with --finetune" in remarks[0]
    train(data_folder / "finetuned", config, "--finetune", str(tmp_path / "start.pt"))
    assert load(data_folder / "finetuned/model.ckpt-1.pt").get_type_map() == TYPE_MAP


def test_heads_share_the_descriptor_and_each_can_be_packaged(data_folder, tmp_path):
    config = training_input(data_folder, steps=2)
    fitting = config["model"]["fitting_net"]
    head = {"type_map": "elements", "descriptor": "shared", "fitting_net": fitting}
    config["model"] = {
        "shared_dict": {"elements": TYPE_MAP, "shared": descriptor(moe=MOE)},
        "model_dict": {"A": dict(head), "B": dict(head)},
    }
    loss, training = config.pop("loss"), config["training"]
    config["loss_dict"] = {"A": loss, "B": loss}
    data = {key: training.pop(key) for key in ("training_data", "validation_data")}
    training["data_dict"] = {"A": data, "B": data}
    training["model_prob"] = {"A": 0.5, "B": 0.5}
    folder = data_folder / "heads"
    train(folder, config)
    model = load(folder / "model.ckpt-2.pt", "B")
    package_checkpoint(folder / "model.ckpt-2.pt", tmp_path / "b.moe.pt", head="B")
    atoms = random_frames(1)[0]
    atoms.calc = MoECalculator(tmp_path / "b.moe.pt", device="cpu")
    assert atoms.get_potential_energy() == pytest.approx(evaluate(model, atoms)[0], abs=1e-8)


def test_another_version_of_deepmd_kit_is_left_alone(monkeypatch, caplog):
    import importlib

    from moecalc.deepmd import plugin

    monkeypatch.setattr("importlib.metadata.version", lambda name: "4.0.0")
    importlib.reload(plugin)
    assert "needs deepmd-kit 3.2, found 4.0.0" in caplog.text
