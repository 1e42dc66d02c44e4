"""Checkpoints by names of DeePMD-kit's registry (`DPA-3.3-1M`), through its own cache and download."""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moecalc.errors import CheckpointError

_NAME = re.compile(r"DPA-?\d[\w.-]*", re.IGNORECASE)
_FILE = re.compile(r".*\.(pt|pth|pt2|pb)", re.IGNORECASE)


def resolve_checkpoint(checkpoint: str | Path, progress: Callable[[str], None]) -> tuple[Path, str | None]:
    """The file of a checkpoint that is given by path or by a name of DeePMD-kit's registry.

    Args:
        checkpoint: a path, or a name such as `DPA-3.3-1M`; an existing file of that name comes first.
        progress: called before a download, with what happens.

    Returns:
        The path, and the name in the registry where it is one.

    Raises:
        CheckpointError: no such file, no DeePMD-kit with a registry, an unknown name, a failed download,
            another checksum.
    """
    path, text = Path(checkpoint), str(checkpoint)
    if path.exists() or path.name != text or not _NAME.fullmatch(text) or _FILE.fullmatch(text):
        return path, None
    registry = _registry(text)
    if text not in registry:
        raise CheckpointError(
            f"{text}: no such file, and not in the registry of the installed DeePMD-kit, expected one of: "
            f"{', '.join(sorted(registry))}"
        )
    progress(f"asking DeePMD-kit for {text}")
    path = _download(text)
    _check_sum(path, text, registry[text])
    return path, text


def _registry(name: str) -> Mapping[str, Mapping[str, Any]]:
    """Entries of the installed DeePMD-kit's registry by name."""
    remedy = "install deepmd-kit 3.2.0 or later, or give the path of the downloaded .pt file"
    try:
        module = importlib.import_module("deepmd.pretrained.registry")
    except ModuleNotFoundError as error:
        if error.name == "deepmd":
            what = "names of pretrained models are looked up in DeePMD-kit, which is not installed"
        else:
            what = f"the installed DeePMD-kit has no registry of pretrained models (no module {error.name})"
        raise CheckpointError(f"{name}: no such file, and {what}: {remedy}") from None
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{name}: no such file, and DeePMD-kit does not load ({reason}): {remedy}"
        ) from None
    entries = getattr(module, "MODEL_REGISTRY", None)
    if not isinstance(entries, Mapping):
        raise CheckpointError(
            f"{name}: the installed DeePMD-kit has no MODEL_REGISTRY that moecalc can read: {remedy}"
        )
    return entries


def _download(name: str) -> Path:
    """The file in DeePMD-kit's cache, downloaded by DeePMD-kit if it is not there."""
    try:
        module = importlib.import_module("deepmd.pretrained.download")
        path = Path(module.resolve_model_path(name))
    except Exception as error:  # noqa: BLE001 - network, disk, another interface
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{name}: DeePMD-kit could not provide the file ({reason}), expected a network connection or the "
            "file in its "
            f"cache: run `dp pretrained download {name}` where there is a network, and give the path that it "
            "prints"
        ) from None
    if not path.is_file():
        raise CheckpointError(f"{name}: DeePMD-kit names {path}, which is no file: remove it and try again")
    return path


def _check_sum(path: Path, name: str, entry: Mapping[str, Any]) -> None:
    wanted = entry.get("sha256") if isinstance(entry, Mapping) else None
    if not isinstance(wanted, str):
        raise CheckpointError(
            f"{name}: DeePMD-kit's registry has no sha256 of it, expected one to check {path} with"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted.lower():
        raise CheckpointError(
            f"{path}: sha256 {found} is not that of {name} in DeePMD-kit's registry, expected {wanted}: "
            "remove the file and "
            f"download it again with `dp pretrained download {name}`"
        )
