"""The package file: a TorchScript archive with extra records and an integrity stamp.

The zip comment is `moecalc crc32=XXXXXXXX size=N`: checksum and length of everything before the end record, so that
a truncated, a damaged and a foreign file are told apart before torch is asked to load them. The C++ runtime checks
the same stamp (cpp/runtime/archive.cpp).
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from moecalc.errors import PackageError
from moecalc.package.metadata import FORMAT_VERSION, Metadata, ReferenceFrame, VerificationReport

if TYPE_CHECKING:
    import torch

_END = b"PK\x05\x06"
_STAMP = re.compile(rb"^moecalc crc32=([0-9a-f]{8}) size=(\d+)$")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_archive(path: Path, module: torch.jit.ScriptModule, records: Mapping[str, str]) -> None:
    """Write a package; the same input gives the same bytes.

    Args:
        path: file to write (not atomically: write beside the target and rename).
        module: the scripted model.
        records: extra records by name (`metadata.json`, ...).
    """
    from moecalc._jit import jit_save

    raw = path.with_suffix(".raw")
    try:
        jit_save(module, raw, records)
        with zipfile.ZipFile(raw) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
            for name in sorted(source.namelist()):
                # source paths of the machine that packaged, and a random id: nothing that a run needs
                if name.endswith((".debug_pkl", "/serialization_id")):
                    continue
                # torch names the top folder after the file; give it one name
                inner = "model/" + name.split("/", 1)[1]
                target.writestr(zipfile.ZipInfo(inner, date_time=_EPOCH), source.read(name))
    finally:
        raw.unlink(missing_ok=True)
    body = path.read_bytes()
    end = body.rindex(_END)
    stamp = f"moecalc crc32={zlib.crc32(body[:end]):08x} size={end}".encode()
    with path.open("r+b") as f:
        f.seek(end + 20)
        f.write(struct.pack("<H", len(stamp)) + stamp)
        f.truncate()


def check_archive(path: str | Path) -> None:
    """Check that a file is a whole, undamaged package of a format that this version reads.

    Raises:
        PackageError: missing, truncated, damaged, foreign or newer file; the message names it and the remedy.
    """
    path = Path(path)
    if not path.is_file():
        raise PackageError(f"{path}: no such file")
    body = path.read_bytes()
    foreign = PackageError(
        f"{path}: not a moecalc package; make one with `moecalc package CHECKPOINT -o {path}`"
    )
    again = "copy it again or package the checkpoint again"
    if not body.startswith(b"PK\x03\x04"):
        raise foreign
    end = body.rfind(_END)
    if end < 0 or len(body) < end + 22:
        raise PackageError(f"{path}: incomplete file (truncated copy?): {again}")
    stamp = _STAMP.match(body[end + 22 :])
    if stamp is None:
        if b"moecalc crc32=" in body[end:]:
            raise PackageError(f"{path}: damaged file (unreadable integrity stamp): {again}")
        raise foreign
    size, crc = int(stamp[2]), int(stamp[1], 16)
    if size != end:
        raise PackageError(f"{path}: incomplete file ({end} bytes of {size}, truncated copy?): {again}")
    found = zlib.crc32(body[:end])
    if found != crc:
        raise PackageError(f"{path}: damaged file (checksum {found:08x}, expected {crc:08x}): {again}")
    version = read_record(path, "format_version").strip()
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        from moecalc import __version__

        raise PackageError(
            f"{path}: package format {version} is newer than this moecalc ({__version__}) reads ({FORMAT_VERSION}): upgrade moecalc"
        )


def read_record(path: str | Path, name: str) -> str:
    """Text of an extra record; does not check integrity.

    Raises:
        PackageError: no such record.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(f"model/extra/{name}").decode()
    except (KeyError, zipfile.BadZipFile, OSError) as error:
        raise PackageError(
            f"{path}: no record {name!r} in this package ({error}): package the checkpoint again"
        ) from None


def _read_json(path: str | Path, name: str) -> object:
    try:
        return json.loads(read_record(path, name))
    except json.JSONDecodeError as error:
        raise PackageError(
            f"{path}: record {name!r} is not JSON ({error}): package the checkpoint again"
        ) from None


def read_metadata(path: str | Path) -> Metadata:
    """Checked metadata of a package.

    Raises:
        PackageError: as `check_archive`, or metadata that do not fit their schema.
    """
    check_archive(path)
    try:
        return Metadata.model_validate(_read_json(path, "metadata.json"))
    except ValidationError as error:
        raise PackageError(
            f"{path}: metadata do not fit their schema ({error.errors()[0]['loc']}): package again"
        ) from None


def read_reference(path: str | Path) -> list[ReferenceFrame]:
    """Reference frames of a package."""
    frames = _read_json(path, "reference.json")
    if not isinstance(frames, list):
        raise PackageError(
            f"{path}: reference.json holds {type(frames).__name__}, expected a list: package again"
        )
    return [ReferenceFrame.model_validate(frame) for frame in frames]


def read_verification(path: str | Path) -> VerificationReport:
    """The verification that was stored when the package was made."""
    return VerificationReport.model_validate(_read_json(path, "verification.json"))
