"""Sparse upcycling: a mixture of experts that starts as a dense model."""

import itertools
import json

import numpy as np
import pytest
import torch
from training_models import build, descriptor, evaluate, load, random_frames, save, training_input

from moecalc.errors import CheckpointError
from moecalc.training.upcycle import upcycle


def dense_checkpoint(folder, **options):
    model, params = build(descriptor("dpa3", **options))
    return model, save(model, params, folder / "dense.pt")


def start(folder, dense, moe, repflow=None, **options):
    config = training_input(folder)
    config["model"]["descriptor"] = descriptor(repflow=repflow, moe=moe)
    (folder / "input.json").write_text(json.dumps(config))
    upcycle(dense, folder / "input.json", folder / "start.pt", **options)
    return folder / "start.pt"


def deviation(model, other):
    worst = 0.0
    for atoms in random_frames():
        for a, b in zip(evaluate(model, atoms), evaluate(other, atoms), strict=True):
            worst = max(worst, float(np.abs(np.asarray(a) - np.asarray(b)).max()))
    return worst


COMBINATIONS = [
    c
    for c in itertools.product(
        ["mlp", "linear"], ["topk_softmax", "softmax_topk"], ["element", "configuration"], [0, 1]
    )
    if c[1:3] != ("softmax_topk", "configuration")
]


@pytest.mark.parametrize(("kind", "gate", "routing", "n_shared"), COMBINATIONS)
def test_the_start_equals_the_dense_model(tmp_path, kind, gate, routing, n_shared):
    dense, path = dense_checkpoint(tmp_path)
    moe = {
        "n_routed_experts": 4,
        "top_k": 2,
        "n_shared_experts": n_shared,
        "kind": kind,
        "gate": gate,
        "routing": routing,
    }
    assert deviation(dense, load(start(tmp_path, path, moe))) < 1e-10


def test_the_start_equals_a_dense_model_of_the_paper_s_defaults_with_static_selection(tmp_path):
    repflow = {
        "use_dynamic_sel": False,
        "smooth_edge_update": False,
        "use_exp_switch": False,
        "edge_init_use_dist": False,
    }
    dense, path = dense_checkpoint(tmp_path, repflow=repflow)
    moe = {"n_routed_experts": 4, "top_k": 2}
    assert deviation(dense, load(start(tmp_path, path, moe, repflow))) < 1e-10


def test_a_head_of_a_multi_task_checkpoint_can_be_chosen(tmp_path):
    model, params = build(descriptor("dpa3"))
    state = torch.load(save(model, params, tmp_path / "one.pt"), weights_only=True)["model"]
    two = {
        k.replace(".Default.", f".{head}."): v
        for head in ("A", "B")
        for k, v in state.items()
        if k != "_extra_state"
    }
    two["_extra_state"] = {"model_params": {"model_dict": {"A": params, "B": params}}, "train_infos": {}}
    torch.save({"model": two}, tmp_path / "two.pt")
    path = start(tmp_path, tmp_path / "two.pt", {"n_routed_experts": 2, "top_k": 1}, head="B")
    assert deviation(model, load(path)) < 1e-10


def test_noise_perturbs_the_routed_experts_only(tmp_path):
    _, path = dense_checkpoint(tmp_path)
    moe = {"n_routed_experts": 3, "top_k": 2, "n_shared_experts": 1}
    state = torch.load(start(tmp_path, path, moe, noise=0.01, seed=4), weights_only=True)
    experts = state["model.Default.atomic_model.descriptor.layers.0.node_self_mlp.matrix"]
    dense = torch.load(path, weights_only=True)["model"]
    shared = dense["model.Default.atomic_model.descriptor.repflows.layers.0.node_self_mlp.matrix"]
    assert torch.equal(experts[3], shared)
    for routed in experts[:3]:
        assert 0.001 < float(((routed - shared) / shared).std()) < 0.03


def test_the_elements_start_on_different_experts(tmp_path):
    _, path = dense_checkpoint(tmp_path)
    model = load(start(tmp_path, path, {"n_routed_experts": 3, "top_k": 1}))
    part = model.atomic_model.descriptor
    ids, _ = part.layers[0].routers["node"](part.embedding.table())
    assert sorted(ids[:, 0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("moe", "repflow", "message"),
    [
        ({"gate": "softmax_topk", "routing": "configuration"}, {}, "depends on the composition"),
        ({"n_shared_experts": 1}, {"use_dynamic_sel": False, "smooth_edge_update": False}, "edges without angles skip it"),
        ({"n_shared_experts": 1}, {"update_style": "res_avg"}, "no residual vector"),
        ({"positions": []}, {}, "no moe section with positions"),
        ({"gates": 1}, {}, "moe.gates is not an option"),
    ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused_with_the_reason(tmp_path, moe, repflow, message):
    _, path = dense_checkpoint(tmp_path, repflow=repflow)
    with pytest.raises(CheckpointError, match=message):
        start(tmp_path, path, {"n_routed_experts": 4, "top_k": 2} | moe, repflow)


def test_more_elements_than_the_embedding_can_tell_apart_are_refused(tmp_path):
    from ase.data import chemical_symbols

    type_map = chemical_symbols[1:30]
    model, params = build(descriptor("dpa3"), type_map)
    path = save(model, params, tmp_path / "dense.pt")
    moe = {"n_routed_experts": 4, "top_k": 2, "gate": "softmax_topk"}
    with pytest.raises(CheckpointError, match="dependent rows"):
        start(tmp_path, path, moe)


def test_options_that_differ_from_the_dense_model_are_refused(tmp_path):
    _, path = dense_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"descriptor.repflow.e_rcut = 4.8 in the input, expected 5.0"):
        start(tmp_path, path, {"n_routed_experts": 4, "top_k": 2}, {"e_rcut": 4.8})


def test_a_mixture_cannot_be_upcycled_again(tmp_path):
    model, params = build(descriptor(moe={"n_routed_experts": 2, "top_k": 1}))
    path = save(model, params, tmp_path / "moe.pt")
    with pytest.raises(CheckpointError, match="expected a dense DPA3"):
        start(tmp_path, path, {"n_routed_experts": 4, "top_k": 2})


def test_an_input_for_another_descriptor_is_refused(tmp_path):
    _, path = dense_checkpoint(tmp_path)
    (tmp_path / "input.json").write_text(json.dumps({"model": {"descriptor": {"type": "dpa3"}}}))
    with pytest.raises(CheckpointError, match="expected 'dpa3_moe'"):
        upcycle(path, tmp_path / "input.json", tmp_path / "start.pt")


def test_a_file_that_is_no_input_is_refused(tmp_path):
    _, path = dense_checkpoint(tmp_path)
    (tmp_path / "input.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a single-task training input"):
        upcycle(path, tmp_path / "input.json", tmp_path / "start.pt")


def test_the_command_writes_a_start_and_says_how_to_train(tmp_path):
    from typer.testing import CliRunner

    from moecalc.cli import app

    dense, path = dense_checkpoint(tmp_path)
    config = training_input(tmp_path)
    (tmp_path / "input.json").write_text(json.dumps(config))
    arguments = [
        "upcycle",
        str(path),
        "--input",
        str(tmp_path / "input.json"),
        "-o",
        str(tmp_path / "start.pt"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "--init-model" in result.output
    assert deviation(dense, load(tmp_path / "start.pt")) < 1e-10
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "exists" in again.output
