"""From a trained checkpoint to a package file, and what a package says of itself."""

from typing import TYPE_CHECKING, Any

from moecalc._extras import need_torch
from moecalc._lazy import lazy_names

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
_WITH_TORCH = {
    "package_checkpoint": "moecalc.package.build",
    "upgrade_package": "moecalc.package.upgrade",
    "verify_package": "moecalc.package.verify",
}
_load = lazy_names(
    __name__,
    {
        "Architecture": "moecalc.package.architecture",
        "Metadata": "moecalc.package.metadata",
        "PackageReport": "moecalc.package.metadata",
        "VerificationReport": "moecalc.package.metadata",
        "check_archive": "moecalc.package.archive",
        "read_architecture": "moecalc.package.archive",
        "read_metadata": "moecalc.package.archive",
        "read_reference": "moecalc.package.archive",
        "read_verification": "moecalc.package.archive",
        **_WITH_TORCH,
    },
)


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        need_torch(name)
    return _load(name)
