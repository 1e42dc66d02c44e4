"""The one place that writes a package of a lowered model: for packaging, and for tests."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from moecalc._jit import jit_script
from moecalc.conditions import ModelConditions
from moecalc.nn import ModelConfig, MoEPotential
from moecalc.package import records
from moecalc.package.architecture import dtype_name
from moecalc.package.archive import write_archive
from moecalc.package.lower import count_parameters
from moecalc.package.metadata import (
    FORMAT_VERSION,
    Metadata,
    Parameters,
    ReferenceFrame,
    Routing,
    Source,
    VerificationReport,
)


@dataclass(frozen=True)
class Labels:
    """What people want to know of a package, beside its model.

    Attributes:
        name: of the package.
        source: the checkpoint.
        trained_elements: symbols that occurred in training; None: all of the model's.
        note, license, citation: free text.
        remarks: of packaging.
    """

    name: str
    source: Source
    trained_elements: Sequence[str] | None = None
    note: str = ""
    license: str = ""
    citation: str = ""
    remarks: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Lowered:
    """A model as `moecalc.package.lower.lower` makes it, in the precision of the package.

    Attributes:
        model: the model.
        routing: what `lower` says of its experts.
        config: architecture of the full model.
        conditions: what is taken and what was folded (`moecalc.conditions.fix`).
    """

    model: MoEPotential
    routing: Routing
    config: ModelConfig
    conditions: ModelConditions | None = None

    @cached_property
    def scripted(self) -> torch.jit.ScriptModule:
        """The model in TorchScript."""
        return jit_script(self.model)


def write_package(
    path: str | Path,
    lowered: Lowered,
    labels: Labels,
    frames: Sequence[ReferenceFrame],
    verification: VerificationReport | None = None,
) -> Metadata:
    """Write a package, whatever its verification says.

    Args:
        path: file to write (not atomically: write beside the target and rename).
        lowered: the model.
        labels: texts of the metadata.
        frames: reference frames, at least one, or engines refuse the package.
        verification: stored with it; None: no checks.

    Returns:
        The metadata.
    """
    metadata = _metadata(lowered, labels)
    texts = {
        records.FORMAT: str(metadata.format_version),
        records.METADATA: metadata.model_dump_json(indent=1),
        records.REFERENCE: json.dumps([frame.model_dump() for frame in frames]),
        records.VERIFICATION: (verification or VerificationReport(checks=[])).model_dump_json(indent=1),
    }
    write_archive(Path(path), lowered.scripted, texts)
    return metadata


def write_bare(path: str | Path, model: MoEPotential, name: str = "") -> None:
    """Write a lowered model with no more than the kernels read: neither facts nor reference frames.

    Args:
        path: file to write.
        model: as `moecalc.package.lower.lower` makes it.
        name: of the model; engines that show it need one.
    """
    metadata = json.dumps({"name": name} if name else {})
    write_archive(Path(path), jit_script(model), {records.METADATA: metadata})


def _metadata(lowered: Lowered, labels: Labels) -> Metadata:
    from moecalc import __version__

    low, d = lowered.model, lowered.config.descriptor
    total, active = count_parameters(low)
    trained = set(low.elements if labels.trained_elements is None else labels.trained_elements)
    return Metadata(
        format_version=FORMAT_VERSION,
        name=labels.name,
        elements=low.elements,
        trained_elements=[e for e in low.elements if e in trained],
        cutoff=low.cutoff,
        angle_cutoff=low.angle_cutoff,
        n_layers=d.nlayers,
        dims={"node": d.n_dim, "edge": d.e_dim, "angle": d.a_dim},
        dtype=dtype_name(low.dtype_probe),
        neighbor_limits={"edge": d.e_sel, "angle": d.a_sel},
        routing=lowered.routing,
        conditions=lowered.conditions,
        parameters=Parameters(checkpoint=labels.source.parameters, total=total, active=active),
        source=labels.source,
        versions={"moecalc": __version__, "torch": torch.__version__},
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        note=labels.note,
        license=labels.license,
        citation=labels.citation,
        remarks=list(labels.remarks),
    )
