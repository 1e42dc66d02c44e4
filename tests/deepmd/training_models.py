"""Small models, training inputs and frames for the tests with DeePMD-kit."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

TYPE_MAP = ["Nb", "Mo", "W"]
MOE = {"n_routed_experts": 4, "n_shared_experts": 0, "top_k": 2, "positions": ["node", "edge", "angle"]}


def descriptor(kind="dpa3_moe", repflow=None, **options):
    """A `descriptor` section; three layers, so that every map reaches the energy."""
    section = {
        "type": kind,
        "repflow": {
            "n_dim": 12, "e_dim": 8, "a_dim": 4, "nlayers": 3,
            "e_rcut": 5.0, "e_rcut_smth": 4.0, "e_sel": 600, "a_rcut": 3.5, "a_rcut_smth": 3.0, "a_sel": 200,
            "axis_neuron": 4, "a_compress_rate": 1, "a_compress_e_rate": 2, "a_compress_use_split": True,
            "smooth_edge_update": True, "use_exp_switch": True, "use_dynamic_sel": True, "edge_init_use_dist": True,
        },
        "activation_function": "silut:3.0",
        "precision": "float64",
        "seed": 1,
    }  # fmt: skip
    section["repflow"] |= repflow or {}
    return section | options


def training_input(folder, steps=6, save=3, model=None, fitting=None, **descriptor_options):
    """An `input.json` for the systems in `folder`/data, as a dictionary."""
    options = {"moe": MOE} | descriptor_options
    return {
        "model": model
        or {
            "type_map": TYPE_MAP,
            "descriptor": descriptor(**options),
            "fitting_net": {"neuron": [8, 8], "precision": "float64", "seed": 1, **(fitting or {})},
        },
        "learning_rate": {"type": "exp", "start_lr": 1e-3, "stop_lr": 1e-5, "decay_steps": 2},
        "loss": {"type": "ener", "start_pref_e": 1, "limit_pref_e": 1, "start_pref_f": 1, "limit_pref_f": 1,
                 "start_pref_v": 0.1, "limit_pref_v": 0.1},
        "training": {
            "training_data": {"systems": str(folder / "data/train"), "batch_size": 1},
            "validation_data": {"systems": str(folder / "data/valid"), "batch_size": 1},
            "numb_steps": steps, "seed": 7, "disp_freq": 2, "save_freq": save,
        },
    }  # fmt: skip


def random_frames(n=2, sizes=(5, 9), seed=0):
    """Periodic frames of random atoms, not closer than 1.5 A."""
    random = np.random.default_rng(seed)
    frames = []
    for i in range(n):
        cell = np.diag([4.6, 5.3, 6.1]) + random.normal(scale=0.3, size=(3, 3))
        while True:
            size = sizes[i % len(sizes)]
            atoms = Atoms(
                random.choice(TYPE_MAP, size), scaled_positions=random.random((size, 3)), cell=cell, pbc=True
            )
            distances = atoms.get_all_distances(mic=True)[np.triu_indices(size, 1)]
            if distances.min() > 1.5:
                break
        frames.append(atoms)
    return frames


def build(section, type_map=TYPE_MAP, neuron=(8, 8), fitting=None, **model_options):
    """DeePMD-kit's model of a descriptor section, in evaluation mode, and its filled-in `model_params`."""
    from deepmd.pt.model.model import get_model
    from deepmd.utils.argcheck import normalize

    config = training_input(Path("nowhere"))
    config["model"] = {
        "type_map": list(type_map),
        "descriptor": section,
        "fitting_net": {"neuron": list(neuron), "precision": section["precision"], "seed": 2,
                        **(fitting or {})},
        **model_options,
    }  # fmt: skip
    params = normalize(config)["model"]
    model = get_model(copy.deepcopy(params))
    generator = torch.Generator().manual_seed(3)
    model.atomic_model.out_bias.normal_(generator=generator)
    return model.eval(), params


def save(model, params, path):
    """Write a checkpoint as `dp --pt train` does."""
    from deepmd.pt.train.wrapper import ModelWrapper

    torch.save({"model": ModelWrapper(model, model_params=params).state_dict()}, path)
    return path


def load(path, head=None):
    """The model of a checkpoint, in evaluation mode."""
    from deepmd.pt.train.training import get_model_for_wrapper
    from deepmd.pt.train.wrapper import ModelWrapper

    data = torch.load(path, weights_only=True)
    state = data.get("model", data)
    wrapper = ModelWrapper(get_model_for_wrapper(copy.deepcopy(state["_extra_state"]["model_params"])))
    wrapper.load_state_dict(state)
    return wrapper.model[head or "Default"].eval()


def evaluate(model, atoms, type_map=TYPE_MAP, **given):
    """Energy, forces (n, 3) and virial (3, 3) of DeePMD-kit's model; `given`: charge_spin, fparam."""
    types = torch.tensor([[type_map.index(symbol) for symbol in atoms.symbols]])
    given = {name: torch.tensor([value], dtype=torch.float64) for name, value in given.items()}
    out = model(
        torch.tensor(atoms.positions).reshape(1, -1),
        types,
        torch.tensor(atoms.cell.array).reshape(1, 9),
        **given,
    )
    return (
        out["energy"].item(),
        out["force"][0].detach().numpy(),
        out["virial"][0].reshape(3, 3).detach().numpy(),
    )


def dp(folder, *arguments, compile_activations=False):
    """Run `dp --pt` in a folder and return its log.

    Raises:
        AssertionError: with the log, where it fails.
    """
    environment = os.environ | {
        "MOECALC_COMPILE": "1" if compile_activations else "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "deepmd", "--pt", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    return log


def train(folder, config, *arguments, **options):
    """Run `dp --pt train` with an input in a folder, without the neighbor statistics."""
    folder.mkdir(exist_ok=True)
    (folder / "input.json").write_text(json.dumps(config))
    return dp(folder, "train", "input.json", "--skip-neighbor-stat", *arguments, **options)
