"""What a package says of itself: readable without loading the model."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from moecalc.conditions import Conditions, ModelConditions

FORMAT_VERSION = 2
"""Of the packages that are written, and the newest that is read.

2: with the records `architecture.json` and `tensors.json`.
"""


# besides tabs and ends of lines; a terminal or a log would act on them
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def worst(*deviations: float) -> float:
    """The largest of some deviations, at least 0; NaN if one of them is NaN, which `max` would pass over."""
    return math.nan if any(math.isnan(d) for d in deviations) else max((0.0, *deviations))


def has_control(text: str) -> bool:
    """Whether a text has control characters besides tabs and ends of lines."""
    return _CONTROL.search(text) is not None


def _check_texts(value: object) -> None:
    if isinstance(value, str) and has_control(value):
        raise ValueError(f"expected text without control characters, got {value[:40]!r}")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_texts(key)
            _check_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_texts(item)


class _Record(BaseModel):
    """Numbers are finite, and texts have no control characters."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain_texts(cls, value: object) -> object:
        _check_texts(value)
        return value


class Source(_Record):
    """The checkpoint that a package was made from."""

    file: str
    sha256: str
    layout: str
    head: str | None = None
    size_bytes: int
    parameters: int


class PositionRouting(_Record):
    """Routing of one mixture of experts.

    `experts[t]` and `weights[t]` list the active experts of element t and their weights. Ids below `n_routed`
    are routed, the others shared. Empty at configuration level, where they depend on the composition.
    """

    kind: Literal["mlp", "linear"]
    gate: str
    n_routed: int
    n_shared: int
    top_k: int
    experts: list[list[int]] = Field(default_factory=list)
    weights: list[list[float]] = Field(default_factory=list)


class Routing(_Record):
    """Routing level and one dictionary position -> routing per layer (empty for dense models).

    With `on_charge_spin` the experts of an element depend on charge and spin too: there is no table of them.
    """

    level: Literal["element", "configuration"] = "element"
    on_charge_spin: bool = False
    layers: list[dict[str, PositionRouting]] = Field(default_factory=list)

    @property
    def is_moe(self) -> bool:
        """Whether any position is a mixture of experts."""
        return any(self.layers)

    @property
    def is_table(self) -> bool:
        """Whether the experts of an element are known without a structure."""
        return self.level == "element" and not self.on_charge_spin


class Parameters(_Record):
    """Network parameters: in the checkpoint, in the package, and touched for an atom (mean over elements)."""

    checkpoint: int
    total: int
    active: int


class Metadata(_Record):
    """`metadata.json` of a package. Lengths in Angstrom, energies in eV."""

    format_version: int
    name: str
    elements: list[str]
    trained_elements: list[str]
    cutoff: float
    angle_cutoff: float
    n_layers: int
    dims: dict[str, int]
    dtype: Literal["float32", "float64"]
    units: dict[str, str] = Field(default_factory=lambda: {"energy": "eV", "length": "Angstrom"})
    neighbor_limits: dict[str, int]
    routing: Routing
    conditions: ModelConditions | None = None
    parameters: Parameters
    source: Source
    versions: dict[str, str]
    created: str
    note: str = ""
    license: str = ""
    citation: str = ""
    remarks: list[str] = Field(default_factory=list)
    digest: str = ""
    """Of the records of the model (`digest_of`); written with them."""


class ReferenceFrame(_Record):
    """A small structure with the reference model's answer (float64, weights rounded to the package's dtype).

    Charge, multiplicity and frame parameters are None where the package takes none.
    """

    label: str
    charge: int | None = None
    spin: int | None = None
    fparam: list[float] | None = None
    symbols: list[str]
    positions: list[list[float]]
    cell: list[list[float]]
    pbc: list[bool]
    energy: float
    energies: list[float]
    forces: list[list[float]]
    virial: list[list[float]]

    @property
    def conditions(self) -> Conditions:
        """What the model was given beside the structure."""
        return Conditions(self.charge, self.spin, None if self.fparam is None else tuple(self.fparam))

    @model_validator(mode="after")
    def _whole(self) -> ReferenceFrame:
        n = len(self.symbols)
        if n == 0:
            raise ValueError("expected at least one atom, got none")
        for name, rows in (("positions", n), ("forces", n), ("cell", 3), ("virial", 3)):
            value: list[list[float]] = getattr(self, name)
            if len(value) != rows or any(len(row) != 3 for row in value):
                raise ValueError(f"expected {name} of shape ({rows}, 3), got {len(value)} rows")
        if len(self.energies) != n or len(self.pbc) != 3:
            raise ValueError(f"expected {n} energies and 3 pbc, got {len(self.energies)} and {len(self.pbc)}")
        return self


class Check(_Record):
    """One line of a verification: the largest deviation found, and what is allowed."""

    # what was found may be NaN: it does not pass, and the report says so
    model_config = ConfigDict(extra="ignore", allow_inf_nan=True, ser_json_inf_nan="strings")

    name: str
    value: float
    tolerance: float
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the deviation is allowed (NaN is not)."""
        return math.isfinite(self.value) and math.isfinite(self.tolerance) and self.value <= self.tolerance


class VerificationReport(_Record):
    """Result of `moecalc verify`, stored as `verification.json` when the package is made."""

    checks: list[Check]
    torch: str = ""
    moecalc: str = ""
    created: str = ""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def failures(self) -> list[Check]:
        """Checks that did not pass."""
        return [check for check in self.checks if not check.passed]


class PackageReport(_Record):
    """What packaging did: printed by the command line, returned by `package_checkpoint`."""

    path: str
    metadata: Metadata
    verification: VerificationReport
    size_bytes: int
    pruned: dict[str, Any] = Field(default_factory=dict)
