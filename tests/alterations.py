"""Altered packages with a right integrity stamp: what a careless or hostile hand could make of a genuine one.

Every alteration has a name and comes from a generator that is determined by its seed, so that a failure is repeated by
its seed and name.
"""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from moecalc._jit import jit_load
from moecalc.package.archive import digest_of, write_archive

Records = dict[str, bytes]
END = b"PK\x05\x06"
EXTRA = ("format_version", "metadata.json", "reference.json", "verification.json")


def stamp(body: bytes) -> bytes:
    """The file with the integrity stamp that fits it."""
    end = body.rindex(END)
    comment = b"moecalc crc32=%08x size=%d" % (zlib.crc32(body[:end]), end)
    return body[: end + 20] + struct.pack("<H", len(comment)) + comment


def records_of(path: Path) -> Records:
    """All records by their full name."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def pack(
    records: Records | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED, *, digest: bool = True
) -> bytes:
    """A stamped package of these records, with the digest that fits them; a list may name one twice."""
    buffer = io.BytesIO()
    if isinstance(records, dict) and digest:
        records = _with_right_digest(records)
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in records.items() if isinstance(records, dict) else records:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content, compress_type=method)
    return stamp(buffer.getvalue())


def _with_right_digest(records: Records) -> Records:
    """So that what is behind the check of the digest is tested, too."""
    name = "model/extra/metadata.json"
    if b'"digest"' not in records.get(name, b""):
        return records
    entries = {n: zipfile.ZipInfo(n) for n in records if n.startswith("model/")}
    for n, entry in entries.items():
        entry.file_size, entry.CRC = len(records[n]), zlib.crc32(records[n])
    right = b'"digest": "%s"' % digest_of(entries.items()).encode()
    return {**records, name: re.sub(rb'"digest": "[0-9a-f]{8}"', right, records[name])}


def edit_json(path: Path, record: str, change: Callable[[object], object]) -> bytes:
    """The package with a changed JSON record; `change` returns the new value, or text to store as it is."""
    records = records_of(path)
    name = f"model/extra/{record}"
    value = change(json.loads(records[name]))
    records[name] = (value if isinstance(value, str) else json.dumps(value)).encode()
    return pack(records)


def edit_code(path: Path, change: Callable[[str], str]) -> bytes:
    """The package with every record of code changed by `change`."""
    records = records_of(path)
    for name, content in records.items():
        if name.endswith(".py"):
            records[name] = change(content.decode()).encode()
    return pack(records)


def insert_code(
    path: Path, line: str, record: str = "model/code/__torch__/moecalc/nn/descriptor.py"
) -> bytes:
    """The package with a line at the start of the first method of a record."""
    records = records_of(path)
    text = records[record].decode()
    records[record] = re.sub(r"(  def \w+\([^)]*\) -> [^\n]+:\n)", rf"\1    {line}\n", text, count=1).encode()
    return pack(records)


@dataclass
class Alteration:
    """A way to alter the package at `source`; `make` returns the bytes of the altered file."""

    name: str
    make: Callable[[Path], bytes]


def _with_module(name: str, change: Callable[[torch.jit.ScriptModule], None], folder: Path) -> Alteration:
    def make(source: Path) -> bytes:
        module = jit_load(source)
        with torch.no_grad():
            change(module)
        records = records_of(source)
        target = folder / "altered.moe.pt"
        write_archive(target, module, {n: records[f"model/extra/{n}"].decode() for n in EXTRA})
        return target.read_bytes()

    return Alteration(name, make)


def _owner(module: torch.jit.ScriptModule, name: str) -> tuple[torch.jit.ScriptModule, str]:
    *parents, last = name.split(".")
    for parent in parents:
        module = getattr(module, parent)
    return module, last


def _tensor(name: str, what: str, change: Callable[[torch.Tensor], torch.Tensor], folder: Path) -> Alteration:
    def apply(module: torch.jit.ScriptModule) -> None:
        owner, last = _owner(module, name)
        old = getattr(owner, last)
        new = change(old.detach().clone())
        if isinstance(old, torch.nn.Parameter) and new.is_floating_point():
            new = torch.nn.Parameter(new, requires_grad=False)
        setattr(owner, last, new)

    return _with_module(f"{name} {what}", apply, folder)


def _set_one(value: float, rng: np.random.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(t: torch.Tensor) -> torch.Tensor:
        if t.numel():
            t.reshape(-1)[int(rng.integers(t.numel()))] = value
        return t

    return change


_SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "longer": lambda t: torch.cat([t, t]) if t.dim() else t.reshape(1).expand(7).clone(),
    "much longer": lambda t: t.repeat(50, *([1] * (t.dim() - 1))) if t.dim() else t.expand(1000).clone(),
    "wider": lambda t: torch.cat([t, t], -1) if t.dim() else t.expand(2, 2).clone(),
    "shorter": lambda t: t[:-1].clone() if t.dim() else t.reshape(1),
    "empty": lambda t: t.reshape(-1)[:0].clone(),
    "empty rows": lambda t: t[..., :0].clone() if t.dim() else t.reshape(1)[:0],
    "transposed": lambda t: t.transpose(0, -1).contiguous() if t.dim() > 1 else t.reshape(1, -1),
    "of one more dimension": lambda t: t.unsqueeze(0).clone(),
    "of four dimensions": lambda t: t.reshape(1, 1, 1, -1).clone(),
    "flat": lambda t: t.reshape(-1).clone() if t.dim() != 1 else t.reshape(-1, 1).clone(),
}
_DTYPES = {"half": torch.half, "float": torch.float32, "double": torch.float64, "integers": torch.int64,
           "complex": torch.complex64, "bool": torch.bool}  # fmt: skip


def _tensors(module: torch.jit.ScriptModule) -> list[str]:
    return [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]


def _module_alterations(source: Path, rng: np.random.Generator, folder: Path) -> Iterator[Alteration]:
    module = jit_load(source)
    names = _tensors(module)
    floating = {n for n, t in [*module.named_parameters(), *module.named_buffers()] if t.is_floating_point()}
    for name in names:
        if name in floating:
            for factor in (1.001, 1.1, -1.0):
                yield _tensor(name, f"x {factor}", lambda t, f=factor: t * f, folder)
            for value in (float("nan"), float("inf"), 1e300):
                yield _tensor(name, f"with {value}", _set_one(value, rng), folder)
        for what, change in _SHAPES.items():
            yield _tensor(name, what, change, folder)
        for what, dtype in _DTYPES.items():
            yield _tensor(name, f"as {what}", lambda t, d=dtype: t.to(d), folder)
        if name.endswith(".ids"):
            for shift in (1, -1, 1000, -(2**40), 2**40):
                yield _tensor(name, f"+ {shift}", lambda t, s=shift: t + s, folder)
        if name.endswith("pair_mask"):
            yield _tensor(name, "one way only", _set_one(0, rng), folder)
    for attribute in ("cutoff", "angle_cutoff"):
        for value in (0.1, -0.1, 1e9, -10.0, float("nan"), float("inf")):
            yield _with_module(
                f"{attribute} + {value}",
                lambda m, a=attribute, v=value: setattr(m, a, getattr(m, a) + v),
                folder,
            )
    elements = list(module.elements)
    for new in (elements[::-1], [*elements[1:], elements[0]], elements[:-1], [*elements, "Xe"], [], ["Xx"] * len(elements),
                [elements[0]] * len(elements), ["\x1b[2J", *elements[1:]]):  # fmt: skip
        yield _with_module(f"elements {new!r}", lambda m, e=new: setattr(m, "elements", e), folder)
    for level in ("configuration", "atom", ""):
        yield _with_module(f"level {level!r}", lambda m, v=level: setattr(m, "routing_level", v), folder)


ATTACKS = {
    "write a file": 'torch.save(edge_vec, "moecalc_attack")',
    "read a file": 'x0 = torch.from_file("/etc/passwd", False, 10)',
    "read an image": 'x0 = ops.image.read_file("/etc/passwd")',
    "print": 'print("hello")',
    "loop": "while True:",
    "call by another name": "x0 = torch",
    "use a class of C++": "x0 = __torch__.torch.classes.profiling.SourceStats()",
    "import": "import os",
    "call what getattr finds": 'x0 = getattr("a", "from_file")',
    "call an expression": "x0 = (torch.add)(1, 2)",
    "call a string": 'x0 = "a"("b")',
    "use a tensor of the constants": "x0 = CONSTANTS.c0",
    "assert": "assert False",
    "lambda": "x0 = lambda y: y",
    "method": 'x0 = ("x").format("y")',
    "spawn": "x0 = torch.fork(self)",
    "random": "x0 = torch.rand([2])",
    "sleep": "x0 = ops.aten.wait(self)",
    "comment": "# type: int",
    "decorator": "@torch.jit.export",
}
SET_STATE = """
  def __setstate__(self: __torch__.moecalc.nn.descriptor.Geometry,
    state: Tensor) -> NoneType:
    while True:
      pass
"""


def _code_alterations(source: Path, rng: np.random.Generator) -> Iterator[Alteration]:
    for name, line in ATTACKS.items():
        call = "\n    x1 = x0(1)" if name == "call what getattr finds" else ""
        yield Alteration(f"code: {name}", lambda p, line=line + call: insert_code(p, line))
    record = "model/code/__torch__/moecalc/nn/descriptor.py"
    for method in ("__setstate__", "__getstate__", "__init__", "__del__"):

        def add(path: Path, method: str = method) -> bytes:
            records = records_of(path)
            records[record] += SET_STATE.replace("__setstate__", method).encode()
            return pack(records)

        yield Alteration(f"code: {method}", add)
    text = b"".join(c for n, c in records_of(source).items() if n.endswith(".py")).decode()
    finals = sorted(set(re.findall(r"  (\w+ : Final\[(?:int|float|bool|str)\] = [^\n]+)\n", text)))
    for line in finals:
        head, _, value = line.partition(" = ")
        if "[bool]" in head:
            changed = ["False" if value == "True" else "True"]
        elif "[int]" in head:
            changed = [str(int(value) + 1), str(10**9), "-1", "0"]
        elif "[float]" in head:
            changed = [repr(float(value) + 0.1), repr(float(value) - 0.1), "-1.0", "0.0", "1e+300"]
        else:
            changed = ['"x"', '""']
        for new in changed:
            yield Alteration(
                f"code: {head} = {new}",
                lambda p, a=line, b=f"{head} = {new}": edit_code(
                    p, lambda t: t.replace(f"  {a}\n", f"  {b}\n")
                ),
            )
    for old, new in (("torch.add(", "torch.sub("), ("torch.matmul", "torch.addmm"), ("torch.sum(", "torch.cumsum("),
                     ("torch.index_select", "torch.select"), ("torch.exp", "torch.neg"), ("self.table", "self.training")):  # fmt: skip
        yield Alteration(
            f"code: {old} -> {new}", lambda p, a=old, b=new: edit_code(p, lambda t: t.replace(a, b))
        )


def _walk(value: object, place: tuple[object, ...] = ()) -> Iterator[tuple[object, ...]]:
    yield place
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, (*place, key))
    elif isinstance(value, list):
        for k, item in enumerate(value[:3]):
            yield from _walk(item, (*place, k))


def _replaced(value: object, place: tuple[object, ...], new: object) -> object:
    if not place:
        return new
    parent = value
    for step in place[:-1]:
        parent = parent[step]  # type: ignore[index]
    parent[place[-1]] = new  # type: ignore[index]
    return value


def _json_alterations(source: Path, rng: np.random.Generator) -> Iterator[Alteration]:
    records = records_of(source)
    values = [float("nan"), float("inf"), 1e308, -1, None, "\x1b]0;owned\x07", [], {}, "x", True, [[1.0]]]
    for record in ("metadata.json", "reference.json"):
        places = list(_walk(json.loads(records[f"model/extra/{record}"])))
        for _ in range(90):
            place = places[int(rng.integers(len(places)))]
            new = values[int(rng.integers(len(values)))]
            yield Alteration(
                f"{record} {place} = {new!r}",
                lambda p, r=record, a=place, b=new: edit_json(p, r, lambda v: _replaced(v, a, b)),
            )
        for text in (
            "",
            "[",
            "[]",
            "{}",
            "null",
            "[" * 100000,
            '{"a": 1, "a": 2}',
            "\ud800".encode("utf-8", "replace").decode(),
        ):
            yield Alteration(
                f"{record} is {text[:20]!r}", lambda p, r=record, t=text: edit_json(p, r, lambda _: t)
            )
    for quantity in ("energy", "forces", "virial", "positions", "cell"):

        def shift(frames: object, q: str = quantity) -> object:
            for frame in frames:  # type: ignore[attr-defined]
                a = np.array(frame[q])
                frame[q] = (a + 1e-3 * len(frame["symbols"])).tolist()
            return frames

        yield Alteration(
            f"reference {quantity} shifted", lambda p, s=shift: edit_json(p, "reference.json", s)
        )


def _file_alterations(source: Path, rng: np.random.Generator) -> Iterator[Alteration]:
    records = records_of(source)
    names = sorted(records)
    yield Alteration("all records deflated", lambda p: pack(records_of(p), zipfile.ZIP_DEFLATED))
    yield Alteration(
        "a zip bomb", lambda p: pack({**records_of(p), "model/data/999": bytes(2**24)}, zipfile.ZIP_DEFLATED)
    )
    for name in ("model/bytecode.pkl", "model/code/__torch__/evil.py", "model/../../x", "/abs", "model/\x1b[31m", "x/y",
                 "model/mobile_debug_handles.pkl", "model/code/x.py", "model/a b", "model/code/__torch__/a.py.debug_pkl"):  # fmt: skip
        yield Alteration(f"with record {name!r}", lambda p, n=name: pack({**records_of(p), n: b"x"}))
    for name in ("model/extra/metadata.json", "model/data.pkl", "model/EXTRA/metadata.json", "model/version"):
        yield Alteration(f"{name} twice", lambda p, n=name: pack([*records_of(p).items(), (n, b"{}")]))
    for name in names:
        if "verification" not in name:
            yield Alteration(
                f"without {name}", lambda p, n=name: pack({k: v for k, v in records_of(p).items() if k != n})
            )
    for _ in range(60):
        name = [n for n in names if "/data/" in n][int(rng.integers(sum("/data/" in n for n in names)))]
        n_bytes = int(rng.choice([-8, -1, 1, 8, 64]))

        def resize(path: Path, name: str = name, n: int = n_bytes) -> bytes:
            changed = records_of(path)
            changed[name] = changed[name] + bytes(n) if n > 0 else changed[name][:n]
            return pack(changed)

        yield Alteration(f"{name} {n_bytes:+d} bytes", resize)
    for record in ("model/data.pkl", "model/constants.pkl"):
        for _ in range(120 if "data" in record else 8):
            at, bit = int(rng.integers(len(records[record]))), int(rng.integers(8))

            def flip(path: Path, record: str = record, at: int = at, bit: int = bit) -> bytes:
                changed = records_of(path)
                body = bytearray(changed[record])
                body[at] ^= 1 << bit
                changed[record] = bytes(body)
                return pack(changed)

            yield Alteration(f"{record} byte {at} bit {bit}", flip)
    for _ in range(60):
        at, bit = int(rng.integers(10**9)), int(rng.integers(8))

        def flip_directory(path: Path, at: int = at, bit: int = bit) -> bytes:
            body = bytearray(path.read_bytes())
            end = body.rindex(END)
            begin = struct.unpack("<I", body[end + 16 : end + 20])[0]
            body[begin + at % (end - begin)] ^= 1 << bit
            return stamp(bytes(body))

        yield Alteration(f"directory byte {at} bit {bit}", flip_directory)


def alterations(source: Path, seed: int, folder: Path) -> list[Alteration]:
    """All alterations of a package, shuffled: any first N of them are a sample of all kinds."""
    rng = np.random.default_rng(seed)
    kinds = [
        list(_module_alterations(source, rng, folder)),
        list(_code_alterations(source, rng)),
        list(_json_alterations(source, rng)),
        list(_file_alterations(source, rng)),
    ]
    for kind in kinds:
        rng.shuffle(kind)  # type: ignore[arg-type]
    mixed: list[Alteration] = []
    longest = max(len(kind) for kind in kinds)
    for k in range(longest):
        mixed += [kind[k] for kind in kinds if k < len(kind)]
    return mixed
