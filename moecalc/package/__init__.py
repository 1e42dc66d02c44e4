"""From a trained checkpoint to a package file, and what a package says of itself."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moecalc._extras import need_torch

if TYPE_CHECKING:
    from moecalc.package.architecture import Architecture
    from moecalc.package.archive import (
        check_archive,
        read_architecture,
        read_metadata,
        read_reference,
        read_verification,
    )
    from moecalc.package.build import package_checkpoint
    from moecalc.package.metadata import Metadata, PackageReport, VerificationReport
    from moecalc.package.upgrade import upgrade_package
    from moecalc.package.verify import verify_package

__all__ = [
    "Architecture",
    "Metadata",
    "PackageReport",
    "VerificationReport",
    "check_archive",
    "package_checkpoint",
    "read_architecture",
    "read_metadata",
    "read_reference",
    "read_verification",
    "upgrade_package",
    "verify_package",
]

# reading needs no torch, which takes seconds to import and may not be installed
_MODULES = {
    "Architecture": "architecture",
    "Metadata": "metadata",
    "PackageReport": "metadata",
    "VerificationReport": "metadata",
    "package_checkpoint": "build",
    "upgrade_package": "upgrade",
    "verify_package": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "archive")
    if module in {"build", "upgrade", "verify"}:
        need_torch(name)
    value = getattr(import_module(f"moecalc.package.{module}"), name)
    globals()[name] = value
    return value
