"""The package file: a TorchScript archive with extra records and an integrity stamp, read without torch.

The zip comment is `moecalc crc32=XXXXXXXX size=N`: checksum and length of everything before the end record.
It tells truncated, damaged and foreign files apart before torch is asked to load them. The core checks the
same stamp (cpp/package/package_file.cpp).
"""

from __future__ import annotations

import io
import json
import mmap
import os
import re
import shlex
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from moecalc.errors import PackageError, printable
from moecalc.files import CHECKPOINT, describe
from moecalc.package import records
from moecalc.package.architecture import Architecture, StoredTensor, dtype_name, index_tensors
from moecalc.package.architecture import describe as describe_model
from moecalc.package.metadata import FORMAT_VERSION, Metadata, ReferenceFrame, VerificationReport

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

_TENSORS = TypeAdapter(dict[str, StoredTensor])
_END = b"PK\x05\x06"
_LONGEST_END = 22 + 0xFFFF  # the end record and its comment
_STAMP = re.compile(rb"^moecalc crc32=([0-9a-f]{8}) size=(\d+)$")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_OF_MODEL = tuple(records.archived(name) for name in records.OF_MODEL)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


def write_archive(path: Path, module: torch.jit.ScriptModule, texts: Mapping[str, str]) -> None:
    """Write a package; the same input gives the same bytes.

    Args:
        path: file to write (not atomically: write beside the target and rename).
        module: the scripted model.
        texts: extra records by name (`moecalc.package.records`). Format version and the records that the
            runtime reads of the model are added where they are missing.
    """
    from moecalc._jit import jit_save

    # through memory: torch's own writer ends the process when the disk is full
    raw, packed = io.BytesIO(), io.BytesIO()
    jit_save(module, raw, {})
    with zipfile.ZipFile(raw) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as target:
        # torch names the top folder after the file; give it one name
        names = {"model/" + name.split("/", 1)[1]: name for name in source.namelist()}
        # source paths of the machine that packaged, and a random id: nothing that a run needs
        names = {n: name for n, name in names.items() if not n.endswith((".debug_pkl", "/serialization_id"))}
        entries = {n: source.getinfo(name) for n, name in names.items()}
        extra = {records.archived(name): text for name, text in texts.items()}
        extra.setdefault(records.archived(records.FORMAT), str(FORMAT_VERSION))
        if not extra.keys() >= set(_OF_MODEL):
            described = _model_records(module, source.read(names["model/data.pkl"]), entries)
            extra = dict(zip(_OF_MODEL, described, strict=True)) | extra
        if records.METADATA in texts:
            entries |= {n: _entry(n, extra[n].encode()) for n in _OF_MODEL}
            digest = digest_of(entries.items())
            extra[records.archived(records.METADATA)] = with_digest(texts[records.METADATA], digest)
        for name in sorted([*names, *extra]):
            content = extra[name].encode() if name in extra else source.read(names[name])
            target.writestr(zipfile.ZipInfo(name, date_time=_EPOCH), content)
    body = packed.getvalue()
    end = body.rindex(_END)
    stamp = f"moecalc crc32={zlib.crc32(body[:end]):08x} size={end}".encode()
    path.write_bytes(body[: end + 20] + struct.pack("<H", len(stamp)) + stamp)


def _model_records(
    module: torch.jit.ScriptModule, data: bytes, entries: Mapping[str, zipfile.ZipInfo]
) -> tuple[str, str]:
    """Texts of architecture.json and tensors.json of a model whose data.pkl is `data`."""
    sizes = {name.split("/", 1)[1]: entry.file_size for name, entry in entries.items()}
    tensors = index_tensors(data, sizes)
    for name, tensor in module.state_dict().items():
        found = tensors.get(name)
        if found is None or (found.dtype, found.shape) != (dtype_name(tensor), list(tensor.shape)):
            raise PackageError(f"expected tensor {name} in the archive, got {found}: please report it")
    return (
        describe_model(module).model_dump_json(indent=1),
        json.dumps({name: tensor.model_dump() for name, tensor in tensors.items()}),
    )


def _entry(name: str, content: bytes) -> zipfile.ZipInfo:
    """What a directory says of a record."""
    entry = zipfile.ZipInfo(name, date_time=_EPOCH)
    entry.file_size, entry.CRC = len(content), zlib.crc32(content)
    return entry


def digest_of(archived: Iterable[tuple[str, zipfile.ZipInfo]]) -> str:
    """Digest of what a model is computed from: CRC-32 of lines `NAME SIZE CRC`, sorted by name.

    It covers the records of the scripted model, `architecture.json` and `tensors.json`, no other extra one.

    Args:
        archived: full names in a package, and entries of the directory.
    """
    inner = {name.split("/", 1)[1]: entry for name, entry in archived}
    lines = [
        f"{name} {entry.file_size} {entry.CRC:08x}\n"
        for name, entry in sorted(inner.items())
        if not name.startswith("extra/") or f"model/{name}" in _OF_MODEL
    ]
    return f"{zlib.crc32(''.join(lines).encode()):08x}"


def with_digest(metadata: str, digest: str) -> str:
    """Text of metadata.json with this digest."""
    return json.dumps(json.loads(metadata) | {"digest": digest}, indent=1, ensure_ascii=False)


def foreign_package(path: Path) -> PackageError:
    """The error for a file that is no package: what it is, where that can be told."""
    what = describe(path)
    if what is None or "moecalc package" in what:  # named like one, or with a piece of one in it
        command = "moecalc package CHECKPOINT -o MODEL.moe.pt"
        return PackageError(f"{path}: not a moecalc package; make one with `{command}`")
    if what == CHECKPOINT or "TorchScript" in what:
        command = f"moecalc package {shlex.quote(str(path))} -o {shlex.quote(_name_of_package(path))}"
        return PackageError(f"{path}: not a moecalc package but {what}; make one with `{command}`")
    return PackageError(f"{path}: not a moecalc package but {what}; expected a file *.moe.pt")


def _name_of_package(checkpoint: Path) -> str:
    """A name that `moecalc package` accepts, and that is not the checkpoint's own."""
    name = f"{checkpoint.stem}.moe.pt"
    return "MODEL.moe.pt" if checkpoint.name.endswith(".moe.pt") else name


def _checksum(path: Path, size: int) -> int:
    """CRC-32 of the first `size` bytes, which need not fit into memory."""
    crc = 0
    with path.open("rb") as file:
        while size > 0 and (chunk := file.read(min(size, 1 << 20))):
            crc = zlib.crc32(chunk, crc)
            size -= len(chunk)
    return crc


def check_archive(path: str | Path) -> None:
    """Check that a file is a whole, undamaged package of a format that this version reads.

    Raises:
        PackageError: missing, truncated, damaged, foreign, newer or older file; with the remedy.
    """
    version, names = check_file(path)
    if not names & set(_OF_MODEL):
        raise PackageError(
            f"{path}: package format {version} has no architecture record: "
            f"moecalc upgrade {path} -o NEW.moe.pt"
        )


def check_file(path: str | Path) -> tuple[int, set[str]]:
    """The same for packages of older formats as well.

    Returns:
        Version of the format, and the names of all records.
    """
    path = Path(path)
    if not path.exists():
        raise PackageError(f"{path}: no such file")
    if not path.is_file():
        raise foreign_package(path)
    foreign = foreign_package(path)
    again = "copy it again or package the checkpoint again"
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise foreign
        begin = max(0, file.seek(0, os.SEEK_END) - _LONGEST_END)
        file.seek(begin)
        tail = file.read()
    place = tail.rfind(_END)
    if place < 0 or len(tail) < place + 22:
        raise PackageError(f"{path}: incomplete file (truncated copy?): {again}")
    end = begin + place
    stamp = _STAMP.match(tail[place + 22 :])
    if stamp is None:
        if b"moecalc crc32=" in tail[place:]:
            raise PackageError(f"{path}: damaged file (unreadable integrity stamp): {again}")
        raise foreign
    size, crc = int(stamp[2]), int(stamp[1], 16)
    if size != end:
        raise PackageError(f"{path}: incomplete file ({end} bytes of {size}, truncated copy?): {again}")
    found = _checksum(path, end)
    if found != crc:
        raise PackageError(f"{path}: damaged file (checksum {found:08x}, expected {crc:08x}): {again}")
    # the checksum does not cover the record that carries it
    if tail[place + 20 :] != struct.pack("<H", len(stamp[0])) + b"moecalc crc32=%08x size=%d" % (crc, size):
        raise PackageError(f"{path}: damaged file (end record): {again}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as body:
        names = _check_directory(path, body, end)
    version = read_record(path, records.FORMAT).strip()
    if not re.fullmatch(r"[1-9][0-9]{0,4}", version):
        raise PackageError(
            f"{path}: expected a positive integer as format_version, got '{printable(version, 40)}': {again}"
        )
    if int(version) > FORMAT_VERSION:
        from moecalc import __version__

        raise PackageError(
            f"{path}: package format {version} is newer than this moecalc ({__version__}) reads "
            f"({FORMAT_VERSION}): upgrade moecalc"
        )
    return int(version), names


def _check_directory(path: Path, body: mmap.mmap, end: int) -> set[str]:
    """Names of all records: every reader of zip files must see the same ones.

    The rules are those of `read_directory` (cpp/package/records.cpp).
    """

    def refuse(what: str) -> PackageError:
        return PackageError(
            f"{path}: damaged or edited file ({what}): copy it again or package the checkpoint again"
        )

    zip64 = end >= 76 and body[end - 76 : end - 72] == b"PK\6\6" and body[end - 20 : end - 16] == b"PK\6\7"
    disks, here, count, size, begin = struct.unpack("<IHHII", body[end + 4 : end + 20])
    stop = end - 76 if zip64 else end
    if zip64:
        wide = struct.unpack("<QQQQ", body[stop + 24 : stop + 56])
        limits = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        if any(
            low != min(high, top)
            for low, high, top in zip((here, count, size, begin), wide, limits, strict=True)
        ):
            raise refuse("an end record that contradicts itself")
        here, count, size, begin = wide
    if disks or here != count or begin > stop or size != stop - begin:
        raise refuse("a directory of another size than the end record says")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise refuse(f"a bad directory: {printable(str(error))}") from None
    position = begin
    for _ in entries:  # Python's reader forgives lengths that reach beyond the directory
        position += 46 + sum(struct.unpack("<HHH", body[position + 28 : position + 34]))
        if position > stop:
            break
    if position != stop:
        raise refuse("a directory of another size than the end record says")
    if len(entries) != count:
        raise refuse("another number of records than the end record says")
    seen: set[str] = set()
    spans: list[tuple[int, int]] = []
    for entry in entries:
        name = entry.orig_filename
        shown = f"record '{printable(name)}'"
        if not _PLAIN_NAME.fullmatch(name) or len(name) > 200 or {"", ".", ".."} & set(name.split("/")):
            raise refuse(f"{shown}, expected letters, digits and `_-.` between single slashes")
        if name.lower() in seen:
            raise refuse(f"{shown} is there twice")
        seen.add(name.lower())
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise refuse(f"{shown} is compressed")
        if entry.flag_bits & 0x61:  # encrypted, strongly too, or a patch
            raise refuse(f"{shown} is encrypted")
        header = body[entry.header_offset : entry.header_offset + 30]
        if len(header) < 30 or not header.startswith(b"PK\3\4"):
            raise refuse(f"{shown} has no header")
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        data = entry.header_offset + 30 + name_size + extra_size
        written = body[entry.header_offset + 30 : entry.header_offset + 30 + name_size]
        if written != name.encode() or header[8:10] != b"\0\0":
            raise refuse(f"{shown} differs from its header")
        if zlib.crc32(memoryview(body)[data : data + entry.file_size]) != entry.CRC:
            raise refuse(f"{shown} has another checksum than the directory says")
        spans.append((entry.header_offset, data + entry.file_size))
    if len({name.partition("/")[0] for name in seen}) != 1 or any("/" not in name for name in seen):
        raise refuse("records in more than one folder")
    spans.sort()
    for (_, last), (first, _) in zip(spans, [*spans[1:], (begin, 0)], strict=True):
        if last > first:
            raise refuse("records that overlap")
    return {entry.orig_filename for entry in entries}


def read_record(path: str | Path, name: str) -> str:
    """Text of an extra record; checks no more of the file than what it needs.

    Raises:
        PackageError: no such record, or one that is compressed or no text.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entry = archive.getinfo(records.archived(name))
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                raise zipfile.BadZipFile("it is compressed")
            return archive.read(entry).decode()
    except (KeyError, zipfile.BadZipFile, OSError, UnicodeDecodeError, NotImplementedError) as error:
        raise PackageError(
            f"{path}: no record {name!r} in this package ({error}): package the checkpoint again"
        ) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _distinct_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    known = dict(pairs)
    if len(known) != len(pairs):
        raise ValueError("a key is there twice")
    return known


def _read_json(path: str | Path, name: str) -> object:
    try:
        return json.loads(
            read_record(path, name), parse_constant=_refuse_constant, object_pairs_hook=_distinct_keys
        )
    except (ValueError, RecursionError) as error:
        raise PackageError(
            f"{path}: record {name!r} is not JSON ({error}): package the checkpoint again"
        ) from None


def _read_checked(path: str | Path, name: str, check: Callable[[Any], T], problem: str) -> T:
    """A record as what pydantic makes of its JSON.

    Raises:
        PackageError: no such record, no JSON, or `problem`, with the first place and reason.
    """
    content = _read_json(path, name)
    try:
        return check(content)
    except ValidationError as error:
        raise PackageError(f"{path}: {problem} ({_first(error)}): package again") from None


def _first(error: ValidationError) -> str:
    """Place and reason of the first of several errors."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(printable(str(part), 40) for part in first["loc"])
    return f"{place}: {printable(first['msg'], 120)}" if place else printable(first["msg"], 120)


def read_metadata(path: str | Path) -> Metadata:
    """Checked metadata of a package.

    Raises:
        PackageError: as `check_archive`, or metadata that do not fit their schema.
    """
    check_archive(path)
    return _read_checked(path, records.METADATA, Metadata.model_validate, "metadata do not fit their schema")


def read_architecture(path: str | Path) -> Architecture:
    """Checked `architecture.json` of a package.

    Raises:
        PackageError: as `check_archive`, or a record that does not fit its schema.
    """
    check_archive(path)
    return _read_checked(
        path,
        records.ARCHITECTURE,
        Architecture.model_validate,
        "architecture.json does not fit its schema",
    )


def read_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Checked `tensors.json` of a package: where each tensor is, by its name in the model.

    Raises:
        PackageError: a record that does not fit its schema, or a tensor that is not whole in the file.
    """
    tensors = _read_checked(
        path, records.TENSORS, _TENSORS.validate_python, "tensors.json does not fit its schema"
    )
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.filename.partition("/")[2]: entry.file_size for entry in archive.infolist()}
    for name, tensor in tensors.items():
        if tensor.offset + tensor.size_bytes > sizes.get(tensor.record, -1):
            raise PackageError(
                f"{path}: tensor '{printable(name, 60)}' is not within record {tensor.record}: package again"
            )
    return tensors


def read_tensor(path: str | Path, tensor: StoredTensor) -> NDArray[Any]:
    """Numbers of a tensor of `read_tensors`."""
    with zipfile.ZipFile(path) as archive, archive.open(f"model/{tensor.record}") as record:
        record.seek(tensor.offset)
        content = record.read(tensor.size_bytes)
    return np.frombuffer(content, np.dtype(tensor.dtype).newbyteorder("<")).reshape(tensor.shape).copy()


def read_reference(path: str | Path) -> list[ReferenceFrame]:
    """Reference frames of a package, at least one.

    Raises:
        PackageError: not a list of whole frames of finite numbers.
    """
    return _read_checked(
        path, records.REFERENCE, lambda content: _frames(path, content), "a reference frame is not whole"
    )


def _frames(path: str | Path, content: object) -> list[ReferenceFrame]:
    if not isinstance(content, list):
        raise PackageError(
            f"{path}: reference.json holds {type(content).__name__}, expected a list: package again"
        )
    if not content:
        raise PackageError(f"{path}: expected reference frames, got none: package again")
    return [ReferenceFrame.model_validate(frame) for frame in content]


def read_verification(path: str | Path) -> VerificationReport:
    """The verification that was stored when the package was made.

    Raises:
        PackageError: a record that does not fit its schema.
    """
    return _read_checked(
        path, records.VERIFICATION, VerificationReport.model_validate, "the stored verification is not whole"
    )
