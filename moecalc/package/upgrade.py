"""From a package of an older format to one of this format: the same model, with records that describe it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from moecalc import _lib
from moecalc._clean import clean_torch
from moecalc._jit import jit_load
from moecalc.errors import PackageError
from moecalc.files import check_outputs, display_text, move_into_place, temporary_folder
from moecalc.package import records
from moecalc.package.archive import (
    check_archive,
    check_file,
    read_metadata,
    read_record,
    read_verification,
    write_archive,
)
from moecalc.package.lower import make_contiguous
from moecalc.package.metadata import FORMAT_VERSION, PackageReport

_KEPT = (records.METADATA, records.REFERENCE, records.VERIFICATION)


@clean_torch()
def upgrade_package(
    old: str | Path, new: str | Path, progress: Callable[[str], None] | None = None
) -> PackageReport:
    """Write a package of an older format as one of this format.

    Weights, reference frames, stored verification and metadata stay. Nothing is written unless the new file
    gives the numbers of the reference frames.

    Args:
        old: the package.
        new: package to write, `*.moe.pt`.
        progress: called with the name of each step.

    Returns:
        Size, metadata and the stored verification.

    Raises:
        PackageError: a file that is no older package, or that does not give its reference numbers.
    """
    say = progress or (lambda _: None)
    new = Path(new)
    if not new.name.endswith(".moe.pt"):
        raise PackageError(f"{new}: expected a file name that ends in .moe.pt")
    if not new.parent.is_dir():
        raise PackageError(f"{new.parent}: no such folder, expected an existing one for the package")
    check_outputs([("the package", new)], [("package", old)])
    say("reading the package")
    version, names = check_file(old)
    if records.archived(records.ARCHITECTURE) in names:
        raise PackageError(
            f"{old}: expected a package of an older format, got format {version}: use it as it is"
        )
    module = jit_load(old)
    make_contiguous(module)
    texts = {name: read_record(old, name) for name in _KEPT if records.archived(name) in names}
    metadata = json.loads(texts[records.METADATA]) | {"format_version": FORMAT_VERSION}
    texts[records.METADATA] = json.dumps(metadata, indent=1, ensure_ascii=False)
    with temporary_folder(new) as folder:
        draft = folder / new.name
        say("writing the package")
        write_archive(draft, module, texts)
        check_archive(draft)
        say("reference frames")
        _check_reference(draft, new)
        move_into_place(draft, new)  # a reader never sees half of it
    return PackageReport(
        path=display_text(new),
        metadata=read_metadata(new),
        verification=read_verification(new),
        size_bytes=new.stat().st_size,
    )


def _check_reference(draft: Path, new: Path) -> None:
    native = _lib.load()
    try:
        for dtype in ("float64", "float32"):
            native.Evaluator(os.fsencode(draft), "cpu", dtype).check_reference()
    except native.Error as error:
        reason = str(error).replace(str(draft), "the draft")
        raise PackageError(f"{new} was not written: {reason}") from None
