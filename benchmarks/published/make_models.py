"""Writes a checkpoint of a published shape with random weights, as `dp --pt train` of 3.2.0 saves it.

    python make_models.py 3.1-3M|3.2-5M|3.3-1M CHECKPOINT      (in an environment with deepmd-kit)

Residuals are about 0.1, so that the noise of float32 stays small in deep models. Heads share their weights
but for the energy shifts, the case embedding and the embedding of charge and spin.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from ase.data import chemical_symbols
from deepmd.pt.model.model import get_model
from deepmd.utils.argcheck import normalize

SHAPES: dict[str, dict[str, Any]] = {
    "3.1-3M": {"nlayers": 16, "n_heads": 31},
    "3.2-5M": {"nlayers": 24, "n_heads": 23, "numb_fparam": 2},
    "3.3-1M": {"nlayers": 6, "n_heads": 23, "charge_spin": True},
}
REPFLOW = {
    "n_dim": 128, "e_dim": 64, "a_dim": 32, "e_rcut": 6.0, "e_rcut_smth": 5.3, "e_sel": 1200, "a_rcut": 4.0,
    "a_rcut_smth": 3.5, "a_sel": 300, "axis_neuron": 4, "a_compress_rate": 1, "a_compress_e_rate": 2,
    "a_compress_use_split": True, "update_angle": True, "smooth_edge_update": True, "edge_init_use_dist": True,
    "use_exp_switch": True, "update_style": "res_residual", "update_residual": 0.1,
    "update_residual_init": "const", "use_dynamic_sel": True, "sel_reduce_factor": 10.0, "fix_stat_std": 0.3,
}  # fmt: skip
NETWORK = {"activation_function": "custom_silu:3.0", "precision": "float32", "seed": 1}


def options(nlayers: int, n_heads: int, numb_fparam: int = 0, charge_spin: bool = False) -> dict[str, Any]:
    """All options of the model, the defaults written out as DeePMD-kit does."""
    descriptor: dict[str, Any] = {"type": "dpa3", "repflow": {**REPFLOW, "nlayers": nlayers}, **NETWORK}
    fitting: dict[str, Any] = {
        "neuron": [240, 240, 240],
        "resnet_dt": True,
        "dim_case_embd": n_heads,
        **NETWORK,
    }
    if charge_spin:
        descriptor |= {"add_chg_spin_ebd": True, "default_chg_spin": [0, 1]}
    if numb_fparam:
        fitting |= {"numb_fparam": numb_fparam, "default_fparam": [0.0, 1.0]}
    head = {"type_map": chemical_symbols[1:119], "descriptor": descriptor, "fitting_net": fitting}
    heads = {f"Head{i:02d}": copy.deepcopy(head) for i in range(n_heads)}
    config = {
        "model": {"shared_dict": {}, "model_dict": heads},
        "learning_rate": {"type": "exp", "decay_steps": 100, "start_lr": 1e-3, "stop_lr": 1e-5},
        "loss_dict": {name: {"type": "ener"} for name in heads},
        "training": {
            "model_prob": dict.fromkeys(heads, 1.0),
            "data_dict": {name: {"training_data": {"systems": ["x"]}} for name in heads},
            "numb_steps": 10,
        },
    }
    return normalize(config, multi_task=True)["model"]


def write(shape: str, path: str) -> None:
    """Write the checkpoint of a shape."""
    params = options(**SHAPES[shape])
    torch.manual_seed(3)
    model = get_model(copy.deepcopy(params["model_dict"]["Head00"]))
    model.set_case_embd(0)
    random = torch.Generator().manual_seed(4)
    state = {name: value for name, value in model.state_dict().items() if torch.is_tensor(value)}
    for name, value in state.items():
        if "residual" in name:
            value.copy_(0.1 * (1 + torch.randn(value.shape, generator=random)))
        elif name.endswith(("fparam_avg", "fparam_inv_std")):
            value.copy_(torch.rand(value.shape, generator=random) + 0.5)
    whole: dict[str, Any] = {}
    for i, head in enumerate(params["model_dict"]):
        for name, value in state.items():
            own = value
            if name.endswith("case_embd"):
                own = torch.eye(len(value), dtype=value.dtype)[i]
            elif name.endswith("out_bias"):
                own = torch.randn(value.shape, generator=random).to(value.dtype)
            elif any(part in name for part in ("chg_embedding", "spin_embedding", "mix_cs_mlp")):
                own = value * (1 + 0.05 * torch.randn(value.shape, generator=random))
            whole[f"model.{head}.{name}"] = own
    whole["_extra_state"] = {"model_params": params, "train_infos": {"lr": 1e-3, "step": 1}}
    torch.save({"model": whole}, path)


if __name__ == "__main__":
    with torch.no_grad():
        write(sys.argv[1], sys.argv[2])
