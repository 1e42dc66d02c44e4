"""From a trained checkpoint to a package file, and what a package says of itself."""

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
