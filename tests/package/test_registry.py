"""Checkpoints by the names of DeePMD-kit's registry, with a stand-in for DeePMD-kit."""

import hashlib
import shutil
import sys
import types

import pytest
from helpers import DATA

from moecalc.errors import CheckpointError
from moecalc.package import package_checkpoint
from moecalc.package.importers.registry import resolve_checkpoint

SOURCE = DATA / "oracle" / "models" / "A_dyn.pt"
NAME = "DPA-9.9-1K"


def silent(_):
    pass


@pytest.fixture
def deepmd(monkeypatch, tmp_path):
    """A DeePMD-kit whose registry has one model; the download copies a file into its cache."""
    registry, download = (types.ModuleType(f"deepmd.pretrained.{n}") for n in ("registry", "download"))
    entry = {
        "filename": f"{NAME}.pt",
        "sha256": hashlib.sha256(SOURCE.read_bytes()).hexdigest(),
        "urls": ["https://example.org/x.pt"],
    }
    registry.MODEL_REGISTRY = {NAME: entry, "DPA-1.0-2M": dict(entry)}
    download.calls = []

    def resolve_model_path(name):
        download.calls.append(name)
        (tmp_path / "cache").mkdir(exist_ok=True)
        return shutil.copy(SOURCE, tmp_path / "cache" / f"{name}.pt")

    download.resolve_model_path = resolve_model_path
    packages = {
        "deepmd": types.ModuleType("deepmd"),
        "deepmd.pretrained": types.ModuleType("deepmd.pretrained"),
    }
    packages |= {"deepmd.pretrained.registry": registry, "deepmd.pretrained.download": download}
    for name, module in packages.items():
        if not name.endswith(("registry", "download")):
            module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    return types.SimpleNamespace(registry=registry.MODEL_REGISTRY, download=download)


def test_a_name_of_the_registry_is_packaged(deepmd, tmp_path):
    said = []
    report = package_checkpoint(NAME, tmp_path / "x.moe.pt", progress=said.append)
    assert report.metadata.source.file == f"{NAME}.pt"
    assert f"checkpoint {NAME} of DeePMD-kit's registry" in report.metadata.remarks
    assert said[0] == f"asking DeePMD-kit for {NAME}"


def test_an_existing_file_of_that_name_comes_first(deepmd, tmp_path):
    shutil.copy(SOURCE, tmp_path / NAME)
    assert str(resolve_checkpoint(NAME, silent)[0]) == NAME
    assert deepmd.download.calls == []


@pytest.mark.parametrize("name", ["./DPA-9.9-1K", "DPA-9.9-1K.pt", "model.ckpt-1000.pt", "models/DPA-9.9-1K"])
def test_paths_are_not_looked_up(deepmd, name):
    resolve_checkpoint(name, silent)
    assert deepmd.download.calls == []


def test_an_unknown_name_lists_the_registry(deepmd):
    with pytest.raises(CheckpointError, match=r"DPA-7\.7-7M: .*expected one of: DPA-1\.0-2M, DPA-9\.9-1K"):
        resolve_checkpoint("DPA-7.7-7M", silent)


def test_another_checksum_is_refused(deepmd):
    deepmd.registry[NAME]["sha256"] = "0" * 64
    with pytest.raises(
        CheckpointError, match=r"DPA-9\.9-1K\.pt: sha256 [0-9a-f]{64} is not that of .*expected 0{64}"
    ):
        resolve_checkpoint(NAME, silent)


def test_an_entry_without_checksum_is_refused(deepmd):
    del deepmd.registry[NAME]["sha256"]
    with pytest.raises(CheckpointError, match="registry has no sha256 of it"):
        resolve_checkpoint(NAME, silent)


def test_without_a_network_the_remedy_is_named(deepmd):
    def fail(name):
        raise RuntimeError(f"Failed to download model '{name}' from all sources")

    deepmd.download.resolve_model_path = fail
    with pytest.raises(CheckpointError, match=r"from all sources.*dp pretrained download DPA-9\.9-1K"):
        resolve_checkpoint(NAME, silent)


def test_without_deepmd_kit_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [])
    for name in [n for n in sys.modules if n == "deepmd" or n.startswith("deepmd.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        CheckpointError, match=r"DeePMD-kit, which is not installed: install deepmd-kit 3\.2\.0"
    ):
        resolve_checkpoint(NAME, silent)


def test_an_older_deepmd_kit_is_told_apart(deepmd, monkeypatch):
    for name in ("deepmd.pretrained", "deepmd.pretrained.registry", "deepmd.pretrained.download"):
        monkeypatch.delitem(sys.modules, name)
    sys.modules["deepmd"].__path__ = []
    with pytest.raises(
        CheckpointError, match=r"has no registry of pretrained models \(no module deepmd\.pretrained\)"
    ):
        resolve_checkpoint(NAME, silent)
