"""Packaging: checkpoint -> import -> prune, merge -> reference frames -> TorchScript -> verification."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ase import Atoms

from moecalc._clean import clean_torch
from moecalc.conditions import Conditions, ModelConditions, fix
from moecalc.errors import PackageError, printable
from moecalc.files import check_outputs, display_text, move_into_place, temporary_folder
from moecalc.keys import DTYPES
from moecalc.nn import MoEPotential
from moecalc.package.architecture import dtype_name
from moecalc.package.archive import check_archive, read_metadata
from moecalc.package.importers import ImportedModel, build_model, load_checkpoint
from moecalc.package.importers.registry import resolve_checkpoint
from moecalc.package.lower import lower
from moecalc.package.metadata import (
    Check,
    PackageReport,
    ReferenceFrame,
    Source,
    VerificationReport,
    has_control,
    worst,
)
from moecalc.package.reference import (
    in_precision,
    reference_cases,
    reference_conditions,
    reference_frame,
    reference_frames,
    reference_structures,
)
from moecalc.package.verify import compare_frames, frame_deviation, verify_package
from moecalc.package.write import Labels, Lowered, write_package
from moecalc.tolerances import VERIFICATION

Progress = Callable[[str], None]

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
    progress: Progress | None = None,
) -> PackageReport:
    """Turn a trained checkpoint into a package that ASE and LAMMPS run.

    Nothing is written unless every check of the verification passes.

    Args:
        checkpoint: `.pt` file of any supported layout (detected from the file), frozen model (`.pth`), or a
            name of DeePMD-kit's registry of pretrained models.
        out: package to write, `*.moe.pt`.
        head: head of a multi-task checkpoint; None takes the one with the alias `Default`.
        elements: symbols to keep; None = all of the checkpoint.
        dtype: "float32" or "float64"; None = the checkpoint's.
        charge: in units of e, to fold into the package, for models that take it; with one of charge and spin,
            the other is the checkpoint's default. None for both: they stay open, to be given at run time.
        spin: multiplicity 2S+1 to fold, likewise.
        fparam: frame parameters to fold, likewise.
        name: name of the package; default: the file name.
        note: free text kept in the metadata, as `license` and `citation`.
        license: under which the model may be used.
        citation: what users of the model are asked to cite.
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
    texts = {"name": name or "", "note": note, "license": license, "citation": citation}
    _check_request(out, dtype, texts)
    checkpoint, registered = resolve_checkpoint(checkpoint, say)
    check_outputs([("the package", out)], [("checkpoint", checkpoint)])
    imported = _imported(checkpoint, registered, head, say)
    fixed, taken = fix(imported.config.conditions(), charge, spin, fparam)
    pruned = _prune(imported, elements, dtype, fixed, taken, say)
    texts["name"] = name or out.name.removesuffix(".moe.pt")
    labels = Labels(
        source=_source(imported, checkpoint),
        trained_elements=imported.trained_elements,
        remarks=_remarks(imported, pruned),
        **{field: display_text(text) for field, text in texts.items()},
    )
    verification = _write_verified(out, pruned, labels, say)
    return PackageReport(
        path=display_text(out),
        metadata=read_metadata(out),
        verification=verification,
        size_bytes=out.stat().st_size,
        pruned=_dropped(imported, pruned),
    )


def _check_request(out: Path, dtype: str | None, texts: Mapping[str, str]) -> None:
    """Refuse what no checkpoint could make right, before one is read."""
    if not out.name.endswith(".moe.pt"):
        raise PackageError(f"{out}: expected a file name that ends in .moe.pt")
    if dtype not in (None, *DTYPES):
        raise PackageError(f"dtype {dtype!r}, expected float32 or float64")
    for field, text in texts.items():
        if has_control(text) or (field == "name" and "\n" in text):
            raise PackageError(
                f"{field} '{printable(text, 60)}', expected text without control characters: "
                "they would reach terminals and logs"
            )
    if not out.parent.is_dir():
        raise PackageError(f"{out.parent}: no such folder, expected an existing one for the package")


def _imported(checkpoint: Path, registered: str | None, head: str | None, say: Progress) -> ImportedModel:
    """The checkpoint, with what there is to say of it."""
    say("reading the checkpoint")
    imported = load_checkpoint(checkpoint, head)
    if registered:
        imported.remarks.append(f"checkpoint {registered} of DeePMD-kit's registry")
    for remark in imported.remarks:
        say(remark)
    return imported


@dataclass(frozen=True)
class _Pruned:
    """A model before and after pruning, and structures to compare them on.

    Attributes:
        full: with all elements and experts, float64.
        exact: pruned, float64.
        lowered: pruned, rounded to the precision of the package.
        fixed: conditions that were folded.
        cases: structures, with conditions that stay open.
        frames: what the package must give for them.
    """

    full: MoEPotential
    exact: MoEPotential
    lowered: Lowered
    fixed: Conditions
    cases: list[tuple[str, Atoms, Conditions]]
    frames: list[ReferenceFrame]


def _prune(
    imported: ImportedModel,
    elements: Sequence[str] | None,
    dtype: str | None,
    fixed: Conditions,
    taken: ModelConditions | None,
    say: Progress,
) -> _Pruned:
    full = build_model(imported, torch.float64)
    say("pruning and merging")
    exact, routing = lower(full, imported.config, None if elements is None else list(elements), fixed)
    low = in_precision(exact, dtype or imported.config.descriptor.precision)
    say("computing reference frames")
    structures = reference_structures(low.elements, (low.cutoff, low.angle_cutoff))
    cases = reference_cases(structures, reference_conditions(exact, taken))
    frames = reference_frames(low, cases)
    return _Pruned(full, exact, Lowered(low, routing, imported.config, taken), fixed, cases, frames)


def _write_verified(out: Path, pruned: _Pruned, labels: Labels, say: Progress) -> VerificationReport:
    """Write a draft, verify it, and let it take its place if it passed."""
    say("compiling to TorchScript")
    with temporary_folder(out) as folder:
        draft = folder / out.name
        write_package(draft, pruned.lowered, labels, pruned.frames)
        verification = verify_package(draft, say)
        say("pruned against full model")
        verification.checks[:0] = _compare_with_full(pruned)
        if not verification.passed:
            found = (f"{c.name}: {c.value:.1e} > {c.tolerance:.1e}" for c in verification.failures())
            raise PackageError(
                f"{out} was not written: verification failed ({'; '.join(found)}); "
                "please report it with the checkpoint's model_params"
            )
        write_package(draft, pruned.lowered, labels, pruned.frames, verification)
        check_archive(draft)
        move_into_place(draft, out)  # a reader never sees half of it
    return verification


def _compare_with_full(pruned: _Pruned) -> list[Check]:
    """Pruned against full model in float64, and what rounding to the package's dtype changed."""
    wanted = [_frame_of_full(pruned, *case) for case in pruned.cases]
    folded = f", {pruned.fixed} folded" if str(pruned.fixed) != "none" else ""
    checks = [
        Check(
            name="pruned vs full model (float64)",
            value=compare_frames(pruned.exact, wanted),
            tolerance=VERIFICATION["float64"],
            detail=f"{len(wanted)} frames, all experts{folded}",
        )
    ]
    if dtype_name(pruned.lowered.model.dtype_probe) == "float32":
        deviations = (frame_deviation(got, want) for got, want in zip(pruned.frames, wanted, strict=True))
        checks.append(
            Check(
                name="rounding of the weights to float32",
                value=worst(*deviations),
                tolerance=VERIFICATION["float32"],
            )
        )
    return checks


def _frame_of_full(pruned: _Pruned, label: str, atoms: Atoms, given: Conditions) -> ReferenceFrame:
    """The full model's answer, under the conditions that the pruned one is given for the same."""
    frame = reference_frame(pruned.full, label, atoms, given.filled_from(pruned.fixed))
    fparam = None if given.fparam is None else list(given.fparam)
    return frame.model_copy(update={"charge": given.charge, "spin": given.spin, "fparam": fparam})


def _dropped(imported: ImportedModel, pruned: _Pruned) -> dict[str, Any]:
    """What pruning left out."""
    low = pruned.lowered.model
    return {
        "elements": [e for e in imported.config.type_map if e not in low.elements],
        "experts_before": _count_experts(pruned.full),
        "experts_after": _count_experts(low),
    }


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


def _remarks(imported: ImportedModel, pruned: _Pruned) -> list[str]:
    remarks = list(imported.remarks)
    routing, fixed = pruned.lowered.routing, pruned.fixed
    positions = [position for layer in routing.layers for position in layer.values()]
    if routing.level == "configuration" and any(position.kind == "mlp" for position in positions):
        remarks.append(
            "nonlinear experts with configuration-level routing: the paper found these numerically unstable"
        )
    return remarks + [
        f"{name} {getattr(fixed, name)} is the checkpoint's default, fixed with the others"
        for name in sorted(fixed.defaulted)
    ]
