"""What the runtime reads of a model: `architecture.json` and `tensors.json` of a package.

The core computes from these two records and the raw numbers that they point to; it runs no code of a file.
C++ checks the same schema (cpp/package/architecture.cpp). Importing this needs no torch: `describe` looks at
a model that its caller has.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from moecalc.conditions import CHARGE_RANGE
from moecalc.errors import PackageError
from moecalc.keys import POSITIONS

if TYPE_CHECKING:
    import torch
    from torch import nn

ITEM_SIZE: Final = {"float32": 4, "float64": 8, "int64": 8, "bool": 1}
"""Types of the tensors of a package, and bytes of one number."""

_STORAGES: Final = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "BoolStorage": "bool",
}

Float = Literal["float32", "float64"]
Size = Annotated[int, Field(ge=0)]
Width = Annotated[int, Field(ge=1)]


class _Strict(BaseModel):
    """No other keys, no conversions, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Activation(_Strict):
    """phi of a map; threshold, slope and offset are those of `silut`."""

    kind: Literal["linear", "silu", "silut", "tanh", "sigmoid", "relu", "relu6", "gelu", "softplus"]
    threshold: float
    slope: float
    offset: float


class Geometry(_Strict):
    """Switches of edges and angles (Angstrom), and what the first edge feature is."""

    e_start: float
    e_stop: float
    a_start: float
    a_stop: float
    exp_switch: bool
    use_dist: bool
    protection: float


class Embedding(_Strict):
    """Initial features; `routed`: routers read the charge and spin embedding as well."""

    use_dist: bool
    routed: bool
    own_router_table: bool
    phi: Activation


class ConditionInputs(_Strict):
    """Charge, spin and frame parameters that the model takes; `phi` is there if it takes charge and spin."""

    takes_charge_spin: bool
    routed: bool
    n_fparam: Size
    n_case: Size
    charge_offset: int
    phi: Activation | None


class TableRouter(_Strict):
    """A router whose answers are tensors: `ids` and `weights`, a row per element."""

    kind: Literal["table"]


class GateRouter(_Strict):
    """A router with a tensor `gate`; shared experts have the last ids."""

    kind: Literal["gate"]
    n_routed: Size
    n_shared: Size
    top_k: Size
    softmax_first: bool


class Position(_Strict):
    """A linear map of a layer: `experts` matrices, chosen by `router` if `routed`, merged if `merge`."""

    router: str
    routed: bool
    merge: bool
    experts: Width


class Layer(_Strict):
    """Constants of a RepFlow layer (attributes of `moecalc.nn.repflow.RepFlowLayer`)."""

    n_head: Width
    axis: Width
    edge_norm: float
    angle_norm: float
    average: bool
    with_residual: bool
    sequential: bool
    live_edge: bool
    live_angle: bool
    with_angles: bool
    keep_far_edges: bool
    compress: bool
    compress_split: bool
    vc_dim: Width
    ec_dim: Width
    phi: Activation
    routers: dict[str, Annotated[TableRouter | GateRouter, Field(discriminator="kind")]]
    positions: dict[str, Position]


class FittingLayer(_Strict):
    """A hidden layer of the fitting net; `residual`: copies of its input that are added."""

    has_idt: bool
    residual: Annotated[int, Field(ge=0, le=2)]
    phi: Activation


class Readout(_Strict):
    """The fitting net; `n_constant` inputs come from conditions."""

    concat_table: bool
    with_case: bool
    n_constant: Size
    dtype: Float
    layers: list[FittingLayer]


class Architecture(_Strict):
    """`architecture.json`: all that is no tensor. Lengths in Angstrom; `dtype` is that of the layers."""

    elements: Annotated[list[str], Field(min_length=1)]
    cutoff: float
    angle_cutoff: float
    routing_level: Literal["element", "configuration"]
    dtype: Float
    n_dim: Width
    e_dim: Width
    a_dim: Width
    geometry: Geometry
    embedding: Embedding
    conditions: ConditionInputs
    layers: Annotated[list[Layer], Field(min_length=1)]
    readout: Readout


class StoredTensor(_Strict):
    """An entry of `tensors.json`: where the numbers of a tensor are, row-major, little-endian.

    Attributes:
        record: name in the archive, without its top folder.
        dtype: of the numbers.
        shape: sizes of the dimensions.
        offset: bytes from the start of the record.
    """

    record: Annotated[str, Field(pattern=r"^data/[0-9]{1,18}$")]
    dtype: Literal["float32", "float64", "int64", "bool"]
    shape: Annotated[list[Size], Field(max_length=8)]
    offset: Size

    @property
    def size_bytes(self) -> int:
        """Bytes of all numbers."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


# --- from a model ------------------------------------------------------------------------------------------


def describe(model: nn.Module) -> Architecture:
    """Architecture of a model.

    Args:
        model: a `MoEPotential`, lowered or with finished type tables, eager or scripted. Those of older
            packages lack attributes of options that they do not have.

    Raises:
        PackageError: a model of another kind.
    """
    try:
        return _describe(model)
    except (AttributeError, IndexError) as error:
        raise PackageError(
            f"expected a lowered MoEPotential to describe, got {type(model).__name__} ({error}): "
            "see moecalc.package.lower"
        ) from None


def _describe(model: Any) -> Architecture:
    layers = children(model.layers)
    embedding = model.embedding
    if not hasattr(embedding.table, "table"):
        raise AttributeError("its type embedding is no finished table")
    return Architecture(
        elements=list(model.elements),
        cutoff=float(model.cutoff),
        angle_cutoff=float(model.angle_cutoff),
        routing_level=model.routing_level,
        dtype=dtype_name(model.dtype_probe),
        n_dim=embedding.table.table.size(1),
        e_dim=embedding.edge_matrix.size(1),
        a_dim=embedding.angle_matrix.size(1),
        geometry=_geometry(model.geometry),
        embedding=Embedding(
            use_dist=embedding.use_dist,
            routed=getattr(embedding, "routed", False),
            own_router_table=getattr(embedding, "own_router_table", False),
            phi=_activation(embedding.phi),
        ),
        conditions=_conditions(getattr(model, "conditions", None)),
        layers=[_layer(layer) for layer in layers.values()],
        readout=_readout(model.readout.net),
    )


def children(module: Any) -> dict[str, Any]:
    """Submodules by name; those of a list in its order."""
    found = dict(module.named_children())
    if all(name.isdecimal() for name in found):
        return {name: found[name] for name in sorted(found, key=int)}
    return found


def dtype_name(tensor: torch.Tensor) -> Any:
    """`float32`, ..."""
    return str(tensor.dtype).removeprefix("torch.")


def _activation(phi: Any) -> Activation:
    return Activation(
        kind=phi.kind, threshold=float(phi.threshold), slope=float(phi.slope), offset=float(phi.offset)
    )


def _geometry(geometry: Any) -> Geometry:
    return Geometry(
        e_start=float(geometry.e_start),
        e_stop=float(geometry.e_stop),
        a_start=float(geometry.a_start),
        a_stop=float(geometry.a_stop),
        exp_switch=geometry.exp_switch,
        use_dist=geometry.use_dist,
        protection=float(geometry.protection),
    )


def _conditions(inputs: Any) -> ConditionInputs:
    taken = inputs is not None and inputs.takes_charge_spin
    return ConditionInputs(
        takes_charge_spin=taken,
        routed=inputs is not None and inputs.routed,
        n_fparam=0 if inputs is None else inputs.n_fparam,
        n_case=0 if inputs is None else inputs.n_case,
        charge_offset=inputs.embedding.charge_offset if taken else -CHARGE_RANGE[0],
        phi=_activation(inputs.embedding.phi) if taken else None,
    )


def _router(router: Any) -> TableRouter | GateRouter:
    if hasattr(router, "ids"):
        return TableRouter(kind="table")
    return GateRouter(
        kind="gate",
        n_routed=router.n_routed,
        n_shared=router.n_shared,
        top_k=router.top_k,
        softmax_first=router.softmax_first,
    )


def _layer(layer: Any) -> Layer:
    positions = {name: getattr(layer, name) for name in POSITIONS if hasattr(layer, name)}
    return Layer(
        n_head=layer.n_head,
        axis=layer.axis,
        edge_norm=float(layer.edge_norm),
        angle_norm=float(layer.angle_norm),
        average=layer.average,
        with_residual=layer.with_residual,
        sequential=layer.sequential,
        live_edge=layer.live_edge,
        live_angle=layer.live_angle,
        with_angles=layer.with_angles,
        keep_far_edges=layer.keep_far_edges,
        compress=layer.compress,
        compress_split=layer.compress_split,
        vc_dim=layer.vc_dim,
        ec_dim=layer.ec_dim,
        phi=_activation(layer.node_self_mlp.phi),
        routers={name: _router(router) for name, router in sorted(layer.routers.named_children())},
        positions={
            name: Position(
                router=position.router,
                routed=position.routed,
                merge=position.merge,
                experts=position.matrix.size(0),
            )
            for name, position in positions.items()
        },
    )


def _readout(net: Any) -> Readout:
    return Readout(
        concat_table=net.concat_table,
        with_case=net.with_case,
        n_constant=getattr(net, "n_constant", 0),
        dtype=dtype_name(net.out_bias),
        layers=[
            FittingLayer(has_idt=layer.has_idt, residual=layer.residual, phi=_activation(layer.phi))
            for layer in children(net.layers).values()
        ],
    )


# --- from an archive ---------------------------------------------------------------------------------------


class _Module:
    """Stands for any module of an archive: what it holds, by name."""

    attributes: Mapping[str, Any] = MappingProxyType({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.attributes = state


@dataclass(frozen=True)
class _View:
    """A tensor of an archive; offset and stride count numbers."""

    record: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(
    storage: tuple[str, str], offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _View:
    record, dtype = storage
    return _View(record, dtype, offset, tuple(shape), tuple(stride))


class _Unpickler(pickle.Unpickler):
    """Reads data.pkl of an archive: placeholders for modules and tensors, nothing that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "__torch__":
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":  # lists and dictionaries with the type of their items
            return lambda value, *_: value
        raise pickle.UnpicklingError(f"`{module} {name}`, which no package has")

    def persistent_load(self, pid: Any) -> tuple[str, str]:
        kind, dtype, key, _, _ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"a persistent object of kind {kind!r}")
        return f"data/{key}", dtype


def index_tensors(data: bytes, sizes: Mapping[str, int]) -> dict[str, StoredTensor]:
    """Where the tensors of a TorchScript archive are, by their names in the model's state dict, sorted.

    Args:
        data: the record `data.pkl`.
        sizes: bytes of every record, without the top folder.

    Raises:
        PackageError: a tensor that is not row-major, of another type, or beyond its record.
    """
    try:
        root = _Unpickler(io.BytesIO(data)).load()
        if not isinstance(root, _Module):
            raise TypeError(f"a {type(root).__name__}")
    except (
        pickle.UnpicklingError, ValueError, TypeError, AttributeError, EOFError, IndexError, KeyError
    ) as error:  # fmt: skip
        raise PackageError(f"expected data.pkl of a scripted model, got {error}: package again") from None
    return dict(sorted(_stored(root, "", sizes)))


def _stored(module: _Module, prefix: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, StoredTensor]]:
    for name, value in module.attributes.items():
        if isinstance(value, _Module):
            yield from _stored(value, f"{prefix}{name}.", sizes)
        elif isinstance(value, _View):
            yield f"{prefix}{name}", _checked(f"{prefix}{name}", value, sizes)


def _checked(name: str, view: _View, sizes: Mapping[str, int]) -> StoredTensor:
    if not _is_row_major(view):
        raise PackageError(
            f"expected tensor {name} in row-major order, got strides {view.stride} for shape {view.shape}: "
            "make it contiguous"
        )
    stored = StoredTensor(
        record=view.record,
        dtype=view.dtype,  # type: ignore[arg-type]
        shape=list(view.shape),
        offset=view.offset * ITEM_SIZE[view.dtype],
    )
    if stored.offset + stored.size_bytes > sizes.get(view.record, -1):
        raise PackageError(f"expected tensor {name} within {view.record}, got one beyond it: package again")
    return stored


def _is_row_major(view: _View) -> bool:
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if size != 1 and stride != expected and 0 not in view.shape:
            return False
        expected *= size
    return True
