"""A package file must not do harm: what is not a genuine package is refused before anything in it runs.

`pytest tests/package/test_package_safety.py --altered 750` takes more altered packages (five times as many
without torch), `--altered-seed N` others.
"""

import json
import os
import random
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from alterations import (
    ATTACKS,
    SET_STATE,
    alterations,
    edit_json,
    edit_model,
    insert_code,
    pack,
    records_of,
    stamp,
)
from helpers import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from moecalc import MoECalculator, _lib, testing, tolerances
from moecalc._jit import jit_load, jit_script
from moecalc.conditions import Conditions
from moecalc.errors import MoecalcError, PackageError, printable
from moecalc.package import check_archive, package_checkpoint, read_metadata, read_reference, verify_package
from moecalc.package.archive import write_archive
from moecalc.package.importers import build_model, load_checkpoint, save_checkpoint
from moecalc.package.lower import lower
from moecalc.package.metadata import Check, Metadata, ReferenceFrame, worst

ELEMENTS = ["Nb", "Mo", "Ta", "W"]
DESCRIPTOR = "model/code/__torch__/moecalc/nn/descriptor.py"


@pytest.fixture(scope="module")
def library():
    return _lib.load()


@pytest.fixture(scope="module")
def genuine(tmp_path_factory):
    """A small package with experts everywhere."""
    folder = tmp_path_factory.mktemp("genuine")
    config = testing.random_config(ELEMENTS, n_routed=4)
    save_checkpoint(folder / "x.pt", testing.random_potential(config), config)
    package_checkpoint(folder / "x.pt", folder / "x.moe.pt")
    return folder / "x.moe.pt"


@pytest.fixture(scope="module")
def whole_package(genuine):
    return records_of(genuine)


@pytest.fixture
def refusal(tmp_path, library):
    """The one line with which every reader refuses a file."""

    def refuse(body):
        path = tmp_path / "altered.moe.pt"
        path.write_bytes(body)
        messages = set()
        for attempt in (
            lambda: MoECalculator(path, device="cpu"),
            lambda: library.Evaluator(str(path)),
        ):
            with pytest.raises((PackageError, library.Error)) as caught:
                attempt()
            messages.add(str(caught.value))
        (message,) = messages
        assert message.startswith(f"{path}: ")
        assert message.isprintable()
        return message.removeprefix(f"{path}: ")

    return refuse


# --- code ------------------------------------------------------------------------------------------

OPTIONS = {
    "experts": {"n_routed": 4},
    "merged": {"n_routed": 4, "kind": "linear"},
    "configuration": {"n_routed": 4, "routing": "configuration"},
    "configuration, other gate": {
        "n_routed": 4, "routing": "configuration", "kind": "linear", "gate": "softmax_topk", "n_shared": 0,
    },
    "sequential": {"n_routed": 3, "sequential_update": True, "a_compress_rate": 0},
    "no angles": {"n_routed": 3, "update_angle": False},
    "one layer": {"nlayers": 1},
    "average": {"update_style": "res_avg", "n_multi_edge_message": 2},
    "increments": {"update_style": "res_incr", "activation_function": "tanh"},
    "static": {
        "use_dynamic_sel": False, "smooth_edge_update": False, "use_exp_switch": False, "edge_init_use_dist": False,
        "a_compress_use_split": False,
    },
    "protection": {"env_protection": 0.1, "edge_init_use_dist": False, "concat_output_tebd": True},
    "relu": {"activation_function": "relu"},
    "relu6": {"activation_function": "relu6"},
    "gelu": {"activation_function": "gelu"},
    "softplus": {"activation_function": "softplus"},
    "sigmoid": {"activation_function": "sigmoid"},
    "charge and spin": {"add_chg_spin_ebd": True, "n_routed": 4},
    "charge, spin and frame parameters, routed": {
        "add_chg_spin_ebd": True, "n_routed": 4, "route_on_charge_spin": True, "concat_output_tebd": True,
        "fitting": {"numb_fparam": 3, "dim_case_embd": 2}, "neuron": (21, 8),
    },
    "charge and spin, configuration": {
        "add_chg_spin_ebd": True, "n_routed": 4, "route_on_charge_spin": True, "routing": "configuration",
    },
    "frame parameters": {"fitting": {"numb_fparam": 2}},
    "frame parameters, skip path": {"fitting": {"numb_fparam": 2}, "neuron": (20, 8)},
    "frame parameters, no hidden layer": {"fitting": {"numb_fparam": 1}, "neuron": ()},
    "residual tables": {"add_chg_spin_ebd": True, "n_dim": 100},
}  # fmt: skip


def models():
    """Lowered models of every checkpoint of the oracle and of every option that changes code."""
    for path in sorted((DATA / "oracle" / "models").glob("*.pt")):
        head = {"D1_multitask": "water_a", "H8_multi_chgspin": "OMat"}.get(path.stem)
        imported = load_checkpoint(path, head)
        yield lower(build_model(imported, torch.float64), imported.config)[0]
    for options in OPTIONS.values():
        config = testing.random_config(ELEMENTS, **options)
        yield lower(testing.random_potential(config), config)[0]
    # fixed charge and spin beside routers that read the bare table
    config = testing.random_config(ELEMENTS, add_chg_spin_ebd=True, n_routed=4, routing="configuration")
    yield lower(testing.random_potential(config), config, fixed=Conditions(1, 2))[0]
    config = testing.random_config(ELEMENTS, neuron=(8, 16, 16))
    fitting = {"dim_case_embd": 2, "resnet_dt": True, "atom_exclude_types": [1]}
    config = config.model_copy(update={"fitting": config.fitting.model_copy(update=fitting)})
    yield lower(testing.random_potential(config), config)[0]


def test_allowed_words_are_those_of_genuine_packages(library, tmp_path):
    path = tmp_path / "x.moe.pt"
    words = set()
    for model in models():
        write_archive(path, jit_script(model), {})
        words |= set(library.words_of_code(str(path)))
    listed = "".join(f"    {json.dumps(word)},\n" for word in sorted(words))
    assert sorted(words) == library.allowed_words(), f"cpp/package/allowed_code.h, expected\n{listed}"


def test_the_shipped_package_may_be_loaded(library):
    library.check_package(str(MoECalculator(device="cpu").path))


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_that_packages_do_not_have_is_refused(refusal, genuine, attack):
    call = "\n    x1 = x0(1)" if attack == "call what getattr finds" else ""
    message = refusal(insert_code(genuine, ATTACKS[attack] + call))
    assert message.startswith("unsafe or edited file (`code/__torch__/moecalc/nn/descriptor.py` has ")
    assert message.endswith("it was not loaded; get the package from its maker")


@pytest.mark.parametrize("activation", ["gelu", "silut:3.0", "softplus"])
def test_a_package_of_any_activation_may_be_loaded(library, tmp_path, activation):
    """torch keeps its version in another record where the code has an operator of a later one."""
    config = testing.random_config(ELEMENTS, activation_function=activation)
    save_checkpoint(tmp_path / "x.pt", testing.random_potential(config), config)
    package_checkpoint(tmp_path / "x.pt", tmp_path / "x.moe.pt")
    assert library.Evaluator(str(tmp_path / "x.moe.pt")).elements == ELEMENTS


def test_two_versions_are_refused(refusal, genuine):
    message = refusal(pack({**records_of(genuine), "model/.data/version": b"10\n"}))
    assert message.startswith("unsafe or edited file (the file has two records `version`, ")


def test_a_loop_at_load_is_refused_before_it_runs(refusal, genuine):
    records = records_of(genuine)
    records[DESCRIPTOR] += SET_STATE.encode()
    assert "`__setstate__`, which would run while it is loaded" in refusal(pack(records))


@pytest.mark.parametrize("what", ["write", "read"])
def test_no_file_is_touched(refusal, genuine, tmp_path, what):
    target = tmp_path / "touched"
    line = (
        f'torch.save(edge_vec, "{target}")'
        if what == "write"
        else f'x0 = torch.from_file("{target}", True, 10)'
    )
    body = insert_code(genuine, line)
    assert ("`torch.save`" if what == "write" else "`torch.from_file`") in refusal(body)
    path = tmp_path / "altered.moe.pt"
    for attempt in (jit_load, verify_package):
        with pytest.raises(PackageError, match="unsafe or edited file"):
            attempt(path)
    assert not target.exists()


def test_a_trainer_loads_nothing_unsafe(library, genuine, tmp_path):
    path = tmp_path / "x.moe.pt"
    path.write_bytes(insert_code(genuine, "import os"))
    with pytest.raises(library.Error, match="unsafe or edited file"):
        library.Trainer(str(path), "float64")


def test_torch_loads_packages_in_one_place_only():
    root = Path(__file__).parents[2]
    loads = []
    for folder, pattern in (
        ("moecalc", "*.py"),
        ("cpp", "*.cpp"),
        ("cpp", "*.h"),
        ("lammps_plugin", "*.cpp"),
    ):
        for path in (root / folder).rglob(pattern):
            text = path.read_text()
            if "torch.jit.load(" in text or "jit::load(" in text:
                loads.append(path.name)
    assert sorted(loads) == ["_jit.py", "package_reader.cpp"]


@pytest.mark.parametrize(
    "name", ["bytecode.pkl", "code/__torch__/evil.py", "code/x.py", "data/x", "attributes.pkl"]
)
def test_records_that_packages_do_not_have_are_refused(refusal, genuine, name):
    message = refusal(pack({**records_of(genuine), f"model/{name}": b"x"}))
    assert f"a record `{name}`, which no package of moecalc has" in message


DEEP = 60_000  # enough for the stack of torch's reader


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("x0 = " + "(" * DEEP + "1" + ")" * DEEP, "a statement of that size"),
        ("x0 = " + "[" * 40 + "1" + "]" * 40, "a statement of that size"),
        ("x0 = " + "-" * DEEP + "1", "a statement of that size"),
        ("x0 = 1" + "+1" * DEEP, "a statement of that size"),
        ("x0 = edge_vec" + "[0]" * DEEP, "a statement of that size"),
        ("x0 = 1" + " if True else 1" * DEEP, "a statement of that size"),
        ("x0 = self" + ".layers" * DEEP, "a name of that length"),
        ("if True:\n" + " " * 100 + "pass", "blocks of that depth"),
        ("\n    ".join(["x0 = 1"] * 200_000), "bytes of code"),
    ],
    ids=["brackets", "lists", "signs", "sums", "items", "choices", "attributes", "blocks", "statements"],
)
def test_code_too_deep_for_torch_is_refused(refusal, genuine, line, what):
    message = refusal(insert_code(genuine, line))
    assert message.startswith("unsafe or edited file (`code/__torch__/moecalc/nn/descriptor.py` has ")
    assert what in message


# --- pickles ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"ctorch\nBoolStorage\n", b"cposix\nsystem\n", "`posix system`, which no package has"),
        (b"ctorch\nBoolStorage\n", b"c__torch__.torch.classes.x\nY\n", "which no package has"),
        (b"ccollections\nOrderedDict\n", b"cbuiltins\neval\n", "`builtins eval`, which no package has"),
        (b"cpu", b"gpu", "a bad storage"),
        (b"X\x09\x00\x00\x00List[str]", b"X\x09\x00\x00\x00List[Any]", "that no package has"),
        (b"\x80\x02", b"\x80\x04", "a protocol other than 2"),
    ],
)
def test_pickles_of_other_things_are_refused(refusal, genuine, old, new, message):
    records = records_of(genuine)
    assert old in records["model/data.pkl"]
    records["model/data.pkl"] = records["model/data.pkl"].replace(old, new, 1)
    assert message in refusal(pack(records))


def test_a_tensor_beyond_its_storage_is_refused(refusal, genuine):
    records = records_of(genuine)
    # sizes (4, 4) of the pair mask
    assert records["model/data.pkl"].count(b"(K\x04K\x04t") >= 1
    records["model/data.pkl"] = records["model/data.pkl"].replace(b"(K\x04K\x04t", b"(K\x04K\x05t", 1)
    assert "a tensor beyond its storage" in refusal(pack(records))


def test_a_storage_of_another_size_is_refused(refusal, genuine):
    records = records_of(genuine)
    records["model/data/0"] = records["model/data/0"][:-1]
    assert "expected 16 numbers of 1 bytes in `data/0`, got 15 bytes" in refusal(pack(records))


# --- the archive -----------------------------------------------------------------------------------


def both_refuse(library, path, body):
    """The refusal of a file by Python and by C++, without the path."""
    path.write_bytes(body)
    with pytest.raises(PackageError) as python:
        check_archive(path)
    with pytest.raises(library.Error) as native:
        library.check_archive(str(path))
    messages = [str(error.value).removeprefix(f"{path}: ") for error in (python, native)]
    assert all(m.isprintable() for m in messages)
    return messages


def test_compressed_records_are_refused(library, genuine, tmp_path):
    bomb = pack({**records_of(genuine), "model/data/999": bytes(10**7)}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 10**6
    for message in both_refuse(library, tmp_path / "x.moe.pt", bomb):
        assert "is compressed" in message


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["extra/metadata.json", "data.pkl", "EXTRA/metadata.json"])
def test_records_that_are_there_twice_are_refused(library, genuine, tmp_path, name):
    body = pack([*records_of(genuine).items(), (f"model/{name}", b"{}")])
    for message in both_refuse(library, tmp_path / "x.moe.pt", body):
        assert f"record 'model/{name}' is there twice" in message


@pytest.mark.parametrize(
    "name", ["model/../x", "/model/x", "model/\x1b[2J", "model/a b", "model//x", "other/x"]
)
def test_odd_names_of_records_are_refused(library, genuine, tmp_path, name):
    for message in both_refuse(library, tmp_path / "x.moe.pt", pack({**records_of(genuine), name: b""})):
        assert "damaged or edited file" in message


def test_no_bit_of_the_end_record_can_flip_unnoticed_in_python(genuine, tmp_path):
    body = genuine.read_bytes()
    path = tmp_path / "x.moe.pt"
    for position in range(body.rindex(b"PK\x05\x06"), len(body)):
        path.write_bytes(body[:position] + bytes([body[position] ^ 4]) + body[position + 1 :])
        with pytest.raises(PackageError, match=r"damaged|incomplete|edited|not a moecalc package"):
            check_archive(path)


def test_python_reads_wide_end_records(genuine, tmp_path):
    from zip64 import with_zip64

    path = tmp_path / "x.moe.pt"
    path.write_bytes(with_zip64(genuine.read_bytes()))
    check_archive(path)
    path.write_bytes(with_zip64(genuine.read_bytes()).replace(b"PK\6\6\x2c", b"PK\6\6\x2d"))
    with pytest.raises(PackageError, match="damaged"):
        check_archive(path)


def test_python_and_the_library_agree_on_edited_directories(library, genuine, tmp_path):
    body, path = genuine.read_bytes(), tmp_path / "x.moe.pt"
    end = body.rindex(b"PK\x05\x06")
    begin = int.from_bytes(body[end + 16 : end + 20], "little")
    for at in np.random.default_rng(4).integers(begin, end, 150):
        path.write_bytes(stamp(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]))
        outcomes = []
        for check, error in ((check_archive, PackageError), (library.check_archive, library.Error)):
            try:
                check(path if error is PackageError else str(path))
                outcomes.append("accepted")
            except error:
                outcomes.append("refused")
        # dates and versions say nothing about what a record holds; Python's reader minds some of them
        assert outcomes[0] == outcomes[1] or outcomes == ["refused", "accepted"], at - begin


def scaled(content):
    """A record of float64 numbers, one of them 1.001 times as large."""
    numbers = np.frombuffer(content).copy()
    numbers[numbers.size // 2] *= 1.001
    return numbers.tobytes()


def largest_tensor(records):
    return max((n for n in records if "/data/" in n), key=lambda n: len(records[n]))


def test_changed_weights_do_not_fit_the_digest(refusal, genuine):
    records = records_of(genuine)
    name = largest_tensor(records)
    records[name] = scaled(records[name])
    message = refusal(pack(records, digest=False))
    pattern = r"edited file \(digest [0-9a-f]{8} of the model's records, expected '[0-9a-f]{8}' of the metadata\): get .*"
    assert re.fullmatch(pattern, message)


def test_changed_weights_do_not_fit_the_directory(library, genuine, tmp_path):
    records, body = records_of(genuine), genuine.read_bytes()
    name = largest_tensor(records)
    altered = stamp(body.replace(records[name], scaled(records[name]), 1))
    assert len(altered) == len(body)
    for message in both_refuse(library, tmp_path / "x.moe.pt", altered):
        assert f"record '{name.partition('/')[2]}' has another checksum" in message.replace("model/", "")


@pytest.mark.parametrize("digest", [7, "", "0" * 8, None])
def test_digests_of_another_form_are_refused(refusal, genuine, digest):
    records = records_of(genuine)
    metadata = json.loads(records["model/extra/metadata.json"]) | {"digest": digest}
    records["model/extra/metadata.json"] = json.dumps(metadata).encode()
    message = refusal(pack(records, digest=False))
    assert "digest" in message or "metadata.json: expected a text" in message


def test_packages_of_older_versions_have_no_digest(library, genuine, tmp_path):
    path = tmp_path / "x.moe.pt"
    path.write_bytes(
        edit_json(genuine, "metadata.json", lambda m: {k: v for k, v in m.items() if k != "digest"})
    )
    library.check_package(str(path))
    assert read_metadata(path).digest == ""


def test_the_shipped_package_has_a_digest():
    assert re.fullmatch("[0-9a-f]{8}", read_metadata(MoECalculator(device="cpu").path).digest)


# --- numbers and texts -----------------------------------------------------------------------------


def test_the_worst_of_deviations_with_nan_is_nan():
    assert worst(0.0, 2.0, 1.0) == 2.0
    assert worst() == 0.0
    assert np.isnan(worst(1.0, float("nan"), 2.0))
    assert np.isnan(worst(float("nan"), 2.0))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2.0])
def test_a_check_fails_beyond_its_tolerance(value):
    assert not Check(name="x", value=value, tolerance=1.0).passed
    assert not Check(name="x", value=0.0, tolerance=float("nan")).passed
    assert not Check(name="x", value=value, tolerance=float("inf")).passed or value == 2.0


@pytest.mark.parametrize("quantity", ["energy", "energies", "forces", "virial", "positions", "cell"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_reference_frames_are_finite(genuine, quantity, value):
    frame = read_reference(genuine)[2].model_dump()
    frame[quantity] = np.full(np.shape(frame[quantity]), value).tolist()
    with pytest.raises(ValueError, match="finite number"):
        ReferenceFrame.model_validate(frame)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbols": []}, "expected at least one atom"),
        ({"forces": [[0.0, 0.0]]}, r"expected forces of shape \(8, 3\)"),
        ({"virial": []}, r"expected virial of shape \(3, 3\)"),
        ({"energies": [1.0]}, "expected 8 energies"),
    ],
)
def test_reference_frames_are_whole(genuine, tmp_path, change, message):
    def edit(frames):
        frames[2].update(change)
        return frames

    path = tmp_path / "x.moe.pt"
    path.write_bytes(edit_json(genuine, "reference.json", edit))
    with pytest.raises(PackageError, match=rf"a reference frame is not whole .*{message}"):
        verify_package(path)


@pytest.mark.parametrize("quantity", ["energy", "forces", "virial"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_verification_does_not_pass_over_numbers_that_are_not_finite(genuine, tmp_path, quantity, value):
    def edit(frames):
        for frame in frames:
            frame[quantity] = np.full(np.shape(frame[quantity]), value).tolist()
        return frames

    path = tmp_path / "x.moe.pt"
    path.write_bytes(edit_json(genuine, "reference.json", edit))
    with pytest.raises(PackageError, match=r"record 'reference\.json' is not JSON .*is no number"):
        verify_package(path)


def test_verification_fails_where_the_model_gives_nan(genuine, monkeypatch):
    from moecalc.package import verify

    real = verify.evaluate_structure

    def broken(*arguments):
        out = real(*arguments)
        out.forces[0, 0] = float("nan")
        return out

    monkeypatch.setattr(verify, "evaluate_structure", broken)
    failed = {check.name.partition(" (")[0] for check in verify_package(genuine).failures()}
    assert failed >= {
        "scripted vs reference",
        "finite-difference forces",
        "rotation",
        "isolated atoms: zero force, finite energy",
    }


def test_a_model_of_nan_is_not_packaged(tmp_path):
    config = testing.random_config(ELEMENTS)
    model = testing.random_potential(config)
    model.layers[1].edge_self_linear.bias.data[0, 0] = np.nan
    save_checkpoint(tmp_path / "x.pt", model, config)
    with pytest.raises(MoecalcError) as error:
        package_checkpoint(tmp_path / "x.pt", tmp_path / "x.moe.pt")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.moe.pt").exists()


@pytest.mark.parametrize("field", ["name", "note", "license", "citation"])
def test_control_characters_are_not_packaged(genuine, tmp_path, field):
    with pytest.raises(
        PackageError, match=rf"{field} 'a\\x1b\[31m', expected text without control characters"
    ):
        package_checkpoint(genuine.with_name("x.pt"), tmp_path / "x.moe.pt", **{field: "a\x1b[31m"})


def test_control_characters_of_metadata_are_refused(refusal, genuine, tmp_path):
    body = edit_json(genuine, "metadata.json", lambda m: {**m, "name": "a\x1b]0;owned\x07"})
    assert "metadata without control characters, got 'a\\x1b]0;owned\\x07' at `name`" in refusal(body)
    with pytest.raises(PackageError, match="expected text without control characters") as error:
        read_metadata(tmp_path / "altered.moe.pt")
    assert str(error.value).isprintable()


def test_text_is_made_printable():
    assert printable("a\x1b[2J\n") == "a\\x1b[2J\\n"
    assert printable("Grüße, 世界") == "Grüße, 世界"
    assert printable("x" * 300) == "x" * 200 + "..."


def test_notes_may_have_lines(genuine):
    assert (
        Metadata.model_validate({**read_metadata(genuine).model_dump(), "note": "a\nb\tc"}).note == "a\nb\tc"
    )


# --- what a package says of itself -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cutoff": 4.6}, "expected the same `cutoff` in model and metadata, got 4.5 and 4.6"),
        ({"angle_cutoff": 3.4}, "expected the same `angle_cutoff`"),
        ({"elements": ["Mo", "Nb", "Ta", "W"]}, "got Nb,Mo,Ta,W and Mo,Nb,Ta,W"),
        ({"dims": {"node": 16, "edge": 6, "angle": 4}}, "expected the same `dims.node`"),
        ({"dtype": "float32"}, "expected dtype float64 in the metadata"),
        ({"n_layers": 2}, "expected the same `n_layers`"),
        ({"trained_elements": ["Xe"]}, "expected `trained_elements` among the elements, got 'Xe'"),
        ({"name": 3}, "expected a text at `.name`, got a number"),
    ],
)
def test_metadata_that_contradict_the_model_are_refused(refusal, genuine, change, message):
    assert message in refusal(edit_json(genuine, "metadata.json", lambda m: {**m, **change}))


def changed(path, **places):
    """The package with other values in architecture.json; `__` goes down in it."""

    def edit(value):
        for place, new in places.items():
            *parents, last = (int(step) if step.isdecimal() else step for step in place.split("__"))
            owner = value
            for step in parents:
                owner = owner[step]
            owner[last] = new
        return value

    return edit_json(path, "architecture.json", edit)


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        ("geometry__e_stop", 4.6, "expected `cutoff` to be that of the switch, 4.6"),
        ("geometry__a_stop", 3.4, "expected `angle_cutoff` to be that of the switch"),
        ("geometry__e_start", 4.5, "expected `geometry.e_start` to be a number in"),
        ("cutoff", 1e9, "expected `cutoff` to be a number in (0, 100]"),
        ("n_dim", 9, "expected `embedding.table.table` to be of shape [4, 9], got [4, 8]"),
        ("e_dim", 2**40, "expected `e_dim` to be an integer in [1, 65536]"),
        ("layers__0__axis", 100000, "expected `layers.0.axis` to be an integer in [1, 6]"),
        ("layers__0__n_head", 2, "expected `layers.0.node_edge_linear.matrix` to be of shape"),
        ("layers__0__phi__kind", "exp", "expected `layers.0.phi.kind` to be a known activation, got 'exp'"),
        ("layers__1__routers", {}, "expected an architecture with `layers.1.routers."),
        ("elements", ["Nb", "Mo", "Ta"], "expected `pair_mask` to be of shape [3, 3], got [4, 4]"),
        ("elements", ["Nb", "Mo", "Ta", "Xx"], "expected `elements` to be element symbols, got 'Xx'"),
        ("layers", [], "expected `layers` to be at least one layer, got none"),
        ("more", 1, "expected `more` to be left out, got a value"),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(refusal, genuine, place, new, message):
    assert message in refusal(changed(genuine, **{place: new}))


def of_tensor(path, name, **changes):
    return edit_model(path, lambda _, tensors, __: tensors[name].update(changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("embedding.edge_matrix", {"shape": [1, 7]}, "within its record of 48 bytes, got [1, 7] from byte 0 on"),
        ("embedding.edge_matrix", {"shape": [6]}, "to be of shape [1, 6], got [6]"),
        ("embedding.edge_matrix", {"shape": [2**32, 2**32]}, "within its record"),
        ("embedding.edge_matrix", {"shape": [-1]}, "to be sizes, whole numbers"),
        ("embedding.edge_matrix", {"offset": 8}, "within its record of 48 bytes, got [1, 6] from byte 8 on"),
        ("embedding.edge_matrix", {"offset": -8}, "to be an integer in [0, "),
        ("embedding.edge_matrix", {"dtype": "float32"}, "to be of type float64, got float32"),
        ("embedding.edge_matrix", {"dtype": "float16"}, "to be float32, float64, int64 or bool"),
        ("embedding.edge_matrix", {"record": "data.pkl"}, "to be a record of the package's data, got 'data.pkl'"),
        ("embedding.edge_matrix", {"record": "data/99999"}, "to be a record of the package's data"),
        ("geometry.mean", {"shape": [0, 4]}, "to be of shape [4, 4], got [0, 4]"),
        ("layers.0.node_self_mlp.matrix", {"shape": [8, 8, 1, 1]}, "to be of shape"),
        ("pair_mask", {"strides": [1]}, "to be left out"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(refusal, genuine, name, changes, message):
    assert message in refusal(of_tensor(genuine, name, **changes))


def test_tensors_that_are_missing_or_too_many_are_refused(refusal, genuine):
    name = "embedding.edge_bias"
    message = refusal(edit_model(genuine, lambda _, tensors, __: tensors.pop(name)))
    assert message == f"expected a model with `{name}`, got one without: package the checkpoint again"
    message = refusal(edit_model(genuine, lambda _, tensors, __: tensors.update(more=tensors[name])))
    assert message.startswith("expected no tensor `more` in this architecture")


def test_layers_in_another_order_are_refused(refusal, genuine):
    """The first layer would read buffers that are sized for the last one."""

    def reverse(architecture, tensors, _):
        last = len(architecture["layers"]) - 1
        architecture["layers"].reverse()
        moved = {}
        for name in [n for n in tensors if n.startswith("layers.")]:
            _, index, rest = name.split(".", 2)
            moved[f"layers.{last - int(index)}.{rest}"] = tensors.pop(name)
        tensors |= moved

    assert "`layers.1.live_edge` to be true in the layer before, got false" in refusal(
        edit_model(genuine, reverse)
    )


def test_tensors_that_share_a_record_are_refused(refusal, genuine):
    """A small file would say that it is a large one."""

    def share(_, tensors, __):
        largest = max(tensors.values(), key=lambda entry: np.prod(entry["shape"]))
        tensors |= {f"more.{k}": largest for k in range(3000)}

    assert "records that many share" in refusal(edit_model(genuine, share))


def test_reference_frames_that_would_take_long_are_refused(genuine, tmp_path):
    n, cell = 1000, 0.8

    def enlarge(frames):
        frame = frames[2]
        frame.update(
            symbols=frame["symbols"][:1] * n, positions=[[0.0, 0.0, cell * i / n] for i in range(n)],
            cell=(np.eye(3) * cell).tolist(), pbc=[True, True, True], energies=[0.0] * n, forces=[[0.0] * 3] * n,
        )  # fmt: skip
        return [frame]

    path = tmp_path / "x.moe.pt"
    path.write_bytes(edit_json(genuine, "reference.json", enlarge))
    with pytest.raises(PackageError, match="too many images"):
        MoECalculator(path)


@pytest.mark.parametrize("record", ["architecture.json", "tensors.json"])
def test_the_digest_covers_what_is_said_of_the_model(refusal, genuine, record):
    records = records_of(genuine)
    records[f"model/extra/{record}"] += b" "
    assert re.match(
        r"edited file \(digest [0-9a-f]{8} of the model's records", refusal(pack(records, digest=False))
    )


@pytest.mark.parametrize("record", ["architecture.json", "tensors.json"])
def test_a_package_without_its_records_is_to_be_upgraded(refusal, genuine, record):
    records = records_of(genuine)
    del records[f"model/extra/{record}"]
    assert "moecalc upgrade" in refusal(pack(records))


@settings(max_examples=100, deadline=None, print_blob=True)
@given(seed=st.integers(0, 2**63 - 1))
def test_edited_bytes_are_refused_or_read(library, whole_package, tmp_path_factory, seed):
    """New files in every run; hypothesis prints the seed. Memory errors show under the sanitizers."""
    chosen = random.Random(seed)
    name = chosen.choice(sorted(whole_package))
    content = bytearray(whole_package[name])
    for _ in range(chosen.randint(1, 4)):
        place = chosen.randint(0, len(content))
        content[place : place + chosen.randint(0, 3)] = chosen.randbytes(chosen.randint(0, 4))
    path = tmp_path_factory.mktemp("edited") / "x.moe.pt"
    path.write_bytes(pack({**whole_package, name: bytes(content)}))
    message = ""
    try:
        library.Evaluator(str(path)).check_reference()
    except library.Error as error:
        message = str(error)
    assert "\n" not in message
    assert all(c.isprintable() for c in message)
    path.unlink()


# --- altered packages --------------------------------------------------------------------------------


def deviation(result, genuine):
    found = []
    for energy, expected, forces, wanted in zip(
        result["energies"], genuine["energies"], result["forces"], genuine["forces"], strict=True
    ):
        f, w = np.array(forces), np.array(wanted)
        found += [abs(energy - expected) / (len(f) / 3), np.abs(f - w).max() / max(1.0, np.abs(w).max())]
    return worst(*found)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("backend", ["", "torchscript"])
def test_altered_packages_are_refused_or_answer_the_same(genuine, tmp_path, request, backend):
    n, seed = request.config.getoption("--altered"), request.config.getoption("--altered-seed")
    chosen = alterations(genuine, seed)[: n if backend else 5 * n]
    names = {}
    for k, alteration in enumerate(chosen):
        path = tmp_path / f"a{k}.moe.pt"
        path.write_bytes(alteration.make(genuine))
        names[str(path)] = alteration.name
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("run_altered.py")), str(genuine), *names],
        env={**os.environ, "MOECALC_BACKEND": backend, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    results = {r["file"]: r for r in map(json.loads, done.stdout.splitlines())}
    missing = [name for path, name in names.items() if path not in results]
    assert not missing, (
        f"seed {seed}: {missing[0]} ended the process with {done.returncode}: {done.stderr[-500:]}"
    )
    unaltered = results.pop(str(genuine))
    for path, result in results.items():
        name = names[path]
        if result["outcome"] == "answered":
            assert deviation(result, unaltered) <= tolerances.REFERENCE["float64"], f"seed {seed}: {name}"
        else:
            assert result["outcome"] == "refused", f"{name}: {result['message']}"
            assert result["message"].startswith(path), f"{name}: {result['message']}"
            assert result["message"].isprintable(), name
