"""The C++ runtime tells a missing, cut, damaged, foreign and newer package apart, each in one line."""

import json
import re
import zipfile

import pytest
import torch
from alterations import END, stamp
from torch import Tensor, nn
from zip64 import with_zip64

from moecalc import _lib

METADATA = {"name": "identity"}


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def archive(folder, version="1", *, stamped=True, rewrite=True):
    """A TorchScript archive with our records: torch compresses and writes zip64, Python's zipfile does not."""
    path = folder / "raw.pt"
    records = {"format_version": version, "metadata.json": json.dumps(METADATA)}
    torch.jit.save(torch.jit.script(Identity()), str(path), _extra_files=records)
    if rewrite:
        with zipfile.ZipFile(path) as source:
            content = {name: source.read(name) for name in source.namelist()}
        with zipfile.ZipFile(path, "w") as target:
            for name, data in content.items():
                target.writestr(name, data)
    body = path.read_bytes()
    return stamp(body) if stamped else body


@pytest.fixture(scope="module")
def library():
    return _lib.load()


@pytest.fixture(params=[False, True], ids=["torch", "zipfile"])
def body(request, tmp_path):
    return archive(tmp_path, rewrite=request.param)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.moe.pt"


def refusal(library, path, body=None):
    """The one-line message with which the library refuses a file, the same from every entry point."""
    if body is not None:
        path.write_bytes(body)
    messages = set()
    for attempt in (
        lambda: library.check_archive(str(path)),
        lambda: library.read_record(str(path), "extra/metadata.json"),
        lambda: library.Evaluator(str(path)),
    ):
        with pytest.raises(library.Error) as caught:
            attempt()
        messages.add(str(caught.value))
    (message,) = messages
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_wide_end_records_are_read(library, path, tmp_path):
    path.write_bytes(with_zip64(archive(tmp_path)))
    library.check_archive(str(path))
    assert json.loads(library.read_record(str(path), "extra/metadata.json")) == METADATA


def test_records_that_torch_compressed_are_refused(library, path, tmp_path):
    message = refusal(library, path, archive(tmp_path, rewrite=False))
    assert re.fullmatch(r"damaged or edited file \(record '.*' is compressed\): copy it again .*", message)


def test_intact_package_is_accepted_and_its_records_read(library, path, tmp_path):
    path.write_bytes(archive(tmp_path))
    library.check_archive(str(path))
    assert json.loads(library.read_record(str(path), "extra/metadata.json")) == METADATA
    with pytest.raises(library.Error, match="has no record `extra/nothing`"):
        library.read_record(str(path), "extra/nothing")


@pytest.mark.parametrize("shift", range(0, 80, 16))
def test_checksums_of_bodies_of_any_length_are_those_of_zlib(library, path, tmp_path, shift):
    body = archive(tmp_path)
    for n in range(shift, shift + 16):
        path.write_bytes(body)
        with zipfile.ZipFile(path, "a") as more:
            more.writestr("raw/extra/pad", bytes(range(n)))
        path.write_bytes(stamp(path.read_bytes()))
        library.check_archive(str(path))


def test_missing_file(library, path):
    assert refusal(library, path) == "no such file"
    assert refusal(library, path / "below") == "no such file"


def test_folder_is_foreign(library, path):
    path.mkdir()
    assert refusal(library, path).startswith("not a moecalc package")


def test_truncated_file(library, path, body):
    incomplete = "incomplete file (truncated copy?): copy it again or package the checkpoint again"
    for length in (8, len(body) // 2, body.rindex(END), body.rindex(END) + 10, len(body) - 1):
        assert refusal(library, path, body[:length]) == incomplete


def test_file_with_a_hole_in_the_middle_is_incomplete(library, path, body):
    assert refusal(library, path, body[:100] + body[200:]).startswith("incomplete file")


def test_flipped_bit(library, path, body):
    end = body.rindex(END)
    pattern = r"damaged file \(checksum [0-9a-f]{8}, expected [0-9a-f]{8}\): copy it again or package again"
    for position in (0, 5, end // 3, end // 2, end - 1):
        damaged = bytearray(body)
        damaged[position] ^= 0x10
        assert re.fullmatch(pattern, refusal(library, path, bytes(damaged)))


def test_no_bit_of_the_end_record_can_flip_unnoticed(library, path, body):
    for position in range(body.rindex(END), len(body)):
        for bit in range(8):
            damaged = bytearray(body)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(library.Error, match=r"damaged file|incomplete file"):
                library.check_archive(str(path))


def test_bytes_after_the_end_are_damage(library, path, body):
    assert refusal(library, path, body + b"\n").startswith("damaged file")


@pytest.mark.parametrize("content", [b"hello", b"\x80\x02}q\x00." * 100, b"\x00" * 5000])
def test_file_that_is_no_zip_is_foreign(library, path, content):
    message = refusal(library, path, content)
    assert message == "not a moecalc package; make one with `moecalc package CHECKPOINT -o MODEL.moe.pt`"


def test_an_empty_file_is_called_empty(library, path):
    assert refusal(library, path, b"").startswith("not a moecalc package but an empty file")


def test_other_zip_files_are_foreign(library, path, tmp_path):
    with zipfile.ZipFile(path, "w") as target:
        target.writestr("a.txt", "hello")
        target.comment = b"somebody's comment"
    assert refusal(library, path).startswith("not a moecalc package")
    torch.save({"model": {}}, path)
    assert refusal(library, path).startswith("not a moecalc package")
    assert refusal(library, path, archive(tmp_path, stamped=False)).startswith("not a moecalc package")


@pytest.mark.parametrize("version", ["3", "17\n"])
def test_newer_format_names_the_upgrade(library, path, tmp_path, version):
    message = refusal(library, path, archive(tmp_path, version))
    assert re.fullmatch(
        rf"package format {version.strip()} is newer than this moecalc \(\d+\.\d+\.\d+\) reads \(2\): "
        r"upgrade moecalc",
        message,
    )


def test_unreadable_format_version(library, path, tmp_path):
    message = refusal(library, path, archive(tmp_path, "one"))
    assert message.startswith("expected a positive integer in `extra/format_version`, got 'one'")


def test_archive_without_a_model_of_ours(library, path, tmp_path):
    path.write_bytes(archive(tmp_path))
    with pytest.raises(library.Error, match=r"has a record `.*`, which no package of moecalc has"):
        library.Evaluator(str(path))
