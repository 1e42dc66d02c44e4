"""Frozen models of DeePMD-kit (`dp --pt freeze`, .pth): options and tensors, without running code.

A frozen model is a TorchScript archive. `torch.jit.load` would run code of the file and needs DeePMD-kit's
own operators; here the object tree (`data.pkl`) is unpickled into inert objects that only hold attributes,
and the parameters and buffers are those that the class texts under `code/` list.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Self

import torch

from moecalc.errors import CheckpointError

_LARGEST_TEXT = 1 << 26
_DEEPEST = 100

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


class _Module:
    """An object of the archive: its class' name and its attributes."""

    kind = ""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __new__(cls, *_: Any) -> Self:
        made = super().__new__(cls)
        made.attributes = {}
        return made

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict) and all(isinstance(name, str) for name in state):
            self.attributes = state


class _Reader(pickle.Unpickler):
    """Unpickles what TorchScript writes: objects without code, tensors, plain containers."""

    def __init__(self, archive: zipfile.ZipFile, top: str) -> None:
        super().__init__(io.BytesIO(_record(archive, f"{top}/data.pkl")))
        self._archive, self._top = archive, top
        self._storages: dict[str, torch.Tensor] = {}
        self._names = set(archive.namelist())

    def find_class(self, module: str, name: str) -> Any:
        """Stand-ins for the few names that such a file needs; everything else is refused."""
        if module == "__torch__" or module.startswith("__torch__."):
            return type("_Module", (_Module,), {"kind": f"{module}.{name}"})
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch.jit._pickle", "restore_type_tag"): _without_tag,
            **{
                ("torch.jit._pickle", f"build_{kind}list"): _as_list
                for kind in ("int", "double", "bool", "tensor")
            },
        }
        if (module, name) not in known:
            raise CheckpointError(
                f"frozen model holds {module}.{name}, expected what DeePMD-kit's DPA3 consists of: "
                "do not load this file elsewhere unless you trust its source"
            )
        return known[module, name]

    def persistent_load(self, pid: Any) -> torch.Tensor:
        """The values (n,) of a storage record."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise CheckpointError("frozen model refers to data of an unknown kind, expected tensors")
        _, dtype, key, _, _ = pid
        name = f"{self._top}/data/{key}"
        if not isinstance(dtype, torch.dtype) or name not in self._names:
            raise CheckpointError(
                f"frozen model has no record {name!r}, expected the values of a tensor: copy it again"
            )
        if name not in self._storages:
            values = bytearray(_record(self._archive, name))
            whole = len(values) // dtype.itemsize
            self._storages[name] = (
                torch.frombuffer(values, dtype=dtype, count=whole) if whole else torch.empty(0, dtype=dtype)
            )
        return self._storages[name]


def _as_list(value: Any) -> list[Any]:
    return list(value)


def _without_tag(value: Any, _: Any) -> Any:
    return value


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """A view of a storage; torch itself refuses one that is out of bounds."""
    numbers = [offset, *size, *stride]
    if not isinstance(storage, torch.Tensor) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise CheckpointError(
            "frozen model has a tensor without values, expected a storage with offset, size and stride"
        )
    return torch.as_strided(storage, tuple(size), tuple(stride), offset)


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    """Bytes of a record; text of the archive is compressed, so its size is bounded here."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED and info.file_size > _LARGEST_TEXT:
        raise CheckpointError(
            f"record {name!r} unpacks to {info.file_size:,} bytes, expected at most {_LARGEST_TEXT:,}"
        )
    with archive.open(info) as record:
        return record.read(info.file_size)


def _parameter_names(archive: zipfile.ZipFile, top: str) -> dict[str, set[str]]:
    """Names of parameters and buffers by class, as the class texts list them.

    The text is searched, never run.
    """
    result: dict[str, set[str]] = {}
    total = 0
    for info in archive.infolist():
        inner = info.filename.removeprefix(f"{top}/code/")
        if inner == info.filename or not inner.endswith(".py"):
            continue
        total += info.file_size
        if total > _LARGEST_TEXT:
            raise CheckpointError(
                f"code of the frozen model unpacks to over {_LARGEST_TEXT:,} bytes, expected less"
            )
        text = _record(archive, info.filename).decode("utf-8", "replace")
        module = inner.removesuffix(".py").replace("/", ".")
        for part in re.split(r"^class ", text, flags=re.MULTILINE)[1:]:
            lists = re.findall(r"^  __(?:parameters|buffers)__ = \[(.*?)\]", part, flags=re.MULTILINE)
            names = {name for found in lists for name in re.findall(r'"([^"]*)"', found)}
            result[f"{module}.{re.split('[^A-Za-z0-9_]', part, maxsplit=1)[0]}"] = names
    return result


def _collect(
    module: _Module, prefix: str, names: dict[str, set[str]], state: dict[str, torch.Tensor], depth: int = 0
) -> None:
    """Add parameters and buffers below an object, by the names of a state dict."""
    if depth > _DEEPEST:
        raise CheckpointError(f"frozen model nests objects deeper than {_DEEPEST}, expected a DPA3 model")
    own = names.get(module.kind, set())
    for name, value in module.attributes.items():
        if isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", names, state, depth + 1)
        elif isinstance(value, torch.Tensor) and name in own:
            state[prefix + name] = value


def read_frozen(path: Path) -> dict[str, Any]:
    """Options and tensors of a frozen model, as `dp --pt train` would have written them.

    Args:
        path: a `.pth` file of DeePMD-kit 3.0.0 or later.

    Returns:
        {"model": state dict with `_extra_state`, "frozen": True}.

    Raises:
        CheckpointError: damaged, another kind of model, or one without `model_def_script`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            top = next(n for n in archive.namelist() if n.endswith("/constants.pkl")).rpartition("/")[0]
            model = _Reader(archive, top).load()
            names = _parameter_names(archive, top)
            modifier = f"{top}/extra/data_modifier.pth"
            if modifier in archive.namelist() and archive.getinfo(modifier).file_size:
                raise CheckpointError(
                    "frozen model has a data modifier, which adds energies of its own, expected none"
                )
    except CheckpointError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever damaged bytes provoke in unpickling
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"not a readable frozen model ({reason}): copy or freeze it again") from None
    options = _options(model)
    state: dict[str, torch.Tensor] = {}
    _collect(model, "model.Default.", names, state)
    return {"model": {**state, "_extra_state": {"model_params": options}}, "frozen": True}


def _options(model: object) -> dict[str, Any]:
    """`model_def_script` of a frozen model."""
    text = model.attributes.get("model_def_script") if isinstance(model, _Module) else None
    if not isinstance(text, str) or not text:
        kind = model.kind.rpartition(".")[2] if isinstance(model, _Module) else type(model).__name__
        raise CheckpointError(
            f"a TorchScript archive of {kind} without model_def_script, expected a DPA3 model that `dp --pt "
            "freeze` of "
            "DeePMD-kit 3.0.0 or later wrote: use the .pt checkpoint of the training folder"
        )
    try:
        options = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"model_def_script of the frozen model is no JSON ({error}): copy or freeze it again"
        ) from None
    if not isinstance(options, dict):
        raise CheckpointError(
            f"model_def_script of the frozen model is {type(options).__name__}, expected a dictionary of "
            "options"
        )
    if "model_dict" in options:
        raise CheckpointError(
            "model_def_script of the frozen model has several heads, expected the options of one"
        )
    return options
