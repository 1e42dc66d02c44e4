"""What a package says of itself: readable without loading the model."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moecalc.conditions import Conditions, ModelConditions

FORMAT_VERSION = 2
"""Newest version of the package format; readers refuse a newer one. 2: the model takes conditions; others stay at 1."""


def format_version(conditions: ModelConditions | None) -> int:
    """Version that a package needs: what readers of version 1 can run right stays readable for them."""
    return 2 if conditions is not None and conditions.open else 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="ignore")


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

    `experts[t]` and `weights[t]` list the active experts of element t and their weights; ids below `n_routed` are
    routed, the following ones shared. Empty at configuration level, where they depend on the composition.
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

    With `on_charge_spin` the experts of an element depend on charge and spin too, so there is no table of them.
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


class Check(_Record):
    """One line of a verification: the largest deviation found, and what is allowed."""

    name: str
    value: float
    tolerance: float
    unit: str = ""
    detail: str = ""

    @property
    def passed(self) -> bool:
        """Whether the deviation is allowed (NaN is not)."""
        return self.value <= self.tolerance


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
