"""The file around a checkpoint: what kind it is, and that reading it is safe, before torch is asked to."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from moecalc.errors import CheckpointError
from moecalc.files import CHECKPOINT, code_in_pickle, describe

_FOREIGN = {
    ".pb": "a frozen model of DeePMD-kit's TensorFlow backend",
    ".savedmodel": "a model of DeePMD-kit's JAX backend",
    ".hlo": "a model of DeePMD-kit's JAX backend",
    ".jax": "a checkpoint of DeePMD-kit's JAX backend",
    ".dp": "a model of DeePMD-kit's reference backend",
    ".yaml": "a model of DeePMD-kit's reference backend",
    ".pd": "a checkpoint of DeePMD-kit's Paddle backend",
    ".pdmodel": "a model of DeePMD-kit's Paddle backend",
    ".pt2": "an AOTInductor model of DeePMD-kit",
    ".pte": "an exported model of DeePMD-kit",
}
_EXPECTED = "expected the .pt checkpoint of a training, or a model frozen by `dp --pt freeze` (.pth)"


def check_container(path: Path) -> list[str]:
    """Look at the file as an archive.

    Returns:
        Names of its records; empty where it is no zip archive (the older form of `torch.save`).

    Raises:
        CheckpointError: a moecalc package, a model of another backend, compressed, doubled or overlong
            records.
    """
    if not zipfile.is_zipfile(path):
        if path.suffix in _FOREIGN:
            raise CheckpointError(f"{_FOREIGN[path.suffix]}, {_EXPECTED}")
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            records, comment = archive.infolist(), archive.comment
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise _unreadable(path, str(error)) from None
    names = [record.filename for record in records]
    inner = {name.partition("/")[2] for name in names}
    if b"moecalc crc32=" in comment or {"extra/metadata.json", "extra/verification.json"} <= inner:
        raise CheckpointError(
            "a package of moecalc already (.moe.pt), expected a trained checkpoint: run it in ASE or LAMMPS "
            "as it is"
        )
    if path.suffix in _FOREIGN or any("aotinductor/" in name for name in names):
        raise CheckpointError(f"{_FOREIGN.get(path.suffix, _FOREIGN['.pt2'])}, {_EXPECTED}")
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(
            f"record {twice!r} is in the archive twice, expected once: copy or save it again"
        )
    size = path.stat().st_size
    for record in records:
        # torch does not compress; a small file must not unpack to more memory than it has bytes
        source = is_torchscript(names) and record.filename.partition("/")[2].startswith("code/")
        if not source and (record.compress_type != zipfile.ZIP_STORED or record.file_size > size):
            raise CheckpointError(
                f"record {record.filename!r} is compressed ({record.compress_size:,} to {record.file_size:,} "
                "bytes), expected "
                "the archive as torch.save wrote it: do not zip checkpoints again"
            )
    return names


def is_torchscript(names: list[str]) -> bool:
    """Whether records are those of a TorchScript archive (a frozen model)."""
    return any(name.endswith("/constants.pkl") for name in names)


def load_plain(path: Path) -> Any:
    """Unpickle a file that `torch.save` wrote, tensors and plain containers only.

    Raises:
        CheckpointError: damaged, or something else is in it.
    """
    try:
        with warnings.catch_warnings():
            # of torch on sparse tensors, which we refuse
            warnings.filterwarnings("ignore", message="(Validating sparse|Sparse invariant)")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own message advises to load the file with its code
        if name := code_in_pickle(error):
            raise CheckpointError(
                f"not a readable checkpoint (it holds {name}, which is code), expected tensors and plain "
                "containers only: "
                "do not load this file elsewhere unless you trust its source"
            ) from None
        raise _unreadable(path, "its content is damaged or of another kind") from None
    except Exception as error:  # noqa: BLE001 - whatever a damaged file provokes in torch
        raise _unreadable(path, str(error) or type(error).__name__) from None


def _unreadable(path: Path, reason: str) -> CheckpointError:
    if (what := describe(path)) is not None and what != CHECKPOINT:
        return CheckpointError(f"not a readable checkpoint but {what}")
    text = re.sub(r"\s+", " ", reason.strip().splitlines()[0] if reason.strip() else "no reason given")
    return CheckpointError(f"not a readable checkpoint ({text[:200]}): copy or train it again")
