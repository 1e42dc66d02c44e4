"""The DPA3-MoE descriptor: `moecalc.nn` behind DeePMD-kit's interface of a PyTorch descriptor.

The physics (geometry, embedding, layers, graph preparation) is that of `moecalc.nn`. What is here turns
DeePMD-kit's padded neighbor list into a graph, and answers the questions that its trainer asks of a
descriptor.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import Any, Final, cast

import numpy as np
import torch
from deepmd.dpmodel.utils.seed import child_seed
from deepmd.pt.model.descriptor.base_descriptor import BaseDescriptor
from deepmd.pt.utils import env
from deepmd.pt.utils.env_mat_stat import EnvMatStatSe
from deepmd.pt.utils.exclude_mask import PairExcludeMask
from deepmd.pt.utils.update_sel import UpdateSel
from deepmd.pt.utils.utils import get_generator
from deepmd.utils.data_system import DeepmdDataSystem
from deepmd.utils.finetune import get_index_between_two_maps, map_pair_exclude_types
from deepmd.utils.path import DPPath
from deepmd.utils.version import check_version_compatibility
from torch import Tensor

from moecalc.deepmd import restart
from moecalc.deepmd.compiled import accelerate
from moecalc.nn.conditions import ConditionEmbedding
from moecalc.nn.config import DescriptorConfig
from moecalc.nn.deepmd_input import DESCRIPTOR, TRAINING_OPTIONS, OptionError, read_descriptor, read_moe
from moecalc.nn.descriptor import Embedding, Geometry, TypeEmbedding
from moecalc.nn.model import prepare_graph
from moecalc.nn.moe import MoERouter
from moecalc.nn.repflow import RepFlowLayer

# below DeePMD-kit's logger, which has the handlers
log = logging.getLogger("deepmd.moecalc")

# DeePMD-kit keeps at most `get_sel()` neighbors. e_sel and a_sel are normalisers here and nothing may be cut
# off, so the list gets room for more than e_sel, and a full one is an error.
_LIST_ROOM = 2


class _StatisticsView:
    """What DeePMD-kit's environment statistics ask of a descriptor, with DPA3's lists of e_sel neighbors.

    The statistics count the padding of the list, so its length changes them.
    """

    def __init__(self, descriptor: "DescrptDPA3MoE") -> None:
        self._descriptor = descriptor
        self.nnei = descriptor.config.e_sel
        self.ndescrpt = 4 * self.nnei
        self.rcut_smth = descriptor.config.e_rcut_smth
        self.emask = PairExcludeMask(descriptor.ntypes, exclude_types=descriptor.exclude_types)

    def get_rcut(self) -> float:
        return self._descriptor.get_rcut()

    def get_rcut_smth(self) -> float:
        return self.rcut_smth

    def get_nsel(self) -> int:
        return self.nnei

    def get_sel(self) -> list[int]:
        return [self.nnei]

    def get_ntypes(self) -> int:
        return self._descriptor.ntypes

    def mixed_types(self) -> bool:
        return True

    def get_env_protection(self) -> float:
        return self._descriptor.get_env_protection()


def _trainable_config(section: dict[str, Any]) -> DescriptorConfig:
    """Architecture of a descriptor section, which DPA3 itself must be able to train.

    Raises:
        OptionError: options that are unknown or inconsistent, or that DPA3 refuses too.
    """
    try:
        config = read_descriptor(section)
    except OptionError as error:
        raise OptionError(f"descriptor: {error}") from None
    if config.use_dynamic_sel and not config.smooth_edge_update:
        raise OptionError(
            "repflow.smooth_edge_update = false with use_dynamic_sel, expected true (as for dpa3)"
        )
    if config.a_sel > config.e_sel:
        raise OptionError(f"repflow.a_sel = {config.a_sel}, expected at most e_sel = {config.e_sel}")
    return config


@BaseDescriptor.register(DESCRIPTOR)
class DescrptDPA3MoE(BaseDescriptor, torch.nn.Module):
    """DPA3 with element-wise mixture of experts.

    Args:
        ntypes: number of elements.
        repflow: DPA3's `repflow` section.
        moe: the `moe` section (`moecalc.nn.deepmd_input.read_moe`); None makes a dense model.
        type_map: element symbols.
        trainable, seed, use_loc_mapping: as for dpa3; the last changes nothing here.
        add_chg_spin_ebd: whether charge and spin of a frame (`charge_spin`) enter the node features.
        default_chg_spin: charge and multiplicity where a frame has none.
        The others are those of `moecalc.nn.config.DescriptorConfig`.

    Raises:
        OptionError: options that are unknown, inconsistent or not supported.
    """

    __jit_unused_properties__ = ("dim_out", "dim_emb")
    add_chg_spin_ebd: Final[bool]
    pair_mask: Tensor

    def __init__(
        self,
        ntypes: int,
        repflow: dict[str, Any],
        moe: dict[str, Any] | None = None,
        concat_output_tebd: bool = False,
        activation_function: str = "silu",
        precision: str = "float64",
        exclude_types: list[tuple[int, int]] | None = None,
        env_protection: float = 0.0,
        trainable: bool = True,
        seed: int | list[int] | None = None,
        use_econf_tebd: bool = False,
        use_tebd_bias: bool = False,
        use_loc_mapping: bool = True,
        type_map: list[str] | None = None,
        add_chg_spin_ebd: bool = False,
        default_chg_spin: list[float] | None = None,
    ) -> None:
        torch.nn.Module.__init__(self)
        self._arguments = {
            "repflow": dict(repflow),
            "moe": None if moe is None else dict(moe),
            "concat_output_tebd": concat_output_tebd,
            "activation_function": activation_function,
            "precision": precision,
            "env_protection": env_protection,
            "trainable": trainable,
            "use_econf_tebd": use_econf_tebd,
            "use_tebd_bias": use_tebd_bias,
            "use_loc_mapping": use_loc_mapping,
            "add_chg_spin_ebd": add_chg_spin_ebd,
            "default_chg_spin": default_chg_spin,
        }
        self.exclude_types = [(int(i), int(j)) for i, j in exclude_types or []]
        self.config = _trainable_config({**self._arguments, "exclude_types": self.exclude_types})
        self.moe = read_moe(moe)
        # DeePMD-kit's atomic model looks for this name
        self.add_chg_spin_ebd = add_chg_spin_ebd
        default = self.config.default_chg_spin
        self.default_chg_spin: list[float] | None = None if default is None else [float(x) for x in default]
        training = {**TRAINING_OPTIONS, **{k: v for k, v in repflow.items() if k in TRAINING_OPTIONS}}
        self.fix_stat_std = 0.3 if training["skip_stat"] else float(training["fix_stat_std"])
        self.ntypes = ntypes
        self.type_map = list(type_map) if type_map is not None else [f"Type_{i}" for i in range(ntypes)]
        self.stats: dict[str, Any] | None = None
        self.trainable = trainable

        config = self.config
        table = self._type_embedding(self.type_map)
        self.geometry = Geometry(config, ntypes)
        self.embedding = Embedding(config, table)
        self.layers = torch.nn.ModuleList([RepFlowLayer(config, self.moe, i) for i in range(config.nlayers)])
        if add_chg_spin_ebd:
            self.charge_spin_embedding = ConditionEmbedding(config.n_dim, config.activation_function)
        self._initialize(seed, training["update_residual"], training["update_residual_init"])
        self.prec = getattr(torch, config.precision)
        if add_chg_spin_ebd:
            self.charge_spin_embedding.to(self.prec)
        self.embedding.to(self.prec)
        self.layers.to(self.prec)
        if self.fix_stat_std:
            self.geometry.stddev.fill_(self.fix_stat_std)
        self.to(env.DEVICE)
        self._refresh_pair_mask()
        # plain attributes, because TorchScript reads them: DeePMD-kit scripts a model before it evaluates it
        self.rcut = config.e_rcut
        self.rcut_smth = config.e_rcut_smth
        self.angle_cutoff = config.a_rcut if config.needs_angles else 0.0
        self.sel = [_LIST_ROOM * config.e_sel]
        self.dim_embedding = config.e_dim
        self.dim_descriptor = config.n_dim * (2 if config.concat_output_tebd else 1)
        self.concat_table = config.concat_output_tebd
        self.protection = config.env_protection
        self.by_element = self.moe.routing == "element" or not self.moe.positions
        self._seen = torch.zeros(ntypes, dtype=torch.int64, device=env.DEVICE)
        for parameter in self.parameters():
            parameter.requires_grad_(trainable)
        self._accelerated = False
        restart.install()

    def _type_embedding(self, type_map: list[str]) -> TypeEmbedding:
        table = TypeEmbedding(
            type_map, self.config.n_dim, self.config.use_tebd_bias, self.config.use_econf_tebd
        )
        # TorchScript keeps all buffers, and DeePMD-kit would report this one as missing in its checkpoints
        table.register_buffer("rows", table.rows, persistent=True)
        return table

    def _initialize(self, seed: int | list[int] | None, residual: float, residual_init: str) -> None:
        """Draw the weights as DPA3 does: matrices N(0, 1/(n_in + n_out)), biases N(0, 1), experts apart."""
        if residual_init not in {"const", "norm"}:
            raise ValueError(f"repflow.update_residual_init = {residual_init!r}, expected const or norm")
        generator = get_generator(child_seed(seed, 0))
        if generator is not None:  # on the CPU, so that all devices start from the same weights
            generator = torch.Generator().manual_seed(generator.initial_seed())
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith("_residual"):
                    if residual_init == "const":
                        parameter.fill_(residual)
                    else:
                        parameter.normal_(std=residual, generator=generator)
                elif name.endswith("bias"):
                    parameter.normal_(generator=generator)
                else:  # (n_in, n_out), or one per expert
                    parameter.normal_(std=1.0 / math.sqrt(sum(parameter.shape[-2:])), generator=generator)

    def _refresh_pair_mask(self) -> None:
        mask = torch.ones(self.ntypes, self.ntypes, dtype=torch.bool, device=env.DEVICE)
        for i, j in self.exclude_types:
            mask[i, j] = mask[j, i] = False
        self.register_buffer("pair_mask", mask)

    # --- what the trainer asks ---

    def get_rcut(self) -> float:
        """Cutoff of the edges, Angstrom."""
        return self.rcut

    def get_rcut_smth(self) -> float:
        """Where the switch of the edges begins, Angstrom."""
        return self.rcut_smth

    def get_sel(self) -> list[int]:
        """Length of the neighbor list: more than e_sel, which is a normaliser here."""
        return self.sel

    def get_ntypes(self) -> int:
        """Number of elements."""
        return self.ntypes

    def get_type_map(self) -> list[str]:
        """Element symbols."""
        return self.type_map

    def get_dim_out(self) -> int:
        """Width of the descriptor."""
        return self.dim_descriptor

    def get_dim_emb(self) -> int:
        """Width of the edge features."""
        return self.dim_embedding

    @property
    def dim_out(self) -> int:
        """Width of the descriptor."""
        return self.get_dim_out()

    @property
    def dim_emb(self) -> int:
        """Width of the edge features."""
        return self.get_dim_emb()

    def mixed_types(self) -> bool:
        """The neighbor list need not be sorted by element."""
        return True

    def has_message_passing(self) -> bool:
        """Neighbours' features depend on their neighbors."""
        return True

    def need_sorted_nlist_for_lower(self) -> bool:
        """The order of the neighbors does not matter: nothing is cut off by rank."""
        return False

    def get_env_protection(self) -> float:
        """Added to distances where they divide."""
        return self.protection

    @torch.jit.export
    def get_dim_chg_spin(self) -> int:
        """Numbers in `charge_spin`: charge and multiplicity, or none."""
        return 2 if self.add_chg_spin_ebd else 0

    @torch.jit.export
    def has_default_chg_spin(self) -> bool:
        """Whether frames may leave out charge and spin."""
        return self.default_chg_spin is not None

    @torch.jit.export
    def get_default_chg_spin(self) -> Tensor | None:
        """Default charge and multiplicity (2,), if there is one."""
        default = self.default_chg_spin
        if default is None:
            return None
        return torch.tensor(default, dtype=self.prec, device=self.geometry.stddev.device)

    # --- statistics ---

    def compute_input_stats(
        self, merged: Callable[[], list[dict[str, Any]]] | list[dict[str, Any]], path: DPPath | None = None
    ) -> None:
        """Mean 0 and `fix_stat_std`; where that is 0, the standard deviation per element of the data."""
        if self.fix_stat_std:
            return
        statistics = EnvMatStatSe(_StatisticsView(self))
        if path is not None:
            path = path / statistics.get_hash()
        statistics.load_or_compute_stats(merged, path)
        self.stats = statistics.stats
        self._set_stddev(statistics()[1])

    def _set_stddev(self, stddev: np.ndarray) -> None:
        rows = torch.as_tensor(stddev[:, 0, :], dtype=torch.float64)
        self.geometry.stddev.copy_(rows.to(self.geometry.stddev.device))

    def get_stat_mean_and_stddev(self) -> tuple[list[Tensor], list[Tensor]]:
        """Mean and standard deviation of the environment matrix, (ntypes, 4) each."""
        return [self.geometry.mean], [self.geometry.stddev]

    def set_stat_mean_and_stddev(self, mean: list[Tensor], stddev: list[Tensor]) -> None:
        """Replace what `get_stat_mean_and_stddev` returns."""
        self.geometry.mean = mean[0]
        self.geometry.stddev = stddev[0]

    @classmethod
    def update_sel(
        cls, train_data: DeepmdDataSystem, type_map: list[str] | None, local_jdata: dict[str, Any]
    ) -> tuple[dict[str, Any], float | None]:
        """Fill in e_sel and a_sel where they are `auto`; warn where dpa3 would cut off neighbors."""
        jdata = {**local_jdata, "repflow": dict(local_jdata["repflow"])}
        repflow = jdata["repflow"]
        search = UpdateSel()
        min_nbor_dist, most_edges = None, 0
        for which in ("e", "a"):
            key, cutoff = f"{which}_sel", repflow[f"{which}_rcut"]
            min_nbor_dist, found = search.get_nbor_stat(train_data, type_map, cutoff, mixed_type=True)
            most, asked = int(found[0]), repflow[key]
            if which == "e":
                most_edges = most
            if search.parse_auto_sel(asked):
                repflow[key] = search.wrap_up_4(most * search.parse_auto_sel_ratio(asked))
            elif most > asked:
                log.warning(
                    "repflow.%s = %d, but an atom of the training data has %d neighbors within %s A: "
                    "dpa3_moe keeps them all "
                    "(dpa3 would drop the farthest), but the sums over them are scaled for fewer",
                    key, asked, most, cutoff,
                )  # fmt: skip
        if most_edges > _LIST_ROOM * repflow["e_sel"]:
            raise ValueError(
                f"repflow.e_sel = {repflow['e_sel']}, but an atom of the training data has {most_edges} "
                "neighbors within e_rcut: "
                f"set e_sel to at least {most_edges // _LIST_ROOM + 1}, or use_dynamic_sel with e_sel = 1200 "
                "and a_sel = 300"
            )
        return jdata, min_nbor_dist

    # --- sharing and changing ---

    def share_params(self, base_class: "DescrptDPA3MoE", shared_level: int, resume: bool = False) -> None:
        """Use parameters of another head's descriptor: all (level 0), or the type embedding (level 1).

        Raises:
            ValueError: another class or level.
        """
        if self.__class__ is not base_class.__class__ or shared_level not in {0, 1}:
            raise ValueError(
                f"cannot share level {shared_level} of {type(base_class).__name__} with "
                f"{type(self).__name__}, "
                "expected level 0 or 1 and descriptors of one type"
            )
        if shared_level == 1:
            self.embedding.table = base_class.embedding.table
            return
        if not resume and not self.fix_stat_std and self.stats is not None and base_class.stats is not None:
            statistics = EnvMatStatSe(_StatisticsView(base_class))
            statistics.stats = {k: v + self.stats[k] for k, v in base_class.stats.items()}
            base_class.stats = statistics.stats
            base_class._set_stddev(statistics()[1])  # noqa: SLF001
        shared = ["geometry", "embedding", "layers"]
        if self.add_chg_spin_ebd and base_class.add_chg_spin_ebd:
            shared.append("charge_spin_embedding")
        for name in shared:
            setattr(self, name, getattr(base_class, name))

    def change_type_map(self, type_map: list[str], model_with_new_type_stat: Any | None = None) -> None:
        """Reorder, drop or add elements.

        New ones get a random embedding, and statistics from `model_with_new_type_stat`.

        Raises:
            ValueError: where the width of the type embedding makes its table depend on the number of
                elements.
        """
        index, has_new = get_index_between_two_maps(self.type_map, type_map)
        config = self.config
        old_table = cast(TypeEmbedding, self.embedding.table)
        table = self._type_embedding(list(type_map))
        table.to(old_table.matrix)
        with torch.no_grad():
            if config.use_econf_tebd:
                table.matrix.copy_(old_table.matrix)
            else:
                if config.n_dim in {n * m for n in (self.ntypes, len(type_map)) for m in (1, 2)}:
                    raise ValueError(
                        f"n_dim = {config.n_dim} is once or twice the number of elements ({self.ntypes} "
                        f"before, {len(type_map)} now), "
                        "where the type embedding has a residual connection: the elements of such a model "
                        "cannot be changed"
                    )
                rows: list[Tensor] = [old_table.matrix, table.matrix] if has_new else [old_table.matrix]
                table.matrix.copy_(torch.cat(rows)[index])
            if config.use_tebd_bias:
                table.bias.copy_(old_table.bias)
        for parameter in table.parameters():
            parameter.requires_grad_(self.trainable)
        self.embedding.table = table
        for name in ("mean", "stddev"):
            statistics: Tensor = getattr(self.geometry, name)
            if has_new:
                source = (
                    None
                    if model_with_new_type_stat is None
                    else getattr(model_with_new_type_stat.geometry, name)
                )
                default = torch.full(
                    (len(type_map), 4), 0.0 if name == "mean" else self.fix_stat_std or 1.0
                ).to(statistics)
                statistics = torch.cat([statistics, default if source is None else source])
            setattr(self.geometry, name, statistics[index])
        self.exclude_types = map_pair_exclude_types(self.exclude_types, index)
        self.type_map = list(type_map)
        self.ntypes = len(type_map)
        self._refresh_pair_mask()
        self._seen = torch.zeros(self.ntypes, dtype=torch.int64, device=env.DEVICE)

    def enable_compression(self, *args: Any, **kwargs: Any) -> None:
        """Not possible.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "dpa3_moe cannot be compressed: make a package of the checkpoint with `moecalc package`"
        )

    def serialize(self) -> dict[str, Any]:
        """The descriptor as numbers and NumPy arrays."""
        return {
            "@class": "Descriptor",
            "type": DESCRIPTOR,
            "@version": 1,
            "ntypes": self.ntypes,
            "type_map": self.type_map,
            "exclude_types": self.exclude_types,
            **self._arguments,
            "@variables": {k: v.detach().cpu().numpy() for k, v in self.state_dict().items()},
        }

    @classmethod
    def deserialize(cls, data: dict[str, Any]) -> "DescrptDPA3MoE":
        """Rebuild what `serialize` wrote."""
        data = data.copy()
        check_version_compatibility(data.pop("@version"), 1, 1)
        data.pop("@class")
        data.pop("type")
        variables = data.pop("@variables")
        descriptor = cls(**data)
        descriptor.load_state_dict({k: torch.as_tensor(v) for k, v in variables.items()})
        return descriptor

    # --- evaluation ---

    @torch.jit.unused
    def _count(self, types: Tensor) -> None:
        """Remember which elements (n_local,) training has seen, for `report_load`; prepare the first step."""
        if self.training:
            if not self._accelerated:  # not earlier: evaluation alone is not worth a compilation
                accelerate(self)
                self._accelerated = True
            self._seen += torch.bincount(types, minlength=self.ntypes)

    def train(self, mode: bool = True) -> "DescrptDPA3MoE":
        """Switch between training and evaluation.

        The trainer does so before it displays losses: then the load is reported.
        """
        if self.training and not mode:
            self.report_load()
        return super().train(mode)

    def report_load(self) -> None:
        """Log the share of the weights that each routed expert had for the atoms since the last report.

        The entropy is that of these shares over its largest value: 1 for a balanced load, 0 where one expert
        does all. With routing by configuration, the shares are those of the mean composition.
        """
        atoms = self._seen.to(torch.float64)
        total = float(atoms.sum())
        if total == 0.0 or not self.moe.positions:
            return
        self._seen.zero_()
        shares = atoms / total
        dtype = self.embedding.edge_matrix.dtype
        composition = (
            torch.eye(self.ntypes, dtype=dtype, device=shares.device)
            if self.by_element
            else shares.to(dtype)[None]
        )
        with torch.no_grad():
            features = self.embedding.group_features(composition)
            for number, layer in enumerate(cast(Iterable[RepFlowLayer], self.layers)):
                parts = []
                for name, router in cast(dict[str, MoERouter], layer.routers).items():
                    if router.n_routed == 0:
                        continue
                    ids, weights = router(features)
                    ids, weights = ids[:, : router.top_k], weights[:, : router.top_k].to(torch.float64)
                    weights = weights * shares[:, None] if self.by_element else weights
                    load = torch.zeros(router.n_routed, dtype=torch.float64, device=shares.device)
                    load = load.index_add(0, ids.reshape(-1), weights.reshape(-1))
                    load = load / load.sum()
                    entropy = float(-torch.xlogy(load, load).sum()) / math.log(max(router.n_routed, 2))
                    parts.append(
                        f"{name} {' '.join(f'{x:.2f}' for x in load.tolist())} (entropy {entropy:.2f})"
                    )
                log.info("dpa3_moe load of layer %d: %s", number, "; ".join(parts))

    def _edges(self, coord: Tensor, nlist: Tensor, mapping: Tensor) -> tuple[Tensor, Tensor]:
        """Edges of DeePMD-kit's list: index (2, E) into all atoms of the batch, vector (E, 3) float64."""
        n_frames, n_local, width = nlist.shape
        n_all = mapping.shape[1]
        flat = nlist.reshape(-1)
        slot = torch.nonzero(flat >= 0).squeeze(1)
        centre = torch.div(slot, width, rounding_mode="floor")
        frame = torch.div(centre, n_local, rounding_mode="floor")
        neighbor = flat.index_select(0, slot) + frame * n_all
        source = centre + frame * (n_all - n_local)
        positions = coord.reshape(n_frames * n_all, 3).to(torch.float64)
        vector = positions.index_select(0, neighbor) - positions.index_select(0, source)
        owner = mapping.reshape(-1).index_select(0, neighbor) + frame * n_local
        return torch.stack([centre, owner]), vector

    def _checked_charge_spin(self, charge_spin: Tensor | None, n_frames: int) -> Tensor:
        """Charge and multiplicity (frames, 2) as int64."""
        if charge_spin is None:
            raise RuntimeError(
                "dpa3_moe with add_chg_spin_ebd needs charge_spin (charge and multiplicity of every frame): "
                "give it, or set "
                "default_chg_spin"
            )
        given = charge_spin.reshape(n_frames, 2)
        whole = given.round()
        if bool((whole != given).any()):
            raise RuntimeError("charge_spin has fractions, expected whole charges and multiplicities")
        low = bool((whole[:, 0] < -100).any()) or bool((whole[:, 1] < 0).any())
        if low or bool((whole > 99).any()):
            raise RuntimeError(
                "charge_spin is out of range, expected charges from -100 to 99 and multiplicities from 0 to "
                "99"
            )
        return whole.to(torch.int64)

    def forward(
        self,
        extended_coord: Tensor,
        extended_atype: Tensor,
        nlist: Tensor,
        mapping: Tensor | None = None,
        comm_dict: dict[str, Tensor] | None = None,
        fparam: Tensor | None = None,
        charge_spin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Node features after the last layer.

        Args:
            extended_coord: (frames, n_all * 3) positions of atoms and their images, Angstrom.
            extended_atype: (frames, n_all) elements.
            nlist: (frames, n_local, width) neighbors, -1 where there is none.
            mapping: (frames, n_all) the atom that each entry is an image of.
            comm_dict, fparam: not read; an MPI exchange is not supported.
            charge_spin: (frames, 2) charge and multiplicity, where the model takes them.

        Returns:
            Features (frames, n_local, dim_out); the four others are None (rotation matrix, edge features,
            ...): the energy does not need them.

        Raises:
            RuntimeError: a full neighbor list, missing mapping, MPI exchange, or charge and spin that are
                missing, not whole or out of range.
        """
        if comm_dict is not None or mapping is None:
            raise RuntimeError(
                "dpa3_moe runs in LAMMPS as a package only: moecalc package model.ckpt.pt, then pair_style "
                "moe"
            )
        n_frames, n_local, width = nlist.shape
        if width > 0 and bool((nlist[:, :, -1] >= 0).any()):
            raise RuntimeError(
                "an atom has more neighbors within e_rcut than the list has room for (twice e_sel), so that "
                "some would be lost: "
                "raise e_sel, or set use_dynamic_sel with e_sel = 1200 and a_sel = 300"
            )
        types = extended_atype[:, :n_local].reshape(-1)
        shift: Tensor | None = None
        condition: Tensor | None = None
        if self.add_chg_spin_ebd:
            shift = self.charge_spin_embedding(self._checked_charge_spin(charge_spin, n_frames))
            condition = torch.arange(n_frames, device=types.device).repeat_interleave(n_local)
        edge_index, edge_vec = self._edges(extended_coord, nlist, mapping)
        if not torch.jit.is_scripting():
            self._count(types)
        dtype = self.embedding.edge_matrix.dtype
        if self.by_element:
            n_group = self.ntypes
            group = types
            composition = torch.eye(n_group, dtype=dtype, device=types.device)
        else:
            n_group = n_frames
            group = torch.arange(n_frames, device=types.device).repeat_interleave(n_local)
            counts = torch.bincount(group * self.ntypes + types, minlength=n_group * self.ntypes)
            composition = counts.reshape(n_group, self.ntypes).to(dtype) / n_local
        order, edge_order, types, edges, angles, node_splits, edge_splits, angle_splits = prepare_graph(
            types, edge_index, edge_vec, group, n_group, self.rcut, self.angle_cutoff, self.pair_mask
        )
        edge_input, switch_edge, directions, cosine, switch_angle = self.geometry(
            edge_vec.index_select(0, edge_order), types, edges, angles
        )
        switch_edge = switch_edge.to(dtype)
        directions = directions.to(dtype)
        switch_angle = switch_angle.to(dtype)
        if condition is not None:
            condition = condition.index_select(0, order)
        node, edge, angle = self.embedding(types, edge_input.to(dtype), cosine.to(dtype), shift, condition)
        features = self.embedding.group_features(composition)
        n_atom = types.size(0)
        for layer in self.layers:
            node, edge, angle = layer(
                node,
                edge,
                angle,
                switch_edge,
                directions,
                switch_angle,
                edges,
                angles,
                n_atom,
                node_splits,
                edge_splits,
                angle_splits,
                features,
            )
        if self.concat_table:
            rows = self.embedding.table().index_select(0, types)
            if shift is not None and condition is not None:
                rows = rows + shift.index_select(0, condition)
            node = torch.cat([node, rows], dim=1)
        node = torch.zeros_like(node).index_copy(0, order, node)
        return (
            node.reshape(n_frames, n_local, self.dim_descriptor).to(env.GLOBAL_PT_FLOAT_PRECISION),
            None,
            None,
            None,
            None,
        )
