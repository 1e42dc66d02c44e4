"""Altered packages with a right integrity stamp: what a careless or hostile hand could make of a genuine one.

Every alteration has a name and comes from a generator that is determined by its seed, so that a failure is repeated by
its seed and name.
"""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moecalc.package.archive import digest_of

Records = dict[str, bytes]
END = b"PK\x05\x06"
MODEL = ("model/extra/architecture.json", "model/extra/tensors.json")


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


def edit_model(path: Path, change: Callable[[dict, dict, Records], None]) -> bytes:
    """The package after `change(architecture, tensors, records)`, which changes what it is given in place."""
    records = records_of(path)
    architecture, tensors = (json.loads(records[name]) for name in MODEL)
    change(architecture, tensors, records)
    for name, value in zip(MODEL, (architecture, tensors), strict=True):
        records[name] = json.dumps(value).encode()
    return pack(records)


def array_of(records: Records, entry: dict) -> np.ndarray:
    """Numbers of an entry of tensors.json."""
    content = records[f"model/{entry['record']}"]
    count = math.prod(entry["shape"])
    return np.frombuffer(content, entry["dtype"], count, entry["offset"]).reshape(entry["shape"]).copy()


def put_array(records: Records, entry: dict, values: np.ndarray) -> None:
    """Other numbers for a tensor: its record and what is said of it fit each other again."""
    records[f"model/{entry['record']}"] = np.ascontiguousarray(values).tobytes()
    entry |= {"dtype": str(values.dtype), "shape": list(values.shape), "offset": 0}


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


def _of_model(name: str, change: Callable[[dict, dict, Records], None]) -> Alteration:
    return Alteration(name, lambda path: edit_model(path, change))


# --- tensors -----------------------------------------------------------------------------------------


def _values(name: str, what: str, change: Callable[[np.ndarray], np.ndarray]) -> Alteration:
    """Other numbers, shape or type of a tensor, in the record and in tensors.json alike."""

    def apply(_: dict, tensors: dict, records: Records) -> None:
        put_array(records, tensors[name], change(array_of(records, tensors[name])))

    return _of_model(f"{name} {what}", apply)


def _entry(name: str, what: str, change: Callable[[dict], None]) -> Alteration:
    """Another entry of tensors.json, about the numbers that are there."""
    return _of_model(f"tensors.json {name} {what}", lambda _, tensors, __: change(tensors[name]))


def _set_one(value: float, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    place = int(rng.integers(2**31))

    def change(t: np.ndarray) -> np.ndarray:
        if t.size:
            t.reshape(-1)[place % t.size] = value
        return t

    return change


def _permuted(seed: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda t: np.random.default_rng(seed).permutation(t) if t.ndim else t


_SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "longer": lambda t: np.concatenate([t, t]) if t.ndim else np.full(7, t),
    "much longer": lambda t: np.concatenate([t] * 50) if t.ndim else np.full(1000, t),
    "wider": lambda t: np.concatenate([t, t], -1) if t.ndim else np.full((2, 2), t),
    "shorter": lambda t: t[:-1] if t.ndim else t.reshape(1),
    "empty": lambda t: t.reshape(-1)[:0],
    "empty rows": lambda t: t[..., :0] if t.ndim else t.reshape(1)[:0],
    "transposed": lambda t: t.swapaxes(0, -1) if t.ndim > 1 else t.reshape(1, -1),
    "of one more dimension": lambda t: t[None],
    "of four dimensions": lambda t: t.reshape(1, 1, 1, -1),
    "of nine dimensions": lambda t: t.reshape([1] * 8 + [-1]),
    "flat": lambda t: t.reshape(-1) if t.ndim != 1 else t.reshape(-1, 1),
}
_DTYPES = ("float16", "float32", "float64", "int64", "int32", "complex64", "bool")
_ODD: dict[str, list[Any]] = {
    "shape": [
        [], [-1], [0], [2**62, 4], [2**32, 2**32], [2**31, 2**31, 4], [1e308, 1e308], [0.5], ["4"], [None], [[4]], {}, "4", None,
        [1] * 100, [2**63], [float("nan")], [float("inf")], 4, [True], [2**40, 0], [-(2**63), 2],
    ],
    "offset": [-1, 1, 8, 64, 2**31, 2**40, 2**53, 2**63, 2**64, 1e308, 0.5, "0", None, [], float("nan"), float("inf"), True, -(2**63)],
    "dtype": ["float16", "bfloat16", "float", "int32", "complex64", "", "x", "\x1b[2J", None, 3, [], "float64 ", "Float64"],
    "record": [
        "data/999999", "data.pkl", "constants.pkl", "extra/metadata.json", "extra/reference.json", "data/", "data/../data/0", "", "/", "byteorder",
        "data/0\x00", "model/data/0", "\x1b[2J", None, 0, [], "data/" + "9" * 300, "format_version",
    ],
}  # fmt: skip
"""What no entry of tensors.json says."""


def _tensor_alterations(source: Path, rng: np.random.Generator) -> Iterator[Alteration]:
    tensors = json.loads(records_of(source)[MODEL[1]])
    names = list(tensors)
    for name, entry in tensors.items():
        if entry["dtype"].startswith("float"):
            for factor in (1.05, 1.1, -1.0):
                yield _values(name, f"x {factor}", lambda t, f=factor: t * np.asarray(f, t.dtype))
            for value in (float("nan"), float("inf"), -float("inf"), 1e300, 5e-324):
                yield _values(name, f"with {value}", _set_one(value, rng))
        yield _values(name, "in another order", _permuted(int(rng.integers(2**31))))
        for what, change in _SHAPES.items():
            yield _values(name, what, change)
        for dtype in _DTYPES:
            yield _values(name, f"as {dtype}", lambda t, d=dtype: t.astype(d))
        if name.endswith(".ids"):
            for shift in (1, -1, 1000, -(2**40), 2**40):
                yield _values(name, f"+ {shift}", lambda t, s=shift: t + s)
        if name == "pair_mask":
            yield _values(name, "one way only", _set_one(0, rng))
            yield _of_model(
                "pair_mask of twos",
                lambda _, t, r: r.update({f"model/{t['pair_mask']['record']}": b"\x02" * 16}),
            )
        other = names[int(rng.integers(len(names)))]
        yield _of_model(
            f"records of {name} and {other} swapped", lambda _, t, __, a=name, b=other: _swap(t, a, b)
        )
        for key, odd in _ODD.items():
            for k in rng.choice(len(odd), 6, replace=False):
                yield _entry(name, f"{key} {odd[k]!r}"[:80], lambda e, key=key, v=odd[k]: e.update({key: v}))
            yield _entry(name, f"without {key}", lambda e, key=key: e.pop(key))
        for dtype in ("float32", "float64", "int64", "bool"):
            yield _entry(name, f"said to be {dtype}", lambda e, d=dtype: e.update(dtype=d))
        yield _entry(name, "with a stride", lambda e: e.update(stride=[1]))
        yield _entry(name, "with rows exchanged", lambda e: e["shape"].reverse())
        yield _of_model(f"tensors.json without {name}", lambda _, t, __, n=name: t.pop(n))
        yield _of_model(f"tensors.json {name} twice", lambda _, t, __, n=name: t.update({n + "_": t[n]}))
        for value in (None, [], 3, "x", {}):
            yield _of_model(
                f"tensors.json {name} = {value!r}", lambda _, t, __, n=name, v=value: t.update({n: v})
            )
    for text in _TEXTS:
        yield Alteration(
            f"tensors.json is {text[:20]!r}", lambda p, t=text: edit_json(p, "tensors.json", lambda _: t)
        )
    yield Alteration(
        "tensors.json reversed", lambda p: edit_json(p, "tensors.json", lambda v: dict(reversed(v.items())))
    )


def _swap(tensors: dict, one: str, other: str) -> None:
    tensors[one]["record"], tensors[other]["record"] = tensors[other]["record"], tensors[one]["record"]


# --- architecture --------------------------------------------------------------------------------------

_TEXTS = (
    "",
    "[",
    "[]",
    "{}",
    "null",
    "[" * 100000,
    '{"a": 1, "a": 2}',
    '{"\\ud800": 1}',
    "{} {}",
    "\ufeff{}",
)


def _others(value: object) -> list[Any]:
    """What might stand in the place of a value of architecture.json."""
    others: list[Any] = [
        None,
        [],
        {},
        "x",
        -1,
        0,
        1e308,
        float("nan"),
        float("inf"),
        2**31,
        2**53 + 1,
        2**64,
        True,
        [[1.0]],
    ]
    if isinstance(value, bool):
        return [not value, not value, int(value), str(value), None]
    if isinstance(value, int):
        return [*others, value + 1, value - 1, value * 2, value + 0.5, str(value), 10**9, 65536, 4096]
    if isinstance(value, float):
        return [*others, value + 0.1, value - 0.1, value * 1.01, -value, 1e9, 5e-324, str(value)]
    if isinstance(value, str):
        return [*others, value + "x", value.upper(), "", "\x1b[2J", "silu", "tanh", "softplus", "relu", "element", "configuration",
                "float32", "float64", "table", "gate"]  # fmt: skip
    if value is None:
        return others[1:]
    if isinstance(value, list):
        return [
            *others,
            value[::-1],
            value[:-1],
            value + value,
            value[1:] + value[:1],
            value * 100,
            dict(enumerate(map(str, value))),
        ]
    return [*others, dict(list(value.items())[1:]), value | {"x": 1}, list(value), dict.fromkeys(value)]  # type: ignore[attr-defined]


def _architecture_alterations(source: Path, rng: np.random.Generator) -> Iterator[Alteration]:
    records = records_of(source)
    original = json.loads(records[MODEL[0]])
    for place in _walk(original):
        value = _at(original, place)
        others = _others(value)
        # every place at least thrice, booleans and numbers with all that is near them
        for k in rng.choice(len(others), min(len(others), 3), replace=False):
            yield Alteration(
                f"architecture.json {place} = {others[k]!r}"[:120],
                lambda p, a=place, v=others[k]: edit_json(
                    p, "architecture.json", lambda all_: _replaced(all_, a, v)
                ),
            )
        if place and rng.random() < 0.3:
            yield Alteration(
                f"architecture.json without {place}",
                lambda p, a=place: edit_json(p, "architecture.json", lambda all_: _without(all_, a)),
            )
    for attribute in ("cutoff", "angle_cutoff"):
        switch = "e_stop" if attribute == "cutoff" else "a_stop"
        for change in (0.1, -0.1, 1e9, -10.0, 1e-300):

            def move(
                a: dict, _: dict, r: Records, n: str = attribute, s: str = switch, c: float = change
            ) -> None:
                a[n] += c
                a["geometry"][s] = a[n]
                _say(r, {n: a[n]})

            yield _of_model(f"{attribute} + {change} everywhere", move)
    elements = original["elements"]
    for new in (elements[::-1], [*elements[1:], elements[0]], elements[:-1], [*elements, "Xe"], [], ["Xx"] * len(elements),
                [elements[0]] * len(elements), ["\x1b[2J", *elements[1:]], [*elements[:-1], "Xe"], ["H"] * 10**5):  # fmt: skip

        def rename(a: dict, _: dict, r: Records, e: list[str] = new) -> None:
            a["elements"] = e
            _say(r, {"elements": e, "trained_elements": e})

        yield _of_model(f"elements {new!r} everywhere"[:120], rename)
    for n in (0, 1, 2, 4, 100, 10**4):
        yield _of_model(
            f"{n} layers",
            lambda a, _, r, n=n: (a.update(layers=(a["layers"] * n)[:n]), _say(r, {"n_layers": n})),
        )
    for what, width in (("n_dim", "node"), ("e_dim", "edge"), ("a_dim", "angle")):
        for value in (1, 2, 3, 5, 16, 65536, 10**9, 2**62):
            yield _of_model(
                f"{what} {value} everywhere",
                lambda a, _, r, w=what, d=width, v=value: (
                    a.update({w: v}),
                    _say(r, {"dims": {**_said(r)["dims"], d: v}}),
                ),
            )
    for value in ("float32", "float64"):
        yield _of_model(
            f"dtype {value} everywhere", lambda a, _, r, v=value: (a.update(dtype=v), _say(r, {"dtype": v}))
        )
    names = list(original["layers"][0]["positions"])
    for _ in range(20):
        one, other = rng.choice(names, 2, replace=False)
        index = int(rng.integers(len(original["layers"])))

        def exchange(a: dict, t: dict, r: Records, k: int = index, x: str = one, y: str = other) -> None:
            positions = a["layers"][k]["positions"]
            if x in positions and y in positions:
                positions[x], positions[y] = positions[y], positions[x]

        yield _of_model(f"positions {one} and {other} of layer {index} exchanged", exchange)
    for text in _TEXTS:
        yield Alteration(
            f"architecture.json is {text[:20]!r}",
            lambda p, t=text: edit_json(p, "architecture.json", lambda _: t),
        )


def _said(records: Records) -> dict:
    return json.loads(records["model/extra/metadata.json"])


def _say(records: Records, change: dict) -> None:
    """Let the metadata say what the architecture says."""
    records["model/extra/metadata.json"] = json.dumps(_said(records) | change, indent=1).encode()


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


def _at(value: object, place: tuple[object, ...]) -> object:
    for step in place:
        value = value[step]  # type: ignore[index]
    return value


def _without(value: object, place: tuple[object, ...]) -> object:
    del _at(value, place[:-1])[place[-1]]  # type: ignore[attr-defined]
    return value


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
        for text in _TEXTS:
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


def alterations(source: Path, seed: int, folder: Path | None = None) -> list[Alteration]:
    """All alterations of a package, shuffled: any first N of them are a sample of all kinds."""
    rng = np.random.default_rng(seed)
    kinds = [
        list(_tensor_alterations(source, rng)),
        list(_architecture_alterations(source, rng)),
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
