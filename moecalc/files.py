"""Files: what one is when it is not what was expected, and writing so that nothing is lost."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from moecalc.errors import MoecalcError

# --- what is it? ---------------------------------------------------------------------------------

CHECKPOINT = "a checkpoint of torch (.pt)"

_LFS = b"version https://git-lfs.github.com/spec/"

# what a file begins with, and what it then is
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (_LFS, "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\xfd7zXZ\x00", "compressed with xz: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"Rar!\x1a\x07", "a RAR archive: unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"CDF", "a NetCDF file"),
    (b"\x93NUMPY", "a NumPy array (.npy)"),
    (b"%PDF-", "a PDF document"),
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x7fELF", "a program or library (ELF)"),
    (b"- of Ulm", "an ASE trajectory"),
    (b"%YAML", "YAML text"),
)
_PICKLE = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_PAGE = (b"<!doctype html", b"<html", b"<head", b"<body")


def describe(path: str | Path) -> str | None:
    """What a file is that should have been a checkpoint or a package, and the remedy; None if nothing tells.

    Only the beginning of the file and, of a zip file, its list of contents are read; nothing is unpickled.

    Args:
        path: a file, a folder, or nothing at all.

    Returns:
        A phrase that follows "PATH: ", such as "a Git LFS pointer, not the file itself: run `git lfs pull`".
    """
    path = Path(path)
    if path.is_dir():
        return _describe_folder(path)
    if not path.exists():
        return "a link to nothing" if path.is_symlink() else "no such file"
    if not path.is_file():
        return "not a regular file (a device, pipe or socket)"
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        return f"not readable ({error.strerror})"
    if not head:
        return "an empty file: the copy or download failed, or the disk was full"
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return what
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if head.startswith(b"PK\x03\x04"):
        return _describe_zip(path)
    if _is_safetensors(head, path.stat().st_size):
        return "a safetensors file: it has the weights, but not the model's description"
    if head.startswith(_PICKLE):
        return _describe_pickle(head)
    if head[:1] == b"\x08" and head[2:3] == b"\x12":  # version of the format, then the program's name
        return "an ONNX model"
    if head[:1] == b"\n" and (b"Placeholder" in head or b"Const" in head) and b"\x12" in head:
        return "a frozen graph of TensorFlow (.pb)"
    if head.count(b"\x00") == min(len(head), 4096):
        return "filled with zeros: the copy failed, or the disk was full"
    return _describe_text(head)


def _describe_folder(path: Path) -> str:
    with suppress(OSError):
        files = sorted(p.name for p in path.iterdir() if p.name.endswith((".pt", ".pth")))
        if "data.pkl" in {p.name for p in path.iterdir()}:
            return "a folder, a checkpoint that was unpacked: give the .pt file itself"
        if files:
            return f"a folder: give one of its files, such as {files[-1]}"
    return "a folder, not a file"


def _describe_zip(path: Path) -> str | None:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None  # cut short: the reader says so
    inner = {name.split("/", 1)[-1] for name in names}
    if any(name.endswith("extra/format_version") for name in names):
        return "a moecalc package (.moe.pt)"
    if "archive_format" in inner or any("aotinductor" in name for name in names):
        return "a model exported with torch.export (.pt2)"
    if any(name.endswith("constants.pkl") for name in names):
        return "a TorchScript archive (a frozen model)"
    if any(name.endswith("data.pkl") for name in names):
        return CHECKPOINT
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz)"
    return f"a zip archive of other files ({', '.join(map(ascii, names[:3])) or 'empty'}): unpack it first"


def _is_safetensors(head: bytes, size: int) -> bool:
    """Eight bytes with the length of a JSON text, and the text."""
    return len(head) > 9 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= size - 8


def _describe_pickle(head: bytes) -> str | None:
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."):
        return None  # torch's form before zip files: a checkpoint after all
    for module, what in (
        (b"numpy", "pickled NumPy arrays"),
        (b"sklearn", "a pickled scikit-learn model"),
        (b"torch", "a pickled torch object, not written by torch.save"),
        (b"ase.", "pickled ASE structures"),
    ):
        if module in head:
            return what
    return "a pickled Python object"


def _describe_text(head: bytes) -> str | None:
    try:
        # the last character may be cut
        text = head[: len(head) - 4].decode("utf-8") if len(head) == 4096 else head.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if any(ord(character) < 32 and character not in "\t\r\n\f" for character in text):
        return None
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.encode().startswith(_PAGE) or (start.startswith("<?xml") and "<html" in start):
        return "an HTML page, not the file itself: a download link was for a web page; download the raw file"
    if start.startswith("<"):
        return "an XML text, not the file itself: a server's answer, or a wrong link; download the raw file"
    if start.startswith(("{", "[")):
        return "JSON text"
    line = text.strip().splitlines()[0][:60] if text.strip() else ""
    if not line:
        return "an empty text: the copy or download failed"
    if "\n" not in text.strip() and Path(line).suffix:
        return f"a text file with {line!r} in it, perhaps a link: give the file that it names"
    return f"a text file that begins with {line!r}"


def code_in_pickle(error: Exception) -> str | None:
    """What `torch.load(..., weights_only=True)` refused as code to run; None if it failed otherwise."""
    found = re.search(r"(?:GLOBAL|[Uu]nsupported (?:class|global)) ([\w.]+)", " ".join(str(error).split()))
    return found[1] if found else None


_EXPECTED = "expected only tensors, numbers, texts, lists and dictionaries"


def load_failure(error: Exception) -> str:
    """Why `torch.load(..., weights_only=True)` failed, without torch's advice to load the file unsafely."""
    text = " ".join(str(error).split())
    if code := code_in_pickle(error):
        return f"it has {code} in it, which could run code, {_EXPECTED}"
    if "weights_only" in text or "Weights only" in text:
        return f"it has objects in it that could run code, {_EXPECTED}"
    if isinstance(error, EOFError):
        return "it ends too early"
    return text[:200] or type(error).__name__


# --- names -----------------------------------------------------------------------------------------


def display_text(value: str | Path) -> str:
    """Text that UTF-8 can express: under LANG=C, Python hides the bytes of an argument in surrogates."""
    return str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def from_text(text: str) -> str:
    """A path from what `display_text` made of it."""
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


# --- writing ---------------------------------------------------------------------------------------

PREFIX = ".moecalc-"
"""Beginning of the names of temporary files and folders, which lie beside what they will become."""

_STALE = 24 * 3600.0  # seconds after which a temporary file is not of a process that still runs


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place if all goes well.

    Until then `path` is as it was, also when the program is killed or the disk is full. What was written is
    then removed (after `kill -9`, by the next run that writes to the folder, a day later).

    Args:
        path: the file to write. A symbolic link stays one: the file that it names is replaced.

    Raises:
        MoecalcError: the disk is full, or the folder cannot be written to.
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    remove_stale(target.parent)
    temporary: Path | None = None
    try:
        temporary = target.with_name(f"{PREFIX}{secrets.token_hex(4)}{target.suffix}")
        # not by tempfile: a new file gets the permissions that the user's umask leaves
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _flush(temporary)
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        temporary.replace(target)
        _flush(target.parent)
    except OSError as error:
        raise _not_written(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(beside: str | Path) -> Iterator[Path]:
    """A folder beside a path that will be made in it: removed at the end, whatever happens.

    Raises:
        MoecalcError: the disk is full, or the folder cannot be written to.
    """
    path = Path(beside)
    try:
        remove_stale(path.parent)
        with tempfile.TemporaryDirectory(
            prefix=PREFIX, dir=path.parent, ignore_cleanup_errors=True
        ) as folder:
            yield Path(folder)
    except OSError as error:
        raise _not_written(path, error) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, in UTF-8, as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(display_text(text), encoding="utf-8")


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def to_bytes(content: Any) -> bytes:
    """What `torch.save` writes, in memory: its own writer ends the process when the disk is full."""
    import io

    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def drop_partial_line(path: Path) -> None:
    """Cut off the end of a line that was not written to its end, of a log that goes on."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def move_into_place(temporary: Path, path: Path) -> None:
    """Let a file that is complete take the place of another, safe against a loss of power."""
    _flush(temporary)
    temporary.replace(path)
    _flush(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder for results, and those that it lies in; one that is there stays as it is.

    Raises:
        MoecalcError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoecalcError(f"{path}: not a folder to write to ({error.strerror})") from None


def remove_stale(folder: Path) -> None:
    """Remove temporary files of runs that were killed a day ago or more."""
    import shutil

    with suppress(OSError):
        for left in folder.glob(f"{PREFIX}*"):
            with suppress(OSError):
                if time.time() - left.lstat().st_mtime > _STALE:
                    if left.is_dir() and not left.is_symlink():
                        shutil.rmtree(left, ignore_errors=True)
                    else:
                        left.unlink()


def check_outputs(
    outputs: Iterable[tuple[str, str | Path | None]], inputs: Iterable[tuple[str, str | Path | None]]
) -> None:
    """Refuse to write over what is read, or twice to one file, whatever the paths are called (links, `..`).

    Args:
        outputs, inputs: name of the option, and its path or None.

    Raises:
        MoecalcError: names both.
    """
    read = [(name, Path(path)) for name, path in inputs if path is not None]
    written: list[tuple[str, Path]] = []
    for name, path in ((name, Path(path)) for name, path in outputs if path is not None):
        for other, source in read:
            if _same(path, source):
                raise MoecalcError(
                    f"{name} {path} is the {other} {source} itself, which would be lost: choose another name"
                )
        for other, target in written:
            if _same(path, target):
                raise MoecalcError(
                    f"{name} {path} and {other} {target} are one file: choose another name for one"
                )
        written.append((name, path))


def _same(a: Path, b: Path) -> bool:
    with suppress(OSError):
        return a.samefile(b)
    return os.path.realpath(a) == os.path.realpath(b)


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems do not do that for folders
            raise
    finally:
        os.close(handle)


def _not_written(path: Path, error: OSError) -> MoecalcError:
    reason = error.strerror or str(error) or type(error).__name__
    return MoecalcError(f"{path} was not written: {reason}; what was there before is unchanged")
