"""From a trained checkpoint to a package file, and what a package says of itself."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moecalc.package.archive import check_archive, read_metadata, read_reference, read_verification
    from moecalc.package.build import package_checkpoint
    from moecalc.package.metadata import Metadata, PackageReport, VerificationReport
    from moecalc.package.verify import verify_package

__all__ = [
    "Metadata",
    "PackageReport",
    "VerificationReport",
    "check_archive",
    "package_checkpoint",
    "read_metadata",
    "read_reference",
    "read_verification",
    "verify_package",
]

# reading metadata needs no torch, which takes seconds to import
_MODULES = {
    "Metadata": "metadata",
    "PackageReport": "metadata",
    "VerificationReport": "metadata",
    "package_checkpoint": "build",
    "verify_package": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"moecalc.package.{_MODULES.get(name, 'archive')}"), name)
    globals()[name] = value
    return value
