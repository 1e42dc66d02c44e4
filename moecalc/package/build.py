"""Packaging: checkpoint -> import -> prune -> merge -> TorchScript -> metadata, reference frames -> verification."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from ase import Atoms

from moecalc._clean import clean_torch
from moecalc.conditions import Conditions, fix
from moecalc.errors import PackageError, printable
from moecalc.files import check_outputs, display_text, move_into_place, temporary_folder
from moecalc.nn import MoEPotential
from moecalc.package.archive import check_archive, read_metadata
from moecalc.package.importers import ImportedModel, build_model, load_checkpoint, set_precision
from moecalc.package.importers.registry import resolve_checkpoint
from moecalc.package.lower import lower
from moecalc.package.metadata import (
    Check,
    PackageReport,
    ReferenceFrame,
    Routing,
    Source,
    has_control,
    worst,
)
from moecalc.package.reference import (
    reference_cases,
    reference_conditions,
    reference_frame,
    reference_structures,
)
from moecalc.package.verify import TOLERANCE, compare_frames, frame_deviation, verify_package
from moecalc.package.write import Labels, Lowered, write_package

CITATION = (
    "Yuzhi Liu et al., npj Artif. Intell. (2026), arXiv:2603.07977 (element-wise MoE); "
    "Duo Zhang et al., arXiv:2506.01686 (DPA3)"
)


@clean_torch()
def package_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    head: str | None = None,
    elements: Sequence[str] | None = None,
    dtype: str | None = None,
    charge: int | None = None,
    spin: int | None = None,
    fparam: Sequence[float] | None = None,
    name: str | None = None,
    note: str = "",
    license: str = "",  # noqa: A002 - the field is called so
    citation: str = CITATION,
    progress: Callable[[str], None] | None = None,
) -> PackageReport:
    """Turn a trained checkpoint into a package that ASE and LAMMPS run.

    Nothing is written unless every check of the verification passes.

    Args:
        checkpoint: `.pt` file of any supported layout (detected from the file), frozen model (`.pth`), or a name of DeePMD-kit's
            registry of pretrained models.
        out: package to write, `*.moe.pt`.
        head: head of a multi-task checkpoint; None takes the one with the alias `Default`.
        elements: symbols to keep; None = all of the checkpoint.
        dtype: "float32" or "float64"; None = the checkpoint's.
        charge, spin: charge (e) and multiplicity 2S+1 to fold into the package, for models that take them; with one of them, the
            other is the checkpoint's default. None for both: they stay open and are given at run time.
        fparam: frame parameters to fold, likewise.
        name: name of the package; default: the file name.
        note, license, citation: free text kept in the metadata.
        progress: called with the name of each step.

    Returns:
        Sizes, metadata and the verification.

    Raises:
        CheckpointError: the checkpoint cannot be imported.
        ElementError: an element that the model does not have.
        ConditionError: charge, spin or frame parameters that the model does not take or cannot have.
        PackageError: wrong file name or dtype, or a failed verification (names the checks).
    """
    say = progress or (lambda _: None)
    out = Path(out)
    if not out.name.endswith(".moe.pt"):
        raise PackageError(f"{out}: expected a file name that ends in .moe.pt")
    if dtype not in (None, "float32", "float64"):
        raise PackageError(f"dtype {dtype!r}, expected float32 or float64")
    for field, text in (("name", name or ""), ("note", note), ("license", license), ("citation", citation)):
        if has_control(text) or (field == "name" and "\n" in text):
            raise PackageError(
                f"{field} '{printable(text, 60)}', expected text without control characters: they would reach terminals and logs"
            )
    if not out.parent.is_dir():
        raise PackageError(f"{out.parent}: no such folder, expected an existing one for the package")
    checkpoint, registered = resolve_checkpoint(checkpoint, say)
    check_outputs([("the package", out)], [("checkpoint", checkpoint)])
    say("reading the checkpoint")
    imported = load_checkpoint(checkpoint, head)
    if registered:
        imported.remarks.append(f"checkpoint {registered} of DeePMD-kit's registry")
    for remark in imported.remarks:
        say(remark)
    taken = imported.config.conditions()
    fixed, left = fix(taken, charge, spin, fparam)
    full = build_model(imported, torch.float64)
    dtype = dtype or imported.config.descriptor.precision
    say("pruning and merging")
    exact, routing = lower(full, imported.config, list(elements) if elements is not None else None, fixed)
    low = copy.deepcopy(exact)
    set_precision(low, dtype, dtype)
    # what the file must give in exact arithmetic: its own rounded weights in float64
    rounded = copy.deepcopy(low)
    set_precision(rounded, "float64", "float64")
    say("computing reference frames")
    structures = reference_structures(low.elements, (low.cutoff, low.angle_cutoff))
    cases = reference_cases(structures, reference_conditions(exact, left))
    frames = [reference_frame(rounded, *case) for case in cases]
    say("compiling to TorchScript")
    lowered = Lowered(low, routing, imported.config, left)
    labels = Labels(
        name=display_text(name or out.name.removesuffix(".moe.pt")),
        source=_source(imported, checkpoint),
        trained_elements=imported.trained_elements,
        note=display_text(note),
        license=display_text(license),
        citation=display_text(citation),
        remarks=_remarks(imported, routing, fixed),
    )
    with temporary_folder(out) as folder:
        draft = folder / out.name
        write_package(draft, lowered, labels, frames)
        report = verify_package(draft, say)
        say("pruned against full model")
        report.checks[:0] = _compare_with_full(full, exact, frames, cases, fixed, dtype)
        if not report.passed:
            failed = "; ".join(f"{c.name}: {c.value:.1e} > {c.tolerance:.1e}" for c in report.failures())
            raise PackageError(
                f"{out} was not written: verification failed ({failed}); "
                "please report it with the checkpoint's model_params"
            )
        write_package(draft, lowered, labels, frames, report)
        check_archive(draft)
        move_into_place(draft, out)  # a reader never sees half of it
    return PackageReport(
        path=display_text(out), metadata=read_metadata(out), verification=report, size_bytes=out.stat().st_size,
        pruned={
            "elements": [e for e in imported.config.type_map if e not in low.elements],
            "experts_before": _count_experts(full),
            "experts_after": _count_experts(low),
        },
    )  # fmt: skip


def _compare_with_full(
    full: MoEPotential,
    exact: MoEPotential,
    frames: list[ReferenceFrame],
    cases: list[tuple[str, Atoms, Conditions]],
    fixed: Conditions,
    dtype: str,
) -> list[Check]:
    """Pruned against full model in float64, and what rounding to the package's dtype changed."""
    wanted = []
    for label, atoms, given in cases:
        frame = reference_frame(full, label, atoms, given.filled_from(fixed))
        # the full model is given what is folded in the pruned one
        pair = {"charge": given.charge, "spin": given.spin}
        frame = frame.model_copy(update=pair | {"fparam": given.fparam and list(given.fparam)})
        wanted.append(frame)
    pruned = compare_frames(exact, wanted)
    checks = [
        Check(
            name="pruned vs full model (float64)",
            value=pruned,
            tolerance=TOLERANCE["float64"],
            unit="relative",
            detail=f"{len(frames)} frames, all experts"
            + (f", {fixed} folded" if str(fixed) != "none" else ""),
        )
    ]
    if dtype == "float32":
        rounding = worst(*(frame_deviation(got, want) for got, want in zip(frames, wanted, strict=True)))
        checks.append(
            Check(
                name="rounding of the weights to float32",
                value=rounding,
                tolerance=TOLERANCE["float32"],
                unit="relative",
            )
        )
    return checks


def _count_experts(model: MoEPotential) -> int:
    return sum(
        p.size(0) for n, p in model.named_parameters() if n.startswith("layers.") and n.endswith(".matrix")
    )


def _source(imported: ImportedModel, checkpoint: Path) -> Source:
    return Source(
        file=display_text(checkpoint.name),
        sha256=hashlib.sha256(checkpoint.read_bytes()).hexdigest(),
        layout=imported.layout,
        head=imported.head,
        size_bytes=checkpoint.stat().st_size,
        parameters=imported.n_parameters,
    )


def _remarks(imported: ImportedModel, routing: Routing, fixed: Conditions) -> list[str]:
    remarks = list(imported.remarks)
    if routing.level == "configuration" and any(
        p.kind == "mlp" for layer in routing.layers for p in layer.values()
    ):
        remarks.append(
            "nonlinear experts with configuration-level routing: the paper found these numerically unstable"
        )
    return remarks + [
        f"{name} {getattr(fixed, name)} is the checkpoint's default, fixed with the others"
        for name in sorted(fixed.defaulted)
    ]
